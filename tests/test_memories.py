"""Memories beyond the notebook: masked arrays, which say what NaN says; far origins, magnitudes,
and columns of different scales."""

import os
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hamux as hmx
from hamux.memories import memory_ham, recall_states
from hamux.memories.bank import ArrayRows, Bank
from hamux.memories.candidates import bank_network, settle
from hamux.memories.frames import Frame
from hamux.memories.looking import look

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
    plain = hmx.recall(PATTERNS, PATTERNS, noisy=True)[0]
    masked = hmx.recall(whole, whole, noisy=True)[0]
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


@pytest.mark.slow
def test_the_largest_numbers():
    "A mean that overflows as a sum, and the largest number itself"
    top = np.finfo(float).max
    patterns = np.array([[top, top / 2, top], [top, -top, -top], [0, top, top / 2]])
    answers, out = hmx.recall(patterns, np.where([[1, 0, 0]], patterns[2:], np.nan))
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


STAMPS = np.column_stack([1.76e9 + 60.0 * np.arange(20), NORMAL[:, :11]])


@pytest.mark.parametrize("x64", [False, True])
def test_time_stamps_beside_columns_of_order_one(x64):
    "It is said that the others count for nothing; where the stamp is known all come back"
    said = "differ so much in scale that 11 of 12 count for nothing"
    with jax.enable_x64(x64), pytest.warns(UserWarning, match=said):
        n, answers, out = right(STAMPS, np.where(np.arange(12) < 1, STAMPS, np.nan))
    assert n == 20 and out.converged.all()


def test_columns_that_cannot_be_told_apart():
    "Where only what counts for nothing is known, to the last bit, there is no answer"
    wide = STAMPS * np.where(np.arange(12) < 1, 1e6, 1)
    with pytest.warns(UserWarning, match="count for nothing"), pytest.raises(
        ValueError, match="All 20 patterns weigh the same for 3 of 4 queries.*row 1: in float32"
    ):
        queries = np.where(np.arange(12) > 0, wide[:4], np.nan)
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
        (np.ones((3, 3)), np.array([[1, np.nan, np.nan]])),
        (np.eye(3), np.array([[0.5, 0.5, np.nan]])),
        (np.array([[-1.0, 1, 1], [0, 1, 1], [1, 1, 1]]), np.array([[np.nan, 1, 1]])),
        (np.array([[-1.0] * 3, [0] * 3, [1] * 3]), np.full((1, 3), np.nan)),
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


# --- what comes with an answer --------------------------------------------------------------------

WEIGHTS = np.random.default_rng(2).uniform(0.2, 2, 20)


def weights_by_hand(memory, x, rows, weights=1.0):
    "Similarities as written: over what both know, times d over the number of common entries"
    both = ~np.isnan(x)[:, None] & ~np.isnan(rows)
    r2 = np.where(both, x[:, None] - rows, 0)**2
    s = np.log(weights) - 0.5 * memory.beta * r2.sum(2) * x.shape[1] / both.sum(2)
    log_sum = np.logaddexp.reduce(s, 1)
    return s, log_sum, np.exp(s - log_sum[:, None])


