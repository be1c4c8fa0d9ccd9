"""Landscapes whose points are known: wells and saddles on a grid, orthogonal patterns, a ring, and
the centroids of log-sum-ReLU; and the joining, against all pairs."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.sparse.csgraph import connected_components
from scipy.special import i0e, i1e

import hamux as hmx
from hamux import HAM, Euler, IdentityLayer, LinearSynapse, MemorySynapse, TanhLayer
from hamux.analysis.joining import DistinctRows, join_near, join_pairs
from hamux.analysis.landscape import composition, find_attractors

TIGHT = dict(rtol=0.0, atol=1e-10, max_steps=3000)


@pytest.fixture(autouse=True, scope="module")
def x64():
    with jax.enable_x64(True):
        yield


def close(got, expected, rtol=1e-7, atol=1e-9):
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol)


# --- joining --------------------------------------------------------------------------------------


def clusters(rng, n=3000, k=40, d=6, width=1e-5):
    "Rows around well separated centres, where each belongs, and how far off it is."
    centres, which = 3 * rng.normal(size=(k, d)), rng.integers(0, k, n)
    rows = centres[which] + width * rng.normal(size=(n, d))
    return rows, which, np.linalg.norm(rows - centres[which], axis=1)


def distinct(rows, ranks, order, batch, tolerance):
    "The points of the rows, joined, in this order and these batches; and of each row its point."
    kept = DistinctRows(tolerance)
    for i in range(0, len(order), batch):
        part = order[i : i + batch]
        kept.add(rows[part], ranks[part][:, None], [part])
    points, (numbers,), place = kept.kept()
    label = join_near(points, tolerance)
    return numbers, label, label[place][np.argsort(order)]


@pytest.mark.parametrize("batch", [7, 3000])
def test_joins_do_not_depend_on_order_or_batches(batch):
    rng = np.random.default_rng(0)
    rows, which, off = clusters(rng)
    first = distinct(rows, off, np.arange(3000), 1024, 1e-3)
    for order in (np.arange(3000), rng.permutation(3000)):
        for a, b in zip(first, distinct(rows, off, order, batch, 1e-3), strict=True):
            assert np.array_equal(a, b)
    assert len(set(zip(which, first[2], strict=True))) == 40 == first[1].max() + 1
    assert first[0][0] == off.argmin() # the best row stands for its point


def test_joins_are_the_components_of_all_pairs():
    "Chains of points, steps of 0.4, which are one at 0.5 and apart at 0.3; the rest is far away."
    rng = np.random.default_rng(1)
    starts = 100 * rng.normal(size=(30, 3))
    lengths = rng.integers(1, 20, 30)
    chain = lambda start, n: start + 0.4 * np.arange(n)[:, None] * np.array([1.0, 0, 0])
    points = rng.permutation(np.concatenate([*map(chain, starts, lengths)]))
    apart = np.linalg.norm(points[:, None] - points, axis=-1)
    for tolerance, count in ((0.5, 30), (0.3, lengths.sum())):
        n, plain = connected_components(apart <= tolerance, directed=False)
        ours = join_near(points, tolerance)
        assert n == count == ours.max() + 1 and len(set(zip(plain, ours, strict=True))) == n


def test_points_beyond_the_tolerance_stay_apart_and_numbers_follow_the_best():
    points = np.array([[0.0, 0], [1.001, 0], [0, 1e-9]])
    assert join_near(points, 1.0).tolist() == [0, 1, 0]
    assert join_pairs(5, [[3, 1], [4, 3]]).tolist() == [0, 1, 2, 1, 1]
    assert join_pairs(3, np.zeros((0, 2), int)).tolist() == [0, 1, 2]


def test_memory_of_what_is_kept_does_not_grow_with_the_rows():
    kept, rng = DistinctRows(1e-2), np.random.default_rng(0)
    for _ in range(100):
        rows, _, off = clusters(np.random.default_rng(2), n=1000, k=5, d=3, width=1e-7)
        kept.add(rows[rng.permutation(1000)], off[:, None], [rows])
    points, _, place = kept.kept()
    assert len(points) <= 10 and len(place) == 100_000


# --- wells on a grid ------------------------------------------------------------------------------


def wells(x): return ((x**2 - 1) ** 2).sum() / 4


FOUR = HAM([IdentityLayer(2, leak=False)], [wells], [((0,), 0)])
side = np.linspace(-2, 2, 21) # with 0, exactly
GRID = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
GRID[abs(GRID) < 1e-9] = 0
find_wells = ft.partial(find_attractors, FOUR, solver=Euler(0.1), batch=441, **TIGHT)


@pytest.mark.slow
def test_minima_saddles_and_the_maximum_of_four_wells():
    """E = Σ (x²−1)²/4: minima at (±1, ±1) of curvature 2, saddles at (0, ±1), (±1, 0) and a maximum
    at 0, where the softest mode has −1; a start keeps the signs of its entries."""
    found = find_wells({0: GRID})
    x = np.round(np.asarray(found.xs[0]), 6) + 0.0
    assert {tuple(v) for v in x} == {(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)}
    zeros = (abs(x) < 0.5).sum(1)
    close(found.energy, zeros / 4, atol=1e-8)
    close(found.softest.curvature, np.where(zeros, -1, 2), atol=1e-6)
    assert (found.kind == np.where(zeros, "saddle", "minimum")).all()
    close(found.share, np.array([100, 10, 1])[zeros] / 441)
    assert (np.diff(zeros) >= 0).all() # the most frequent first
    assert np.array_equal(np.sign(x)[found.label], np.sign(GRID))
    assert found.converged.all() and (found.spread < 1e-8).all()
    close(found.gap, 1.0, atol=1e-6)
    words = "Found 4 minima, 5 saddles from 441 starts, all of which converged."
    assert found.result == words and repr(found).startswith(words)
    assert len(repr(found).splitlines()) == 13


def test_claims_are_checked_against_what_is_returned():
    "Energy, gradient and Hessian of the returned states, by NumPy."
    found = find_wells({0: GRID})
    x = np.asarray(found.xs[0])
    close(found.energy, ((x**2 - 1) ** 2).sum(1) / 4)
    assert abs(x**3 - x).max() <= 1e-9 and found.softest.residual.max() <= 1e-9
    close(found.softest.curvature, (3 * x**2 - 1).min(1), atol=1e-7)
    assert np.array_equal(found.xs[0], found.xhats[0])


def test_order_and_batches_of_starts_change_nothing():
    rng = np.random.default_rng(0)
    first, order = find_wells({0: GRID}), rng.permutation(441)
    for batch in (441, 50):
        again = find_wells({0: GRID[order]}, batch=batch)
        names = {tuple(np.round(x, 6) + 0.0): i for i, x in enumerate(np.asarray(again.xs[0]))}
        move = np.array([names[tuple(np.round(x, 6) + 0.0)] for x in np.asarray(first.xs[0])])
        assert np.array_equal(move[np.asarray(first.label)[order]], again.label)
        close(again.share, np.asarray(first.share)[np.argsort(move)])
        close(again.energy, np.asarray(first.energy)[np.argsort(move)], atol=1e-8)


def test_symmetries_join_what_they_map_to_each_other():
    swap = lambda xs: {0: xs[0][::-1]}
    flip = lambda xs: {0: xs[0] * jnp.array([-1.0, 1.0])}
    count = lambda symmetry: len(find_wells({0: GRID}, symmetry=symmetry))
    # of nine points: orbits under −1; under the swap; under both; under all reflections
    assert [count("sign"), count(swap), count([flip, lambda xs: {0: -xs[0]}])] == [5, 6, 4]
    found = find_wells({0: GRID}, symmetry=[swap, flip])
    assert len(found) == 3
    close(found.share, np.array([400, 40, 1]) / 441)
    close(found.gap, 1.0, atol=1e-6)
    with pytest.raises(ValueError, match="symmetry must leave the energy as it is, got"):
        find_wells({0: GRID}, symmetry=lambda xs: {0: xs[0] + jnp.array([0.5, 0])})


def test_clamps_pass_through_and_each_input_has_its_own_points():
    half = np.where(GRID[:, 1:] > 0, 0.5, -0.5)
    begin = np.concatenate([GRID[:, :1], half], 1)[GRID[:, 0] != 0]
    found = find_wells({0: begin}, clamp={0: np.array([False, True])})
    x = np.asarray(found.xs[0])
    assert {tuple(v) for v in np.round(x, 6)} == {(a, b) for a in (-1, 1) for b in (-0.5, 0.5)}
    assert np.array_equal(abs(x[:, 1]), np.full(4, 0.5)) # to the bit
    close(found.softest.curvature, 2.0, atol=1e-6) # the clamped entry alone would have −¼
    close(found.energy, 0.75**2 / 4, atol=1e-8)
    with pytest.raises(ValueError, match="mask"):
        find_wells({0: begin}, clamp={0: np.ones((len(begin), 2), bool)})


@pytest.mark.slow
def test_layers_are_compared_together_and_may_be_clamped_as_a_whole():
    "Two layers whose energies are wells: points that agree in one layer are not one."
    ham = HAM(
        {"x": IdentityLayer(1, leak=False), "y": IdentityLayer(1, leak=False)},
        {"wells": lambda x, y: wells(x) + wells(y)},
        [(("x", "y"), "wells")],
    )
    begin = {"x": GRID[:, :1], "y": GRID[:, 1:]}
    found = find_attractors(ham, begin, solver=Euler(0.1), **TIGHT)
    close(np.sort(found.share), np.sort(find_wells({0: GRID}).share))
    held = find_attractors(ham, begin, clamp="y", solver=Euler(0.1), **TIGHT)
    assert len(held) == 3 * 21 # of x, for each of the values of y
    assert set(held.softest.mode) == {"x"} and (held.kind == "minimum").sum() == 2 * 21


def test_what_is_flat_is_a_question_of_a_threshold():
    "A trough of curvature 1.5e-7: each start keeps its place along it."
    valley = lambda x: x[0] ** 2 * 7.5e-8 + x[1] ** 2
    trough = HAM([IdentityLayer(2, leak=False)], [valley], [((0,), 0)])
    begin = {0: np.stack([np.arange(8) / 90, np.ones(8)], 1)}
    find = ft.partial(find_attractors, trough, begin, solver=Euler(0.4), rtol=0.0, atol=1e-7)
    for flat, kind in ((None, "minimum"), (1e-6, "flat")):
        found = find(flat=flat)
        assert found.kind.tolist() == 8 * [kind]
        close(found.softest.curvature, 1.5e-7, rtol=1e-2)


def test_starts_that_do_not_converge_are_counted():
    begin = GRID.copy()
    begin[::21] = np.nan
    found = find_wells({0: begin})
    assert (np.asarray(found.label)[::21] == -1).all() and not found.converged[::21].any()
    close(found.share.sum(), 420 / 441)
    assert "from 441 starts; 21 not finite." in found.result
    none = find_wells({0: np.full((441, 2), np.nan)})
    assert len(none) == 0 and none.result == "Found nothing from 441 starts; 441 not finite."
    assert none.kind.tolist() == [] and repr(none) == none.result


# --- flat -----------------------------------------------------------------------------------------

BETA = 5.0


def ring_energy(R):
    "The energy of a circle full of patterns, R² + 1 − log I₀(2βR)/β."
    return R**2 + 1 - (np.log(i0e(2 * BETA * R)) + 2 * BETA * R) / BETA


def rest_radius():
    R = 1.0
    for _ in range(400): R = i1e(2 * BETA * R) / i0e(2 * BETA * R)
    return R


def on_circle(K):
    t = 2 * np.pi * np.arange(K) / K
    return np.stack([np.cos(t), np.sin(t)], 1)


def circle_memory(K, room=64):
    "K patterns on the unit circle, evenly; the energy is half of that of the closed form."
    Xi = np.zeros((room, 2))
    Xi[:K] = on_circle(K)
    log_sum_exp = jax.tree_util.Partial(hmx.lagr_softmax, beta=2 * BETA)
    synapse = MemorySynapse(jnp.asarray(Xi), log_sum_exp, "euclidean", mask=np.arange(room) < K)
    return HAM([IdentityLayer(2, leak=False)], [synapse], [((0,), 0)])


@pytest.mark.slow
def test_few_patterns_on_a_circle_are_points_and_many_are_a_ring():
    """Of K even patterns Σ exp(2βR cos) is K (I₀ + 2 I_K cos Kθ + …): at K = 64 the closed form to
    the last digits, a flat ring; at K = 4 each pattern is a minimum."""
    find = ft.partial(find_attractors, solver=Euler(0.5), flat=1e-6, **TIGHT)
    begin = {0: 1.3 * on_circle(400) + 1e-3}
    few = find(circle_memory(4), begin, patterns=on_circle(4), measure="distance")
    assert few.kind.tolist() == 4 * ["minimum"] and few.composition.kind.tolist() == 4 * ["stored"]
    many = find(circle_memory(64), begin, tolerance=0.1)
    assert many.kind.tolist() == ["flat"] and many.share[0] == 1
    R = rest_radius()
    close(np.linalg.norm(many.xs[0][0]), R, atol=1e-8)
    close(2 * many.energy[0] + np.log(64) / BETA, ring_energy(R), atol=1e-9)
    assert 2 * R - 0.02 < many.spread[0] <= 2 * R + 1e-6
    assert "open to doubt" in many.result # it is wider than the tolerance
    apart = find(circle_memory(64), begin, tolerance=1e-3)
    assert len(apart) == 400 and set(apart.kind) == {"flat"}


# --- memories -------------------------------------------------------------------------------------


def hadamard(n):
    H = np.ones((1, 1))
    while len(H) < n: H = np.block([[H, H], [H, -H]])
    return H


@pytest.mark.slow
def test_orthogonal_patterns_and_their_negatives_are_the_attractors():
    """With W = ΞᵀΞ/N the state mξ is at rest where m = tanh βm; the rates are 1 − βh, h = 1 − m²,
    and, outside of the patterns, 1."""
    N, beta, Xi = 16, 2.0, hadamard(16)[1:4]
    ham = HAM([TanhLayer(N, beta=beta)], [LinearSynapse(Xi.T @ Xi / N / 2)], [([0, 0], 0)])
    rng = np.random.default_rng(0)
    begin = np.concatenate([Xi, -Xi]).repeat(20, 0) + 0.3 * rng.normal(size=(120, N))
    find = ft.partial(find_attractors, ham, {0: begin}, patterns=Xi, solver=Euler(0.5), **TIGHT)
    found, m = find(), 1.0
    for _ in range(200): m = np.tanh(beta * m)
    x, xhat = np.asarray(found.xs[0]), np.asarray(found.xhats[0])
    nearest = np.round(x @ Xi.T / N / m).astype(int)
    assert len({tuple(v) for v in nearest}) == 6 and (abs(nearest).sum(1) == 1).all()
    close(x, m * nearest @ Xi, atol=1e-8)
    close(found.softest.curvature, 1 - beta * (1 - m**2), atol=1e-7)
    assert (found.kind == "minimum").all()
    close(found.share, 1 / 6)
    # −ξ is no stored pattern unless either sign counts
    assert sorted(found.composition.index.tolist()) == [-1, -1, -1, 0, 1, 2]
    half = find(symmetry="sign")
    assert sorted(half.composition.index.tolist()) == [0, 1, 2]
    close(half.share, 1 / 3)
    # what is claimed, from the states alone
    close(np.tanh(beta * x), xhat)
    assert abs(x - xhat @ Xi.T @ Xi / N).max() < 1e-9
    A = np.eye(N) - Xi.T @ Xi / N * beta * (1 - xhat[0] ** 2)
    close(np.linalg.eigvals(A).real.min(), found.softest.curvature[0], atol=1e-7)


@pytest.mark.slow
def test_minima_of_log_sum_relu_are_the_centroids_inside_their_own_supports():
    """Five random patterns in eight dimensions: NumPy tries all 31 subsets; we start near their
    centroids, and from 900 other points."""
    rng = np.random.default_rng(0)
    Xi, beta = rng.random((5, 8)), 2.6
    subsets = (np.arange(1, 32)[:, None] >> np.arange(5)) & 1
    centres = subsets @ Xi / subsets.sum(1, keepdims=True)
    d2 = ((centres[:, None] - Xi) ** 2).sum(-1)
    own = ((d2 < 2 / beta) == subsets).all(1)
    lagrangian = jax.tree_util.Partial(hmx.log_sum_relu, beta=beta)
    synapse = MemorySynapse(Xi, lagrangian, "euclidean")
    ham = HAM([IdentityLayer(8, leak=False)], [synapse], [((0,), 0)])
    near = centres.repeat(4, 0) + 0.01 * rng.normal(size=(124, 8))
    begin = np.concatenate([near, rng.dirichlet(np.full(5, 0.3), 900) @ Xi])
    found = find_attractors(ham, {0: begin}, patterns=Xi, measure="distance", rtol=0.0, atol=1e-9)
    x = np.asarray(found.xs[0])[found.kind == "minimum"]
    away = np.linalg.norm(x[:, None] - centres[own], axis=-1)
    assert away.min(1).max() < 1e-7 and len(set(away.argmin(1))) == len(x) == own.sum() > 20
    stored = found.composition.index[found.kind == "minimum"]
    assert set(range(5)) <= set(stored.tolist())
    # weights of the emergent ones: 1/m each
    weights = np.asarray(found.composition.weights)[found.kind == "minimum"]
    m = subsets[own][away.argmin(1)].sum(1)
    expected = np.where(np.arange(weights.shape[1]) < m[:, None], 1 / m[:, None], 0)
    close(weights, expected, atol=1e-5)


def in_units(kind, c):
    "A memory of five patterns in float32 whose activations are counted in units of 1/c."
    Xi = jnp.asarray(c * np.random.default_rng(0).normal(size=(5, 8)), jnp.float32)
    if kind == "leak":
        synapse = MemorySynapse(Xi, ft.partial(hmx.lagr_softmax, beta=1 / c**2))
    else:
        known = {"softmax": (hmx.lagr_softmax, 4.0), "tents": (hmx.log_sum_relu, 0.2)}
        synapse = MemorySynapse(
            Xi, ft.partial(known[kind][0], beta=known[kind][1] / c**2), "euclidean")
    return HAM([IdentityLayer(8, leak=kind == "leak")], [synapse], [((0,), 0)]), Xi


@pytest.mark.slow(but=1)
@pytest.mark.parametrize("kind, count", [("softmax", 5), ("tents", 2), ("leak", 2)])
def test_units_change_nothing(kind, count):
    """Powers of two are exact, so a network and its starts in other units have the same points with
    the same verdicts; with β = 4 each of five patterns far apart is one"""
    rng = np.random.default_rng(1)
    begin = np.random.default_rng(0).normal(size=(5, 8))[rng.integers(0, 5, 60)]
    begin = (begin + 0.5 * rng.normal(size=(60, 8))).astype(np.float32)
    ham, Xi = in_units(kind, 1.0)
    one = find_attractors(ham, {0: begin}, patterns=Xi, measure="distance")
    assert len(one) == count and one.converged.all() and (one.kind == "minimum").all()
    for c in (2.0**-20, 2.0**20):
        ham, Xi = in_units(kind, c)
        found = find_attractors(ham, {0: np.float32(c) * begin}, patterns=Xi, measure="distance")
        assert np.array_equal(found.label, one.label) and np.array_equal(found.kind, one.kind)
        assert found.result == one.result and found.xs[0].dtype == jnp.float32
        assert np.array_equal(found.composition.kind, one.composition.kind)
        close(found.xs[0] / c, one.xs[0], atol=1e-4)
        close(found.energy / c**2, one.energy, rtol=1e-4, atol=1e-5)
        close(found.softest.curvature, one.softest.curvature, atol=1e-3)
        close(found.tolerance / c, one.tolerance)
    with pytest.raises(ValueError, match="symmetry must leave the energy as it is, got"):
        small, c = in_units(kind, 2.0**-20)[0], np.float32(2.0**-20)
        find_attractors(small, {0: c * begin}, symmetry=lambda xs: {0: xs[0] + c})


@pytest.mark.slow
def test_a_landscape_may_begin_at_rest_or_nowhere():
    "From its own ends, in float32, where gradients are rounding; and from the saddle at 0."
    ham, Xi = in_units("tents", 1.0)
    ends = find_attractors(ham, {0: Xi}).xs[0]
    for more in (ends, ends[:1]):
        again = find_attractors(ham, {0: more})
        assert again.converged.all() and len(again) == len(more)
    nowhere = find_attractors(FOUR, {0: np.zeros((1, 2), np.float32)})
    assert nowhere.converged.all() and nowhere.kind.tolist() == ["saddle"]


def test_composition_recovers_weights():
    rng = np.random.default_rng(0)
    patterns = rng.normal(size=(6, 20))
    w = rng.dirichlet(np.ones(6), 5)
    made = composition(w @ patterns, patterns, measure="distance")
    dense = np.zeros((5, 6))
    np.put_along_axis(dense, np.asarray(made.parts), np.asarray(made.weights), 1)
    close(dense, w, atol=1e-3) # weights below a thousandth of the largest are left out
    assert (np.diff(made.weights, axis=1) <= 0).all() and made.misfit.max() < 1e-2
    signed = composition((2 * patterns[1] - patterns[4])[None], patterns, either_sign=True)
    assert signed.parts[0].tolist() == [1, 4] and signed.kind.tolist() == ["mixture"]
    close(signed.weights[0], [2, -1], atol=1e-6)
    close(signed.misfit, 0, atol=1e-6)
    # with distances: the nearest point p of the hull, where (x − p)·(ξ − p) ≤ 0 for every pattern
    x = 2 * rng.normal(size=(5, 20)) + patterns[:5]
    outside = composition(x, patterns, measure="distance")
    dense[:] = 0
    for row, k, w in zip(dense, np.asarray(outside.parts), np.asarray(outside.weights)):
        row[k[k >= 0]] = w[k >= 0]
    p = dense @ patterns
    close(dense.sum(1), 1)
    close(outside.misfit, np.linalg.norm(x - p, axis=1), rtol=1e-6)
    inward = ((x - p)[:, None] * (patterns[None] - p[:, None])).sum(-1)
    assert inward.max() < 1e-2 * np.linalg.norm(x - p, axis=1).max() ** 2
    off = np.linalg.svd(patterns)[2][-1][None] # at right angles to all of them
    assert composition(off, patterns).kind.tolist() == ["spurious"]
    assert composition(np.zeros((0, 20)), patterns).parts.shape[0] == 0


@pytest.mark.parametrize("measure", ["overlap", "distance"])
def test_nothing_is_no_mixture(measure):
    "The symmetric saddle of a network is made of no pattern"
    made = hmx.composition(np.zeros((1, 3)), np.eye(3) + 1, measure=measure)
    assert made.kind.tolist() == ["spurious"] and made.words(0) == "spurious"
    for states, says in (([[np.nan, 0, 0]], "states"), (np.eye(3), "patterns")):
        patterns = np.eye(3) if says == "states" else [[np.inf, 0, 0]]
        with pytest.raises(ValueError, match=f"{says} must be finite, got NaN or inf in row 0"):
            hmx.composition(np.asarray(states), np.asarray(patterns))
    assert len(hmx.composition(np.zeros((0, 3)), np.eye(3)).kind) == 0


def test_plot_shows_every_point():
    import matplotlib.pyplot as plt
    found = find_wells({0: GRID})
    ax = hmx.plot_attractors(found)
    assert sorted(len(line.get_xdata()) for line in ax.lines) == [4, 5]
    plt.close()


@pytest.mark.parametrize(
    "change, error, says",
    [
        (dict(starts=GRID), TypeError, "starts must be states by layer, got ndarray"),
        (dict(starts={0: GRID[:0]}), ValueError, "one row for each start"),
        (dict(starts={0: GRID[:, :1]}), ValueError, "shape"),
        (dict(starts={1: GRID}), ValueError, "1"),
        (dict(batch=0), ValueError, "batch must be a positive int, got 0"),
        (dict(tolerance=0), ValueError, "tolerance must be a positive number, got 0"),
        (dict(flat=np.nan), ValueError, "flat must be a positive number, got nan"),
        (dict(symmetry="swap"), ValueError, "symmetry must be 'sign', a function"),
        (dict(symmetry=lambda xs: {0: xs[0][:1]}), ValueError, "symmetry must give states by"),
        (dict(clamp=0), ValueError, "every layer is clamped, so nothing moves"),
        (dict(clamp="z"), ValueError, "unknown layer 'z'"),
        (dict(patterns=np.ones((2, 3))), ValueError, r"patterns must be .* of shape \(2,\)"),
        (dict(patterns=np.ones((2, 2)), layer="z"), ValueError, "unknown layer 'z'"),
        (dict(patterns=np.ones((2, 2)), measure="angle"), ValueError, "'overlap' or 'distance'"),
        (dict(patterns=np.array([[1, np.nan]])), ValueError, "patterns must be finite.* in row 0"),
        (dict(measure="angle"), ValueError, "'overlap' or 'distance'"),
        (dict(layer="z"), ValueError, "unknown layer 'z'"),
        (dict(steps=0), ValueError, "steps must be a positive int, got 0"),
        (dict(solver=0.1), TypeError, "solver must be one such as Euler"),
    ],
)
def test_bad_input(change, error, says):
    starts = change.pop("starts", {0: GRID})
    with pytest.raises(error, match=says): find_wells(starts, **change)
    with pytest.raises(TypeError, match="ham must be a HAM"): find_attractors("ham", {0: GRID})
