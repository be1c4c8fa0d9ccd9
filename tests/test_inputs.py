"""Inputs that move against loops written by hand, scipy and finite differences; what is claimed
while they move, and what is refused."""

import re

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy.integrate import solve_ivp

import hamux as hmx
from hamux import (
    HAM,
    BiasSynapse,
    Euler,
    IdentityLayer,
    LinearSynapse,
    ReluLayer,
    SoftmaxLayer,
    TanhLayer,
    descend,
    flow,
)

CONVERGED, MAX_STEPS, NONFINITE = 1, 2, 3
never = dict(rtol=0.0, atol=0.0)  # not to stop before max_steps
rng = np.random.default_rng(0)
W, B = rng.normal(size=(4, 3)), rng.normal(size=4)
PATH = rng.normal(size=(60, 3, 4))  # steps, rows, neurons
PUSH = rng.normal(size=(60, 3))  # the same for all rows
HELD = np.array([True, False, False, True])
STARTS = {"v": rng.normal(size=(3, 4)), "h": rng.normal(size=(3, 3))}


@pytest.fixture(autouse=True, scope="module")
def x64():
    with jax.enable_x64(True): yield


def pair():
    layers = {"v": TanhLayer(4, tau=2.0), "h": IdentityLayer(3)}
    synapses = {"w": LinearSynapse(W), "b": BiasSynapse(B)}
    return HAM(layers, synapses, [(("v", "h"), "w"), (("v",), "b")])


def shown(step): return jnp.asarray(PATH)[step]
def pushed(step): return jnp.asarray(PUSH)[step]
def level(t): return t * jnp.ones(3)


def energy_by_hand(v, h):
    "Of pair() without a drive, in NumPy; one number per row."
    a, log_cosh = np.tanh(v), np.logaddexp(v, -v) - np.log(2)
    own = (a * v - log_cosh).sum(-1) + (h * h).sum(-1) / 2
    return own - ((a @ W) * h).sum(-1) - a @ B


def by_hand(v, h, row, steps, dt, held=HELD, push=PUSH, extra=0.0):
    "States and energies before each step and after the last, in NumPy."
    states, energies = [], []
    for k in range(steps + 1):
        v, I = np.where(held, PATH[k, row], v), push[k]
        a = np.tanh(v)
        energies.append(energy_by_hand(v, h) - I @ h - extra * a.sum())
        states.append((v, h))
        dv, dh = v - W @ h - B - extra, h - a @ W - I
        v, h = np.where(held, v, v - dt / 2 * dv), h - dt * dh
    return states, np.array(energies)


