"""Memories beyond the notebook: masked arrays, which say what NaN says; far origins, magnitudes,
and columns of different scales."""

import warnings

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
    plain = hmx.recall(PATTERNS, PATTERNS[:3], noisy=True)[0]
    masked = hmx.recall(whole, whole[:3], noisy=True)[0]
    np.testing.assert_array_equal(plain, masked)


def test_masked_patterns_are_unknown():
    "In a memory as NaN is; a network of two layers has no place for them"
    mask = np.zeros_like(HIDDEN)
    mask[[4, 9], 2] = True
    masked, unknown = np.ma.masked_array(PATTERNS, mask), np.where(mask, np.nan, PATTERNS)
    queries = np.where(HIDDEN, np.nan, PATTERNS)
    answers = [hmx.recall(m, queries).patterns for m in (masked, unknown)]
    np.testing.assert_array_equal(*answers)
    with pytest.raises(ValueError, match="in 2 rows, the first of them row 4. Fill"):
        memory_ham(masked)


# --- origins, magnitudes, scales ------------------------------------------------------------------

NORMAL = np.random.default_rng(1).standard_normal((20, 12))
HOLES = np.where(np.arange(12) < 6, NORMAL, np.nan)


def right(patterns, queries, spread=1.0, **how):
    "How many come back, to a thousandth of their spread, and what was said."
    answers, out = hmx.recall(patterns, queries, **how)
    return (abs((answers - patterns) / spread) < 1e-3).all(1).sum(), answers, out


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("ratio", [0, 1e3, 1e7, -1e9, 1e11])
def test_far_origins(ratio, noisy, x64):
    "Distances have no origin: centred in float64 all come back, whatever JAX is set to"
    origin = ratio * (1 + np.arange(12) / 7)
    queries = NORMAL + 0.1 if noisy else HOLES
    with jax.enable_x64(x64):
        memory = hmx.Memory(origin + NORMAL)
        assert memory.similarity == "euclidean"
        np.testing.assert_allclose(memory.beta, hmx.Memory(NORMAL).beta, rtol=1e-3)
        n, answers, out = right(origin + NORMAL, origin + queries, noisy=noisy)
    assert n == 20 and out.converged.all() and answers.dtype == np.float64
    if not noisy:
        np.testing.assert_array_equal(answers[:, :6], (origin + NORMAL)[:, :6])


UNITS = 5e-324, 1e-310, 1e-200, 1e-170, 1e-155, 1e-30, 1e30, 1e155, 1e300


@pytest.mark.parametrize("unit", UNITS)
def test_magnitudes(unit):
    "From the smallest numbers of float64 to the largest"
    whole = np.round(8 * NORMAL)
    queries = np.where(np.arange(12) < 6, whole, np.nan)
    with np.errstate(all="raise", under="ignore"):
        n, answers, out = right(whole * unit, queries * unit, unit)
    assert n == 20 and out.converged.all() and np.isfinite(answers).all()


def test_the_largest_numbers():
    "A mean that overflows as a sum, and the largest number itself"
    top = np.finfo(float).max
    patterns = np.array([[top, top / 2], [top, -top], [0, top]])
    answers, out = hmx.recall(patterns, np.where([[1, 0]], patterns[2:], np.nan))
    assert out.converged.all()
    np.testing.assert_allclose(answers, patterns[2:], rtol=1e-3)


def test_beta_in_other_units():
    "A temperature that is nothing at the scale of the data is refused, not computed with"
    for unit, beta in [(1e155, 1.0), (1e-155, 1.0), (1e-300, 1e300)]:
        with pytest.raises(ValueError, match="beta must be in the units of the data"):
            hmx.Memory(unit * NORMAL, beta=beta)
    for beta in (np.inf, np.nan, 0, -1, 1j, np.complex64(1)):
        with pytest.raises(ValueError, match="beta must be a positive finite number"):
            hmx.Memory(NORMAL, beta=beta)


STAMPS = np.column_stack([1.76e9 + 60.0 * np.arange(20), NORMAL[:, :5]])


@pytest.mark.parametrize("x64", [False, True])
def test_time_stamps_beside_columns_of_order_one(x64):
    "It is said that the others count for nothing; where the stamp is known all come back"
    said = "differ so much in scale that 5 of 6 count for nothing"
    with jax.enable_x64(x64), pytest.warns(UserWarning, match=said):
        n, answers, out = right(STAMPS, np.where(np.arange(6) < 1, STAMPS, np.nan))
    assert n == 20 and out.converged.all()


def test_columns_that_cannot_be_told_apart():
    "Where only what counts for nothing is known, to the last bit, there is no answer"
    wide = STAMPS * np.array([1e6, 1, 1, 1, 1, 1])
    with pytest.warns(UserWarning, match="count for nothing"), pytest.raises(
        ValueError, match="All 20 patterns weigh the same for 3 of 4 queries.*row 1: in float32"
    ):
        queries = np.where(np.arange(6) > 0, wide[:4], np.nan)
        queries[0] = wide[0]
        hmx.recall(wide, queries)
    with pytest.warns(UserWarning, match="Near patterns cannot be told apart in float32.*x64"):
        with pytest.raises(ValueError, match="All 20 patterns weigh the same for 20 of 20"):
            hmx.recall(1e9 + NORMAL, 1e9 + HOLES, similarity="dot")
    with pytest.raises(ValueError, match="All 20 patterns weigh the same"):
        hmx.recall(NORMAL, HOLES, beta=1e-20)


def test_equal_weights_that_are_an_answer():
    "Copies, a query in the middle, one about which nothing is known, a single pattern"
    for patterns, query in [
        (np.ones((5, 3)), np.array([[1, np.nan, np.nan]])),
        (np.eye(3), np.array([[0.5, 0.5, np.nan]])),
        (np.array([[-1.0, 1], [1, 1]]), np.array([[np.nan, 1]])),
        (np.array([[-1.0], [1]]), np.array([[np.nan]])),
        (np.ones((1, 3)), np.full((1, 3), np.nan)),
    ]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            answers, out = hmx.recall(patterns, query)
        assert out.converged.all() and np.isfinite(answers).all()


@pytest.mark.parametrize("make", [
    lambda rng: rng.standard_normal((50, 30)),
    lambda rng: rng.standard_normal((200, 100)) * 10 ** rng.uniform(-1.2, 0, 100),
    lambda rng: np.sign(rng.standard_normal((50, 30))),
    lambda rng: (rng.random((300, 64)) < np.linspace(0, 0.5, 64)) * 255.0, # dark edges
    lambda rng: np.column_stack([rng.standard_normal((40, 8)), np.full(40, 1e9)]),
    lambda rng: rng.standard_normal((100, 100)) * np.r_[30, np.ones(99)],
    lambda rng: rng.random((60, 1)),
])
@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_said_of_ordinary_data(make, seed):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hmx.Memory(make(np.random.default_rng(seed)))


def test_queries_beyond_all_patterns():
    with pytest.raises(ValueError, match="row 1, column 3 is 1e\\+300, and the patterns are"):
        queries = NORMAL.copy()
        queries[1, 3] = 1e300
        hmx.recall(NORMAL, queries, noisy=True)
