"""Solvers on thousands of random networks: no rise of the energy, no end without a true reason;
stationary laws; records; schedules."""

import os

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
import pytest
from test_hypergraph import network

from hamux import (
    HAM,
    Adaptive,
    AttentionSynapse,
    Backtracking,
    BiasSynapse,
    ConvSynapse,
    Euler,
    IdentityLayer,
    Langevin,
    LayerNormLayer,
    LinearSynapse,
    MemorySynapse,
    PoolSynapse,
    Relaxation,
    ReluLayer,
    SigmoidLayer,
    SoftmaxLayer,
    TanhLayer,
    Trace,
    descend,
)

CONVERGED, MAX_STEPS, NONFINITE, UNBOUNDED, STUCK, SAMPLED = range(1, 7)
# 100 is the full run: 10,000 networks per solver
STRUCTURES = int(os.environ.get("HAMUX_STRUCTURES", 2))
# networks of one structure, each with weights and a start of its own
WIDTH = 100 if "HAMUX_STRUCTURES" in os.environ else 12


@pytest.fixture(autouse=True, scope="module")
def x64():
    with jax.enable_x64(True):  # for this module alone
        yield


def papers(seed):
    "A structure with the synapses of the papers, which the generator of hypergraphs does not draw."
    rng = np.random.default_rng(seed)
    k = jr.split(jr.PRNGKey(seed), 4)
    if seed % 2:
        tokens = LayerNormLayer((4, 6), leak=bool(rng.integers(2)))
        return HAM(
            {"t": tokens, "h": TanhLayer(5)},
            {
                "a": AttentionSynapse.rand_init(k[0], 6, 2, 3),
                "m": MemorySynapse(jr.normal(k[1], (7, 4, 6))),
                "w": lambda t, h: -(t.sum(0)[:5] * h).sum(),
            },
            [(("t",), "a"), (("t",), "m"), (("t", "h"), "w")],
        )
    kind = ("max", "average")[int(rng.integers(2))]
    return HAM(
        {"g": TanhLayer((4, 4, 2)), "p": ReluLayer((2, 2, 3)), "l": SoftmaxLayer(5)},
        {
            "c": ConvSynapse(jr.normal(k[0], (3, 2, 3, 3)), pool=PoolSynapse(2, kind=kind)),
            "b": BiasSynapse(jr.normal(k[1], (2, 2, 3))),
            "w": lambda p, l, W=jr.normal(k[2], (12, 5)): -(p.reshape(-1) @ W @ l),
        },
        [(("g", "p"), "c"), (("p",), "b"), (("p", "l"), "w")],
    )


def many(ham, seed):
    """The same structure with many weights, of scales from 0.1 to 10, and as many starts; a third
    of the layers start at zero."""
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.uniform(-1, 1, WIDTH)
    def draw(W):
        fresh = rng.normal(size=(WIDTH, *W.shape)) * float(np.abs(W).mean() + 0.1)
        return jnp.asarray(fresh * scale.reshape(-1, *[1] * W.ndim), W.dtype)
    synapses = jtu.tree_map(draw, ham._hypersynapses)
    layers = jtu.tree_map(lambda v: jnp.broadcast_to(v, (WIDTH, *v.shape)), ham._neurons)
    stacked = jtu.tree_unflatten(
        jtu.tree_structure(ham), [*jtu.tree_leaves(layers), *jtu.tree_leaves(synapses)]
    )
    xs = {
        n: jnp.asarray(
            rng.normal(size=(WIDTH, *layer.shape)) * 3 * (rng.uniform() > 0.3), ham.dtype
        )
        for n, layer in ham.neurons.items()
    }
    return stacked, xs


def run(ham, xs, solver, max_steps=400):
    size = lambda ham: lambda xs: sum(
        abs((x * xs[n]).sum()) for n, x in ham.activations(xs).items()
    )
    def go(ham, xs):
        out = descend(
            ham,
            xs,
            solver=solver,
            max_steps=max_steps,
            trace=Trace(parts=True, functions={"size": size(ham)}),
        )
        return out, ham.dEdact(ham.activations(out.xs), out.xs)
    return jax.jit(jax.vmap(go))(ham, xs)


