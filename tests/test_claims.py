"""What a descent says of its end, recomputed from what it returns, in float64."""

import functools as ft

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest

import hamux as hmx
from hamux.dynamics.results import CONVERGED, NONFINITE, STUCK, UNBOUNDED

SOLVERS = hmx.Adaptive(), hmx.Backtracking(), hmx.Relaxation()
GUARDED = pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)


@pytest.fixture(autouse=True, scope="module")
def x64():
    old = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", old)


def normal(key, *shape, dtype=jnp.float32): return jr.normal(jr.key(key), shape, dtype)


def slope(ham, xs, free):
    "The largest |∂E/∂x̂| of the free layers, row by row, in float64."
    wide = lambda tree: jtu.tree_map(lambda v: v.astype(jnp.float64), tree)
    ham = wide(ham)

    def one(xs):
        xhats = ham.activations(xs)
        g = jax.grad(lambda xhats: ham.energy(xhats, xs))(xhats)
        return jnp.stack([abs(g[n]).max() for n in free]).max()
    return np.asarray(jax.jit(jax.vmap(one))(wide(xs)))


def memory_alone():
    ham = hmx.HAM([hmx.IdentityLayer(4)], [hmx.MemorySynapse(normal(0, 6, 4))], [([0], 0)])
    return ham, {0: normal(1, 200, 4)}, None


def keys_clamped():
    attention = hmx.AttentionSynapse(normal(0, 2, 3, 4), normal(1, 2, 3, 4), 1.0)
    layers = [hmx.IdentityLayer((3, 4)), hmx.IdentityLayer((5, 4))]
    ham = hmx.HAM(layers, [attention], [([0, 1], 0)])
    return ham, {0: normal(2, 100, 3, 4), 1: normal(3, 100, 5, 4)}, [1]


def beside_a_clamped_layer():
    layers = [hmx.IdentityLayer(4), hmx.TanhLayer(3)]
    synapses = [hmx.MemorySynapse(normal(0, 6, 4)), hmx.LinearSynapse(3 * normal(1, 4, 3))]
    ham = hmx.HAM(layers, synapses, [([0], 0), ([0, 1], 1)])
    return ham, {0: normal(2, 100, 4), 1: normal(3, 100, 3)}, [1]


@pytest.mark.parametrize("case", [memory_alone, keys_clamped, beside_a_clamped_layer],
                         ids=lambda f: f.__name__)
def test_relaxation_claims_what_holds_of_what_it_returns(case):
    """A layer beside a memory is concave in itself: a jump is a step and not the end."""
    ham, xs, clamp = case()
    free = [n for n in ham.neurons if n not in (clamp or [])]
    out = hmx.descend(ham.vectorize(), xs, solver=hmx.Relaxation(), clamp=clamp)
    g = slope(ham, out.xs, free)
    size = np.max([np.abs(out.xs[n]).reshape(len(g), -1).max(1) for n in free], 0)
    tol = 2.0 ** (-23 * 2 / 3)
    assert out.converged.all()
    assert (g <= 1.1 * tol * (1 + size)).all()
    np.testing.assert_allclose(out.residual, g, rtol=0.02, atol=2e-6)


@pytest.mark.parametrize("solver", [*SOLVERS, hmx.Euler(0.1)], ids=lambda s: type(s).__name__)
def test_a_fall_is_not_a_rise(solver):
    "From ten thousand times the scale, where <x̂, x> and L(x) are large and their difference small."
    ham = hmx.HAM([hmx.TanhLayer(6, beta=100.0)], [hmx.BiasSynapse(normal(0, 6))], [([0], 0)])
    out = hmx.descend(ham.vectorize(), {0: 1e4 * normal(1, 100, 6)}, solver=solver)
    assert out.converged.all() and not out.rises.any()


@pytest.mark.slow(but=2)
@GUARDED
@pytest.mark.parametrize("layer", [hmx.TanhLayer, hmx.SigmoidLayer, hmx.SoftmaxLayer])
def test_far_out_is_not_stuck(layer, solver):
    "From starts of 10³ to 10⁶, where the activations are saturated."
    synapses = [hmx.LinearSynapse(normal(2, 6, 5)), hmx.BiasSynapse(normal(0, 6))]
    ham = hmx.HAM([layer(6), hmx.TanhLayer(5)], synapses, [([0, 1], 0), ([0], 1)])
    far = (10.0 ** np.random.default_rng(0).uniform(3, 6, (40, 1))).astype(np.float32)
    xs = {0: far * normal(1, 40, 6), 1: far * normal(3, 40, 5)}
    assert hmx.descend(ham.vectorize(), xs, solver=solver).converged.all()


