"""The continuous flow against matrix exponentials, scipy, small Euler steps and finite
differences; clamps, rows, dtypes, bad input."""

import math

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.linalg import expm

from hamux import (
    HAM,
    BiasSynapse,
    DenseSynapse,
    IdentityLayer,
    LayerNormLayer,
    LinearSynapse,
    SoftmaxLayer,
    TanhLayer,
)
from hamux.dynamics.continuous import flow
from hamux.dynamics.results import MAX_STEPS, MOVING, NONFINITE


@pytest.fixture(autouse=True, scope="module")
def x64():
    with jax.enable_x64(True):
        yield


def close(got, expected, rtol=1e-7, atol=1e-9):
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol)


def same_bits(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


tight = diffrax.PIDController(rtol=1e-10, atol=1e-10)


def gaussian(taus=(2.0, 0.3)):
    "Two linear layers: E = ½ xᵀAx − b·x, and T."
    rng = np.random.default_rng(0)
    W, b = 0.25 * rng.normal(size=(4, 3)), rng.normal(size=4)
    ham = HAM({"v": IdentityLayer(4, tau=taus[0]), "h": IdentityLayer(3, tau=jnp.asarray(taus[1]))},
              {"W": LinearSynapse(W), "b": BiasSynapse(b)}, [(("v", "h"), "W"), (("v",), "b")])
    A = np.block([[np.eye(4), -W], [-W.T, np.eye(3)]])
    return ham, A, np.concatenate([b, np.zeros(3)]), np.repeat(taus, (4, 3))


def mixed(key=0):
    "Several axes, arity 3, null directions, time constants."
    k = jr.split(jr.PRNGKey(key), 2)
    return HAM(
        [
            TanhLayer((2, 3), beta=2.0, tau=0.7),
            LayerNormLayer((2, 2), tau=2.0),
            SoftmaxLayer(4, beta=3.0),
        ],
        [
            DenseSynapse.rand_init(k[0], (2, 3), (2, 2), 4, scale=0.4),
            DenseSynapse.rand_init(k[1], (2, 3), 4, scale=0.6),
        ],
        [((0, 1, 2), 0), ((0, 2), 1)],
    )


def start(ham, key=3, bs=None):
    return (ham.vectorize() if bs else ham).init_states(bs, key=jr.PRNGKey(key))


def flat(xs):
    return np.concatenate(
        [np.ravel(xs[n]) for n in sorted(xs, key=lambda n: ("v", "h", 0, 1, 2).index(n))]
    )


@pytest.mark.slow
def test_linear_trajectory_is_the_matrix_exponential():
    ham, A, b, tau = gaussian()
    xs, ts = start(ham), np.linspace(0.0, 6.0, 13)
    out, later = flow(ham, xs, 6.0, saveat=ts, stepsize_controller=tight), flow(
        ham, xs, 9.0, t0=3.0, saveat=ts + 3, stepsize_controller=tight
    )
    rest = np.linalg.solve(A, b)
    exact = np.stack([rest + expm(-A / tau[:, None] * t) @ (flat(xs) - rest) for t in ts])
    close(np.concatenate([out.xs["v"], out.xs["h"]], 1), exact, atol=1e-8)
    close(out.energies, 0.5 * np.einsum("ti,ij,tj->t", exact, A, exact) - exact @ b, atol=1e-8)
    close(flat(out.x1), exact[-1], atol=1e-8)
    close(out.residual, np.abs(A @ exact[-1] - b).max(), atol=1e-8)
    close(flat(later.x1), exact[-1], atol=1e-8)
    assert (
        later.t1 == 9.0
        and out.t1 == 6.0
        and out.code == MOVING
        and not out.converged
        and "still moving" in out.result
    )


@pytest.mark.slow
def test_nonlinear_trajectory_is_that_of_scipy_and_its_energy_falls():
    ham = mixed()
    xs, ts = start(ham), np.linspace(0.0, 4.0, 13)
    field = jax.jit(
        lambda xs: {
            n: -g / ham.neurons[n].tau for n, g in ham.dEdact(ham.activations(xs), xs).items()
        }
    )
    shapes = {n: x.shape for n, x in xs.items()}
    def unflat(v):
        parts = np.split(v, np.cumsum([math.prod(s) for s in shapes.values()])[:-1])
        return {n: p.reshape(s) for (n, s), p in zip(shapes.items(), parts, strict=True)}
    ref = solve_ivp(
        lambda t, v: flat(field(unflat(v))),
        (0, 4),
        flat(xs),
        t_eval=ts,
        rtol=1e-10,
        atol=1e-10,
        method="DOP853",
    ).y.T
    out = flow(ham, xs, 4.0, saveat=ts, stepsize_controller=tight)
    close(
        np.concatenate([np.reshape(out.xs[n], (13, -1)) for n in shapes], 1),
        ref,
        atol=1e-7,
        rtol=1e-6,
    )
    assert (np.diff(out.energies) < 0).all()


def test_small_euler_steps_agree_to_first_order():
    ham, xs = mixed(0), start(mixed(0))
    exact = flat(flow(ham, xs, 1.0, saveat=np.linspace(0.0, 1.0, 13), stepsize_controller=tight).x1)
    step = lambda xs, dt: {
        n: xs[n] - dt / ham.neurons[n].tau * g
        for n, g in ham.dEdact(ham.activations(xs), xs).items()
    }
    euler = jax.jit(
        lambda xs, steps: jax.lax.fori_loop(0, steps, lambda _, xs: step(xs, 1.0 / steps), xs)
    )
    coarse, fine = (flat(euler(xs, steps)) for steps in (2000, 4000))
    errors = [np.abs(x - exact).max() for x in (coarse, fine)]
    assert 1.9 < errors[0] / errors[1] < 2.1
    # and what is left after extrapolation is of second order
    assert np.abs(2 * fine - coarse - exact).max() < errors[1] / 50


@pytest.mark.slow
def test_rest_is_the_fixed_point_and_the_rest_of_the_times_is_nan():
    ham, A, b, _ = gaussian()
    out = flow(ham, start(ham), math.inf, steady=True, saveat=[0.0, 2.0, 1e4])
    close(flat(out.x1), np.linalg.solve(A, b), atol=1e-8)
    assert (
        out.converged and out.residual < 1e-9 and np.isnan(out.ts).tolist() == [False, False, True]
    )
    assert (
        np.isnan(out.energies[2])
        and np.isnan(out.xs["v"][2]).all()
        and np.isfinite(out.xs["v"][:2]).all()
    )
    again = flow(ham, out.x1, math.inf, steady=True, saveat=[0.0, 2.0, 1e4])
    assert again.steps == 0 and same_bits(flat(again.x1), flat(out.x1))


@pytest.mark.slow
def test_clamped_elements_keep_their_bits_and_rows_are_alone():
    ham, xs = mixed(2), start(mixed(2), bs=4)
    xs, mask = jax.device_get((xs, jr.bernoulli(jr.PRNGKey(9), 0.4, (4, 2, 3))))
    mask, xs[0] = mask.copy(), xs[0].copy()
    mask[0, 0, 0], xs[0][0, 0, 0] = True, -0.0
    def run(rows):
        begin = {n: jnp.asarray(x[rows]) for n, x in xs.items()}
        clamp, saveat = {0: jnp.asarray(mask[rows]), 1: True}, np.linspace(0.0, 5.0, 7)
        out = flow(ham.vectorize(), begin, 5.0, clamp=clamp, saveat=saveat, steady=True)
        return jax.device_get(out)
    out = run(np.arange(4))
    for i in range(4):
        for t in range(7):
            if not np.isnan(out.ts[i, t]):
                assert same_bits(out.xs[0][i, t][mask[i]], xs[0][i][mask[i]])
                assert same_bits(out.xs[1][i, t], xs[1][i])
        assert same_bits(out.x1[0][i][mask[i]], xs[0][i][mask[i]])
        assert same_bits(out.x1[1][i], xs[1][i])
        alone = run(np.full(4, i))  # the row beside none but itself, in the same program
        for n in xs: close(out.xs[n][i], alone.xs[n][0], rtol=1e-10, atol=1e-12)
        close(out.energies[i], alone.energies[0], rtol=1e-10)
        assert out.steps[i] == alone.steps[0] and out.code[i] == alone.code[0]
    assert not np.array_equal(out.x1[0][~mask], xs[0][~mask])


@pytest.mark.slow
def test_a_clamped_problem_has_the_closed_form_of_the_free_part():
    ham, A, b, tau = gaussian()
    xs, free = start(ham), np.array([0, 1, 1, 0, 1, 1, 1], bool)
    out = flow(ham, xs, 3.0, clamp={"v": jnp.asarray(~free[:4])}, stepsize_controller=tight)
    x0 = flat(xs)
    Aff, pull = A[np.ix_(free, free)], b[free] - A[np.ix_(free, ~free)] @ x0[~free]
    rest = np.linalg.solve(Aff, pull)
    close(
        flat(out.x1)[free],
        rest + expm(-Aff / tau[free][:, None] * 3.0) @ (x0[free] - rest),
        atol=1e-8,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "layer",
    [
        SoftmaxLayer(5, beta=3.0),
        LayerNormLayer((2, 5)),
        pytest.param(LayerNormLayer(5), marks=pytest.mark.slow), # one row of the same
    ],
    ids=["softmax", "two rows of layer norm", "layer norm"],
)
def test_the_energy_falls_also_where_a_mask_cuts_a_competition(layer):
    "40 networks each: along the flow of the free states no saved energy is above the one before"
    rng = np.random.default_rng(0)
    size = int(np.prod(layer.shape))
    start = {
        "h": jnp.asarray(2 * rng.normal(size=(40, *layer.shape))),
        "v": jnp.asarray(rng.normal(size=(40, 4))),
    }
    masks = jnp.asarray(rng.random((40, *layer.shape)) < 0.4)
    ham = HAM(
        {"h": layer, "v": TanhLayer(4)},
        [DenseSynapse(rng.normal(size=(*layer.shape, 4)))],
        [(("h", "v"), 0)],
    )
    out = flow(
        ham.vectorize(),
        start,
        20.0,
        clamp={"h": masks},
        saveat=np.linspace(0, 20, 41),
        max_steps=20_000,
    )
    assert size and (np.diff(out.energies, axis=1) < 1e-5).all()
    assert same_bits(np.where(masks, out.x1["h"], 0), np.where(masks, start["h"], 0))


@pytest.mark.slow
def test_gradients_against_finite_differences():
    W = jr.normal(jr.PRNGKey(0), (3, 4))
    xs, mask = {"v": jr.normal(jr.PRNGKey(1), (3,)), "h": jr.normal(jr.PRNGKey(2), (4,))}, {
        "v": jnp.array([True, False, False])
    }
    def loss(W, v, tau, t1):
        ham = HAM(
            {"v": TanhLayer(3, beta=2.0, tau=tau), "h": SoftmaxLayer(4)},
            {"W": LinearSynapse(W)},
            [(("v", "h"), "W")],
        )
        out = flow(
            ham, {**xs, "v": v}, t1, clamp=mask, saveat=[0.5, 1.0], stepsize_controller=tight
        )
        return sum((x**3).sum() for x in out.x1.values()) + out.energies[1] * out.xs["h"][0, 1]
    at = (W, xs["v"], jnp.array(0.7, float), jnp.array(1.5, float)) # one program for all
    both = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))
    for i, g in enumerate(both(*at)[1]):
        d = jr.normal(jr.PRNGKey(i), at[i].shape)
        shifted = [
            both(*(v + s * 1e-5 * d if j == i else v for j, v in enumerate(at)))[0] for s in (1, -1)
        ]
        close((g * d).sum(), (shifted[0] - shifted[1]) / 2e-5, rtol=1e-5)