def examine(ham, out, again):
    "What must hold of every descent of a guarded solver; `again` is its gradient, computed anew."
    xs, again = jax.device_get((out.xs, again))
    E, eps = np.asarray(out.energies, float), float(jnp.finfo(out.energies.dtype).eps)
    parts = sum(
        abs(np.asarray(v, float)) for v in jtu.tree_leaves(out.records["parts"])
    ) + np.asarray(out.records["size"], float)
    lowest = np.fmin.accumulate(E, 1)
    allowed = 64 * eps * np.fmax.accumulate(np.nan_to_num(parts, posinf=np.inf), 1)
    with np.errstate(invalid="ignore"):
        assert not (E[:, 1:] > lowest[:, :-1] + allowed[:, 1:]).any()
    assert not np.any(out.rises)
    code = np.asarray(out.code)
    # the gradient is small: all of it where the layer leaks
    for i in np.flatnonzero(code == CONVERGED):
        for n, layer in ham.neurons.items():
            if layer.leak:
                assert (
                    abs(again[n][i]).max() <= 3e-5 * (1 + abs(xs[n][i]).max())
                    if eps > 1e-10
                    else 1e-9 * (1 + abs(xs[n][i]).max())
                )
    assert np.all(np.asarray(out.steps)[code == MAX_STEPS] == out.energies.shape[1] - 1)
    # far below where it began, far beyond any state of its scale
    for i in np.flatnonzero(code == UNBOUNDED):
        assert (
            np.nanmin(E[i]) < E[i, 0]
            and max(abs(x[i]).max() for x in xs.values()) > 1e3
        )
    for i in np.flatnonzero(code == NONFINITE): assert not np.isfinite(E[i, 0])
    return np.bincount(code, minlength=7)


@pytest.mark.slow
@pytest.mark.parametrize(
    "solver", [Adaptive(), Backtracking(), Relaxation()], ids=lambda s: type(s).__name__
)
@pytest.mark.parametrize("seed", range(STRUCTURES))
def test_no_rise_and_a_true_reason(seed, solver):
    ham = papers(seed) if seed % 4 == 0 else network(seed + 1000)[0]
    ham, xs = many(ham, seed)
    counts = examine(ham, *run(ham, xs, solver))
    print(
        dict(
            zip(
                "running converged max_steps nonfinite unbounded stuck sampled".split(),
                counts.tolist(),
                strict=True,
            )
        )
    )


# --------------------------------------------------------------------------------------------------
# -------------------
# guarded solvers where it is hard


def close(got, expected, rtol=1e-9, atol=1e-11):
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol)


@pytest.mark.slow(but=1)
@pytest.mark.parametrize(
    "dtype", [jnp.float16, jnp.bfloat16, jnp.float32], ids=lambda d: jnp.dtype(d).name
)
@pytest.mark.parametrize(
    "solver", [Backtracking(jnp.array(1e5)), Adaptive()], ids=lambda s: type(s).__name__
)
def test_no_rise_in_narrow_dtypes_whatever_the_first_step(solver, dtype):
    W = jr.normal(jr.PRNGKey(0), (6, 5)) * jnp.logspace(-2, 1, 24)[:, None, None]
    def one(W, x):
        ham = HAM(
            {"v": TanhLayer(6, beta=2.0), "h": SoftmaxLayer(5)},
            {"w": LinearSynapse(W), "vv": LinearSynapse(W @ W.T)},
            [(("v", "h"), "w"), (("v", "v"), "vv")],
        )
        out = descend(ham, {"v": x, "h": jnp.zeros(5, dtype)}, solver=solver, max_steps=150)
        return out.energies, out.rises, out.code, out.xs
    E, rises, code, xs = jax.jit(jax.vmap(one))(
        W.astype(dtype), jr.normal(jr.PRNGKey(1), (24, 6), dtype)
    )
    assert (
        not rises.any()
        and set(code.tolist()) <= {CONVERGED, MAX_STEPS, STUCK}
        and xs["v"].dtype == dtype
    )
    E = np.asarray(E, float)
    assert (
        np.nanmin(E, 1).max() < np.inf
        and not (
            E[:, 1:]
            > np.fmin.accumulate(E, 1)[:, :-1]
            + 0.02 * float(jnp.finfo(dtype).eps) * 64 * abs(E).max()
        ).any()
        or dtype != jnp.float32
    )


