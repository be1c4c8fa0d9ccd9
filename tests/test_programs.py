"""What compiles, and what must not: counted, with results that do not depend on it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.extend.core import Primitive
from jax.interpreters import mlir

import hamux as hmx
from hamux import compiled_programs
from hamux.dynamics import filled_size
from hamux.dynamics.solver import plain_step

ROOT = Path(__file__).resolve().parent.parent
W = 0.3 * jr.normal(jr.key(0), (7, 5))
MEMORIES = jr.normal(jr.key(1), (9, 7))


def pair(beta=3.0, tau=1.0):
    layers = {"v": hmx.IdentityLayer(7, tau=tau), "h": hmx.SoftmaxLayer(5, beta=beta)}
    return hmx.HAM(layers, {"w": hmx.LinearSynapse(W)}, [(("v", "h"), "w")])


def starts(rows, seed=0):
    draw = np.random.default_rng(seed).normal
    return {"v": jnp.asarray(draw(size=(rows, 7)), float), "h": jnp.asarray(np.zeros((rows, 5)))}


def recalled(ham, xs, **settings):
    return hmx.descend(ham.vectorize(), xs, **settings)


def programs(calls):
    """The names of the larger programs that each of some calls compiles, in this order; they ask
    for a number of steps that no other test does."""
    counts = []
    for call in calls:
        with compiled_programs() as names: jax.block_until_ready(call().xs)
        counts.append([n for n in names if "descend" in n or "recall" in n])
    return counts


@pytest.mark.slow
def test_batches_share_programs():
    sizes = (1, 5, 6, 7, 100, 1000)
    xs, settings = {n: starts(n) for n in sizes}, dict(solver=hmx.Euler(0.3), max_steps=94)
    calls = [lambda n=n: recalled(pair(), xs[n], **settings) for n in (*sizes, *sizes)]
    counts = programs(calls)
    assert list(map(len, counts)) == [1, 0, 0, 0, 1, 1] + 6 * [0]


@pytest.mark.slow(but=1)
@pytest.mark.parametrize("rows", [1, pytest.param(5, marks=pytest.mark.slow), 13])
@pytest.mark.parametrize("solver", [hmx.Adaptive(), hmx.Euler(0.3), hmx.Langevin(0.01, 0.1)])
def test_rows_that_fill_up_change_nothing(solver, rows):
    "Under `jax.jit` no row is added, and numbers are constants."
    xs, key = starts(rows), jr.key(3)
    settings = dict(solver=solver, key=key, max_steps=40, trace=hmx.Trace(parts=True, states=True))
    settings["clamp"] = {"v": np.arange(7) < 3, "h": isinstance(solver, hmx.Langevin)}
    ours = recalled(pair(), xs, **settings)
    plain = jax.jit(lambda xs: recalled(pair(), xs, **settings))(xs)
    assert ours.energies.shape == (rows, 41) and ours.records["states"]["v"].shape == (rows, 41, 7)
    # on the way rounding may decide over a length, but not where the way ends
    kept = (lambda out: (out.xs, out.energy)) if solver.compares_energies else lambda out: out
    for a, b in zip(*map(jax.tree.leaves, (ours, plain)), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
    for a, b in zip(*map(jax.tree.leaves, (kept(ours), kept(plain))), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-4)


def test_sizes():
    sizes = [filled_size(n) for n in range(1, 5000)]
    assert sizes == sorted(sizes) and all(s >= n for n, s in enumerate(sizes, 1))
    assert all(s - n < 8 or s < 1.125 * n for n, s in enumerate(sizes, 1))
    assert len(set(sizes)) <= 8 * 8 # eight for every doubling


@pytest.mark.slow
def test_numbers_are_data():
    "Of layers, solvers and tolerances: all of them change at once"
    xs = starts(8)
    net = lambda v: pair(beta=v, tau=v / 2)
    for make in (
        lambda v: recalled(net(v), xs, max_steps=95, solver=hmx.Euler(v / 20)),
        lambda v: recalled(
            net(v), xs, max_steps=96, solver=hmx.Adaptive(tol=v / 1000), rtol=v * 1e-5
        ),
    ):
        counts = programs([lambda v=v: make(v) for v in np.linspace(1, 9, 10).tolist()])
        assert list(map(len, counts)) == [1] + [0] * 9


@pytest.mark.slow
def test_numbers_are_data_of_flow_and_stability():
    xs = starts(2)
    for name, go in (
        ("flow", lambda v: hmx.flow(pair(beta=v, tau=v).vectorize(), xs, 0.5, max_steps=97)),
        ("stability", lambda v: hmx.stability(pair(beta=v, tau=v).vectorize(), xs, steps=31)),
    ):
        counts = []
        for v in (1.0, 2.0, 3.0):
            with compiled_programs() as names: jax.block_until_ready(jax.tree.leaves(go(v)))
            counts.append(sum(name in n for n in names))
        assert counts == [1, 0, 0]


@pytest.mark.slow
def test_masks_are_data():
    rng = np.random.default_rng(0)
    def bank(mask):
        memory = hmx.MemorySynapse(MEMORIES, mask=mask)
        return hmx.HAM({"v": hmx.IdentityLayer(7)}, {"m": memory}, [(("v",), "m")])
    def tokens(mask):
        synapse = hmx.AttentionSynapse.rand_init(jr.key(0), 4, 2, 3, mask=mask)
        return hmx.HAM({"t": hmx.LayerNormLayer((3, 4))}, {"a": synapse}, [(("t",), "a")])
    masks = [np.array(m) for m in rng.random((3, 9)) < 0.7]
    seen = [np.array(m) for m in rng.random((3, 3, 3)) < 0.8]
    v, t = {"v": starts(8)["v"]}, {"t": jr.normal(jr.key(5), (8, 3, 4))}
    settings = dict(solver=hmx.Euler(0.3), max_steps=98)
    remember = lambda m, v: recalled(bank(m), v, **settings)
    for calls in (
        [lambda m=m: remember(m, v) for m in masks],
        [lambda m=m: recalled(tokens(m), t, **settings) for m in seen],
        [lambda m=m: recalled(pair(), starts(8), clamp={"v": m[:7]}, **settings) for m in masks],
    ):
        assert list(map(len, programs(calls))) == [1, 0, 0]
    ours, by_hand = remember(masks[0], v), jax.jit(lambda v: remember(masks[0], v))(v)
    np.testing.assert_allclose(ours.xs["v"], by_hand.xs["v"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_arrays_of_any_length_share_the_program_of_recall():
    rng = np.random.default_rng(0)
    A = rng.normal(size=(20, 6)).astype("f4")
    queries = np.where(np.arange(6) < 4, A[:9], np.nan)
    memory = hmx.Memory(A)
    answers = {}
    def call(n):
        answers[n], out = memory.recall(queries[:n], max_steps=99)
        assert len(answers[n]) == n == len(out.steps)
        return out
    assert sum(map(len, programs([lambda n=n: call(n) for n in (6, 7, 8, 1)]))) == 1
    np.testing.assert_allclose(answers[8][:6], answers[6], rtol=1e-6)
    np.testing.assert_allclose(answers[8], A[:8], atol=0.05)


@pytest.mark.slow
def test_a_number_still_does_not_learn():
    "And one that learns does, through the same function."
    x = {n: v[0] for n, v in starts(1).items()}
    def loss(beta): return (hmx.descend(pair(beta), x, adjoint="implicit").xs["v"] ** 2).sum()
    slope = jax.jit(jax.grad(loss))(jnp.array(3.0))
    step = 1e-2
    np.testing.assert_allclose(slope, (loss(3 + step) - loss(3 - step)) / (2 * step), rtol=2e-2)
    learn = eqx.filter_grad(lambda ham: (hmx.descend(ham, x).xs["v"] ** 2).sum())
    grads = eqx.filter_eval_shape(learn, pair(3.0))
    assert jax.tree.structure(grads) == jax.tree.structure(pair(3.0))


def test_what_is_not_declared_stays_a_number():
    "Code of a user may ask about it."
    def steep(x, beta): return (beta * x**2 if beta > 1 else x**2).sum() / 2
    ham = hmx.HAM(
        {"v": hmx.NeuronLayer(eqx.Partial(steep, beta=2.0), 7)}, [hmx.BiasSynapse(jnp.ones(7))],
        [(("v",), 0)],
    )
    assert hmx.descend(ham, ham.init_states()).converged

    class Careful(hmx.AbstractSolver):
        dt: Any = 0.5
        exact_steps: ClassVar[bool] = True
        def init(self, problem, xs): return None
        def step(self, problem, now, state, step, key):
            assert self.dt < 1
            return hmx.Move(now, plain_step(problem, now, self.dt), None)
        def descends(self, step): return True
        def cost(self, problem): return 1.0
    assert hmx.descend(ham, ham.init_states(), solver=Careful()).converged


def test_only_what_is_compiled_inside_is_named():
    twice = jax.jit(lambda x: 2 * x)
    with compiled_programs() as outer:
        twice(np.ones(3))
        with compiled_programs() as inner: twice(np.ones(4))
    twice(np.ones(5))
    assert (len(outer), len(inner)) == (2, 1)


def test_the_same_network_in_both_precisions():
    "What is kept in single precision is not found in double, nor the other way round."
    for wide in (False, True, False):
        with jax.enable_x64(wide):
            xs = {n: v.astype(float) for n, v in starts(3).items()}
            out = recalled(pair(2.5, tau=1.5), xs, solver=hmx.Euler(0.25))
            assert out.energy.dtype == out.xs["v"].dtype == jnp.result_type(float)


def test_a_network_of_numpy_arrays():
    "As `jax.device_get` makes it"
    for ham in (pair(), jax.device_get(pair())):
        out = recalled(ham, starts(5))
        assert out.converged.all() and out.energy.shape == (5,)


FIRST_CALLS = """
import numpy as np, jax, jax.numpy as jnp, hamux as hmx
rows = np.random.default_rng(0).uniform(size=(20, 8)).astype("f4")
ham = hmx.HAM(
    {"x": hmx.IdentityLayer(8), "h": hmx.SoftmaxLayer(20, beta=3.0)},
    {"s": hmx.LinearSynapseWithBias(rows.T, -(rows**2).sum(1) / 2)}, [(("x", "h"), "s")])
