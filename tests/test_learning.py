"""Gradients through recall: every adjoint on every kind of layer and synapse, equilibrium
propagation, a user's own method, jit, vmap, two devices, rows that have no gradient."""

import functools
import os
import subprocess
import sys
import textwrap

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import hamux as hmx
from hamux import (
    HAM,
    Backtracking,
    EquilibriumPropagation,
    Euler,
    ImplicitAdjoint,
    OneStepAdjoint,
    descend,
    gradient,
)
from hamux.learning.gradients import Gradient, row_losses


@pytest.fixture(autouse=True, scope="module")
def x64():
    with jax.enable_x64(True):  # for this module alone
        yield


class Cubic(eqx.Module):
    "A synapse of a user: an odd energy of two layers, not affine in either."
    W: jax.Array
    def __call__(self, a, b): return -jnp.sin(a) @ self.W @ b**2 / 5


def every_kind():
    "A network with every layer and every synapse of the library, and one of a user's."
    k = iter(jr.split(jr.PRNGKey(3), 40))
    w = lambda *shape: 0.25 * jr.normal(next(k), shape, float)
    beta = lambda v: jnp.array(v, float)
    layers = {
        "image": hmx.TanhLayer((6, 6, 1), beta=beta(0.9)),
        "maps": hmx.ReluLayer((3, 3, 2)),
        "pooled": hmx.SigmoidLayer((1, 1, 2), tau=beta(1.5)),
        "tokens": hmx.LayerNormLayer((3, 4), gamma=beta(1.1), delta=w(4)),
        "other": hmx.SphericalNormLayer((2, 4), eps=0.5),
        "label": hmx.SoftmaxLayer(5, beta=beta(1.3)),
        "rest": hmx.GhostmaxLayer(3),
        "linear": hmx.IdentityLayer(4),
        "power": hmx.RepuLayer(4, n=3),
        "exp": hmx.ExpLayer(3, beta=beta(0.5)),
        "rexp": hmx.RexpLayer(3, beta=beta(0.7)),
    }
    synapses = {
        "conv": hmx.ConvSynapse(w(2, 1, 3, 3), window_strides=2),
        "pool": hmx.PoolSynapse(3, kind="average"),
        "self": hmx.AttentionSynapse.rand_init(next(k), 4, 2, 3),
        "cross": hmx.AttentionSynapse(w(2, 3, 4), w(2, 3, 4), beta(0.8)),
        "features": hmx.RandomFeatureMemory.store(next(k), w(5, 4), 0.5, 40),
        "memory": hmx.MemorySynapse(w(6, 4), hmx.lagr_softmax),
        "near": hmx.MemorySynapse(
            w(6, 4), functools.partial(hmx.lagr_softmax, beta=beta(2.0)), similarity="euclidean"
        ),
        "W": hmx.LinearSynapse(w(4, 5)),
        "Wb": hmx.LinearSynapseWithBias(w(5, 3), w(3)),
        "three": hmx.DenseSynapse(w(4, 3, 3)),
        "bias": hmx.BiasSynapse(w(3) - 0.5),
        "cubic": Cubic(w(4, 4)),
        "flat": lambda t, x, W=w(12, 4): -t.reshape(-1) @ W @ x,
        "down": lambda p, x, W=w(2, 4): -p.reshape(-1) @ W @ x,
        "side": hmx.DenseSynapse(w(2, 4, 3)),
    }
    joined = [
        (("image", "maps"), "conv"),
        (("maps", "pooled"), "pool"),
        (("tokens",), "self"),
        (("tokens", "other"), "cross"),
        (("linear",), "features"),
        (("linear",), "memory"),
        (("linear",), "near"),
        (("linear", "label"), "W"),
        (("label", "rest"), "Wb"),
        (("power", "exp", "rest"), "three"),
        (("exp",), "bias"),
        (("rexp",), "bias"),
        (("linear", "power"), "cubic"),
        (("tokens", "linear"), "flat"),
        (("pooled", "linear"), "down"),
        (("other", "rexp"), "side"),
    ]
    return HAM(layers, synapses, joined)


MASK = {"image": np.arange(36).reshape(6, 6, 1) % 3 == 0}


def loss_of(xs, xhats):
    "Of every layer: of its activation, and of its state."
    return sum(
        (jnp.sin(xhats[n] + i) + 0.1 * jnp.cos(x + i)).sum() / x.size
        for i, (n, x) in enumerate(xs.items())
    )


