"""What the benchmark of GPT-2 on a GPU counts."""

import pytest

for library in ("torch", "transformers"):
    pytest.importorskip(library)

from benchmarks.gpu_gpt import GpuGpt, report

SMALL = GpuGpt(batch_size=2, length=64, vocab_size=128, depth=2)


def test_the_flops_of_a_step_are_those_of_the_formula():
    """Of a token six for each weight in a product, and twelve for each width and position of the attention in each block (Chowdhery et al. 2022, appendix B)."""
    width, depth = 768, SMALL.depth
    weights = depth * 12 * width**2 + width * SMALL.vocab_size
    assert SMALL.flops() == 2 * 64 * (6 * weights + 12 * depth * width * 64)


def test_shares_are_of_the_peak_of_the_chip():
    found = report(SMALL, {"jaxdl": [0.2, 0.1, 0.3], "torch": [0.4, 0.4, 0.4]}, "NVIDIA H100 80GB HBM3")
    assert found["jaxdl"]["tokens_per_second"] == 2 * 64 / 0.2 and found["torch / jaxdl"] == 2.0
    assert found["torch"]["share_of_bf16_peak"] == SMALL.flops() / 0.4 / 989e12
    assert report(SMALL, {"jaxdl": [1.0], "torch": [1.0]}, "cpu")["jaxdl"]["share_of_bf16_peak"] is None
