"Networks, results, solvers and losses are values: copies of every kind are equal to them."

import copy
import functools as ft
import pickle
import subprocess
import sys

import cloudpickle
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest

import hamux as hmx
from hamux.learning.gradients import AdjointMethod
from hamux.network.parameters import Frozen

COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda v: pickle.loads(pickle.dumps(v)),
    "cloudpickle": lambda v: pickle.loads(cloudpickle.dumps(v)),
}


@ft.cache
def network():
    "With constants of every kind: numbers, NumPy numbers, a mask, integers, functions."
    layers = {
        "x": hmx.TanhLayer(3, beta=2.0, tau=np.float32(0.5)),
        "h": hmx.SoftmaxLayer(4, beta=jnp.array(3.0)),
        "g": hmx.GhostmaxLayer((2, 3), beta=np.float16(1.5)),
    }
    parts = {
        "W": hmx.LinearSynapse.lazy(),
        "M": hmx.MemorySynapse(jnp.eye(4, 3), mask=[True] * 3 + [False]),
        "A": hmx.AttentionSynapse.lazy(2, causal=True),
    }
    connections = [(("x", "h"), "W"), (("x",), "M"), (("g",), "A")]
    return hmx.build(layers, parts, connections, key=jr.key(0))


@ft.cache
def things():
    "A thing of every kind, by name; the results are those of a network that is soon compiled."
    key, layers = jr.key(1), {"x": hmx.TanhLayer(3, beta=2.0), "h": hmx.IdentityLayer(4)}
    ham = hmx.build(layers, {"W": hmx.LinearSynapse.lazy()}, [(("x", "h"), "W")], key=key)
    xs, steps = ham.init_states(key=key), dict(solver=hmx.Euler(0.5), max_steps=5)
    loss = hmx.denoising_loss("x", **steps)
    images = jr.normal(key, (4, 3))
    how = dict(steps=2, batch_size=2, key=key, progress=False)
    bits = hmx.DiscreteHopfield(hmx.hebbian(jnp.array([[1, -1, 1], [1, 1, -1]])))
    return {
        "network": network(),
        "batches": network().vectorize(),
        "Descent": hmx.descend(ham, xs, **steps, trace=hmx.Trace(states=True)),
        "Flow": hmx.flow(ham, xs, 0.5),
        "Gradient": hmx.gradient(ham, lambda xhats: xhats["x"].sum(), xs, **steps),
        "Fit": hmx.fit(ham, loss, images, optax.adam(1e-2), validation=images, **how),
        "Stability": hmx.stability(ham, xs),
        "BitRecall": hmx.recall_bits(bits, jnp.array([1, 1, 1])),
        "DiscreteHopfield": bits,
        "losses": (loss, hmx.completion_loss("x"), hmx.classification_loss("h", "x")),
        "solvers": [hmx.Euler(0.5), hmx.Backtracking(), hmx.Adaptive(), hmx.Relaxation()],
        "Langevin": hmx.Langevin(0.1, jnp.array(0.5)),
        "adjoints": [
            hmx.UnrolledAdjoint(),
            hmx.CheckpointedAdjoint(),
            hmx.ImplicitAdjoint(),
            hmx.OneStepAdjoint(),
        ],
        "methods": [
            hmx.EquilibriumPropagation(),
            hmx.ContrastiveHebbian(),
            AdjointMethod(hmx.ImplicitAdjoint()),
        ],
    }


NAMES = (
    "network batches Descent Flow Gradient Fit Stability BitRecall DiscreteHopfield losses solvers"
    " Langevin adjoints methods"
).split()


@pytest.mark.slow
def test_nothing_is_forgotten(): assert set(NAMES) == set(things())


def is_same(a, b):
    "Equal structures, and equal leaves."
    if isinstance(a, hmx.Fit): a, b = vars(a), vars(b)
    leaves = zip(jtu.tree_leaves(a), jtu.tree_leaves(b), strict=True)
    return jtu.tree_structure(a) == jtu.tree_structure(b) and all(is_equal(v, w) for v, w in leaves)


def is_equal(v, w):
    "Equal numbers of one dtype, or the same thing."
    if not eqx.is_array_like(v): return v is w or v == w
    if isinstance(v, jax.Array) and jnp.issubdtype(v.dtype, jax.dtypes.prng_key):
        v, w = jr.key_data(v), jr.key_data(w)
    v, w = np.asarray(v), np.asarray(w)
    return (v.dtype, v.shape, v.tobytes()) == (w.dtype, w.shape, w.tobytes())


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", NAMES)
def test_a_copy_is_equal(name, how):
    thing = things()[name]
    twin = COPIES[how](thing)
    assert is_same(thing, twin)
    if not isinstance(thing, hmx.Fit): jtu.tree_map(lambda a, b: None, thing, twin)


