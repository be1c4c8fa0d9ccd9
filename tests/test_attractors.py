"""Which memory, against numpy; stability, against dense matrices and closed forms; basins, against
networks whose basins are known."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from hamux import (
    HAM,
    BiasSynapse,
    DenseSynapse,
    Euler,
    IdentityLayer,
    LayerNormLayer,
    LinearSynapse,
    MemorySynapse,
    ReluLayer,
    SoftmaxLayer,
    TanhLayer,
    descend,
    lagr_softmax,
)
from hamux.analysis.attractors import (
    add_noise,
    basin_size,
    cover,
    erase,
    flip_signs,
    stability,
    which_memory,
    wilson,
)


@pytest.fixture(autouse=True, scope="module")
def x64():
    with jax.enable_x64(True):
        yield


def close(got, expected, rtol=1e-7, atol=1e-9):
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol)


# --------------------------------------------------------------------------------------------------
# -------------------
# which memory


def by_hand(x, patterns, measure):
    "Nearest, overlap, distance, margin by numpy, with every pattern different."
    p, x = patterns.reshape(len(patterns), -1), x.reshape(-1)
    overlaps, distances = p @ x / np.linalg.norm(p, axis=1) / np.linalg.norm(x), np.linalg.norm(
        p - x, axis=1
    )
    order = np.argsort(-overlaps if measure == "overlap" else distances)
    best, second = order[:2]
    margin = (
        overlaps[best] - overlaps[second]
        if measure == "overlap"
        else distances[second] - distances[best]
    )
    if measure == "overlap":
        return best, overlaps[best], distances[best], margin, overlaps[best] >= 0.95
    gap = np.delete(np.linalg.norm(p - p[best], axis=1), best).min()
    return best, overlaps[best], distances[best], margin, distances[best] <= 0.25 * gap


@pytest.mark.parametrize("measure", ["overlap", "distance"])
@pytest.mark.parametrize("shape", [(6,), (2, 3), ()])
def test_which_memory_by_hand(measure, shape):
    rng = np.random.default_rng(0)
    patterns = rng.normal(size=(7, *shape)) + 1.0
    states = patterns[rng.integers(0, 7, 150)] + rng.normal(size=(150, *shape)) * rng.choice(
        [0.01, 0.1, 1.0], (150,) + (1,) * len(shape)
    )
    if measure == "overlap" and shape == (): return  # every cosine is ±1
    found = which_memory(states, patterns, measure=measure)
    rows = [by_hand(x, patterns, measure) for x in states]
    best, overlap, distance, margin, good = map(np.array, zip(*rows))
    assert np.array_equal(found.nearest, best) and np.array_equal(
        found.index, np.where(good, best, -1)
    )
    close(found.overlap, overlap); close(found.distance, distance); close(found.margin, margin)
    assert {True, False} == set(good.tolist())
    alone = which_memory(states[3], patterns, measure=measure)
    assert alone.index.shape == () and alone.index == found.index[3]


def test_which_memory_copies_signs_single_patterns_and_scale():
    xi = np.random.default_rng(0).choice([-1, 1], (4, 50))
    double = np.concatenate([xi[:3], xi[1:2]])
    found = which_memory(
        np.stack([xi[1], np.where(np.arange(50) == 3, np.nan, xi[1])]), double, measure="distance"
    )
    # the copy is no rival
    assert found.index[0] == 1 and found.distance[0] == 0 and found.margin[0] > 1
    assert found.index[1] == -1
    found = which_memory(np.stack([-xi[2], 1e-3 * xi[0], 1e200 * xi[0], np.zeros(50)]), xi)
    assert found.index.tolist() == [-1, 0, 0, -1] and found.overlap[3] == 0
    close(found.overlap[1], 1.0)
    signed = which_memory(-xi[2], xi, either_sign=True)
    assert signed.index == 2 and signed.overlap == pytest.approx(-1) and 0 < signed.margin < 1
    for measure in ("overlap", "distance"):
        one = which_memory(xi[0], xi[:1], measure=measure)
        assert one.index == 0 and np.isinf(one.margin)


@pytest.mark.parametrize(
    "states, patterns, settings, error, says",
    [
        (np.zeros(3), np.zeros((2, 4)), {}, ValueError, "must have shape"),
        (np.zeros((2, 2, 4)), np.zeros((2, 4)), {}, ValueError, "must have shape"),
        (np.zeros(4), np.zeros((0, 4)), {}, ValueError, "one per row"),
        (np.zeros(4) * 1j, np.zeros((2, 4)), {}, TypeError, "real numbers"),
        ("abcd", np.zeros((2, 4)), {}, TypeError, "must be an array"),
        (np.zeros(4), np.zeros((2, 4)), {"threshold": -1}, ValueError, "threshold"),
        (
            np.zeros(4),
            np.zeros((2, 4)),
            {"measure": "distance", "either_sign": True},
            ValueError,
            "either_sign",
        ),
    ],
)
def test_which_memory_bad_input(states, patterns, settings, error, says):
    with pytest.raises(error, match=says): which_memory(states, patterns, **settings)


# --------------------------------------------------------------------------------------------------
# -------------------
# stability


def networks(name, key):
    k = jr.split(jr.PRNGKey(key), 3)
    if name == "tanh":
        return HAM(
            {"a": TanhLayer(6, beta=2.0), "b": TanhLayer(5, tau=0.3)},
            {"W": LinearSynapse.rand_init(k[0], 6, 5, scale=0.6)},
            [(("a", "b"), "W")],
        )
    if name == "null":
        return HAM(
            {"a": LayerNormLayer((2, 4), eps=0.1), "b": SoftmaxLayer(5, beta=2.0, tau=2.0)},
            {"W": DenseSynapse.rand_init(k[0], (2, 4), 5, scale=0.7)},
            [(("a", "b"), "W")],
        )
    if name == "relu":
        return HAM(
            {"a": ReluLayer(6), "b": IdentityLayer(4)},
            {
                "W": LinearSynapse.rand_init(k[0], 6, 4, scale=0.25),
                "c": BiasSynapse(jr.normal(k[1], (6,))),
            },
            [(("a", "b"), "W"), (("a",), "c")],
        )
    memory = MemorySynapse(
        jr.normal(k[0], (8, 5)), jax.tree_util.Partial(lagr_softmax, beta=1.5), "euclidean"
    )
    return HAM({"a": IdentityLayer(5, leak=False, tau=0.7)}, {"m": memory}, [(("a",), "m")])


@functools.partial(jax.jit, static_argnames="clamp")
def bends(ham, xs, clamp):
    "H and ∂²E/∂x̂² of the free layers."
    free = {n: x for n, x in xs.items() if n not in clamp}
    flat, unravel = ravel_pytree(free)
    xhats = ham.activations(xs)
    act = lambda v: ravel_pytree(
        {n: x for n, x in ham.activations({**xs, **unravel(v)}).items() if n in free}
    )[0]
    return jax.jacfwd(act)(flat), jax.hessian(lambda u: ham.energy({**xhats, **unravel(u)}, xs))(
        act(flat)
    )


def dense(ham, xs, clamp=()):
    "Eigenvalues of T⁻¹(D − JH) on what the energy sees, by numpy."
    H, S = map(np.asarray, bends(ham, xs, clamp))
    spread = lambda value: np.concatenate(
        [np.full(xs[n].size, value(ham.neurons[n])) for n in sorted(xs) if n not in clamp]
    )
    D, tau = spread(lambda layer: float(layer.leak)), spread(lambda layer: float(layer.tau))
    w, V = np.linalg.eigh(H)
    R = (V * np.sqrt(np.maximum(w, 0)))[:, w > 1e-10]
    # H commutes with T and D (constant on each layer), so with H = RRᵀ the matrix is similar to (D
    # + RᵀSR)/T on the range of H
    inner = np.linalg.pinv(R) @ np.diag(D / tau) @ R + R.T @ np.diag(1 / tau) @ S @ R
    return np.sort(np.linalg.eigvals(inner).real), S, H, D, tau


@pytest.mark.slow(but=1)
@pytest.mark.parametrize("name", ["tanh", "null", "relu", "leakless"])
def test_curvature_is_the_smallest_eigenvalue_of_the_dense_matrix(name):
    for key in range(3):
        ham = networks(name, key)
        xs = descend(
            ham,
            ham.init_states(key=jr.PRNGKey(key + 9)),
            solver=Euler(0.1),
            max_steps=20000,
            rtol=0.0,
            atol=1e-10,
        ).xs
        got, (rates, S, H, D, tau) = stability(ham, xs), dense(ham, xs)
        assert got.at_rest and got.stable and "minimum" in got.result
        close(got.curvature, rates[0], rtol=1e-7)
        assert got.error < 1e-4
        # an eigenvector of the whole matrix, null directions included
        v = np.asarray(ravel_pytree(got.mode)[0])
        close((D * v + S @ (H @ v)) / tau, got.curvature * v, atol=1e-4)
        close(np.linalg.norm(v), 1.0)


def test_saddles_grow_along_the_mode_at_the_rate():
    ham = networks("tanh", 0)
    ham = HAM(ham.neurons, {"W": LinearSynapse(3 * ham.hypersynapses["W"].W)}, ham.connections)
    zero = ham.init_states()
    got, (rates, *_) = stability(ham, zero), dense(ham, zero)
    close(got.curvature, rates[0], rtol=1e-7)
    assert got.curvature < 0 and not got.stable and "saddle" in got.result
    push = {n: 1e-5 * v for n, v in got.mode.items()}
    out = descend(ham, push, solver=Euler(1e-3), max_steps=200, rtol=0.0, atol=0.0)
    grown = np.linalg.norm(ravel_pytree(out.xs)[0]) / 1e-5
    close(np.log(grown), 200 * np.log1p(-1e-3 * rates[0]), rtol=1e-4)
    assert out.energy < 0 == ham.energy(zero, zero)


@functools.partial(jax.jit, static_argnames="unravel")
def hessian(ham, flat, unravel):
    return jax.hessian(lambda v: ham.energy(ham.activations(unravel(v)), unravel(v)))(flat)


def test_hessian_of_the_energy_has_the_same_sign():
    """Inertia: where H is invertible, the Hessian of x ↦ E(σ(x), x) at a fixed point has as sign
    that of the curvature."""
    for key in range(3):
        ham = networks("tanh", key)
        for scale in (1.0, 3.0):
            net = HAM(
                ham.neurons, {"W": LinearSynapse(scale * ham.hypersynapses["W"].W)}, ham.connections
            )
            flat, unravel = ravel_pytree(net.init_states())
            low = np.linalg.eigvalsh(hessian(net, flat, unravel))[0]
            assert np.sign(low) == np.sign(stability(net, unravel(flat)).curvature)


@pytest.mark.slow
def test_clamps_batches_and_what_is_not_at_rest():
    ham = networks("tanh", 1)
    xs = ham.vectorize().init_states(3, key=jr.PRNGKey(1))
    rest = descend(
        ham.vectorize(), xs, clamp="b", solver=Euler(0.5), rtol=0.0, atol=1e-10, max_steps=3000
    ).xs
    got = stability(ham.vectorize(), rest, clamp="b")
    assert set(got.mode) == {"a"} and got.stable.all()
    close(got.curvature, 1.0)  # with the other layer held, a layer just leaks
    mask = np.array([True] * 4 + [False] * 2)
    one = {n: x[0] for n, x in rest.items()}
    held = lambda xs, mask: stability(ham.vectorize(), xs, clamp={"a": mask})  # one program
    part = jax.tree_util.tree_map(lambda v: np.asarray(v)[0], held(rest, mask))
    _, S, H, D, tau = dense(ham, one)
    free = np.r_[~np.asarray(mask), np.ones(5, bool)]
    A = (np.diag(D) + S @ H)[np.ix_(free, free)] / tau[free][:, None]
    close(part.curvature, np.linalg.eigvals(A).real.min())
    assert np.all(np.asarray(part.mode["a"])[mask] == 0)
    full = held(xs, np.zeros(6, bool))
    for i in range(3):
        alone = stability(ham, {n: x[i] for n, x in xs.items()})
        close(full.curvature[i], alone.curvature); close(full.residual[i], alone.residual)
    assert not full.at_rest.any() and not full.stable.any() and "Not at rest" in full.result[0]


def test_what_the_energy_does_not_see():
    dead = HAM({"a": ReluLayer(4, tau=2.0)}, {"b": BiasSynapse(-jnp.ones(4))}, [(("a",), "b")])
    got = stability(dead, {"a": -jnp.ones(4)})  # H = 0: all that is left is the leak
    assert got.stable and got.curvature == 0.5 and got.products == 0
    flat = HAM([IdentityLayer(3)], [lambda x: -0.5 * (x * x).sum()], [((0,), 0)])
    level = stability(flat, {0: jnp.ones(3)})  # every state is a fixed point
    assert not level.stable and abs(level.curvature) <= 1e-12


@pytest.mark.slow
def test_large_and_single_precision():
    with jax.enable_x64(False):
        k = jr.split(jr.PRNGKey(0), 2)
        Xi = jr.normal(k[0], (3000, 400))
        ham = HAM(
            {"x": IdentityLayer(400), "h": SoftmaxLayer(3000, beta=0.02)},
            {"W": LinearSynapse(Xi.T)},
            [(("x", "h"), "W")],
        )
        zero = descend(ham, ham.init_states(), solver=Euler(0.5), max_steps=3000).xs
        got = stability(ham, zero)
        p, b = jax.nn.softmax(0.02 * zero["h"]), 0.02
        # the hidden layer follows at a tenth: rates of [[1, −Wᵀ…]]
        C = b * (Xi.T * p) @ Xi - b * jnp.outer(p @ Xi, p @ Xi)
        mu = np.sqrt(np.linalg.eigvalsh(C)[-1])
        # eigenvalues of a bipartite network: 1 ± √μ
        close(got.curvature, 1 - mu, rtol=0.0, atol=2e-3)
        assert got.products < 64


# --------------------------------------------------------------------------------------------------
# -------------------
# basins


def test_corruptions_keep_their_promises():
    x = jr.normal(jr.PRNGKey(0), (4, 5)) + 3
    for level in (0.1, 1.0):
        k = jr.PRNGKey(7)
        assert (
            (flip_signs(k, x, level) == -x).sum()
            == round(level * 20)
            == (erase(k, x, level) == 0).sum()
            == (cover(k, x, level) == 0).sum()
        )
        close((add_noise(k, x, level) - x).std(), level, atol=0.6 * level)
    few, many = (flip_signs(jr.PRNGKey(7), x, s) < 0 for s in (0.2, 0.6))
    assert not (few & ~many).any()  # nested


def test_wilson_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    for p in (0.02, 0.3, 0.9):
        low, high = wilson(rng.binomial(40, p, 4000), 40)
        assert 0.90 < ((low <= p) & (p <= high)).mean() <= 1.0


@pytest.mark.slow
def test_the_basin_of_a_double_well_is_a_half_line():
    "One identity unit with two memories at ±1 (β large): a start returns iff it keeps its sign."
    memory = MemorySynapse(
        jnp.array([[-1.0], [1.0]]), jax.tree_util.Partial(lagr_softmax, beta=8.0), "euclidean"
    )
    ham = HAM([IdentityLayer(1, leak=False)], [memory], [((0,), 0)])
    out = basin_size(
        ham,
        jnp.array([[-1.0], [1.0]]),
        add_noise,
        [0.0, 1.0, 2.0],
        key=jr.PRNGKey(0),
        n=400,
        measure="distance",
        solver=Euler(0.5),
    )
    truth = [1.0, 0.8413447, 0.6914625]  # P(noise < 1/σ)
    for share, p in zip(out.share, truth): assert abs(share - p) <= 3 * np.sqrt(p * (1 - p) / 400)
    close(np.stack([out.low, out.high]), wilson(400 * np.asarray(out.share), 400), atol=1e-6)
    close(out.share + out.elsewhere, 1.0)
    assert (
        (out.converged == 1).all()
        and out.reached.shape == (3, 400)
        and (out.reached[0] == out.target).all()
    )
    assert np.isnan(out.radius(0.5)) and 1 < out.radius(0.8) < 2


@pytest.mark.slow
def test_basins_of_a_named_layer_start_with_the_others_settled():
    """The visible layer is fast: were the hidden layer at zero, it would have forgotten the query
    before it is recognised."""
    rng = np.random.default_rng(0)
    xi = jnp.asarray(rng.choice([-1.0, 1.0], (10, 60)))
    ham = HAM(
        {"h": SoftmaxLayer(10, beta=0.08), "x": IdentityLayer(60, tau=0.05)},
        {"W": LinearSynapse(xi)},
        [(("h", "x"), "W")],
    )
    run = lambda: basin_size(
        ham,
        xi,
        flip_signs,
        [0.0, 0.1, 0.5],
        key=jr.PRNGKey(1),
        layer="x",
        n=30,
        solver=Euler(0.04),
        max_steps=3000,
    )
    out, again = run(), run()
    close(out.overlap_start, [1.0, 0.8, 0.0], atol=1e-12)
    assert (
        (out.share[:2] == 1).all()
        and out.share[2] < 0.6
        and np.array_equal(out.reached, again.reached)
    )


@pytest.mark.parametrize("change, error, says", [
    (dict(n=0), ValueError, "n must be a positive int"),
    (dict(levels=0.1), ValueError, "sequence of numbers"),
    (dict(layer="z"), ValueError, "unknown layer"),
    (dict(clamp="a"), ValueError, "no clamp"),
    (dict(patterns=jnp.zeros((2, 3))), ValueError, "one per row"),
    (dict(corrupt=lambda k, x, level: x[1:]), ValueError, "corrupted state"),
])
def test_basin_bad_input(change, error, says):
    ham = networks("tanh", 0)
    given = dict(patterns=jnp.ones((2, 6)), corrupt=flip_signs, levels=[0.0]) | change
    with pytest.raises(error, match=says):
        basin_size(
            ham,
            given.pop("patterns"),
            given.pop("corrupt"),
            given.pop("levels"),
            key=jr.PRNGKey(0),
            **given,
        )


@pytest.mark.parametrize("change, error, says", [
    (dict(steps=0), ValueError, "steps must be a positive int"),
    (dict(tol=0.0), ValueError, "tol must be positive"),
    (dict(clamp=["a", "b"]), ValueError, "nothing moves"),
    (dict(clamp="c"), ValueError, "unknown layer"),
])
def test_stability_bad_input(change, error, says):
    ham = networks("tanh", 0)
    with pytest.raises(error, match=says): stability(ham, ham.init_states(), **change)