@pytest.mark.slow
def test_gradients_by_integrating_backwards_against_the_matrix_exponential():
    adjoint = diffrax.BacksolveAdjoint(stepsize_controller=tight)
    ham, A, b, tau = gaussian()
    xs = start(ham)
    end = lambda ham, v: flow(
        ham, {**xs, "v": v}, 1.5, adjoint=adjoint, stepsize_controller=tight
    ).x1["v"][0]
    in_ham, in_v = jax.jit(jax.grad(end, (0, 1)))(ham, xs["v"])
    P = expm(-A / tau[:, None] * 1.5)
    close(in_v, P[0, :4], atol=1e-7)
    close(in_ham.hypersynapses["b"].b, ((np.eye(7) - P) @ np.linalg.inv(A))[0, :4], atol=1e-7)


@pytest.mark.slow
def test_implicit_gradients_of_rest_under_a_mask():
    ham, A, b, _ = gaussian()
    xs, mask = start(ham), jnp.array([True, False, False, False])
    rest = lambda ham: flow(
        ham, xs, math.inf, steady=True, clamp={"v": mask}, adjoint=diffrax.ImplicitAdjoint()
    ).x1["v"][1]
    slope = jax.jit(jax.grad(rest))(ham).hypersynapses["b"].b
    inverse = np.linalg.inv(A[1:, 1:])
    close(slope, np.concatenate([[0.0], inverse[0, :3]]), atol=1e-8)