@GUARDED
def test_far_out_a_lagrangian_that_declares_nothing_is_not_stuck(solver):
    "Its energy is a difference of large numbers there: what it was is no yardstick near rest."
    layers = [hmx.NeuronLayer(lambda x: jnp.sqrt(1 + x**2).sum(), 5), hmx.TanhLayer(4, beta=20.0)]
    ham = hmx.HAM(layers, [hmx.LinearSynapse(4 * normal(0, 5, 4))], [([0, 1], 0)]).vectorize()
    xs = {0: 1e5 * normal(1, 50, 5), 1: 1e4 * normal(2, 50, 4)}
    assert hmx.descend(ham, xs, solver=solver).converged.all()


@pytest.mark.slow(but=1)
@pytest.mark.parametrize("d, beta, spread", [(2, 1.0, 2.0), (2, 4.0, 1.0), (4, 1.0, 2.0)])
def test_the_edge_of_a_tent_is_not_the_end(d, beta, spread):
    "The gradient jumps there, and a step that crosses it lowers the energy."
    memory = hmx.MemorySynapse(normal(0, 10, d), ft.partial(hmx.log_sum_relu, beta=beta),
                               similarity="euclidean")
    ham = hmx.HAM([hmx.IdentityLayer(d)], [memory], [([0], 0)]).vectorize()
    xs = {0: spread * normal(1, 300, d)}
    ours = hmx.descend(ham, xs)
    euler = hmx.descend(ham, xs, solver=hmx.Euler(0.01), max_steps=3000)
    # a graze may take more steps than there are: over the edge lie a few units in the last place
    assert not (ours.code == STUCK).any() and ours.converged.sum() >= 298 and not ours.rises.any()
    # the step over the edge decides between attractors: none is worse than the flow's on average
    assert ours.energy.mean() < euler.energy.mean() + 0.02


@pytest.mark.slow
def test_a_first_trial_that_changes_nothing_is_not_the_last():
    "A hundredth of the time constant is below what bfloat16 resolves, and so is the least of two."
    half = hmx.BiasSynapse(jnp.array([1.35], jnp.bfloat16))
    ham = hmx.HAM([hmx.IdentityLayer(1)], [half], [([0], 0)])
    assert hmx.descend(ham, {0: jnp.ones(1, jnp.bfloat16)}).converged
    layers = [hmx.IdentityLayer(1, tau=1e-3), hmx.IdentityLayer(1, tau=1e3)]
    one = hmx.BiasSynapse(jnp.ones(1, jnp.float32))
    ham = hmx.HAM(layers, [one, one], [([0], 0), ([1], 1)])
    out = hmx.descend(ham, {0: jnp.ones(1, jnp.float32), 1: jnp.zeros(1, jnp.float32)})
    assert out.converged and out.steps <= 30
    np.testing.assert_allclose(out.xs[1], 1, rtol=1e-4)


@pytest.mark.slow(but=2)
@GUARDED
@pytest.mark.parametrize("dtype, W, n", [(jnp.float16, 40.0, 4), (jnp.bfloat16, 150.0, 20)])
def test_a_large_state_in_half_precision_is_not_unbounded(dtype, W, n, solver):
    "|x̂| ≤ 1 on one side, so the energy is bounded below by −½|Wx̂|²."
    weights = hmx.LinearSynapse(jnp.full((n, n), W, dtype))
    ham = hmx.HAM([hmx.IdentityLayer(n), hmx.TanhLayer(n)], [weights], [([0, 1], 0)])
    at_rest = {0: jnp.full((1, n), n * W, dtype), 1: jnp.full((1, n), n * n * W * W, jnp.float32)}
    at_rest[1] = jnp.minimum(at_rest[1], float(jnp.finfo(dtype).max)).astype(dtype)
    near = jtu.tree_map(lambda x: jnp.ones_like(x), at_rest)
    for xs in (at_rest, near):
        assert (hmx.descend(ham.vectorize(), xs, solver=solver).code != UNBOUNDED).all()


