"""Generation with a cache, in one compiled loop: sampling, greedy decoding and beam search."""

from jaxdl.generate.beam import Beam, beam_search
from jaxdl.generate.loop import generate
from jaxdl.generate.prompts import Decode
from jaxdl.generate.sampling import Sampling, choose, filter_logits

__all__ = ["Beam", "Decode", "Sampling", "beam_search", "choose", "filter_logits", "generate"]