@pytest.mark.slow(but=1)
@pytest.mark.parametrize(
    "solver",
    [Adaptive(), Backtracking(), Relaxation(), Euler(0.02)],
    ids=lambda s: type(s).__name__,
)
def test_a_mask_through_a_softmax_does_not_climb(solver):
    "The plain flow −∂E/∂x̂ of the free entries rose in up to 27 of 200 such trials."
    rng = np.random.default_rng(0)
    W, x, h = (
        rng.normal(size=(100, 7, 6)) * 3,
        rng.normal(size=(100, 7)),
        rng.normal(size=(100, 6)) * 2,
    )
    mask = np.arange(6) < 3
    def one(W, x, h):
        ham = HAM(
            {"v": TanhLayer(7), "h": SoftmaxLayer(6)}, {"w": LinearSynapse(W)}, [(("v", "h"), "w")]
        )
        out = descend(ham, {"v": x, "h": h}, solver=solver, clamp={"h": mask}, max_steps=300)
        free = jax.grad(
            lambda h: ham.energy(
                ham.activations({"v": out.xs["v"], "h": h}), {"v": out.xs["v"], "h": h}
            )
        )(out.xs["h"])
        return out.xs["h"], out.rises, out.residual, free
    end, rises, residual, free = jax.jit(jax.vmap(one))(W, x, h)
    assert not rises.any() and np.array_equal(np.asarray(end)[:, mask], h[:, mask])
    # what the residual measures
    assert np.all(abs(np.asarray(free))[:, ~mask].max(1) <= np.asarray(residual) + 1e-9)


@pytest.mark.slow
def test_tokens_without_leak_converge_where_their_activations_rest():
    ham = HAM(
        {"t": LayerNormLayer((3, 8), leak=False)},
        {"a": AttentionSynapse.rand_init(jr.PRNGKey(2), 8, 2, 4)},
        [(("t",), "a")],
    )
    out = descend(ham, ham.init_states(key=jr.PRNGKey(3)), max_steps=500, rtol=1e-8, atol=1e-8)
    assert out.converged and out.rises == 0
    @jax.jit
    def pulled(xhats, xs):
        slope = ham.dEdact(xhats, xs)["t"]
        return slope, jax.vjp(ham.neurons["t"].activations, xs["t"])[1](slope)[0]
    slope, pull = map(np.asarray, pulled(out.xhats, out.xs))
    assert abs(pull).max() * abs(out.xs["t"]).max() < 1e-6 * abs(slope).max() * 10


# --------------------------------------------------------------------------------------------------
# -------------------
# the loop: many rows, schedules, records, derivatives, progress


def memory(beta=2.0):
    W = jr.normal(jr.PRNGKey(4), (10, 8))
    return HAM(
        {"v": IdentityLayer(10, tau=2.0), "h": SoftmaxLayer(8, beta=beta)},
        {"w": LinearSynapse(W)},
        [(("v", "h"), "w")],
    )


@pytest.mark.slow
def test_rows_that_leave_a_large_batch_get_what_they_get_alone():
    ham = memory()
    xs = ham.vectorize().init_states(300, key=jr.PRNGKey(5))
    xs["v"] = (xs["v"] * jnp.logspace(-3, 3, 300)[:, None]).at[7].set(jnp.nan)
    out = descend(ham.vectorize(), xs, trace=Trace(every=3, states=True))
    few = [0, 7, 100, 250, 299]
    some = descend(
        ham.vectorize(),
        {n: x[jnp.array(few)] for n, x in xs.items()},
        trace=Trace(every=3, states=True),
    )
    for name in ("steps", "code", "rises"):
        assert np.array_equal(getattr(out, name)[jnp.array(few)], getattr(some, name))
    close(out.energies[jnp.array(few)], some.energies, 1e-7)
    close(out.records["states"]["v"][jnp.array(few)], some.records["states"]["v"], 1e-6, 1e-9)
    assert len(set(out.steps.tolist())) > 5 and out.code[7] == NONFINITE