@pytest.mark.parametrize("held", [HELD, np.ones(4, bool)], ids=["part", "whole"])
def test_a_descent_under_moving_inputs_is_the_hand_written_loop(held):
    "Each row under its own clamp; the current is one for all, and a constant one has rows"
    clamp = {"v": shown if held.all() else (held, shown)}
    extra = np.arange(3.0)[:, None] * np.ones(4)
    out = descend(
        pair().vectorize(), STARTS, clamp=clamp, drive={"h": pushed, "v": extra},
        solver=Euler(0.2), max_steps=50, trace=hmx.Trace(states=True, parts=True), **never,
    )
    assert out.code.tolist() == [MAX_STEPS] * 3
    for i in range(3):
        path, energies = by_hand(*(STARTS[n][i] for n in "vh"), i, 50, 0.2, held, extra=i)
        np.testing.assert_allclose(out.energies[i], energies, rtol=1e-9)
        for n, layer in enumerate("vh"):
            np.testing.assert_allclose(
                out.records["states"][layer][i], [x[n] for x in path], rtol=1e-8, atol=1e-10
            )
            np.testing.assert_allclose(out.xs[layer][i], path[-1][n], rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(out.energy[i], energies[-1], rtol=1e-9)
        np.testing.assert_array_equal(out.xs["v"][i][held], PATH[50, i][held])
        parts = sum(jax.tree.leaves(out.records["parts"]))
        np.testing.assert_allclose(parts[i], energies, rtol=1e-8)
    assert set(out.records["parts"]["drive"]) == {"h", "v"}


def smooth(t): return jnp.stack([jnp.sin(t), jnp.cos(2 * t), t / 3, jnp.exp(-t)])


@pytest.mark.slow
def test_a_flow_under_moving_inputs_is_that_of_scipy():
    "And, with the steps of Euler, the descent"
    scale = jnp.arange(1.0, 4.0)
    push = lambda t: scale[:, None] * jnp.stack([t, jnp.cos(t), jnp.sin(3 * t)])
    settings = dict(clamp={"v": (HELD, smooth)}, drive={"h": push})
    tight, ts = diffrax.PIDController(rtol=1e-9, atol=1e-9), np.linspace(0.5, 3, 6)
    out = flow(
        pair().vectorize(), STARTS, 3.0, t0=0.5, saveat=ts, stepsize_controller=tight, **settings
    )
    there = lambda t: np.array([np.sin(t), np.cos(2 * t), t / 3, np.exp(-t)])
    current = lambda t: np.arange(1.0, 4)[:, None] * np.array([t, np.cos(t), np.sin(3 * t)])
    def field(t, y):
        v, h = np.where(HELD, there(t), y[:12].reshape(3, 4)), y[12:].reshape(3, 3)
        dv, dh = np.where(HELD, 0, -(v - h @ W.T - B) / 2), -(h - np.tanh(v) @ W - current(t))
        return np.concatenate([dv.ravel(), dh.ravel()])
    begin = np.concatenate([STARTS["v"].ravel(), STARTS["h"].ravel()])
    path = solve_ivp(field, (0.5, 3), begin, t_eval=ts, rtol=1e-10, atol=1e-10).y.T
    for k, t in enumerate(ts):
        v, h = np.where(HELD, there(t), path[k, :12].reshape(3, 4)), path[k, 12:].reshape(3, 3)
        np.testing.assert_allclose(out.xs["v"][:, k], v, atol=1e-6)
        np.testing.assert_allclose(out.xs["h"][:, k], h, atol=1e-6)
        energies = energy_by_hand(v, h) - (current(t) * h).sum(1)
        np.testing.assert_allclose(out.energies[:, k], energies, atol=1e-5)
    np.testing.assert_allclose(out.x1["v"], v, atol=1e-6)
    np.testing.assert_allclose(out.energy, energies, atol=1e-5)
    assert (out.code == 7).all() and (out.residual > 0.01).all()
    steps = flow(
        pair().vectorize(), STARTS, 1.0, solver=diffrax.Euler(), dt0=0.125,
        stepsize_controller=diffrax.ConstantStepSize(), **settings,
    )
    loop = descend(
        pair().vectorize(), STARTS, solver=Euler(0.125), max_steps=8,
        clamp={"v": (HELD, lambda k: smooth(0.125 * k))}, drive={"h": lambda k: push(0.125 * k)},
    )
    for n in "vh": np.testing.assert_allclose(steps.x1[n], loop.xs[n], rtol=1e-9)
    np.testing.assert_allclose(steps.energy, loop.energy, rtol=1e-9)


class Turning(eqx.Module):
    "A current that is turned down until step 100, or a wave that comes back, until step 300."
    wave: jax.Array

    def __call__(self, k):
        down, wave = 2 - jnp.minimum(k, 100) / 50, (k % 200 < 100) * 1.0
        return jnp.where(self.wave, wave, down) * jnp.ones(3)


def test_converged_is_claimed_once_the_input_stands():
    "And of what is returned, under the input of the end; rises are counted from then on"
    start = {n: v[0] for n, v in STARTS.items()}
    weak = eqx.tree_at(lambda h: h._hypersynapses["w"].W, pair(), 0.2 * jnp.asarray(W))
    under = lambda wave, most: descend(
        weak, start, drive={"h": Turning(jnp.asarray(wave))}, solver=Euler(0.5), max_steps=most
    )
    for wave, last in ((False, 100), (True, 300)):
        out = under(wave, 399)
        assert out.converged and last <= out.steps < 399 and out.rises == 0
        v, h = out.xs["v"], out.xs["h"]
        left = [abs(v - 0.2 * W @ h - B).max(), abs(h - np.tanh(v) @ (0.2 * W)).max()]
        np.testing.assert_allclose(out.residual, max(left), rtol=1e-6, atol=1e-12)
        assert (np.diff(out.energies[: last]) > 1e-3).any() # the input lifts it
    few = under(False, 50)
    assert few.steps == 50 and few.code == MAX_STEPS


def test_a_schedule_comes_to_its_end_however_it_rounds():
    "β = 3 − k/30 up to k = 50, which is not the same in all programs"
    ham = HAM({"v": TanhLayer(4, beta=jnp.asarray(1.0))}, {"b": BiasSynapse(B)}, [(("v",), "b")])
    cool = {"v": lambda k: 3 - jnp.minimum(k, 50) / 30}
    with jax.enable_x64(False):
        ham, x = jax.tree.map(lambda v: v.astype("f4"), (ham, {"v": jnp.zeros(4)}))
        out = descend(ham, x, anneal=cool, solver=Euler(0.5), max_steps=200, trace=False)
    assert out.converged and 50 <= out.steps < 150


def test_the_rise_at_a_change_of_temperature_is_none():
    "One of both changes lifts the energy"
    lifts = []
    for before, after in ((1.0, 4.0), (4.0, 1.0)):
        layer = TanhLayer(4, beta=jnp.asarray(1.0))
        ham = HAM({"v": layer}, {"b": BiasSynapse(B)}, [(("v",), "b")])
        jump = {"v": lambda k, a=before, b=after: jnp.where(k < 50, a, b)}
        out = descend(ham, {"v": jnp.zeros(4)}, anneal=jump, solver=Euler(0.5), max_steps=200)
        assert out.converged and out.rises == 0
        lifts.append(bool(out.energies[50] > out.energies[49] + 1e-3))
    assert sorted(lifts) == [False, True]


def test_a_flow_that_runs_out_of_steps_rests_at_no_later_time():
    "Its input is NaN from 20 on, so no step gets there"
    ham = HAM({"v": IdentityLayer(2)}, {"b": BiasSynapse(np.ones(2))}, [(("v",), "b")])
    late = lambda t: jnp.where(t > 20, jnp.nan, 1.0) * jnp.ones(2)
    out = flow(ham, {"v": jnp.zeros(2)}, 30.0, drive={"v": late}, rtol=1e-3, max_steps=64)
    assert out.t1 < 20.1 and out.code == MAX_STEPS and not out.converged


@pytest.mark.slow
def test_an_input_that_stands_is_a_clamp():
    settings = dict(solver=Euler(0.1), max_steps=300)
    there = jnp.asarray(PATH[0])
    moving = descend(pair().vectorize(), STARTS, clamp={"v": lambda k: there}, **settings)
    still = descend(pair().vectorize(), STARTS | {"v": there}, clamp="v", **settings)
    for a, b in zip(*map(jax.tree.leaves, (moving, still)), strict=True):
        np.testing.assert_array_equal(a, b)
    biased = HAM(
        {"h": IdentityLayer(3)}, {"b": BiasSynapse(np.arange(3.0))}, [(("h",), "b")]
    )
    bare = HAM({"h": IdentityLayer(3)}, {"b": BiasSynapse(np.zeros(3))}, [(("h",), "b")])
    by_bias, by_drive = (
        descend(ham, {"h": jnp.ones(3)}, drive={"h": drive})
        for ham, drive in ((biased, np.zeros(3)), (bare, np.arange(3.0)))
    )
    for n in ("energy", "steps", "residual"):
        np.testing.assert_allclose(getattr(by_bias, n), getattr(by_drive, n), atol=1e-12)
    np.testing.assert_allclose(by_bias.xs["h"], by_drive.xs["h"], atol=1e-12)


class Show(eqx.Module):
    pictures: jax.Array
    def __call__(self, step): return self.pictures[jnp.minimum(step // 3, 1)]


@pytest.mark.slow(but=1)
@pytest.mark.parametrize("adjoint", ["checkpointed", "unrolled", "implicit"])
def test_derivatives_in_what_moves(adjoint):
    "Of a module, and of what a plain function closes over; by finite differences, or at rest"
    start, rest = {n: v[0] for n, v in STARTS.items()}, adjoint == "implicit"
    steps = dict(max_steps=200 if rest else 7, solver=Euler(0.2), adjoint=adjoint, trace=False)
    push = lambda gain: lambda k: gain * jnp.array([1.0, 2.0, 3.0]) * jnp.exp(-k / 4.0 * (not rest))
    def end(pictures, gain):
        clamp, drive = {"v": Show(pictures)}, {"h": push(gain)}
        out = descend(pair(), start, clamp=clamp, drive=drive, **steps)
        return (out.xs["h"] ** 2).sum() + out.energy
    at = jnp.asarray(PATH[0, :2]), jnp.asarray(0.7, float)
    both = jax.jit(jax.value_and_grad(end, (0, 1)))
    value, grads = both(*at)
    # the steps are taken again for the derivative
    if adjoint == "checkpointed": np.testing.assert_allclose(value, end(*at), rtol=1e-12)
    for i in (0, 1):
        d = jr.normal(jr.key(i), at[i].shape)
        near = [both(*(v + s * d if j == i else v for j, v in enumerate(at)))[0]
                for s in (1e-5, -1e-5)]
        slope = (near[0] - near[1]) / 2e-5
        np.testing.assert_allclose((grads[i] * d).sum(), slope, rtol=1e-5, atol=1e-8)
    assert (grads[0][0] == 0).all() == rest # at rest nothing is left of the first picture
    if not rest: return
    a = np.tanh(at[0][1]) # h = Wᵀtanh(p) + I is the end
    h = a @ W + 0.7 * np.array([1.0, 2.0, 3.0])
    np.testing.assert_allclose(grads[1], (2 * h - h) @ [1.0, 2.0, 3.0], rtol=1e-4)


AROUND = 0.7 - 1e-5, 0.7, 0.7 + 1e-5


@pytest.mark.slow
def test_derivatives_of_the_flow_in_what_moves():
    start = {n: v[0] for n, v in STARTS.items()}
    def end(gain):
        drive = {"h": lambda t: gain * jnp.sin(t) * jnp.ones(3)}
        tight = diffrax.PIDController(rtol=1e-9, atol=1e-9)
        return (flow(pair(), start, 1.5, drive=drive, stepsize_controller=tight).x1["h"] ** 2).sum()
    values, slopes = map(np.array, zip(*map(jax.jit(jax.value_and_grad(end)), AROUND), strict=True))
    np.testing.assert_allclose(slopes[1], (values[2] - values[0]) / 2e-5, rtol=1e-5)


@pytest.mark.slow
def test_an_input_that_is_not_finite_is_told_and_touches_no_other_row():
    "Also where the energy hides it: a leakless relu at NaN is 0"
    hidden = HAM(
        {"r": ReluLayer(2, leak=False), "i": IdentityLayer(2)},
        {"w": LinearSynapse(np.ones((2, 2)))}, [(("r", "i"), "w")],
    ).vectorize()
    bad = lambda k: jnp.where((k >= 9) & (jnp.arange(3) == 1), jnp.nan, 1.0)[:, None] * jnp.ones(2)
    begin = {"r": jnp.zeros((3, 2)), "i": jnp.zeros((3, 2))}
    out = descend(hidden, begin, clamp={"r": bad}, solver=Euler(0.1), max_steps=400)
    assert out.code.tolist() == [CONVERGED, NONFINITE, CONVERGED]
    assert 4 <= out.steps[1] < 9 and "finite" in out.result[1]
    assert jnp.isfinite(out.xs["r"]).all() and jnp.isfinite(out.energy).all()
    fine = descend(hidden, begin, clamp={"r": lambda k: jnp.ones(2)}, solver=Euler(0.1))
    np.testing.assert_allclose(out.xs["i"][0], fine.xs["i"][0])
    moved = flow(hidden, begin, 30.0, clamp={"r": bad}, max_steps=256)
    assert moved.code[1] == NONFINITE and moved.converged[jnp.array([0, 2])].all()


@pytest.mark.slow
def test_rows_keep_their_inputs_when_a_batch_shrinks():
    "512 rows of 512 neurons, of which 57 go further, and go on as 64"
    ham = HAM({"x": IdentityLayer(512)}, {"b": BiasSynapse(np.zeros(512))}, [(("x",), "b")])
    far = np.arange(512) % 9 == 4
    own = (np.arange(512.0) * np.where(far, 1e4, 1))[:, None]
    push = lambda k: jnp.asarray(own) * jnp.minimum(k, 50) * jnp.ones(512)
    out = descend(
        ham.vectorize(), {"x": jnp.zeros((512, 512))}, drive={"x": push}, solver=Euler(0.7),
        trace=False, rtol=0.0, atol=1e-3,
    )
    assert out.converged.all() and out.steps[far].min() > out.steps[~far].max() >= 50
    np.testing.assert_allclose(out.xs["x"], 50 * own * np.ones(512), atol=2e-3)


def test_other_arrays_of_a_module_compile_nothing():
    counts, start = [], {n: v[0] for n, v in STARTS.items()}
    settings = dict(solver=Euler(), max_steps=41, trace=False) # of no other test
    for i in range(3):
        show = Show(jnp.asarray(PATH[i, :2]))
        with hmx.compiled_programs() as names:
            descend(pair(), start, clamp={"v": show}, **settings)
        counts.append(sum("descend" in n for n in names))
    assert counts == [1, 0, 0]


ONE = {n: v[0] for n, v in STARTS.items()}
steady = lambda **more: lambda: flow(pair(), ONE, 1.0, drive={"h": level}, **more)


@pytest.mark.parametrize("call, error, says", [
    (lambda: descend(pair(), ONE, clamp={"v": smooth}), ValueError, "Euler or Langevin, or with"),
    (
        lambda: descend(pair(), ONE, clamp={"v": smooth}, solver=hmx.Relaxation()),
        ValueError, "Relaxation compares energies",
    ),
    (
        lambda: descend(pair(), ONE, clamp={"v": pushed}, solver=Euler()),
        ValueError, r"clamp of the layer 'v' must return an array of shape \(4,\), got \(3,\)",
    ),
    (
        lambda: descend(pair().vectorize(), STARTS, drive={"v": lambda k: PATH[0, :2]},
                        solver=Euler()),
        ValueError, r"shape \(4,\) or \(3, 4\), got \(2, 4\)",
    ),
    (
        lambda: descend(pair(), ONE, drive={"v": lambda k: jnp.ones(4) if k > 2 else jnp.zeros(4)},
                        solver=Euler()),
        TypeError, "jnp.where, not by if",
    ),
    (
        lambda: descend(pair(), ONE, drive={"v": lambda k: [1.0] * 4}, solver=Euler()),
        TypeError, "must return one array",
    ),
    (
        lambda: descend(pair(), ONE, drive={"v": lambda k: 1j * jnp.ones(4)}, solver=Euler()),
        TypeError, "real numbers, got dtype complex",
    ),
    (lambda: descend(pair(), ONE, drive={"z": smooth}), ValueError, "unknown layer 'z'"),
    (lambda: descend(pair(), ONE, drive=smooth), TypeError, "dictionary from layer names"),
    (lambda: descend(pair(), ONE, drive={"v": np.ones(3)}), ValueError, r"\(4,\), got \(3,\)"),
    (lambda: descend(pair(), ONE, drive={"v": "strong"}), TypeError, "array or a function"),
    (
        lambda: descend(pair(), ONE, clamp={"v": (np.ones(3, bool), smooth)}, solver=Euler()),
        ValueError, r"mask must have shape \(4,\), got \(3,\)",
    ),
    (
        lambda: descend(pair(), ONE, clamp={"v": smooth, "h": True}, solver=Euler()),
        ValueError, "every layer is clamped",
    ),
    (lambda: hmx.stability(pair(), ONE, clamp={"v": smooth}), TypeError, "takes no input that"),
    (steady(steady=True), ValueError, "steady=True stops at rest"),
    (steady(adjoint=diffrax.ImplicitAdjoint()), ValueError, "ImplicitAdjoint differentiates"),
])
def test_bad_input(call, error, says):
    with pytest.raises(error) as e: call()
    assert re.search(says, str(e.value)), str(e.value)


def test_a_mask_that_cuts_a_competition_moves_with_its_input():
    "The free entries go along ∂E/∂x of the energy at hand"
    ham = HAM({"s": SoftmaxLayer(4)}, {"b": BiasSynapse(B)}, [(("s",), "b")])
    x, held = jnp.asarray(rng.normal(size=4)), jnp.asarray(HELD)
    show, twelve = lambda k: jnp.array([1.0, 9.0, 9.0, 0.1]) * k / 10, dict(max_steps=12, **never)
    out = descend(ham, {"s": x}, clamp={"s": (HELD, show)}, solver=Euler(0.3), **twelve)
    def slope(x): return jax.grad(lambda x: ham.energy(ham.activations({"s": x}), {"s": x}))(x)
    for k in range(13):
        x = jnp.where(held, show(k), x)
        if k < 12: x = jnp.where(held, x, x - 0.3 * slope(x))
    np.testing.assert_allclose(out.xs["s"], x, rtol=1e-9)


def test_flow_does_not_overlook_a_pulse():
    "A leaky neuron at rest, and 20 for 5 units of time after 40: 20 (1 − e^(−t/τ)), then decay"
    unit = HAM({"x": IdentityLayer(1, tau=2.0)}, {"0": lambda x: 0 * x.sum()}, [(("x",), "0")])
    ts = jnp.array([41.0, 45.0, 50.0])
    pulse = lambda t: jnp.where((t > 40) & (t < 45), 20.0, 0.0)[None]
    out = flow(unit, {"x": jnp.zeros(1)}, 100.0, saveat=ts, drive={"x": pulse})
    top = 20 * (1 - np.exp(-5 / 2))
    exact = [20 * (1 - np.exp(-1 / 2)), top, top * np.exp(-5 / 2)]
    np.testing.assert_allclose(out.xs["x"][:, 0], exact, rtol=1e-3)