@pytest.mark.slow
def test_bad_rows_are_told_and_touch_no_others():
    ham, A, b, tau = gaussian()
    xs = start(ham, bs=3)
    xs["h"] = xs["h"].at[1, 0].set(jnp.nan)
    out = flow(ham.vectorize(), xs, 2.0, saveat=[1.0, 2.0], stepsize_controller=tight)
    rest, P = np.linalg.solve(A, b), expm(-A / tau[:, None] * 2.0)
    for i in (0, 2):
        close(
            flat({n: x[i] for n, x in out.x1.items()}),
            rest + P @ (flat({n: x[i] for n, x in xs.items()}) - rest),
            atol=1e-8,
        )
    assert out.code.tolist() == [MOVING, NONFINITE, MOVING] and "Not finite" in out.result[1]
    assert (
        same_bits(out.x1["v"][1], xs["v"][1])
        and np.isnan(out.energies[1]).all()
        and np.isfinite(out.energies[jnp.array([0, 2])]).all()
    )


def test_an_energy_without_a_floor_is_told():
    ham = HAM([IdentityLayer(2)], [LinearSynapse(jnp.eye(2))], [([0, 0], 0)])  # x' = x
    out = flow(ham, {0: jnp.ones(2)}, math.inf, steady=True)
    assert out.code in (NONFINITE, MAX_STEPS)
    close(np.log(out.x1[0]), out.t1, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16])
