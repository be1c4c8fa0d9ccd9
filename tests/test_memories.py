"Memories beyond the notebook: masked arrays, which say what NaN says."

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hamux as hmx
from hamux.memories import memory_ham, recall_states

RNG = np.random.default_rng(0)
PATTERNS = RNG.integers(0, 200, (20, 12))
HIDDEN = RNG.random((20, 12)) < 0.4


@pytest.mark.parametrize("dtype", ["int64", "uint8", "float32", "float64"])
def test_masked_queries_are_unknown(dtype):
    "The same answers as with NaN, whatever is under the mask"
    unknown = np.where(HIDDEN, np.nan, PATTERNS)
    values = np.where(HIDDEN, 7, PATTERNS).astype(dtype)
    expected, _ = hmx.recall(PATTERNS, unknown)
    answers, out = hmx.recall(PATTERNS, np.ma.masked_array(values, HIDDEN))
    np.testing.assert_array_equal(answers, expected)
    np.testing.assert_array_equal(answers[~HIDDEN], PATTERNS[~HIDDEN])
    assert (np.round(answers) == PATTERNS).all(1).mean() > 0.8 and out.converged.all()


def test_masked_queries_of_a_network():
    ham = memory_ham(PATTERNS / 100, 4.0)
    queries = np.where(HIDDEN, np.nan, PATTERNS / 100).astype(np.float32)
    plain, masked = (recall_states(ham, q) for q in (queries, np.ma.masked_invalid(queries)))
    np.testing.assert_array_equal(plain.xs["pattern"], masked.xs["pattern"])
    traced = jax.jit(lambda q: recall_states(ham, q).xs["pattern"])(jnp.asarray(queries))
    np.testing.assert_allclose(traced, plain.xs["pattern"], rtol=1e-4, atol=1e-5)


def test_a_mask_without_an_entry_is_no_mask():
    whole = np.ma.masked_array(PATTERNS, np.zeros_like(HIDDEN))
    plain, masked = hmx.recall(PATTERNS, PATTERNS[:3])[0], hmx.recall(whole, whole[:3])[0]
    np.testing.assert_array_equal(plain, masked)


@pytest.mark.parametrize("make", [hmx.Memory, memory_ham, lambda m: hmx.recall(m, PATTERNS)])
def test_masked_patterns_are_refused(make):
    mask = np.zeros_like(HIDDEN)
    mask[[4, 9], 2] = True
    with pytest.raises(ValueError, match="in 2 rows, the first of them row 4. Fill"):
        make(np.ma.masked_array(PATTERNS, mask))
