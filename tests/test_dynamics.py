"""Descents against hand-written loops, closed forms and finite differences; clamps, rows, dtypes,
recompilation, bad input."""

import functools
import math
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
import pytest

import hamux as hmx
from hamux import (
    HAM,
    BiasSynapse,
    DenseSynapse,
    Euler,
    IdentityLayer,
    LayerNormLayer,
    LinearSynapse,
    LinearSynapseWithBias,
    ReluLayer,
    SigmoidLayer,
    SoftmaxLayer,
    TanhLayer,
)
from hamux import descend as any_descend

CONVERGED, MAX_STEPS, NONFINITE, UNBOUNDED = 1, 2, 3, 4
descend = functools.partial(any_descend, solver=Euler())


@pytest.fixture(autouse=True, scope="module")
def x64():
    with jax.enable_x64(True):  # for this module alone
        yield


def close(got, expected, rtol=1e-9, atol=1e-11):
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol)


def trees_close(got, expected, **tol):
    assert set(got) == set(expected)
    for n in got: close(got[n], expected[n], **tol)


def same_bits(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@functools.cache
def two_layers(key, scale=1.0):
    k = jr.split(jr.PRNGKey(key), 2)
    return HAM(
        {"v": TanhLayer(5, tau=1.5), "h": SoftmaxLayer(4, beta=2.0)},
        {
            "w": LinearSynapse.rand_init(k[0], 5, 4, scale=scale),
            "b": BiasSynapse(jr.normal(k[1], (5,))),
        },
        [(("v", "h"), "w"), (("v",), "b")],
    )


@functools.cache
def grids(key):
    "Several axes, arity 3, a layer joined to itself, a learned tau."
    k = jr.split(jr.PRNGKey(key), 3)
    return HAM(
        [IdentityLayer((2, 3), tau=jnp.array(0.7)), LayerNormLayer((2, 2)), SigmoidLayer(4)],
        [
            DenseSynapse.rand_init(k[0], (2, 3), (2, 2), 4, scale=0.1),
            DenseSynapse.rand_init(k[1], 4, 4, scale=0.5),
            BiasSynapse(jr.normal(k[2], (2, 3))),
        ],
        [((0, 1, 2), 0), ((2, 2), 1), ((0,), 2)],
    )


class Memory(eqx.Module):
    xi: jax.Array
    def __call__(self, x): return 0.5 * (x * x).sum() - jax.nn.logsumexp(2.0 * self.xi @ x) / 2.0


@functools.cache
def leakless(key):
    return HAM(
        {"x": IdentityLayer(4, leak=False, tau=2.0), "y": ReluLayer((2, 2), tau=0.5)},
        {
            "m": Memory(jr.normal(jr.PRNGKey(key), (6, 4))),
            "w": DenseSynapse.rand_init(jr.PRNGKey(key + 1), 4, (2, 2), scale=0.15),
        },
        [(("x",), "m"), (("x", "y"), "w")],
    )


NETWORKS = {"two layers": two_layers, "grids": grids, "leakless": leakless}


@functools.partial(jax.jit, static_argnames=("n", "cut"))
def by_hand(ham, xs, dt, n, held=None, cut=()):
    """n steps of x ← x − (dt/τ) ∂E/∂x̂ outside of `held`: the end, and the energies and states
    before each step and after the last; for `cut`, ∂E(σ(x), x)/∂x."""
    held = held or {}
    def step(xs, _):
        E, g = ham.dEdact(ham.activations(xs), xs, return_energy=True)
        for m in cut:
            g[m] = jax.grad(
                lambda x: ham.energy(ham.activations({**xs, m: x}), {**xs, m: x}).sum()
            )(xs[m])
        ahead = {m: x - dt / ham.neurons[m].tau * g[m] for m, x in xs.items()}
        return {m: jnp.where(held.get(m, False), xs[m], x) for m, x in ahead.items()}, (E, xs)
    _, (energies, path) = jax.lax.scan(step, xs, length=n + 1)
    return {m: x[n] for m, x in path.items()}, jnp.moveaxis(energies, 0, -1), path


activations = jax.jit(lambda ham, xs: ham.activations(xs))
currents = jax.jit(
    lambda ham, xhats: jax.grad(lambda a: -sum(e.sum() for e in ham.connection_energies(a)))(xhats)
)


def start(ham, key=3, bs=None):
    return (ham.vectorize() if bs else ham).init_states(bs, key=jr.PRNGKey(key))


never = dict(rtol=0.0, atol=0.0)  # not to stop before max_steps


# --------------------------------------------------------------------------------------------------
# -------------------
# the flow


@pytest.mark.slow(but=1)
@pytest.mark.parametrize("name", NETWORKS)
def test_euler_is_the_hand_written_loop_never_climbs_and_ends_where_the_fixed_point_equation_holds(
    name,
):
    # with dt an array, all descents of a network are one program
    steps, run = 1000, functools.partial(descend, max_steps=1000)
    for key in range(2):
        ham = NETWORKS[name](key)
        xs = start(ham, key, 8)
        out = run(ham.vectorize(), xs, solver=Euler(jnp.array(0.01)), **never)
        end, energies, _ = by_hand(ham.vectorize(), xs, 0.01, steps)
        trees_close(out.xs, end)
        close(out.energies, energies)
        trees_close(out.xhats, activations(ham.vectorize(), end))
        assert (
            out.energies.shape == (8, steps + 1)
            and np.all(out.rises == 0)
            and np.all(out.steps == steps)
            and np.all(out.code == MAX_STEPS)
        )
        assert np.all(np.diff(energies) <= 1e-12 * (1 + abs(energies[:, 1:])))
        assert np.all(energies[:, -1] < energies[:, 0])

        out = run(ham.vectorize(), xs, solver=Euler(jnp.array(0.2)), rtol=0.0, atol=1e-8)
        assert np.all(out.converged) and np.all(out.residual <= 1e-8) and np.all(out.steps > 0)
        current = currents(ham.vectorize(), out.xhats)
        trees_close(
            {
                n: (out.xs[n] if ham.neurons[n].leak else 0.0) * np.ones_like(v)
                for n, v in current.items()
            },
            current,
            atol=2e-8,
        )
        largest = [
            np.abs((out.xs[n] if ham.neurons[n].leak else 0) - v).reshape(8, -1).max(1)
            for n, v in current.items()
        ]
        close(np.max(largest, 0), out.residual, rtol=1e-5, atol=1e-14)


def gaussian():
    "Identity layers: ½|v|² + ½|h|² − vᵀWh − b·v − c·h, with its quadratic form in numpy."
    rng = np.random.default_rng(0)
    W, b, c = rng.normal(size=(3, 2)) * 0.3, rng.normal(size=3), rng.normal(size=2)
    ham = HAM(
        {"v": IdentityLayer(3, tau=2.0), "h": IdentityLayer(2, tau=jnp.array(0.5))},
        {"w": LinearSynapseWithBias(W, c), "b": BiasSynapse(b)},
        [(("v", "h"), "w"), (("v",), "b")],
    )
    A = np.block([[np.eye(3), -W], [-W.T, np.eye(2)]])
    return ham, A, np.concatenate([b, c]), np.array([2.0] * 3 + [0.5] * 2)


def test_linear_gaussian_network_in_closed_form():
    ham, A, b, tau = gaussian()
    xs = start(ham)
    z0, fixed = np.concatenate([xs["v"], xs["h"]]), np.linalg.solve(A, b)
    # one program
    run = lambda dt, mask, **tols: descend(
        ham, xs, solver=Euler(jnp.array(dt)), clamp={"v": mask}, max_steps=200, **tols
    )
    out = run(0.01, np.zeros(3, bool), **never)
    z = fixed + np.linalg.matrix_power(np.eye(5) - 0.01 * A / tau[:, None], 200) @ (z0 - fixed)
    close(np.concatenate([out.xs["v"], out.xs["h"]]), z)
    close(out.energy, z @ A @ z / 2 - b @ z)
    close(out.residual, abs(A @ z - b).max())
    out = run(0.5, np.zeros(3, bool), rtol=0.0, atol=1e-10)
    close(np.concatenate([out.xs["v"], out.xs["h"]]), fixed, atol=1e-8)
    mask = np.array([True, False, True])
    # the mean of a Gaussian, conditioned on two variables
    out = run(0.5, mask, rtol=0.0, atol=1e-10)
    k, f = [0, 2], [1, 3, 4]
    close(
        np.concatenate([out.xs["v"], out.xs["h"]])[f],
        np.linalg.solve(A[np.ix_(f, f)], b[f] - A[np.ix_(f, k)] @ z0[k]),
        atol=1e-8,
    )


def test_fact_23_climbing_and_divergence_are_reported():
    ham = two_layers(0, scale=3.0)
    out = descend(ham, start(ham), solver=Euler(2.9), max_steps=20, **never)
    _, energies, _ = by_hand(ham, start(ham), 2.9, 20)
    assert out.rises == (np.diff(energies) > 0).sum() > 0
    assert f"rose in {int(out.rises)} of 20 steps" in out.result and "smaller dt" in out.result
    unbounded = HAM([IdentityLayer(2)], [DenseSynapse(4 * np.eye(2))], [((0, 0), 0)])
    out = descend(unbounded, {0: jnp.ones(2)}, solver=Euler(5.0))
    assert out.code == UNBOUNDED and not out.converged and np.all(np.isfinite(out.xs[0]))
    assert "not to be bounded below" in out.result and "rose" not in out.result


# --------------------------------------------------------------------------------------------------
# -------------------
# clamps


row_masks = np.arange(15).reshape(3, 5) % 2 == 0
CLAMPS = {
    "none": (None, {}),
    "empty": ((), {}),
    "false": ({"v": False}, {}),
    "name": ("h", {"h": True}),
    "list": (["h"], {"h": True}),
    "tuple": (("h",), {"h": True}),
    "true": ({"h": True}, {"h": True}),
    "mask": ({"v": row_masks[0]}, {"v": row_masks[0]}),
    "list mask": ({"v": [True, False, True, False, True]}, {"v": row_masks[0]}),
    "two": ({"v": jnp.asarray(row_masks[1]), "h": True}, {"v": row_masks[1], "h": True}),
    "rows": ({"v": row_masks}, {"v": row_masks}),
    "softmax": ({"h": np.arange(4) < 2}, {"h": np.arange(4) < 2}),
    "nothing": ({"v": np.zeros(5, bool)}, {}),
    "everything": ({"v": np.ones(5, bool)}, {"v": True}),
}


@pytest.mark.parametrize("case", CLAMPS)
def test_clamped_elements_stay_and_the_others_flow(case):
    clamp, held = CLAMPS[case]
    ham = two_layers(1)
    xs = start(ham, 3, 3)
    xs["v"] = (
        xs["v"].at[:, 0].set(-0.0).at[0, 2].set(1e300).at[1, 1].set(-1e-320).at[2, 4].set(30.0)
    )
    out = descend(ham.vectorize(), xs, clamp=clamp, max_steps=40, **never)
    assert np.all(out.code == MAX_STEPS)
    held = {n: np.broadcast_to(held.get(n, False), x.shape) for n, x in xs.items()}
    for n, m in held.items(): assert same_bits(np.asarray(out.xs[n])[m], np.asarray(xs[n])[m])
    end, energies, _ = by_hand(
        ham.vectorize(), xs, 0.1, 40, held, ("h",) if case == "softmax" else ()
    )
    trees_close(out.xs, end)
    close(out.energies, energies)


def test_one_clamp_by_position():
    ham = HAM([TanhLayer(3), TanhLayer(2)], [LinearSynapse(np.ones((3, 2)))], [((0, 1), 0)])
    xs = start(ham)
    out = descend(ham, xs, clamp=1, max_steps=5)
    assert same_bits(out.xs[1], xs[1]) and not same_bits(out.xs[0], xs[0])


def test_all_clamped_takes_no_step():
    ham = two_layers(0)
    xs = start(ham)
    E = by_hand(ham, xs, 0.1, 20)[1][0]
    for clamp in (["v", "h"], {"v": np.ones(5, bool), "h": np.ones(4, bool)}):
        out = descend(ham, xs, clamp=clamp, max_steps=7)
        assert out.steps == 0 and out.converged and out.residual == 0 and out.rises == 0
        assert all(same_bits(out.xs[n], xs[n]) for n in xs)
        close(out.energies, [E, *[np.nan] * 7])
    many = descend(ham.vectorize(), start(ham, 3, 2), clamp=["v", "h"], max_steps=7, trace=False)
    assert (
        many.energies is None
        and many.energy.shape == many.steps.shape == many.residual.shape == many.code.shape == (2,)
    )
    xs = {n: x.astype(jnp.float16) for n, x in xs.items()}
    kept = lambda clamp: jax.eval_shape(lambda: descend(ham, xs, clamp=clamp).residual).dtype
    assert kept(["v", "h"]) == kept("v")


@pytest.mark.parametrize(
    "name, clamp",
    [("h", "h"), ("v", {"v": np.arange(5) == 2}), ("v", ["v", "h"])],
    ids=["layer", "mask", "all"],
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_clamped_nan_is_reported(name, clamp, value):
    ham = two_layers(0)
    xs = start(ham, 3, 3)
    bad = {**xs, name: xs[name].at[0, 2].set(value)}
    # programs of the clamps above
    out, fine = (descend(ham.vectorize(), x, clamp=clamp, max_steps=40, **never) for x in (bad, xs))
    assert out.code[0] == NONFINITE and "finite" in out.result[0] and out.steps[0] == 0
    assert same_bits(out.xs["v"][0], bad["v"][0]) and same_bits(out.xs["h"][0], bad["h"][0])
    assert out.result[1] == fine.result[1] and same_bits(out.energies[1], fine.energies[1])


def test_nan_is_reported_where_the_energy_hides_it():
    "A leakless relu layer has the activation 0 at NaN: the energy is finite, the state is not."
    ham = HAM(
        {"r": ReluLayer(3, leak=False), "i": IdentityLayer(2)},
        {"w": LinearSynapse(np.ones((3, 2)))},
        [(("r", "i"), "w")],
    )
    out = descend(ham, {"r": jnp.array([jnp.nan, 1.0, 1.0]), "i": jnp.ones(2)}, clamp="r")
    assert out.code == NONFINITE and not out.converged


def test_a_large_clamped_element_does_not_loosen_the_tolerance():
    ham = HAM({"x": IdentityLayer(3)}, {"b": BiasSynapse(np.ones(3))}, [(("x",), "b")])
    out = descend(
        ham,
        {"x": jnp.array([1e12, 5.0, -5.0])},
        clamp={"x": np.array([True, False, False])},
        rtol=1e-6,
        atol=1e-6,
    )
    assert out.converged and out.steps > 0
    close(out.xs["x"][1:], [1.0, 1.0], atol=1e-5)


# --------------------------------------------------------------------------------------------------
# -------------------
# every row is on its own


def cubic():
    "½x² − x³/3 per neuron: from below 1 it falls to 0, from above 1 it falls for ever."
    return HAM({"x": IdentityLayer(2)}, {"c": lambda x: -(x**3).sum() / 3}, [(("x",), "c")])


def test_rows_are_independent():
    ham, many = cubic(), cubic().vectorize()
    x = jnp.array(
        [
            [0.5, -1.0],
            [np.nan, 0.2],
            [0.9, 0.9],
            [3.0, 0.1],
            [0.0, np.inf],
            [0.0, 0.0],
            [0.1, 0.99],
            [-np.inf, np.nan],
        ]
    )
    out = descend(many, {"x": x}, max_steps=400)
    np.testing.assert_array_equal(out.code, [1, 3, 1, UNBOUNDED, 3, 1, 1, 3])
    assert out.steps[5] == 0 and len(out.result) == 8
    for i, row in enumerate(x):
        alone = descend(ham, {"x": row}, max_steps=400)
        assert (out.steps[i], out.code[i], out.rises[i]) == (alone.steps, alone.code, alone.rises)
        assert out.result[i] == alone.result
        for got, expected in zip(
            (out.xs["x"][i], out.xhats["x"][i], out.energy[i], out.energies[i], out.residual[i]),
            (alone.xs["x"], alone.xhats["x"], alone.energy, alone.energies, alone.residual),
            strict=True,
        ):
            np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-300)
    good = np.array([0, 2, 5, 6, 0, 0, 0, 0])
    again = descend(many, {"x": x[good]}, max_steps=400)  # the same shapes, so the same program
    for i, j in enumerate(good[:4]):
        assert same_bits(again.xs["x"][i], out.xs["x"][j]) and same_bits(
            again.energies[i], out.energies[j]
        )
        assert again.steps[i] == out.steps[j] and same_bits(again.residual[i], out.residual[j])
    assert same_bits(out.xs["x"][1], x[1])  # a row that cannot start is returned as it was


@pytest.mark.slow
def test_gradients_of_good_rows_beside_bad_ones():
    x = jnp.array([[0.5, -1.0], [np.nan, 0.2], [0.7, 0.1], [3.0, 0.1]])
    W = jnp.array([[1.0, 0.3], [0.3, 0.8]])

    class Cubic(eqx.Module):
        W: jax.Array
        def __call__(self, x): return -(x**3).sum() / 3 - jnp.array([0.1, 0.05]) @ self.W @ x

    def loss(W, x, rows, adjoint):
        ham = HAM({"x": IdentityLayer(2)}, {"c": Cubic(W)}, [(("x",), "c")])
        out = descend(
            ham.vectorize(), {"x": x}, max_steps=300, adjoint=adjoint, rtol=0.0, atol=1e-9
        )
        return (out.xs["x"][rows] ** 2).sum()

    for adjoint in (optx.RecursiveCheckpointAdjoint(), optx.ImplicitAdjoint()):
        grad = jax.jit(lambda W, x, rows, adjoint=adjoint: jax.grad(loss)(W, x, rows, adjoint))
        mixed, alone = grad(W, x, np.array([0, 2])), grad(
            W, x[jnp.array([0, 2, 0, 2])], np.array([0, 1])
        )
        assert np.all(np.isfinite(mixed)) and np.any(mixed != 0)
        close(mixed, alone)


def test_an_empty_batch():
    many = cubic().vectorize()
    out = descend(many, {"x": jnp.zeros((0, 2))}, max_steps=5)
    assert out.xs["x"].shape == (0, 2) and out.energies.shape == (0, 6) and out.result == []


# --------------------------------------------------------------------------------------------------
# -------------------
# jit, vmap and gradients by the user


@pytest.mark.slow
def test_user_level_jit_and_vmap():
    ham = two_layers(0)
    batch = start(ham, 3, 3)
    # the program of the clamps above
    expected = descend(ham.vectorize(), batch, clamp={"v": row_masks}, max_steps=40)
    f = lambda ham, xs, mask: descend(ham, xs, clamp={"v": mask}, max_steps=40)
    out = jax.jit(jax.vmap(f, (None, 0, 0)))(ham, batch, row_masks)
    trees_close(out.xs, expected.xs)
    close(out.energies, expected.energies)
    assert out.result == expected.result and np.array_equal(out.code, expected.code)
    row, mask = jtu.tree_map(lambda v: v[0], batch), row_masks[0]
    hams = jtu.tree_map(lambda *v: jnp.stack(v), *(two_layers(k) for k in range(3)))
    out = jax.vmap(lambda ham: descend(ham, row, max_steps=40))(hams)  # without jit of one's own
    for k in range(3): close(out.energy[k], descend(two_layers(k), row, max_steps=40).energy)
    with pytest.raises(TypeError, match=r"Under jit use `.code`"):
        jax.jit(lambda xs: f(ham, xs, mask).result)(row)


def strong(tree):
    "Arrays of the same dtypes, none weakly typed: one program for all that are near."
    return jtu.tree_map(lambda v: jnp.asarray(v, v.dtype), tree)


def directional(f, at, h=1e-5):
    """Pairs of slopes along random directions: from the gradient, and from finite differences. `f`
    returns value and gradient."""
    g = f(at)[1]
    for key in range(3):
        leaves, treedef = jtu.tree_flatten(at)
        d = jtu.tree_unflatten(
            treedef,
            [jr.normal(k, v.shape) for k, v in zip(jr.split(jr.PRNGKey(key), len(leaves)), leaves)],
        )
        move = lambda s: jtu.tree_map(lambda v, d: v + s * h * d, at, d)
        yield sum(jtu.tree_leaves(jtu.tree_map(lambda g, d: (g * d).sum(), g, d))), (
            f(move(1))[0] - f(move(-1))[0]
        ) / (2 * h)


held = {"v": np.array([True, True, False, False, False])}


@pytest.mark.slow
def test_gradients_through_the_steps_are_those_of_the_unrolled_loop():
    ham = two_layers(0)
    xs, target = start(ham), jr.normal(jr.PRNGKey(8), (5,))

    def loss(at, hand):
        ham, xs, dt = at
        if hand:
            end, energies, _ = by_hand(ham, xs, dt, 25, held)
            E = energies[-1]
        else:
            out = descend(ham, xs, solver=Euler(dt), clamp=held, max_steps=25, **never)
            end, E = out.xs, out.energy
        return ((ham.activations(end)["v"] - target)**2).sum() + end["h"][0] + 0.3 * E

    at = strong((ham, xs, jnp.array(0.1)))
    f, g = (
        jax.jit(jax.value_and_grad(functools.partial(loss, hand=hand))) for hand in (False, True)
    )
    got, expected = f(at)[1], g(at)[1]
    jtu.tree_map(lambda a, b: close(a, b, rtol=1e-8), got, expected)
    assert all(np.any(g != 0) for g in jtu.tree_leaves(got))
    assert np.any(got[1]["v"][:2] != 0)  # the clamped input
    for exact, slope in directional(f, at): close(exact, slope, rtol=1e-6)


@pytest.mark.slow
def test_implicit_gradients_are_those_of_the_fixed_point():
    xs, target = start(two_layers(0)), jr.normal(jr.PRNGKey(8), (5,))
    ham = HAM({"v": TanhLayer(5, tau=jnp.array(1.5)), "h": SoftmaxLayer(4, beta=jnp.array(2.0))},
              two_layers(0).hypersynapses, two_layers(0).connections)

    def loss(at):
        ham, held_values = at
        out = descend(
            ham,
            {**xs, "v": jnp.where(held["v"], held_values, xs["v"])},
            solver=Euler(0.5),
            clamp=held,
            max_steps=2000,
            rtol=0.0,
            atol=1e-12,
            adjoint=optx.ImplicitAdjoint(),
        )
        return ((out.xhats["v"] - target)**2).sum() + out.xs["h"][0]

    at = strong((ham, xs["v"]))
    f = jax.jit(jax.value_and_grad(loss))
    got = f(at)[1]
    for exact, slope in directional(f, at): close(exact, slope, rtol=1e-5, atol=1e-8)
    # a fixed point does not know τ, nor where the free ones came from
    close(got[0].neurons["v"].tau, 0.0, atol=1e-9)
    close(got[1][2:], 0.0)
    assert np.all(got[1][:2] != 0) and got[0].neurons["h"].lagrangian.keywords["beta"] != 0


def test_the_final_energy_has_the_envelope_gradient():
    "At a fixed point dE/dW is its explicit part, −v̂ ĥᵀ."
    ham = two_layers(0)
    xs = start(ham)
    def final(ham):
        out = descend(
            ham,
            xs,
            solver=Euler(0.5),
            max_steps=2000,
            rtol=0.0,
            atol=1e-12,
            adjoint=optx.ImplicitAdjoint(),
        )
        return out.energy, out.xhats
    grad, xhats = jax.jit(jax.grad(final, has_aux=True))(ham)
    close(grad.hypersynapses["w"].W, -np.outer(xhats["v"], xhats["h"]), atol=1e-9)
    close(grad.hypersynapses["b"].b, -np.asarray(xhats["v"]), atol=1e-9)


# --------------------------------------------------------------------------------------------------
# -------------------
# steps, trace, words


def test_trace_and_steps():
    ham = two_layers(2)
    xs = start(ham, 5, 6)
    out = descend(ham.vectorize(), xs, max_steps=400)
    _, energies, path = by_hand(ham.vectorize(), xs, 0.1, 400)
    assert (
        out.energies.shape == (6, 401)
        and np.all(out.converged)
        and len(set(out.steps.tolist())) > 1
    )
    for i, k in enumerate(out.steps.tolist()):
        close(out.energies[i, :k + 1], energies[i, :k + 1])
        assert np.all(np.isnan(out.energies[i, k + 1:])) and 0 < k < 400
        trees_close({n: x[i] for n, x in out.xs.items()}, {n: p[k, i] for n, p in path.items()})
        close(out.energy[i], out.energies[i, k])
        # the first state whose gradient is small, layer by layer
        tol = float(jnp.finfo(float).eps)**(2 / 3)
        small = (
            [
                all(
                    np.abs(p[j + 1, i] - p[j, i]).max() * ham.neurons[n].tau / 0.1
                    <= 1.001 * tol * (1 + np.abs(p[j, i]).max())
                    for n, p in path.items()
                )
                for j in (k - 4, k)
            ]
            if k < 400
            else []
        )  # it is judged at every fourth step
        assert small == [False, True]
    dark = descend(ham.vectorize(), xs, max_steps=400, trace=False)
    assert dark.energies is None and np.array_equal(dark.steps, out.steps)
    trees_close(dark.xs, out.xs)


def test_max_steps_is_exact_and_throw():
    ham = two_layers(2)
    xs = start(ham)
    end, energies, _ = by_hand(ham, xs, 0.1, 1)
    out = descend(ham, xs, max_steps=1)
    assert out.steps == 1 and out.code == MAX_STEPS and out.energies.shape == (2,)
    trees_close(out.xs, end)
    close(out.energies, energies)
    close(out.energy, energies[1])
    with pytest.raises(RuntimeError, match="did not converge.*throw=False"):
        descend(ham, xs, max_steps=1, throw=True)
    run = lambda xs, atol, **kw: descend(ham, xs, max_steps=40, rtol=0.0, atol=atol, **kw)
    short = run(xs, 0.0)
    assert not short.converged and short.steps == 40 and short.residual > 1e-12
    # to converge at the last step is to converge
    enough = run(xs, 1.001 * short.residual, throw=True)
    assert (
        enough.converged
        and enough.steps == 40
        and all(same_bits(enough.xs[n], short.xs[n]) for n in xs)
    )
    assert not run(xs, 0.999 * short.residual).converged
    again = run(enough.xs, 1.001 * short.residual)
    assert (
        again.steps == 0
        and again.converged
        and all(same_bits(again.xs[n], enough.xs[n]) for n in xs)
    )
    assert np.isnan(again.energies[1:]).all() and again.energies[0] == again.energy


def test_the_words_of_a_result():
    ham = cubic()
    words = lambda x, **kw: descend(ham, {"x": jnp.array(x)}, **kw)
    done, short, bad = words([0.5, 0.1]), words([0.5, 0.1], max_steps=3), words([np.nan, 0.1])
    assert re.match(
        rf"Converged in {int(done.steps)} steps.*residual.*{float(done.residual):.2g}", done.result
    )
    assert re.match(
        rf"Stopped at the maximum of 3 steps with a residual of {float(short.residual):.2g}.*more"
        r" steps",
        short.result,
    )
    assert re.search("finite at step 0: the start or the parameters hold NaN or inf", bad.result)
    assert isinstance(done.result, str) and descend(
        ham.vectorize(), {"x": jnp.array([[0.5, 0.1]])}
    ).result == [done.result]


@pytest.mark.parametrize(
    "x, dt",
    [([3.0, 0.1], 0.1), ([3.0, 0.1], 1e308), ([1e160, 0.1], 0.1)],
    ids=["in time", "state at once", "energy at once"],
)
def test_the_words_name_the_step_that_is_not_finite(x, dt):
    ham = cubic()
    _, energies, path = by_hand(ham, {"x": jnp.array(x)}, dt, 40)
    finite = np.isfinite(energies) & np.isfinite(path["x"]).all(-1)
    first = int(np.argmin(finite))  # x₀ is step 0
    out = descend(ham, {"x": jnp.array(x)}, solver=Euler(dt), max_steps=40)
    assert not finite[first] and np.all(np.isfinite(out.xs["x"]))
    if dt == 0.1 and first:
        assert (
            out.code == UNBOUNDED
            and first - 4 <= out.steps <= first
            and "not to be bounded below" in out.result
        )
    else:
        assert out.code == NONFINITE and re.search(rf"at step {first}[;:]", out.result), (
            first,
            out.result,
        )


# --------------------------------------------------------------------------------------------------
# -------------------
# dtypes, compilation


# float64 is all the others
@pytest.mark.parametrize(
    "dtype", [jnp.float16, jnp.bfloat16, jnp.float32], ids=lambda d: jnp.dtype(d).name
)
def test_dtypes_are_kept(dtype):
    dtype = jnp.dtype(dtype)
    double = two_layers(4)
    ham = jtu.tree_map(lambda v: v.astype(dtype), double)
    xs = {n: x.astype(dtype) for n, x in start(double).items()}
    out = descend(ham, xs, solver=Euler(0.2), clamp={"v": row_masks[0]}, max_steps=300)
    assert {
        v.dtype
        for v in (*out.xs.values(), *out.xhats.values(), out.energy, out.energies, out.residual)
    } == {dtype}
    assert out.converged and out.steps.dtype == out.rises.dtype == jnp.int32 and out.rises == 0
    wide = descend(
        jtu.tree_map(lambda v: v.astype(float), ham),
        {n: x.astype(float) for n, x in xs.items()},
        solver=Euler(0.2),
        clamp={"v": row_masks[0]},
        rtol=0.0,
        atol=1e-10,
    )
    trees_close(
        {n: x.astype(float) for n, x in out.xs.items()},
        wide.xs,
        rtol=0,
        atol=10 * float(jnp.finfo(dtype).eps) ** (2 / 3),
    )


def test_layers_of_two_dtypes_keep_theirs():
    ham = two_layers(0)
    xs = start(ham)
    out = jax.eval_shape(
        lambda: descend(
            ham,
            {"v": xs["v"].astype(jnp.float32), "h": xs["h"]},
            solver=Euler(jnp.array(0.1, float)),
            max_steps=3,
        )
    )
    assert out.xs["v"].dtype == jnp.float32 and out.xs["h"].dtype == float


def test_nothing_compiles_twice():
    traces = []
    class Counting(eqx.Module):
        W: jax.Array
        def __call__(self, v, h):
            traces.append(1)
            return -v @ self.W @ h

    def run(key, mask=True, dt=jnp.array(0.1), **kw):
        ham = HAM(
            {"v": TanhLayer(5), "h": TanhLayer(4)},
            {"w": Counting(jr.normal(jr.PRNGKey(key), (5, 4)))},
            [(("v", "h"), "w")],
        )
        before = len(traces)  # building it traces too
        descend(
            ham,
            start(ham, key),
            clamp={"v": mask} if mask is not True else None,
            max_steps=5,
            solver=Euler(dt),
            **kw,
        )
        return len(traces) - before

    assert run(0) > 0
    assert run(1) == 0 and run(2, dt=jnp.array(0.3)) == 0
    assert run(3, row_masks[0]) > 0
    assert run(3, row_masks[1]) == 0 and run(4, jnp.ones(5, bool)) == 0
    # a tolerance is no constant of the program
    assert run(5, atol=jnp.array(1e-3)) == 0 and run(6, atol=1e-4) == 0
    # nor is a number, which does not learn, and is data
    assert run(7, dt=0.1) == 0 and run(8, dt=0.2) == 0


def test_a_vectorised_call_compiles_once_too():
    traces = []
    synapse = lambda x: traces.append(1) or -(x**2).sum() / 4
    for key in range(3):
        many = HAM([IdentityLayer(2)], [synapse], [((0,), 0)]).vectorize()
        before = len(traces)
        descend(many, {0: jr.normal(jr.PRNGKey(key), (3, 2))}, max_steps=5)
        assert (len(traces) > before) is (key == 0)


# --------------------------------------------------------------------------------------------------
# -------------------
# bad input


X = {"v": np.ones(5), "h": np.ones(4)}
def without_leak(layer, *synapses):
    return HAM({"t": layer}, list(synapses), [(("t",), i) for i in range(len(synapses))])


@pytest.mark.slow
def test_one_rule_of_rest_for_descend_flow_and_stability():
    """A layer norm without leak under a bias: its state grows along itself, its activation has
    come to rest"""
    ham = without_leak(
        LayerNormLayer((2, 4), leak=False), BiasSynapse(np.arange(8.0).reshape(2, 4) ** 2)
    )
    out = hmx.descend(ham, ham.init_states(key=jr.key(0)))
    assert out.converged and abs(ham.dEdact(out.xhats, out.xs)["t"]).max() > 1
    assert hmx.flow(ham, out.xs, 10.0, steady=True).converged
    assert hmx.stability(ham, out.xs).at_rest
    assert out.energy == pytest.approx(float(hmx.descend(ham, out.xs).energy), rel=1e-9)


FLAT = {
    "a ReLU that is off": (ReluLayer(2, leak=False), [-1.0, -2.0], [1.0, 1.0]),
    "a tanh on the wrong side": (TanhLayer(2, leak=False), [25.0, 30.0], [-1.0, -1.0]),
    "a softmax on the wrong entry": (hmx.SoftmaxLayer(2, leak=False), [60.0, 0.0], [0.0, 1.0]),
}


@pytest.mark.slow
def test_what_is_flat_now_is_not_at_rest():
    """The state moves on along the ray until it leaves the plateau. All three layers are one
    network, and in each row the bias of one case pulls; in the last row none does"""
    layers = {n: layer for n, (layer, *_) in FLAT.items()}
    begin = {n: jnp.array(start) for n, (_, start, _) in FLAT.items()}
    for n, layer in layers.items():
        assert abs(jax.jvp(layer.activations, (begin[n],), (jnp.ones(2),))[1]).max() < 1e-8
    pulls = np.eye(4, 3)[..., None] * np.array([bias for *_, bias in FLAT.values()])
    @jax.jit
    @jax.vmap
    def look(biases):
        synapses = dict(zip(layers, map(BiasSynapse, biases), strict=True))
        ham = HAM(layers, synapses, [((n,), n) for n in layers])
        still = descend(ham, begin, max_steps=1, solver=Euler(1e-3), trace=False)
        at_rest = (
            still.converged,
            hmx.stability(ham, begin).at_rest,
            hmx.flow(ham, begin, 1e-3, steady=True).converged,
        )
        later = descend(ham, begin, solver=Euler(0.5), max_steps=300, trace=False)
        return jnp.stack(at_rest), still.residual, later.energy - still.energy
    at_rest, residual, fall = map(np.asarray, look(pulls))
    assert not at_rest[:3].any() and (residual[:3] > 0.1).all() and (fall[:3] < -0.5).all()
    assert at_rest[3].all() and residual[3] == 0 == fall[3]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_the_energy_transformer_comes_to_rest(seed):
    "Under the default solver, with states that stay finite, in single precision"
    with jax.enable_x64(False):
        keys = jr.split(jr.key(seed), 3)
        tokens = hmx.LayerNormLayer((6, 8), leak=False)
        parts = {
            "attention": hmx.AttentionSynapse.lazy(2),
            "memory": hmx.MemorySynapse.lazy(16, hmx.lagr_relu, over="last", scale=0.5),
        }
        ham = hmx.build(
            {"t": tokens}, parts, [(("t",), "attention"), (("t",), "memory")], key=keys[0]
        )
        out = hmx.descend(ham, ham.init_states(key=keys[1]), max_steps=2000)
        assert out.converged and out.rises == 0 and abs(out.xs["t"]).max() < 1e4
        assert (
            hmx.stability(ham, out.xs).at_rest
            and hmx.flow(ham, out.xs, 10.0, steady=True).converged
        )


@pytest.mark.slow
def test_masks_of_a_clamp_may_be_traced():
    ham = two_layers(0)
    masks = np.array([[True, False, False, False, True], [False] * 5])
    rows = jax.vmap(lambda m: descend(ham, X, clamp={"v": m}, trace=False).xs["v"])(masks)
    for mask, row in zip(masks, rows, strict=True):
        np.testing.assert_allclose(
            row, descend(ham, X, clamp={"v": mask}, trace=False).xs["v"], rtol=1e-6
        )


BAD = {
    "ham": (lambda h: descend("ham", X), TypeError, "HAM or a VectorizedHAM.*'ham'"),
    "missing": (lambda h: descend(h, {"v": X["v"]}), ValueError, r"states.*missing \['h'\]"),
    "extra": (lambda h: descend(h, {**X, "z": X["v"]}), ValueError, r"unknown \['z'\]"),
    "shape": (
        lambda h: descend(h, {**X, "v": np.ones(4)}),
        ValueError,
        r"'v' must have shape \(5,\), got \(4,\)",
    ),
    "ints": (lambda h: descend(h, {**X, "v": np.ones(5, int)}), TypeError, "'v'.*int64"),
    "batched": (
        lambda h: descend(h, {n: np.ones((2, *x.shape)) for n, x in X.items()}),
        ValueError,
        "'v'.*vectorize",
    ),
    "single": (lambda h: descend(h.vectorize(), X), ValueError, "batch axis.*'v'.*unvectorize"),
    "sizes": (
        lambda h: descend(h.vectorize(), {"v": np.ones((2, 5)), "h": np.ones((3, 4))}),
        ValueError,
        "one batch size.*'v': 2.*'h': 3",
    ),
    "solver": (lambda h: descend(h, X, solver=0.1), TypeError, "solver must be.*Euler.*0.1"),
    "solver class": (lambda h: descend(h, X, solver=Euler), TypeError, "solver must be.*Euler"),
    **{
        f"max_steps {n!r}": (
            lambda h, n=n: descend(h, X, max_steps=n),
            ValueError,
            f"max_steps must be a positive int.*{n}",
        )
        for n in (0, -1, 2.0, "3")
    },
    **{
        f"{t} {v}": (
            lambda h, t=t, v=v: descend(h, X, **{t: v}),
            ValueError,
            f"tolerances.*{t}={v}",
        )
        for t in ("rtol", "atol")
        for v in (-1.0, math.nan)
    },
    **{
        f"dt {v}": (lambda h, v=v: Euler(v), ValueError, f"dt must be positive and finite.*{v}")
        for v in (0, -0.1, math.nan, math.inf)
    },
    "dt array": (
        lambda h: Euler(jnp.array(-1.0)),
        ValueError,
        "dt must be positive and finite.*-1",
    ),
    "dt per layer": (
        lambda h: Euler(jnp.ones(2)),
        ValueError,
        r"dt must be one positive number.*\(2,\)",
    ),
    "dt a word": (lambda h: Euler("fast"), TypeError | ValueError, "dt.*'?fast"),
    "dt none": (lambda h: Euler(None), TypeError | ValueError, "dt.*None"),
    "adjoint": (lambda h: descend(h, X, adjoint="rolled"), ValueError, "adjoint.*'rolled'"),
    "clamp unknown": (
        lambda h: descend(h, X, clamp="vv"),
        ValueError,
        "clamp.*unknown layer 'vv'.*'v', 'h'",
    ),
    "clamp one unknown": (
        lambda h: descend(h, X, clamp=["v", "hid"]),
        ValueError,
        "unknown layer 'hid'",
    ),
    "clamp mask unknown": (
        lambda h: descend(h, X, clamp={"z": np.ones(5, bool)}),
        ValueError,
        "unknown layer 'z'",
    ),
    "clamp a number": (lambda h: descend(h, X, clamp=1.5), TypeError | ValueError, "clamp.*1.5"),
    "clamp true": (
        lambda h: descend(h, X, clamp=np.ones(5, bool)),
        TypeError | ValueError,
        "clamp",
    ),
    "clamp nested": (
        lambda h: descend(h, X, clamp=[["v"]]),
        TypeError | ValueError,
        r"clamp.*\['v'\]",
    ),
    "clamp none": (
        lambda h: descend(h, X, clamp={"v": None}),
        TypeError | ValueError,
        "clamp of the layer 'v'",
    ),
    "mask shape": (
        lambda h: descend(h, X, clamp={"v": np.ones(4, bool)}),
        ValueError,
        r"clamp of the layer 'v': a mask must have shape \(5,\), got \(4,\)",
    ),
    "mask batched": (
        lambda h: descend(h, X, clamp={"v": np.ones((2, 5), bool)}),
        ValueError,
        r"shape \(5,\), got \(2, 5\)",
    ),
    "mask rows": (
        lambda h: descend(
            h.vectorize(),
            {n: np.ones((3, *x.shape)) for n, x in X.items()},
            clamp={"v": np.ones((2, 5), bool)},
        ),
        ValueError,
        r"shape \(5,\) or \(3, 5\), got \(2, 5\)",
    ),
    "mask one row": (
        lambda h: descend(
            h.vectorize(),
            {n: np.ones((3, *x.shape)) for n, x in X.items()},
            clamp={"v": np.ones((1, 5), bool)},
        ),
        ValueError,
        r"got \(1, 5\)",
    ),
    "mask of floats": (
        lambda h: descend(h, X, clamp={"v": np.ones(5)}),
        TypeError,
        "clamp of the layer 'v'.*must be booleans.*float64",
    ),
    "mask of ints": (
        lambda h: descend(h, X, clamp={"v": [0, 1]}),
        TypeError,
        "clamp of the layer 'v'.*must be booleans.*int",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, error, words = BAD[case]
    kinds = getattr(error, "__args__", (error,))
    with pytest.raises(kinds) as caught: call(two_layers(0))
    assert type(caught.value) in kinds and re.search(words, str(caught.value), re.DOTALL), str(
        caught.value
    )


# --- what a function closes over ------------------------------------------------------------------

WEIGHTS = 0.3 * np.random.default_rng(0).standard_normal((4, 3))
STEPS = {"solver": Euler(0.1), "max_steps": 15, "rtol": 0, "atol": 0}
REST = {"solver": hmx.Adaptive(), "rtol": 1e-12, "atol": 1e-12}


def joined(hidden=None, synapse=None):
    layers = {"v": IdentityLayer(4), "h": hidden or SoftmaxLayer(3)}
    synapse = LinearSynapse(WEIGHTS) if synapse is None else synapse
    return HAM(layers, {"s": synapse}, [(("v", "h"), "s")])


def end_by_hand(x, h, b):
    W = b * WEIGHTS
    for _ in range(15):
        a = jax.nn.softmax(h)
        x, h = x + 0.1 * (W @ a - x), h + 0.1 * (x @ W - h)
    return (x**2).sum()


class Held:
    "A function of the activations that hides an array from JAX"
    def __init__(self, b): self.b = b
    def __call__(self, v, h): return -self.b * (v @ WEIGHTS @ h)


# each hides its argument in a function
HIDDEN = {
    "hypersynapse": lambda b: (joined(synapse=lambda v, h: -b * (v @ WEIGHTS @ h)), {}),
    "default": lambda b: (joined(synapse=lambda v, h, b=b: -b * (v @ WEIGHTS @ h)), {}),
    "Lagrangian": lambda b: (
        joined(hmx.NeuronLayer(lambda x: hmx.lagr_softmax(x, beta=b), 3)), {}
    ),
}
OF_THE_STEP = {
    "anneal": lambda b: (joined(SoftmaxLayer(3, beta=1.0)), {"anneal": {"h": lambda n: b + n / 9}}),
    "dt": lambda b: (joined(), {"solver": Euler(lambda n: b / (9 + n))}),
    "drive": lambda b: (joined(), {"drive": {"v": lambda n: b * jnp.cos(0.1 * n) * jnp.ones(4)}}),
}


def end_of(hidden, b, **settings):
    ham, own = hidden(b)
    xs = {"v": jnp.ones(4), "h": jnp.zeros(3)}
    return (any_descend(ham, xs, **(settings | own)).xs["v"] ** 2).sum()


@pytest.mark.slow(but=6)
@pytest.mark.parametrize("kind", [*HIDDEN, *OF_THE_STEP])
@pytest.mark.parametrize("adjoint", ["checkpointed", "unrolled", "implicit"])
def test_derivative_reaches_what_a_function_closes_over(kind, adjoint):
    if kind in OF_THE_STEP and adjoint == "implicit": return
    hidden = (HIDDEN | OF_THE_STEP)[kind]
    settings = REST | {"max_steps": 200} if adjoint == "implicit" else STEPS
    end = lambda b: end_of(hidden, b, adjoint=adjoint, **settings)
    expected = (end(1.3 + 1e-5) - end(1.3 - 1e-5)) / 2e-5
    assert abs(expected) > 1e-3
    close(jax.grad(end)(1.3), expected, rtol=1e-6)
    close(jax.jit(jax.grad(end))(1.3), expected, rtol=1e-6)


def test_derivative_in_a_lambda_is_that_of_the_loop_by_hand():
    end = lambda b: end_of(HIDDEN["hypersynapse"], b, **STEPS)
    close(jax.grad(end)(1.3), jax.grad(end_by_hand, argnums=2)(jnp.ones(4), jnp.zeros(3), 1.3))


def test_a_traced_array_out_of_sight_is_an_error():
    with pytest.raises(ValueError, match="'s'.*traced array.*equinox.Module"):
        jax.grad(lambda b: end_of(lambda b: (joined(synapse=Held(b)), {}), b))(1.3)
    end_of(lambda b: (joined(synapse=Held(b)), {}), 1.3)  # a constant is none

    def mutual(b):
        f = lambda v, h, n=1: -b * (v @ WEIGHTS @ h) if n == 0 else g(v, h, n - 1)
        g = lambda *args: f(*args)
        return f

    with pytest.raises(ValueError, match="derivative would be lost"):
        jax.grad(lambda b: end_of(lambda b: (joined(synapse=mutual(b)), {}), b))(1.3)


def test_one_program_for_functions_that_are_written_alike():
    gradient = jax.grad(lambda b: end_of(HIDDEN["hypersynapse"], b, **STEPS))
    gradient(1.3)
    with hmx.compiled_programs() as names: gradient(1.4)
    assert names == []


def test_a_weak_number_leaves_the_dtype_alone():
    @jax.jit
    def energy(b):
        ham = joined(synapse=lambda v, h: -b * (v @ WEIGHTS.astype("float32") @ h))
        assert ham.dtype == jnp.result_type(float)
        xs = {"v": jnp.ones(4, jnp.float32), "h": jnp.zeros(3, jnp.float32)}
        return any_descend(ham, xs).energy

    assert energy(1.3).dtype == jnp.float32