def test_dtype_is_kept(dtype):
    # x' = −x/2
    ham = HAM([IdentityLayer(3)], [LinearSynapse(0.25 * jnp.eye(3, dtype=dtype))], [([0, 0], 0)])
    out = flow(ham, {0: jnp.ones(3, dtype)}, 2.0, saveat=[1.0, 2.0])
    assert (
        out.x1[0].dtype == out.xs[0].dtype == out.energies.dtype == out.residual.dtype == dtype
        and out.code == MOVING
    )
    close(out.x1[0].astype(float), np.exp(-1.0), rtol=2 * float(jnp.finfo(dtype).eps) ** (2 / 3))


@pytest.mark.slow
def test_what_saveat_can_do():
    ham, *_ = gaussian()
    xs = start(ham)
    steps = flow(
        ham, xs, 2.0, saveat=diffrax.SaveAt(t0=True, steps=True, dense=True), max_steps=200
    )
    seen = ~np.isnan(steps.ts)
    assert (
        seen.sum() > 5
        and steps.ts[0] == 0.0
        and np.nanmax(steps.ts) == 2.0
        and same_bits(steps.xs["v"][0], xs["v"])
    )
    length = flow(
        ham,
        xs,
        2.0,
        saveat=diffrax.SaveAt(ts=jnp.array([0.0, 1.0]), fn=lambda t, xs, _: (xs["v"] ** 2).sum()),
    )
    close(length.xs, [(xs["v"]**2).sum(), (steps.solution.evaluate(1.0)["v"]**2).sum()])
    with pytest.raises(ValueError, match="takes no several"):
        flow(ham, xs, 2.0, saveat=diffrax.SaveAt(dense=True))


@pytest.mark.slow
def test_under_jit_and_without_compiling_twice():
    traced = []
    def synapse(v, h):
        traced.append(1)
        return -0.1 * v.sum() * h.sum()
    net = HAM([TanhLayer(2), TanhLayer(3)], [synapse], [([0, 1], 0)])
    flow(net, start(net, 0), 1.0)
    seen = len(traced)
    flow(net, start(net, 1), 2.0)
    assert len(traced) == seen
    inside = jax.jit(lambda xs, t: flow(net, xs, t).x1)(start(net, 1), 2.0)
    close(flat(inside), flat(flow(net, start(net, 1), 2.0).x1))


@pytest.mark.parametrize("change, error, says", [
    (dict(t1=math.nan), ValueError, "t1 is NaN"),
    (dict(t1="late"), TypeError, "t1 must be one number"),
    (dict(t1=0.0), ValueError, "later than t0"),
    (dict(t0=-math.inf), ValueError, "t0 must be a finite time"),
    (dict(dt0=[0.1]), TypeError, "dt0 must be one number"),
    (dict(saveat=[0.5, 0.1]), ValueError, "must increase"),
    (dict(saveat=[[0.5]]), TypeError, "sequence of times"),
    (dict(stepsize_controller=0.1), TypeError, "AbstractStepSizeController"),
    (dict(adjoint="implicit"), TypeError, "AbstractAdjoint"),
    (dict(atol=-1.0), ValueError, "must not be negative"),
    (dict(max_steps=1.5), ValueError, "positive int"),
    (dict(adjoint=diffrax.ImplicitAdjoint(), saveat=[0.5]), ValueError, "SaveAt"),
])
def test_bad_settings(change, error, says):
    ham, *_ = gaussian()
    with pytest.raises(error, match=says): flow(ham, start(ham), **{"t1": 1.0, **change})


def test_import_without_diffrax(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "diffrax", None)
    ham, *_ = gaussian()
    with pytest.raises(ImportError, match=r"pip install 'hamux\[ode\]'"): flow(ham, start(ham), 1.0)