def test_ids_weights_energy_and_values_of_an_answer():
    "All of them recomputed from the patterns that are returned, in float64"
    values = RNG.standard_normal((20, 2, 3))
    names = [f"row {i}" for i in range(20)]
    memory = hmx.Memory(NORMAL, values, ids=names, weights=WEIGHTS, beta=0.5)
    out = memory.recall(HOLES, k=4)
    assert out.descent.converged.all()
    s, log_sum, p = weights_by_hand(memory, out.patterns, NORMAL, WEIGHTS)
    order = np.argsort(-s, 1)[:, :4]
    np.testing.assert_array_equal(out.ids, np.array(names)[order])
    np.testing.assert_allclose(out.weights, np.take_along_axis(p, order, 1), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(out.energy, -log_sum / memory.beta, rtol=1e-4)
    np.testing.assert_allclose(out.values, np.einsum("nk,kij->nij", p, values), atol=1e-4)
    free = np.arange(12) >= 6 # at rest: what is free is the average
    np.testing.assert_allclose((p @ NORMAL)[:, free], out.patterns[:, free], atol=1e-3)
    assert set(out.verdict) <= {"one", "several"}
    np.testing.assert_array_equal(out.verdict == "one", out.weights[:, 0] >= 0.9)


def test_one_step_is_kernel_regression():
    "max_steps=0 stops at the average with the weights of what is known"
    memory = hmx.Memory(NORMAL, NORMAL[:, :1] * 2.0, beta=0.3)
    out = memory.recall(HOLES, max_steps=0)
    _, _, p = weights_by_hand(memory, HOLES, NORMAL)
    np.testing.assert_allclose(out.patterns[:, 6:], (p @ NORMAL)[:, 6:], atol=1e-5)
    assert not out.descent.converged.all() and (out.descent.steps == 0).all()


@pytest.mark.parametrize("labels", [np.arange(20) % 3, np.arange(20) % 2 == 0,
                                    np.array(list("abcde") * 4)])
def test_labels_are_counted(labels):
    memory = hmx.Memory(NORMAL, labels, beta=0.3)
    out = memory.recall(NORMAL + 0.3, noisy=True)
    _, _, p = weights_by_hand(memory, out.patterns, NORMAL)
    totals = np.stack([p[:, labels == c].sum(1) for c in memory.classes], 1)
    np.testing.assert_allclose(out.label_weights, totals, atol=1e-4)
    clear = np.sort(totals, 1)[:, -1] - np.sort(totals, 1)[:, -2] > 1e-3
    np.testing.assert_array_equal(out.values[clear], memory.classes[totals.argmax(1)][clear])


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_unknown_entries_of_patterns(share):
    "The weights of the first step are those of scikit-learn's distances over what both know"
    from sklearn.metrics.pairwise import nan_euclidean_distances
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((60, 8))
    rows[rng.random(rows.shape) < share] = np.nan
    rows[:, 0] = np.arange(60) # which all know
    queries = np.where(rng.random(rows.shape) < 0.3, np.nan, rows)
    queries[:, 0] = rows[:, 0]
    memory = hmx.Memory(rows, beta=0.05)
    s = -0.5 * 0.05 * nan_euclidean_distances(queries, rows, squared=True)
    np.testing.assert_allclose(memory.energy(queries), -np.logaddexp.reduce(s, 1) / 0.05, rtol=1e-4)
    out = hmx.recall(rows, queries, scale="std", k=3)
    assert out.descent.converged.all() and np.isfinite(out.patterns).all()
    assert (out.ids[:, 0] == np.arange(60)).mean() > 0.9


def test_scales():
    "Standardised by hand or by the memory, the same answers; noise instead of beta"
    table = NORMAL * 10.0 ** np.arange(-6, 6)
    queries = np.where(np.arange(12) < 6, table, np.nan)
    by_memory = hmx.recall(table, queries, scale="std", noise=0.4)
    by_hand = hmx.recall(table / table.std(0), queries / table.std(0), beta=1 / 0.16)
    np.testing.assert_allclose(by_memory.patterns / table.std(0), by_hand.patterns, atol=1e-4)
    np.testing.assert_allclose(by_memory.energy, by_hand.energy, rtol=1e-4)
    given = hmx.recall(table, queries, scale=table.std(0), noise=0.4)
    np.testing.assert_allclose(given.patterns, by_memory.patterns, rtol=1e-4)


def test_dot_is_a_preference_for_long_patterns():
    "Σ exp(β ξ·x) of a query is that of distances with weights exp(β‖ξ‖²/2)"
    memory = hmx.Memory(NORMAL, similarity="dot", beta=0.2)
    gap = np.diff(memory.energy(NORMAL))
    dot = -np.logaddexp.reduce(0.2 * NORMAL @ NORMAL.T, 1) / 0.2 + 0.5 * (NORMAL**2).sum(1)
    np.testing.assert_allclose(gap, np.diff(dot), rtol=1e-3, atol=1e-4)


# --- banks of any size ----------------------------------------------------------------------------


def big_bank(rng, K=3000, d=400):
    return rng.standard_normal((K, d)).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("beta", [None, 0.01])
def test_large_banks_end_where_the_whole_network_does(beta):
    "Among few, or in the stream: the same answers as one network of all patterns gives"
    rng = np.random.default_rng(4)
    rows = big_bank(rng)
    queries = rows[:8] + 0.3 * rng.standard_normal((8, 400)).astype(np.float32)
    memory = hmx.Memory(rows, beta=beta)
    assert rows.size > 2**20 # so that it does not descend as one network
    out = memory.recall(queries, noisy=True, k=3)
    ham, first = memory.network().vectorize(), hmx.Memory(rows, beta=memory.beta)
    start = (first.recall(queries, noisy=True, max_steps=0).patterns / first.frame.size
             - first.frame.centre) / first.frame.widths
    whole = hmx.descend(ham, {"pattern": start.astype(np.float32)})
    answers = first.frame.outside(np.asarray(whole.xs["pattern"]))
    assert out.descent.converged.all() and whole.converged.all()
    np.testing.assert_allclose(out.patterns, answers, atol=2e-3 if beta else 1e-5)
    _, log_sum, _ = weights_by_hand(memory, out.patterns.astype(float), rows.astype(float))
    np.testing.assert_allclose(out.energy, -log_sum / memory.beta, rtol=1e-5, atol=1e-4)
    if beta is None: np.testing.assert_array_equal(out.ids[:, 0], np.arange(8))


@pytest.mark.slow
@pytest.mark.parametrize("beta", [100.0, 20.0])
def test_descents_among_few_end_in_the_basin_of_all(beta):
    "Also where the pull of all the others is less than rounding"
    rng = np.random.default_rng(0)
    rows, x = (rng.standard_normal((n, 6)).astype(np.float32) for n in (400, 300))
    free = rng.random(x.shape) < 0.7
    bank = Bank(ArrayRows(rows), Frame(1.0, np.zeros(6), 1.0), "float32")
    start = np.where(free, look(bank, x, beta, averages=True).mean, x)
    few = settle(bank, start, free, beta, max_steps=1000)
    whole = hmx.descend(bank_network(rows, np.zeros(400, "f4"), beta, False).vectorize(),
                        {"pattern": start}, clamp={"pattern": ~free})
    gap = abs(few.descent.xs["pattern"] - np.asarray(whole.xs["pattern"])).max(1)
    assert (gap > 1e-2).sum() <= 1 # a start may be on a ridge


@pytest.mark.slow
def test_a_bank_on_the_disk(tmp_path):
    "The same answers from an array, from a mapped array, and from files"
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rng = np.random.default_rng(5)
    rows, queries = rng.standard_normal((500, 6)).astype("f4"), rng.standard_normal((9, 6))
    queries[:, 3:] = np.nan
    np.save(tmp_path / "bank.npy", rows)
    np.savez(tmp_path / "bank.npz", rows)
    pq.write_table(pa.table(dict(zip("abcdef", rows.T))), tmp_path / "bank.parquet")
    expected = hmx.Memory(rows).recall(queries, k=3)
    for bank in (np.load(tmp_path / "bank.npy", mmap_mode="r"), tmp_path / "bank.npy",
                 str(tmp_path / "bank.npz"), tmp_path / "bank.parquet"):
        out = hmx.Memory(bank, block=64).recall(queries, k=3)
        np.testing.assert_array_equal(out.ids, expected.ids)
        np.testing.assert_allclose(out.patterns, expected.patterns, atol=1e-4)
        assert out.descent.converged.all()


def test_a_file_that_changes_or_vanishes(tmp_path):
    path = tmp_path / "bank.npy"
    np.save(path, NORMAL)
    memory = hmx.Memory(path)
    np.save(path, NORMAL[:-1])
    with pytest.raises(hmx.FileProblem, match="was changed while it was in use"):
        memory.recall(HOLES)
    path.unlink()
    with pytest.raises(hmx.FileProblem, match="no such file"):
        memory.recall(HOLES)


SMALL_SPACE = """
import resource, sys
import numpy as np
import hamux as hmx
rows, path = int(sys.argv[1]), sys.argv[2]
warm = np.random.default_rng(0).standard_normal((2**16, 64)).astype("f4")
np.save(path + ".npy", warm)
queries = warm[:8] + 0.1
hmx.Memory(path + ".npy").recall(queries, noisy=True)
bank = np.lib.format.open_memmap(path, "w+", "f4", (rows, 64))
bank[:8], bank[8:16] = warm[:8], warm[8:16]
del bank # the rest is zeros, which take no room on the disk
held = next(int(v.split()[1]) for v in open("/proc/self/status") if v.startswith("VmSize"))
more = rows * 64 * 4 // 4
resource.setrlimit(resource.RLIMIT_AS, (1024 * held + more,) * 2)
try:
    np.load(path, mmap_mode="r")
    print("the limit does not hold")
except (OSError, ValueError):
    pass
out = hmx.Memory(path, beta=4.0).recall(queries, noisy=True)
assert (out.ids[:, 0] == np.arange(8)).all() and out.descent.converged.all()
print("ended")
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's VmSize")
def test_a_bank_four_times_the_address_space(tmp_path):
    "What may be added is a quarter of the bank; mapping the file fails, the memory does not"
    command = [sys.executable, "-c", SMALL_SPACE, str(2**22), str(tmp_path / "bank.npy")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.stdout == "ended\n", done.stderr[-2000:]


# --- who comes in, who goes out -------------------------------------------------------------------


def test_data_frames_and_tables():
    pd, pa = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    frame = pd.DataFrame(NORMAL, columns=[f"c{i}" for i in range(12)], index=range(5, 25))
    holes = pd.DataFrame(HOLES, columns=frame.columns, index=frame.index).convert_dtypes()
    out = hmx.recall(frame, holes).patterns
    assert list(out.columns) == list(frame.columns) and list(out.index) == list(frame.index)
    np.testing.assert_allclose(out, NORMAL, atol=1e-3)
    table = hmx.recall(frame, pa.Table.from_pandas(holes, preserve_index=False)).patterns
    np.testing.assert_allclose(table.to_pandas(), NORMAL, atol=1e-3)
    with pytest.raises(ValueError, match="must have the columns of the memories"):
        hmx.recall(frame, frame[frame.columns[::-1]], noisy=True)
    with pytest.raises(TypeError, match="the first of them 'name'"):
        hmx.Memory(frame.assign(name="x"))


def test_sparse_arrays_are_refused():
    from scipy import sparse
    with pytest.raises(TypeError, match="must be dense"): hmx.Memory(sparse.eye(3, format="csr"))


@pytest.mark.slow
def test_a_changed_memory_answers_as_a_new_one():
    "After adding, replacing, forgetting and fading: the same energies as a memory made so"
    rng = np.random.default_rng(6)
    rows, more = rng.standard_normal((50, 5)), rng.standard_normal((30, 5))
    memory = hmx.Memory(rows, rows[:, 0], beta=2.0)
    memory.add(more[:20], more[:20, 0])
    memory.replace([3, 55], more[20:22], more[20:22, 0])
    memory.remove([4, 5, 60])
    memory.add(more[22:], more[22:, 0], ids=list(range(100, 108)), weights=0.5)
    kept = np.r_[rows[[0, 1, 2, *range(6, 50)]], more[[*range(5), *range(6, 10), *range(11, 20)]],
                 more[20:22], more[22:]]
    weights = np.r_[np.ones(len(kept) - 8), np.full(8, 0.5)]
    fresh = hmx.Memory(kept, kept[:, 0], beta=2.0, weights=weights)
    assert len(memory) == len(fresh)
    queries = rng.standard_normal((10, 5))
    np.testing.assert_allclose(memory.energy(queries), fresh.energy(queries), rtol=1e-5)
    holes = np.where(np.arange(5) < 3, queries, np.nan)
    ours, theirs = memory.recall(holes), fresh.recall(holes)
    np.testing.assert_allclose(ours.patterns, theirs.patterns, atol=1e-3)
    np.testing.assert_allclose(ours.values, theirs.values, atol=1e-3)
    memory.weigh(np.linspace(1, 0.1, len(memory)))
    assert not np.allclose(memory.energy(queries), fresh.energy(queries))


@pytest.mark.parametrize("change, said", [
    (lambda m: m.add(NORMAL[:, :3]), "must have 12 columns, got 3"),
    (lambda m: m.add(NORMAL[:2], ids=[1, 2]), "id 1 already"),
    (lambda m: m.add(NORMAL[:2], ids=["a"]), "one for each of 2 patterns, got 1"),
    (lambda m: m.add(NORMAL[:2], values=[1, 2]), "holds no values: leave out values"),
    (lambda m: m.add(NORMAL[:1] * np.inf), "got inf in row 0"),
    (lambda m: m.add(NORMAL[:1] * np.nan), "only NaN in row 0"),
    (lambda m: m.add(NORMAL[:1], weights=-1), "finite numbers that are not negative"),
    (lambda m: m.remove([99]), "no pattern with id 99"),
    (lambda m: m.remove(range(20)), "keep at least one pattern"),
    (lambda m: m.replace([0], NORMAL[:2]), "must name 2 different patterns, got 1"),
    (lambda m: m.weigh(np.ones(3)), "weights must"),
    (lambda m: m.recall(HOLES, k=0), "k must be an int from 1 to 20"),
    (lambda m: m.recall(HOLES, alpha=2), "alpha must be a number between 0 and 1"),
    (lambda m: m.recall(HOLES, max_steps=-1), "max_steps must be an int"),
    (lambda m: m.score_samples(HOLES), "A density is of whole rows"),
    (lambda m: m.choose_beta("warm"), "one of near, likelihood, completion"),
])
def test_a_memory_that_refuses_is_as_it_was(change, said):
    memory = hmx.Memory(NORMAL)
    before = memory.energy(NORMAL), memory.ids, memory.beta
    with pytest.raises((ValueError, TypeError), match=said): change(memory)
    np.testing.assert_array_equal(memory.energy(NORMAL), before[0])
    assert (memory.ids, memory.beta) == before[1:]


def test_nothing_to_recall_is_said():
    with pytest.warns(UserWarning, match="nothing unknown, and come back as they are"):
        out = hmx.recall(NORMAL, NORMAL + 0.1)
    np.testing.assert_array_equal(out.patterns, NORMAL + 0.1)


@pytest.mark.slow
def test_p_values_of_exchangeable_queries():
    "The share of p ≤ α is at most α, to three standard errors, whole and partly known"
    rng = np.random.default_rng(7)
    rates = []
    for _ in range(10):
        rows = rng.standard_normal((500, 4)) ** 3
        memory = hmx.Memory(rows[:300], scale="std", beta="likelihood")
        whole = memory.recall(rows[300:], noisy=True, max_steps=0).p_value
        partly = memory.recall(np.where(np.arange(4) < 2, rows[300:], np.nan), max_steps=0).p_value
        rates.append([[(p <= a).mean() for a in (0.02, 0.1, 0.3)] for p in (whole, partly)])
    rates = np.array(rates)
    error = rates.std(0) / np.sqrt(len(rates))
    assert (rates.mean(0) <= np.array([0.02, 0.1, 0.3]) + 3 * error).all(), rates.mean(0)
    far = memory.recall(np.full((1, 4), 1e3), noisy=True, alpha=0.05)
    assert far.verdict == ["unknown"] and far.p_value <= 1 / 300 + 1e-6