def test_schedules_of_the_step_and_of_beta_are_the_loop_by_hand():
    ham, dt, beta = memory(jnp.array(2.0)), lambda k: 0.3 / (1 + k), lambda k: 0.5 + k / 10
    xs = ham.init_states(key=jr.PRNGKey(6))
    out = descend(ham, xs, solver=Euler(dt), anneal={"h": beta}, max_steps=7)
    @jax.jit
    def step(now, xs, dt):
        E, g = now.dEdact(now.activations(xs), xs, return_energy=True)
        return E, {n: x - dt / now.neurons[n].tau * g[n] for n, x in xs.items()}
    energies = []
    for k in range(8):
        E, after = step(memory(jnp.array(beta(k))), xs, dt(k))
        energies.append(E)
        if k < 7: xs = after
    close(out.energies, energies, 1e-12)
    close(out.xs["v"], xs["v"], 1e-12)


@pytest.mark.slow(but=1)
@pytest.mark.parametrize(
    "adjoint",
    [optx.RecursiveCheckpointAdjoint(), optx.ImplicitAdjoint()],
    ids=["steps", "implicit"],
)
def test_records_with_every_adjoint(adjoint):
    ham = memory()
    xs = ham.init_states(key=jr.PRNGKey(7))
    watch = Trace(parts=True, functions={"first": lambda xs: xs["v"][0]})
    def loss(ham, trace, adjoint=adjoint):
        out = descend(
            ham, xs, solver=Euler(0.5), rtol=0.0, atol=1e-11, adjoint=adjoint, trace=trace
        )
        return out.xs["v"] @ jnp.arange(10.0) + out.energy, out
    both = jax.jit(lambda ham: [jax.grad(loss, has_aux=True)(ham, t) for t in (watch, False)])
    (slope, out), (plain, _) = both(ham)
    close(slope.hypersynapses["w"].W, plain.hypersynapses["w"].W, 1e-12)
    k = int(out.steps)
    close(sum(jtu.tree_leaves(out.records["parts"]))[:k + 1], out.energies[:k + 1], 1e-12)
    close(out.records["first"][jnp.array([0, k])], [xs["v"][0], out.xs["v"][0]], 1e-12)
    h = 1e-5
    W = ham.hypersynapses["w"].W
    i, j = np.unravel_index(np.argmax(abs(slope.hypersynapses["w"].W)), W.shape)
    def at(d):
        near = {"w": LinearSynapse(W.at[i, j].add(d))}
        return loss(HAM(dict(ham.neurons), near, ham.connections), False, "checkpointed")[0]
    close(slope.hypersynapses["w"].W[i, j], (at(h) - at(-h)) / (2 * h), 1e-5)


@pytest.mark.slow
def test_a_progress_bar_is_harmless_under_grad_and_vmap(capsys):
    ham = memory()
    f = lambda x, progress: descend(
        ham, {"v": x, "h": jnp.zeros(8)}, solver=Euler(0.5), max_steps=20, progress=progress
    ).energy
    x = jr.normal(jr.PRNGKey(8), (3, 10))
    got, expected = (jax.vmap(jax.grad(lambda x, p=p: f(x, p)))(x) for p in (True, False))
    jax.effects_barrier()
    assert np.array_equal(got, expected) and "descend" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# -------------------
# temperature


@pytest.mark.slow
def test_langevin_has_the_law_of_the_energy_for_sigmoid_neurons():
    W, T = np.array([[0.0, 1.5], [1.5, 0.0]]) / 2, 0.2
    ham = HAM(
        {"x": SigmoidLayer(2, beta=2.0)},
        {"w": LinearSynapse(W), "b": BiasSynapse(np.array([-0.8, -0.7]))},
        [(("x", "x"), "w"), (("x",), "b")],
    )
    p = np.linspace(1e-4, 1 - 1e-4, 400)
    a, b = np.meshgrid(p, p, indexing="ij")
    # the Legendre transform of softplus(βx)/β
    own = (a * np.log(a) + (1 - a) * np.log1p(-a) + b * np.log(b) + (1 - b) * np.log1p(-b)) / 2.0
    weight = np.exp(-(own - 1.5 * a * b + 0.8 * a + 0.7 * b) / T)
    weight /= weight.sum()
    n = 4000
    out = descend(
        ham.vectorize(),
        ham.vectorize().init_states(n),
        solver=Langevin(0.02, T),
        max_steps=1000,
        key=jr.PRNGKey(9),
        trace=False,
    )
    assert np.all(out.code == SAMPLED) and not out.rises.any()
    for f in (lambda a, b: a, lambda a, b: a * b, lambda a, b: (a - 0.5)**2):
        got, mean = f(*np.asarray(out.xhats["x"]).T), (f(a, b) * weight).sum()
        assert abs(got.mean() - mean) < 4 * got.std() / n**0.5 + 0.02 * abs(mean)