def recalled(ham, xs, adjoint, steps=1500):
    out = descend(
        ham,
        xs,
        solver=Euler(0.25),
        clamp=MASK,
        max_steps=steps,
        rtol=0.0,
        atol=1e-12,
        adjoint=adjoint,
        trace=False,
    )
    return loss_of(out.xs, out.xhats) + 0.1 * out.energy, out


@functools.cache
def kinds():
    "A network of every kind, and a start."
    ham = every_kind()
    xs = ham.init_states(key=jr.PRNGKey(1))
    return ham, xs | {"rest": xs["rest"] - 1}


@functools.cache
def of_every_kind(adjoint):
    "The program of value and gradient of all of them, and its gradient"
    loss = functools.partial(recalled, adjoint=adjoint)
    go = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, out), grads = go(*kinds())
    assert out.converged, out.result
    return go, grads


@pytest.mark.slow # of fewer kinds: tokens that grow, and test_dynamics, test_solvers
def test_every_kind_has_the_same_gradient_through_its_steps():
    a, b = (ravel_pytree(of_every_kind(adjoint)[1])[0] for adjoint in ("checkpointed", "implicit"))
    assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(b)


@pytest.mark.slow
def test_every_kind_of_layer_and_synapse():
    (ham, xs), (go, grads) = kinds(), of_every_kind("implicit")
    idle = [
        jtu.keystr(path) for path, v in jtu.tree_flatten_with_path(grads[0])[0] if not np.any(v)
    ]
    # all that can learn does; a fixed point does not know τ
    assert all(".frequencies" in name or "._tau" in name for name in idle), idle

    for seed in range(2): # and it is the derivative, along a random direction
        rng = np.random.default_rng(seed)
        # these are held
        d = jtu.tree_map_with_path(
            lambda path, v, rng=rng: jnp.asarray(
                rng.normal(size=v.shape) * (".frequencies" not in jtu.keystr(path))
            ),
            (ham, xs),
        )
        at = lambda t, d=d: go(*jtu.tree_map(lambda v, dv: v + t * dv, (ham, xs), d))[0][0]
        exact = sum(
            (g * dv).sum()
            for g, dv in zip(jtu.tree_leaves(grads), jtu.tree_leaves(d), strict=True)
        )
        np.testing.assert_allclose((at(1e-5) - at(-1e-5)) / 2e-5, exact, rtol=1e-5)


# --------------------------------------------------------------------------------------------------
# one small network, every method


def small(scale=1.0):
    k = jr.split(jr.PRNGKey(5), 3)
    return HAM(
        {
            "v": hmx.TanhLayer(5, tau=jnp.array(1.5)),
            "h": hmx.SoftmaxLayer(4, beta=jnp.array(2.0)),
            "r": hmx.ReluLayer(3),
        },
        {
            "w": hmx.LinearSynapse(scale * jr.normal(k[0], (5, 4), float)),
            "u": hmx.LinearSynapse(0.5 * jr.normal(k[1], (5, 3), float)),
            "b": hmx.BiasSynapse(jr.normal(k[2], (5,), float)),
        },
        [(("v", "h"), "w"), (("v", "r"), "u"), (("v",), "b")],
    )


def miss(xhats, y):
    return ((xhats["h"] - jax.nn.one_hot(y, 4)) ** 2).sum() + xhats["v"][3] * xhats["r"].sum()


ROWS = 6
CLAMP = {"v": np.arange(5) < 2}
SETTINGS = dict(clamp=CLAMP, solver=Euler(0.5), max_steps=1500, rtol=0.0, atol=1e-12)


def batch(): return small().vectorize().init_states(ROWS, key=jr.PRNGKey(2)), jnp.arange(ROWS) % 4


@functools.cache
def by(method):
    xs, y = batch()
    return jax.jit(lambda ham: gradient(ham, miss, xs, targets=y, method=method, **SETTINGS))(
        small().vectorize()
    )


def flat(tree): return np.asarray(ravel_pytree(tree)[0])
def cosine(a, b): return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


@pytest.mark.slow
def test_methods_agree():
    exact = by("implicit")
    assert isinstance(exact.grads, hmx.VectorizedHAM) and exact.equilibria["free"].converged.all()
    assert np.linalg.norm(flat(by("unrolled").grads) - flat(exact.grads)) < 1e-6 * np.linalg.norm(
        flat(exact.grads)
    )
    ep = by(EquilibriumPropagation(0.01))
    assert cosine(flat(ep.grads), flat(exact.grads)) > 0.99999 and set(ep.equilibria) == {
        "free",
        "nudged",
        "nudged back",
    }
    assert ep.value == exact.value and all(d.converged.all() for d in ep.equilibria.values())
    one = by(EquilibriumPropagation(0.01, centred=False))
    assert cosine(flat(one.grads), flat(exact.grads)) > 0.999 and set(one.equilibria) == {
        "free",
        "nudged",
    }