@GUARDED
def test_an_energy_without_a_floor_is_said_to_have_none(solver):
    "Exponential neurons that excite themselves: the energy ends the dtype, the states are small."
    ham = hmx.HAM([hmx.ExpLayer(3)], [hmx.LinearSynapse(jnp.eye(3, dtype=jnp.float32))],
                  [([0, 0], 0)])
    out = hmx.descend(ham.vectorize(), {0: 1 + abs(normal(0, 20, 3))}, solver=solver)
    assert (out.code == UNBOUNDED).all() and (abs(out.xs[0]) < 1e3).all()


@GUARDED
def test_a_mask_through_a_saturated_softmax_is_not_rest(solver):
    "The gradient in the free states is zero to the last digit, on the wrong entry."
    pull = lambda p: -5 * p[1]
    ham = hmx.HAM([hmx.SoftmaxLayer(3)], [pull], [([0], 0)])
    mask = {0: np.array([False, False, True])}
    descend = lambda x: hmx.descend(ham, {0: jnp.array(x, jnp.float32)}, solver=solver, clamp=mask)
    wrong, near = descend([300, 0, 0]), descend([1, 4, 0])
    assert wrong.code == STUCK and wrong.residual > 1
    assert near.code == CONVERGED


@pytest.mark.slow(but=1)
@GUARDED
def test_a_mask_that_holds_nothing_is_no_mask(solver):
    "A layer norm far out is flat: along ∂E/∂x nothing moves, along ∂E/∂x̂ it does."
    ham = hmx.HAM([hmx.LayerNormLayer(2, leak=False)], [lambda x: (x[0] - 1) ** 2], [([0], 0)])
    start = {0: jnp.array([0, 1e5], jnp.float32)}
    free = lambda xs, clamp=None: hmx.descend(ham, xs, solver=solver, clamp=clamp)
    held = lambda xs: free(xs, {0: np.zeros(2, bool)})
    for descend in (free, held, jax.jit(held)):
        out = descend(start)
        x = np.asarray(out.xs[0])
        assert out.code == CONVERGED and (x[0] - x[1]) / x.std() > 1.98


@pytest.mark.parametrize("x0", [1.0, 1.1, 2.0, 5.0])
def test_what_is_said_of_an_overflow_is_said_of_what_is_returned(x0):
    "Euler is judged at every fourth step; this runs away in between."
    ham = hmx.HAM([hmx.IdentityLayer(3)], [lambda x: -(x**4).sum()], [([0], 0)])
    how = {"solver": hmx.Euler(0.3), "max_steps": 60, "trace": hmx.Trace(states=True)}
    out = hmx.descend(ham, {0: jnp.full(3, x0)}, **how)
    E = ham.energy(ham.activations(out.xs), out.xs)
    np.testing.assert_allclose([out.energy, out.energies[out.steps]], [E, E], rtol=1e-5)
    assert np.isfinite(out.energies).sum() == out.steps + 1
    assert np.isfinite(out.records["states"][0]).all(1).sum() == out.steps + 1


@pytest.mark.parametrize("dt", [0.8, 0.9, 1.0, 1.1, 1.2, 1.3])
def test_no_rise_is_counted_that_comes_after_the_state_that_is_returned(dt):
    "With steps this long a bowl is climbed at every step, until the energy leaves the dtype."
    ham = hmx.HAM([hmx.IdentityLayer(2)], [lambda x: (x**2).sum()], [([0], 0)])
    solver, start = hmx.Euler(dt), {0: jnp.ones(2, jnp.float32)}
    out = hmx.descend(ham, start, solver=solver, max_steps=300)
    assert out.code == NONFINITE and out.rises == out.steps < 300


@GUARDED
def test_a_step_that_lowers_the_energy_is_found_however_large_the_state(solver):
    "From a kink at 100, up a slope of 1, and beyond 110 down one of 3; half precision, no leak."
    def kink(x): return jnp.maximum(x - 100, 0) - 4 * jnp.maximum(x - 110, 0)
    pit = lambda x: (2 * jnp.maximum(100 - x, 0) + kink(x)).sum()
    ham = hmx.HAM([hmx.IdentityLayer(1, leak=False)], [pit], [([0], 0)])
    start = {0: jnp.full(1, 100, jnp.bfloat16)}
    out = hmx.descend(ham, start, solver=solver, max_steps=100)
    assert out.code != STUCK and out.energy < -1000