@pytest.mark.slow
def test_chains_have_keys_of_their_own_and_clamps_hold():
    ham = HAM(
        {"x": IdentityLayer(3), "y": TanhLayer(2)},
        {"w": LinearSynapse(0.3 * np.ones((3, 2)))},
        [(("x", "y"), "w")],
    )
    xs = ham.vectorize().init_states(4, key=jr.PRNGKey(10))
    clamp = {"x": np.array([True, False, False])}
    run = lambda key: descend(
        ham.vectorize(), xs, solver=Langevin(0.1, 0.5), max_steps=20, key=key, clamp=clamp
    )
    out, again, other = run(jr.PRNGKey(1)), run(jr.PRNGKey(1)), run(jr.PRNGKey(2))
    assert np.array_equal(out.xs["y"], again.xs["y"]) and not np.array_equal(
        out.xs["y"], other.xs["y"]
    )
    assert (
        np.array_equal(out.xs["x"][:, 0], xs["x"][:, 0]) and len(np.unique(out.xs["x"][:, 1])) == 4
    )
    alone = descend(
        ham,
        {n: x[2] for n, x in xs.items()},
        solver=Langevin(0.1, 0.5),
        max_steps=20,
        key=jr.split(jr.PRNGKey(1), 4)[2],
        clamp=clamp,
    )
    close(alone.xs["x"], out.xs["x"][2], 1e-12)


@pytest.mark.slow
def test_a_ramp_is_over_where_rounding_says_so():
    """0.9 − 100 · 0.009 is 1e-16, 1.35 − 150 · 0.009 is 1e-7 in float32, noise that nothing
    resolves; 0.7 − 100 · 0.007 is −1e-16, without a root. A temperature that stays is one"""
    wells = {"wells": lambda x: (0.25 * x**4 - 1.5 * x**2 - 0.15 * x).sum()}
    ham = HAM({"x": IdentityLayer(1)}, wells, [(("x",), "wells")]).vectorize()
    def run(T, dtype=jnp.float64):
        xs = {"x": jnp.full((4, 1), 0.9, dtype)}
        return descend(ham, xs, solver=Langevin(0.1, T), max_steps=900, key=jr.key(0), trace=False)
    def ramp(start, slope, steps, dtype):
        start, slope = jnp.asarray(start, dtype), jnp.asarray(slope, dtype)
        return lambda s: start - jnp.minimum(s, steps).astype(dtype) * slope
    for start, slope, steps, dtype, sign in (
        (0.9, 0.009, 100, jnp.float64, 1),
        (1.35, 0.009, 150, jnp.float32, 1),
        (0.7, 0.007, 100, jnp.float64, -1),
    ):
        T = ramp(start, slope, steps, dtype)
        assert sign * T(jnp.array(900)) > 0 # not 0 by accident
        out = run(T, dtype)
        assert (out.code == CONVERGED).all() and (out.steps >= steps).all()
    assert (run(lambda s: jnp.where(s < 100, 0.5, 1e-9)).code == SAMPLED).all()


@pytest.mark.slow
def test_the_default_solver_has_the_gradient_of_the_fixed_point():
    ham = memory()
    xs = ham.init_states(key=jr.PRNGKey(11))
    loss = lambda ham, adjoint: descend(ham, xs, adjoint=adjoint).xs["v"] @ jnp.arange(10.0)
    adjoints = optx.RecursiveCheckpointAdjoint(), optx.ImplicitAdjoint()
    both = jax.jit(lambda ham: [jax.grad(loss)(ham, a).hypersynapses["w"].W for a in adjoints])
    steps, implicit = both(ham)
    close(steps, implicit, 1e-7, 1e-7 * float(abs(implicit).max()))