class ForwardGradient(hmx.AbstractMethod):
    "A user's own method: derivatives along random orthonormal directions, forwards only."
    directions: int | jax.Array

    def gradient(self, ham, loss, xs, targets, clamp, recall):
        rows, (theta, unravel) = row_losses(loss, ham, targets), ravel_pytree(ham)
        def value(theta):
            end = recall(unravel(theta), xs, clamp=clamp, adjoint="implicit")
            return rows(end.xhats, targets).mean(), end
        basis = jr.orthogonal(jr.PRNGKey(0), theta.size)
        basis *= (jnp.arange(theta.size) < self.directions)[:, None]
        slope = lambda d: jax.jvp(value, (theta,), (d,), has_aux=True)[1]
        mean, end = value(theta)
        return Gradient(mean, unravel(jax.lax.map(slope, basis) @ basis), {"free": end})


@pytest.mark.slow
def test_a_method_of_a_user():
    "In `gradient`, in a loss and in `fit`, with no other file touched."
    xs, y = batch()
    exact, size = flat(by("implicit").grads), ravel_pytree(small())[0].size
    along = jax.jit(
        lambda ham, n: gradient(ham, miss, xs, targets=y, method=ForwardGradient(n), **SETTINGS)
    )
    whole, half = (flat(along(small().vectorize(), n).grads) for n in (size, size // 2))
    np.testing.assert_allclose(whole, exact, atol=1e-9)
    np.testing.assert_allclose(half @ half, half @ exact)  # a projection

    prepare = lambda ham, batch, key: batch
    loss = hmx.RecallLoss(prepare, miss, method=ForwardGradient(size), **SETTINGS)
    np.testing.assert_allclose(loss(small(), (xs, y), jr.PRNGKey(0)), by("implicit").value)
    with pytest.raises(TypeError, match="ForwardGradient.* is not an adjoint"):
        jax.grad(loss)(small(), (xs, y), jr.PRNGKey(0))
    data = jtu.tree_map(np.asarray, (xs, y))
    settings = dict(steps=1, batch_size=ROWS, key=jr.PRNGKey(0), progress=False)
    out = hmx.fit(small(), loss, data, optax.sgd(0.1), **settings)
    np.testing.assert_allclose(flat(out.ham), flat(small()) - 0.1 * exact, atol=1e-9)
    assert out.unconverged.tolist() == [0]


@pytest.mark.slow
def test_a_batch_is_the_mean_of_its_rows_and_of_vmap():
    xs, y = batch()
    one = lambda xs, y: gradient(small(), miss, xs, targets=y, **SETTINGS)
    rows = jax.jit(jax.vmap(one))(xs, y)
    np.testing.assert_allclose(rows.value.mean(), by("implicit").value, rtol=1e-9)
    np.testing.assert_allclose(
        flat(jtu.tree_map(lambda v: v.mean(0), rows.grads)),
        flat(by("implicit").grads),
        rtol=1e-7,
        atol=1e-10,
    )


@pytest.mark.slow
def test_second_derivatives():
    xs, y = batch()
    d = jtu.tree_map(lambda v: jnp.asarray(np.random.default_rng(0).normal(size=v.shape)), small())
    def along(t, adjoint):
        ham = jtu.tree_map(lambda v, dv: v + t * dv, small(), d).vectorize()
        out = descend(
            ham, xs, adjoint=adjoint, trace=False, **{**SETTINGS, "max_steps": 300, "atol": 1e-10}
        )
        return jax.vmap(miss)(out.xhats, y).mean()
    implicit, unrolled = (
        jax.grad(functools.partial(along, adjoint=adjoint)) for adjoint in ("implicit", "unrolled")
    )
    go = jax.jit(lambda t: jax.jvp(implicit, (t,), (1.0,)))
    first, forward = go(0.0)
    again, reverse = jax.jit(jax.value_and_grad(unrolled))(0.0)
    np.testing.assert_allclose((forward, first), (reverse, again), rtol=1e-5)
    np.testing.assert_allclose((go(1e-5)[0] - go(-1e-5)[0]) / 2e-5, forward, rtol=1e-4)


@pytest.mark.slow
def test_rows_that_have_not_converged_or_are_not_finite():
    xs, y = batch()
    xs = {n: x.at[1].set(jnp.nan) if n == "r" else x for n, x in xs.items()}
    xs["h"] = xs["h"].at[2].set(by("implicit").equilibria["free"].xs["h"][2])
    few = {**SETTINGS, "max_steps": 40, "atol": 1e-5}
    def grad(ham, unconverged):
        out = descend(ham, xs, adjoint=ImplicitAdjoint(unconverged=unconverged), trace=False, **few)
        return (
            jnp.where(
                jnp.isfinite(out.xhats["r"]).all(1), out.xhats["h"][:, 0] * out.xhats["r"][:, 0], 0
            ).sum(),
            out.converged,
        )
    go = lambda unconverged: eqx.filter_jit(
        jax.grad(functools.partial(grad, unconverged=unconverged), has_aux=True)
    )(small().vectorize())
    got, converged = go("drop")
    assert np.isfinite(flat(got)).all() and not converged.all() and not converged[1]
    assert np.isnan(flat(go("nan")[0])).any()
    with pytest.raises(eqx.EquinoxRuntimeError, match="has not converged"):
        jax.block_until_ready(go("raise"))


@pytest.mark.slow
def test_a_degenerate_valley_is_not_passed_over():
    def rest(w, adjoint): # v rests anywhere on an axis of curvature 0, and the loss asks where
        class Quadratic(eqx.Module):
            w: jax.Array
            def __call__(self, v): return -(self.w * v * v).sum() / 2
        return (
            descend(
                HAM([hmx.IdentityLayer(3)], [Quadratic(w)], [([0], 0)]),
                {0: jnp.ones(3)},
                solver=Backtracking(),
                adjoint=adjoint,
                trace=False,
            )
            .xs[0]
            .sum()
        )
    flat_floor = jnp.array([0.5, 1.0, 0.2])
    with pytest.raises(eqx.EquinoxRuntimeError, match="flat floor"):
        eqx.filter_jit(jax.grad(rest))(flat_floor, ImplicitAdjoint())
    np.testing.assert_array_equal(
        jax.grad(rest)(flat_floor, ImplicitAdjoint(unconverged="drop")), np.zeros(3)
    )


def test_the_one_step_adjoint_is_the_first_term_of_the_series():
    W = 0.2 * jr.normal(jr.PRNGKey(0), (4, 4), float)
    W = W + W.T
    def rest(b, adjoint):
        ham = HAM(
            [hmx.IdentityLayer(4)],
            [lambda v: -v @ W @ v / 2, hmx.BiasSynapse(b)],
            [([0], 0), ([0], 1)],
        )
        return descend(
            ham,
            {0: jnp.zeros(4)},
            solver=Euler(0.5),
            adjoint=adjoint,
            rtol=0.0,
            atol=1e-12,
            trace=False,
        ).xs[0]
    b = jnp.ones(4)
    for n, dt in ((1, 1.0), (2, 0.5)):
        M = (1 - dt) * np.eye(4) + dt * np.asarray(W)
        series = dt * sum(np.linalg.matrix_power(M, i) for i in range(n))
        np.testing.assert_allclose(
            jax.jacrev(rest)(b, OneStepAdjoint(n, dt)), series, rtol=1e-9, atol=1e-12
        )


# --------------------------------------------------------------------------------------------------
# through the steps of solvers that find their lengths, on twenty networks


@functools.partial(jax.jit, static_argnames=("solver", "max_steps"))
def errors_of_the_steps(atol, solver=hmx.Adaptive(), max_steps=1000):
    """Relative errors of the default gradient, against central differences of the same descents,
    which change the lengths of the steps too."""
    settings = dict(solver=solver, max_steps=max_steps, atol=atol)
    def loss(theta, begin, aim):
        ham = HAM(
            {"v": hmx.TanhLayer(4), "h": hmx.SoftmaxLayer(3, beta=2.0)},
            {"W": hmx.LinearSynapse(theta[:12].reshape(4, 3)), "b": hmx.BiasSynapse(theta[12:])},
            [(("v", "h"), "W"), (("v",), "b")],
        )
        xs = {"v": begin[:4], "h": begin[4:]}
        out = descend(ham, xs, rtol=0.0, trace=False, **settings)
        return ((jnp.concatenate([out.xhats["v"], out.xhats["h"]]) - aim) ** 2).sum()

    def differences(theta, *at):
        moves = 1e-6 * jnp.stack([jnp.eye(16), -jnp.eye(16)])
        ahead, behind = jax.vmap(jax.vmap(lambda d: loss(theta + d, *at)))(moves)
        return (ahead - behind) / 2e-6

    keys = jr.split(jr.key(0), 4)[1:] # the networks of the page
    at = [jr.normal(key, (20, size)) for key, size in zip(keys, (16, 7, 7), strict=True)]
    slopes = jax.vmap(differences)(*at)
    size = lambda v: jnp.linalg.norm(v, axis=1)
    return size(jax.vmap(jax.grad(loss))(*at) - slopes) / size(slopes)


@pytest.mark.slow # the page of adjoints asserts as much of loose tolerances
@pytest.mark.parametrize("steps", [5, 10, 20, 40])
def test_unfinished_descents_of_the_default_solver_have_no_exact_gradient(steps):
    "What is left out is as large as the gradient; see *Lengths that are found*."
    error = np.asarray(errors_of_the_steps(1e-12, max_steps=steps))
    print(f"{steps} steps: median {np.median(error):.1e}, worst {error.max():.1e}")
    assert np.median(error) < (0.5 if steps < 40 else 0.01)
    assert error.max() < 10
    if steps < 20: assert np.median(error) > 0.01


@pytest.mark.slow # the page of adjoints asserts it, too
def test_the_error_of_the_default_solver_dies_out_as_it_converges():
    loose, close, rest = (np.asarray(errors_of_the_steps(tol)) for tol in (1e-3, 1e-6, 1e-11))
    print(*(f"median {np.median(e):.1e}, worst {e.max():.1e}" for e in (loose, close, rest)))
    assert np.median(loose) < 1e-2 and np.median(close) < 1e-5
    assert close.max() < 1e-2 and rest.max() < 1e-6


@jax.jit
def slopes_from_rest(first, start):
    "Of the energy of a descent in β, and of what it should be: of ReLU neurons, or of sparsemax."
    b = jnp.arange(5.0) / 3
    def lagrangian(x, beta, first):
        return jnp.where(first > 0, hmx.lagr_relu(beta * x), hmx.lagr_sparsemax(beta * x))
    def end(beta):
        layer = hmx.NeuronLayer(jtu.Partial(lagrangian, beta=beta, first=first), 5)
        ham = HAM({"x": layer}, {"b": hmx.BiasSynapse(b)}, [(("x",), "b")])
        x = {"x": jnp.full(5, start)}
        return descend(ham, x, trace=False, rtol=0.0, atol=1e-10).energy
    return [jax.grad(f)(jnp.array(2.0)) for f in (end, lambda beta: -lagrangian(b, beta, first))]


@pytest.mark.slow
@pytest.mark.parametrize("first, start", [(1.0, -1.0), (0.0, 0.0)], ids=["relu", "sparsemax"])
def test_activations_that_do_not_change_at_first_have_a_gradient(first, start):
    "At rest the energy is −L(b), and its slope that of L; the first error of a step is 0."
    np.testing.assert_allclose(*slopes_from_rest(first, start), rtol=1e-6)


@pytest.mark.slow(but=1)
@pytest.mark.parametrize(
    "solver",
    # the page of adjoints asserts it of Backtracking
    [Euler(0.5), hmx.Relaxation(), pytest.param(Backtracking(), marks=pytest.mark.slow)],
    ids=lambda s: type(s).__name__,
)
def test_unfinished_descents_of_other_solvers_have_an_exact_gradient(solver):
    "Lengths that are given, or jump, do not change with the parameters."
    assert errors_of_the_steps(1e-12, solver=solver, max_steps=8).max() < 1e-6


# --------------------------------------------------------------------------------------------------
# without leak


PLATEAUS = {
    "a ReLU that is off": (hmx.ReluLayer(2, leak=False), [-1.0, -2.0], [1.0, 1.0]),
    "a tanh on the wrong side": (hmx.TanhLayer(2, leak=False), [25.0, 30.0], [-1.0, -1.0]),
    "a softmax on the wrong entry": (hmx.SoftmaxLayer(2, leak=False), [60.0, 0.0], [0.0, 1.0]),
}


@pytest.mark.slow
def test_a_plateau_that_is_not_at_rest_has_no_implicit_gradient():
    """Though a layer that reads it stands still. All three cases are one network, and a row has one
    of them: the biases of the others hold what pulls at them"""
    W, layers, starts, synapses = 0.1 * jnp.eye(2), {}, {}, []
    for name, (layer, start, _) in PLATEAUS.items():
        layers |= {name: layer, f"reader of {name}": hmx.IdentityLayer(2)}
        starts |= {name: jnp.array(start)}
        starts[f"reader of {name}"] = W @ layer.activations(starts[name])
        synapses.append(((name, f"reader of {name}"), hmx.LinearSynapse(W)))
    held = {n: -W @ starts[f"reader of {n}"] for n in PLATEAUS}
    def read(biases, unconverged):
        parts = [*synapses, *(((n,), hmx.BiasSynapse(b)) for n, b in biases.items())]
        ham = HAM(layers, [p for _, p in parts], [(on, i) for i, (on, _) in enumerate(parts)])
        settings = dict(solver=Euler(1e-3), max_steps=1, trace=False)
        out = descend(ham, starts, adjoint=ImplicitAdjoint(unconverged=unconverged), **settings)
        return sum(out.xhats[f"reader of {n}"].sum() for n in PLATEAUS)
    go = eqx.filter_jit(jax.grad(read))
    for name in PLATEAUS:
        biases = held | {name: jnp.array(PLATEAUS[name][2])}
        with pytest.raises(eqx.EquinoxRuntimeError, match="has not converged"):
            jax.block_until_ready(go(biases, "raise"))
        assert jnp.isnan(go(biases, "nan")[name]).all()
    assert all(jnp.isfinite(v).all() for v in go(held, "nan").values()) # no other case is at fault


@pytest.mark.slow
def test_tokens_that_grow_along_themselves_have_the_gradient_of_the_steps():
    "The activations of a layer norm without leak are at rest; Euler's steps grow with the states."
    keys = jr.split(jr.key(11), 4)
    tokens = hmx.LayerNormLayer((3, 4), leak=False)
    aim = jr.normal(keys[0], (3, 4))
    xs = {"t": jr.normal(keys[1], (3, 4))}
    synapses = (
        hmx.AttentionSynapse.rand_init(keys[2], 4, 2, 3),
        hmx.BiasSynapse(4 * jr.normal(keys[3], (3, 4))),
    )
    def loss(synapses, adjoint):
        ham = HAM({"t": tokens}, list(synapses), [(("t",), 0), (("t",), 1)])
        growing = Euler(lambda step: 0.1 * 1.3**step)
        settings = dict(solver=growing, max_steps=400, rtol=0.0, atol=1e-11, trace=False)
        out = descend(ham, xs, adjoint=adjoint, **settings)
        return (out.xhats["t"] * aim).sum(), (out.converged, ham.dEdact(out.xhats, out.xs)["t"])
    go = lambda adjoint: eqx.filter_jit(eqx.filter_grad(loss, has_aux=True))(synapses, adjoint)
    implicit, (converged, slope) = go("implicit")
    through, _ = go("checkpointed")
    assert converged and abs(slope).max() > 1
    a, b = flat(implicit), flat(through)
    print(f"apart by {np.linalg.norm(a - b) / np.linalg.norm(b):.1e}")
    assert np.linalg.norm(b) > 1e-3 and np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(b)


@pytest.mark.slow
def test_a_batch_over_two_devices(tmp_path):
    code = f"""
        import jax, numpy as np, jax.numpy as jnp
        jax.config.update("jax_enable_x64", True)
        import sys; sys.path.insert(0, "tests")
        from test_learning import SETTINGS, batch, flat, miss, small
        from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
        from hamux import gradient
        assert jax.device_count() == 2
        xs, y = batch()
        shared = NamedSharding(Mesh(np.array(jax.devices()), ("rows",)), P("rows"))
        go = jax.jit(lambda ham, xs, y: gradient(ham, miss, xs, targets=y, **SETTINGS))
        two = go(small().vectorize(), *jax.device_put((xs, y), shared))
        assert len(two.equilibria["free"].xs["h"].sharding.device_set) == 2
        one = np.load({str(tmp_path / "one.npy")!r})
        np.testing.assert_allclose(flat(two.grads), one, rtol=1e-9, atol=1e-12)
    """
    np.save(tmp_path / "one.npy", flat(by("implicit").grads))
    env = {
        **os.environ,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2",
    }
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=env,
        cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
    )
    assert out.returncode == 0, out.stderr[-3000:]
