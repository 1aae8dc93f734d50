"""What callers get wrong, and what they may do: generation gives the right tokens or a line that says why not, and never token 0 instead of NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import config

from jaxdl.errors import UserError
from jaxdl.generate import Beam, Sampling, beam_search, choose, filter_logits, generate
from jaxdl.models.gpt2 import GPT, continue_text
from jaxdl.nn import known_tokens


@pytest.fixture
def untyped(monkeypatch):
    """As outside of tests, where types are not checked before values are."""
    monkeypatch.setattr(config, "jaxtyping_disable", True)


KEY = jax.random.key(0)
GREEDY = Sampling(temperature=0)
MODULE = GPT(vocab_size=20, length=32, width=16, depth=1, num_heads=2)


@pytest.fixture(scope="module")
def variables():
    return jax.tree.map(lambda x: x * 8, MODULE.init(jax.random.key(1), jnp.zeros((1, 4), int)))


def decode(variables, tokens, cache, valid):
    out, cache = MODULE.apply(variables, tokens, cache, valid=valid, method="decode")
    return out.logits, cache


def written(variables, prompt, valid=None, *, steps=6, slots=32, **how):
    how = {"sampling": GREEDY} | how
    valid = None if valid is None else jnp.asarray(valid, bool)
    prompt = jnp.asarray(prompt)
    return generate(
        decode, variables, prompt, MODULE.empty_cache(len(prompt), slots), KEY, steps=steps, valid=valid, **how
    ).tolist()


def searched(variables, prompt, valid=None, *, steps=6, slots=32, width=2, **how):
    cache = MODULE.empty_cache(width * len(prompt), slots)
    valid = None if valid is None else jnp.asarray(valid, bool)
    beams, scores = beam_search(
        decode, variables, jnp.asarray(prompt), cache, steps=steps, beam=Beam(width), valid=valid, **({"end": 0} | how)
    )
    assert np.isfinite(scores).all()
    return beams[:, 0].tolist()


WAYS = [written, searched]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("pad", [0, 20, -1, 2**30])
def test_padding_is_not_looked_at_on_whichever_side_and_whatever_it_holds(variables, way, pad):
    alone = way(variables, [[3, 4]])
    rows = [[pad, pad, 3, 4], [3, 4, pad, pad], [pad, 3, pad, 4]]
    valid = [[0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1]]
    assert way(variables, rows, valid) == 3 * alone
    under_jit = jax.jit(lambda rows, valid: generate(
        decode, variables, rows, MODULE.empty_cache(3, 32), KEY, steps=6, sampling=GREEDY, valid=valid
    ))(jnp.asarray(rows), jnp.asarray(valid, bool))  # fmt: skip
    assert under_jit.tolist() == 3 * written(variables, [[3, 4]])


def test_padding_may_have_an_id_that_the_model_lacks_in_every_call(variables):
    tokens, valid = jnp.asarray([[20, 3, 4]]), jnp.asarray([[False, True, True]])
    logits, _ = decode(variables, tokens, MODULE.empty_cache(1, 8), valid)
    alone, _ = decode(variables, tokens[:, 1:], MODULE.empty_cache(1, 8), valid[:, 1:])
    np.testing.assert_allclose(logits[:, 1:], alone, atol=1e-5)


def test_one_of_several_ends_ends(variables, untyped):
    (free,) = written(variables, [[3, 4]], steps=8)
    later = next(token for token in free if token != free[0])
    place = free.index(later)
    (ended,) = written(variables, [[3, 4]], steps=8, end=[later, *({0, 1, 2} - set(free[:place]))])
    assert ended == free[: place + 1] + [later] * (7 - place)
    assert written(variables, [[3, 4]], steps=8, end=later) == [ended] == written(variables, [[3, 4]], steps=8, end=np.array([later]))
    text = continue_text(MODULE, variables, [3, 4], KEY, tokens=8, sampling=GREEDY, end=(later, later))
    assert text == free[: place + 1]
    assert searched(variables, [[3, 4]], end=[5, 5]) == searched(variables, [[3, 4]], end=5)


WRONG = {
    "a cache without room for all steps": (dict(slots=8), "larger"),
    "no steps": (dict(steps=0), "steps"),
    "steps below 0": (dict(steps=-2), "steps"),
    "an empty prompt": (dict(prompt=np.zeros((1, 0), int)), "prompt"),
    "a prompt without rows": (dict(prompt=[3, 4]), "prompt"),
    "a prompt of floats": (dict(prompt=[[3.0, 4.0]]), "prompt"),
    "a token that the model has not": (dict(prompt=[[3, 20]]), "token 20"),
    "a token below 0": (dict(prompt=[[-1, 3]]), "token -1"),
    "a row of padding": (dict(prompt=[[3, 4], [0, 0]], valid=[[1, 1], [0, 0]]), "row 1"),
    "valid of another shape": (dict(valid=[[1, 1, 1]]), "valid"),
    "an end that the model has not": (dict(end=20), "end"),
    "an end below 0": (dict(end=[1, -1]), "end"),
    "an end that is no id": (dict(end="x"), "end"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_said_before_anything_is_compiled(variables, way, wrong, untyped):
    given, words = WRONG[wrong]
    with pytest.raises(UserError, match=words) as error:
        way(variables, **({"prompt": [[3, 4, 5, 6]], "steps": 6} | given))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("way", WAYS)
def test_a_cache_of_just_the_size_has_room(variables, way):
    assert way(variables, [[3, 4, 5, 6]], steps=6, slots=9) == way(variables, [[3, 4, 5, 6]], steps=6)


def test_a_cache_of_other_rows_is_refused(variables):
    with pytest.raises(UserError, match="rows"):
        beam_search(decode, variables, jnp.asarray([[3]]), MODULE.empty_cache(3, 8), steps=2, end=0, beam=Beam(2))


def test_the_models_say_which_token_they_lack(variables):
    with pytest.raises(UserError, match="token 20"):
        MODULE.apply(variables, jnp.asarray([[3, 20]]))


LOGITS = jnp.asarray([[1.0, 5.0, 3.0, 2.0]])


@pytest.mark.parametrize(
    "how", [dict(temperature=0), dict(top_p=0.0), dict(top_p=1e-300), dict(temperature=1e-38), dict(temperature=1e-45), dict(top_k=1)]
)
def test_at_the_bounds_it_is_the_likeliest_token(how):
    for seed in range(20):
        assert choose(LOGITS, Sampling(**how), jax.random.key(seed)).tolist() == [1]
    if how.get("temperature", 1) > 0:
        kept = np.isfinite(filter_logits(LOGITS, Sampling(**how)))[0]
        assert kept[1] and not np.isnan(filter_logits(LOGITS, Sampling(**how))).any()


OUT_OF_BOUNDS = [
    *(dict(temperature=value) for value in (-1.0, float("nan"), float("inf"), "hot", None)),
    *(dict(top_p=value) for value in (-0.1, 1.5, float("nan"))),
    *(dict(top_k=value) for value in (-1, 2.5)),
    *(dict(suppressed_tokens=value) for value in ((-1,), (1.5,), ("a",))),
]


@pytest.mark.parametrize("how", OUT_OF_BOUNDS)
def test_what_lies_out_of_bounds_is_no_way_to_sample(how, untyped):
    with pytest.raises(UserError, match="give"):
        Sampling(**how)


@pytest.mark.parametrize(
    "how", [dict(width=0), dict(width=2.5), dict(length_penalty=-1), dict(length_penalty=float("nan")), dict(offset=-1), dict(stop="now")]
)
def test_what_lies_out_of_bounds_is_no_way_to_search(how, untyped):
    with pytest.raises(UserError, match="give|choose"):
        Beam(**how)


@pytest.mark.parametrize("suppressed, words", [((99,), "99"), (tuple(range(20)), "all 20")])
def test_suppressed_tokens_are_the_models_and_not_all_of_them(variables, suppressed, words):
    with pytest.raises(UserError, match=words):
        written(variables, [[3, 4]], sampling=Sampling(temperature=0, suppressed_tokens=suppressed))
    with pytest.raises(UserError, match=words):
        beam_search(
            decode, variables, jnp.asarray([[3]]), MODULE.empty_cache(2, 8), steps=2, end=0, beam=Beam(2, suppressed_tokens=suppressed)
        )


def test_known_tokens_are_checked_where_they_are_seen():
    tokens, valid = jnp.asarray([[20, 3, -5]]), jnp.asarray([[False, True, False]])
    assert known_tokens(tokens, 20, valid).tolist() == [[0, 3, 0]]
    assert jax.jit(lambda tokens: known_tokens(tokens, 20, valid))(tokens).tolist() == [[0, 3, 0]]
    for wrong in (tokens, tokens[:, 1:]):
        with pytest.raises(UserError, match="token (20|-5)"):
            known_tokens(wrong, 20)