@pytest.mark.parametrize("how", COPIES)
def test_nothing_compiles_again_for_a_copy(how):
    ham, compiled = network(), []

    @jax.jit
    def energy(ham, xs):
        compiled.append(ham)
        return ham.energy(ham.activations(xs), xs)

    xs = ham.init_states(key=jr.key(2))
    np.testing.assert_array_equal(energy(ham, xs), energy(COPIES[how](ham), xs))
    assert len(compiled) == 1


READER = """
import pickle, sys
import jax.random as jr, jax.tree_util as jtu
import test_values
with open(sys.argv[1], "rb") as file: ham = pickle.load(file)
here = test_values.network()
assert jtu.tree_structure(ham) == jtu.tree_structure(here)
assert hash(jtu.tree_structure(ham)) == hash(jtu.tree_structure(here))
xs = ham.init_states(key=jr.key(2))
print(repr(float(ham.energy(ham.activations(xs), xs))))
"""


@pytest.mark.slow
def test_a_pickle_is_read_in_another_process(tmp_path):
    "Where words have other hashes."
    ham = network()
    (tmp_path / "ham.pickle").write_bytes(pickle.dumps(ham))
    command = [sys.executable, "-c", READER, tmp_path / "ham.pickle"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="tests")
    assert done.returncode == 0, done.stderr
    xs = ham.init_states(key=jr.key(2))
    assert float(done.stdout) == float(ham.energy(ham.activations(xs), xs))


class Odd:
    "Without a hash, and with an `==` that may give no answer."
    __hash__ = None
    def __init__(self, value): self.value = value
    def __eq__(self, other): return self.value == other.value


@pytest.mark.parametrize("how", COPIES)
def test_constants_without_a_hash(how):
    "They are compared by ==; without a plain answer a constant equals only itself."
    for constant in {1, 2}, {"a": {1}}, bytearray(b"x"), Odd(3), float("nan"), -0.0, 1j:
        assert COPIES[how](Frozen([constant])) == Frozen([constant])
    assert Frozen(Odd(3)) != Frozen(Odd(4)) and Frozen({1}) != Frozen({2})
    assert Frozen(0.0) != Frozen(-0.0) and Frozen(np.float32(1)) != Frozen(np.float64(1))
    vague = Odd(np.ones(2))
    assert Frozen(vague) == Frozen(vague) != Frozen(Odd(np.ones(2)))
    assert Frozen(Odd(np.ones(2))) != Frozen(Odd(np.ones(3))) # whose == raises, or says no


BETAS = float("inf"), np.float32(np.inf), jnp.array(jnp.inf), 1j, np.complex64(2)


@pytest.mark.parametrize("beta", BETAS)
def test_an_inverse_temperature_is_real_and_finite(beta):
    "Wherever it stands"
    hot = eqx.Partial(hmx.lagr_softmax, beta=beta)
    W, bias = jnp.ones((1, 2, 3)), hmx.BiasSynapse(jnp.ones(3))
    for make in (
        lambda: hmx.HAM([hmx.SoftmaxLayer(3, beta=beta)], [bias], [([0], 0)]),
        lambda: hmx.TanhLayer(3, beta=beta).sigma(jnp.ones(3)),
        lambda: hmx.MemorySynapse(jnp.eye(3), hot),
        lambda: hmx.AttentionSynapse(W, W, beta),
        lambda: hmx.memory_ham(jnp.eye(3), beta),
        lambda: hmx.Memory(np.eye(3), beta=beta),
    ):
        with pytest.raises(ValueError, match="beta must be .*finite"): make()


@pytest.mark.parametrize("tau", [10**400, np.complex64(1), "1", np.nan, -np.inf])
def test_a_time_constant_is_a_positive_number(tau):
    with pytest.raises(ValueError, match="tau must be a positive finite number"):
        hmx.TanhLayer(3, tau=tau)


@pytest.mark.parametrize("max_steps", [2**31, 2**40, 10**400])
def test_steps_that_no_counter_holds(max_steps):
    ham = network()
    for recall in hmx.descend, lambda *given, **how: hmx.flow(*given, 1.0, **how):
        with pytest.raises(ValueError, match="max_steps must be a positive int"):
            recall(ham, ham.init_states(), max_steps=max_steps)


@pytest.mark.parametrize("key", [{}, 3, "x", []])
def test_a_key_that_is_none(key):
    ham = network()
    with pytest.raises(TypeError, match="key must be a PRNG key"):
        hmx.descend(ham, ham.init_states(), solver=hmx.Langevin(0.1, 0.1), max_steps=3, key=key)