start = jax.device_put({"x": rows[0], "h": np.zeros(20, "f4")})
with hmx.compiled_programs() as names: hmx.descend(ham, start, solver=hmx.Euler(0.1), rtol=1e-3)
print(*names, sep="; ")
queries = np.where(np.arange(8) < 4, rows[:3], np.nan)
with hmx.compiled_programs() as names: hmx.recall(rows, queries, k=2, solver=hmx.Euler(0.1))
print(*names, sep="; ")
"""


@pytest.mark.slow
def test_a_first_call_compiles_no_small_programs():
    "The descent alone; of a recall also a pass over the patterns and the nearest, for both looks"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    python = [sys.executable, "-c", FIRST_CALLS]
    run = subprocess.run(python, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    descend, recall = (line.split("; ") for line in run.stdout.splitlines())
    assert len(descend) == 1 and "_descend" in descend[0]
    assert len(recall) == 3 and sum("_descend" in name for name in recall) == 1


def test_a_program_that_another_needs_to_be_lowered():
    "In the contexts that programs share in a test run"
    needs = Primitive("needs_another")
    needs.def_abstract_eval(lambda x: x)

    def lower(context, x):
        jnp.sin(jnp.arange(17.0)).block_until_ready()
        return [x]

    mlir.register_lowering(needs, lower)
    assert jax.jit(needs.bind)(1.0) == 1.0
