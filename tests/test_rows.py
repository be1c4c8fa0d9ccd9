"""Networks of which each row has its own: against each row alone, closed forms, and bad input."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import hamux as hmx

BANKS = np.random.default_rng(0).normal(size=(5, 9, 4))
STARTS = {"x": np.random.default_rng(1).normal(size=(5, 4))}


@pytest.fixture(autouse=True, scope="module")
def x64():
    with jax.enable_x64(True): yield


def memory(Xi, beta=2.0, b=None):
    "One network: nearest-pattern memory, a constant, and a weight that all may share."
    synapses = {
        "m": hmx.MemorySynapse(Xi, Partial(hmx.lagr_softmax, beta=beta), "euclidean"),
        "b": hmx.BiasSynapse(jnp.full(4, 0.1) if b is None else b),
    }
    layers = {"x": hmx.NeuronLayer(hmx.lagr_identity, 4, leak=False)}
    return hmx.HAM(layers, synapses, [(("x",), "m"), (("x",), "b")])


def stacked(): return jax.vmap(memory)(BANKS).vectorize(axes=0)


def alone(i, **settings):
    "The descent of one row by itself; the rows are one program."
    return hmx.descend(memory(BANKS[i]), {"x": STARTS["x"][i]}, **settings)


@pytest.mark.slow(but=1)
@pytest.mark.parametrize(
    "solver", [hmx.Euler(0.3), hmx.Adaptive(), hmx.Relaxation()], ids=lambda s: type(s).__name__
)
def test_each_row_gets_what_it_gets_alone(solver):
    "And stops by itself; five rows are filled up to eight"
    out = hmx.descend(stacked(), STARTS, solver=solver)
    mapped = eqx.filter_vmap(lambda ham, x: hmx.descend(ham, {"x": x}, solver=solver))(
        jax.vmap(memory)(BANKS), STARTS["x"]
    )
    assert out.converged.all() and len(set(out.steps.tolist())) > 1
    for i in range(5):
        row = alone(i, solver=solver)
        for got in (out, mapped):
            assert (got.steps[i], got.code[i]) == (row.steps, row.code)
            np.testing.assert_allclose(got.xs["x"][i], row.xs["x"], rtol=1e-9)
            np.testing.assert_allclose(got.energies[i], row.energies, rtol=1e-9)
            np.testing.assert_allclose(got.energy[i], row.energy, rtol=1e-9)
            np.testing.assert_allclose(got.residual[i], row.residual, rtol=1e-3, atol=1e-13)


def test_one_step_is_the_posterior_mean_under_the_bank_of_the_row():
    ham = stacked().network
    ham = eqx.tree_at(lambda h: h._hypersynapses["b"].b, ham, jnp.zeros((5, 4)))
    out = hmx.descend(ham.vectorize(axes=0), STARTS, solver=hmx.Euler(1.0), max_steps=1)
    d2 = ((STARTS["x"][:, None] - BANKS) ** 2).sum(-1)
    p = np.exp(-d2) / np.exp(-d2).sum(1, keepdims=True) # β = 2: noise of variance ½
    np.testing.assert_allclose(out.xs["x"], np.einsum("bk,bkd->bd", p, BANKS), rtol=1e-9)


def test_other_banks_and_sizes_of_a_batch_compile_nothing():
    counts, settings = [], dict(max_steps=401, trace=False) # of no other test
    for banks in (BANKS, BANKS[::-1], BANKS[:3]):
        ham, n = jax.vmap(memory)(banks).vectorize(axes=0), len(banks)
        with hmx.compiled_programs() as names:
            out = hmx.descend(ham, {"x": STARTS["x"][:n]}, **settings)
        counts.append(sum("descend" in n for n in names))
        assert out.converged.shape == (n,) and out.converged.all()
    assert counts == [1, 0, 0]


@pytest.mark.parametrize("adjoint", ["checkpointed", "implicit"])
def test_derivatives_in_what_is_shared_and_what_is_not(adjoint):
    settings = dict(solver=hmx.Euler(0.5), adjoint=adjoint, trace=False, max_steps=300)
    def all_rows(banks, b):
        ham = eqx.tree_at(lambda h: h._hypersynapses["m"].Xi, memory(BANKS[0], b=b), banks)
        return (hmx.descend(ham.vectorize(axes="m"), STARTS, **settings).xs["x"] ** 2).sum()
    banks, b = jnp.asarray(BANKS), jnp.full(4, 0.1)
    in_banks, in_b = jax.jit(jax.grad(all_rows, (0, 1)))(banks, b)
    def by_hand(banks, b): # 300 half steps to the posterior mean plus b
        def step(x, _):
            p = jax.nn.softmax(-((x[:, None] - banks) ** 2).sum(-1))
            return (x + jnp.einsum("bk,bkd->bd", p, banks) + b) / 2, None
        return (jax.lax.scan(step, jnp.asarray(STARTS["x"]), length=300)[0] ** 2).sum()
    wanted = jax.jit(jax.grad(by_hand, (0, 1)))(banks, b)
    np.testing.assert_allclose(in_banks, wanted[0], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(in_b, wanted[1], rtol=1e-6)


def test_temperatures_schedules_and_masks_of_rows():
    "A number that differs is an array; a mask that differs comes in by vmap; beta may be annealed"
    betas, masks = np.arange(1.0, 6.0), np.random.default_rng(2).random((5, 9)) < 0.6
    def make(bank, beta, mask):
        synapse = hmx.MemorySynapse(bank, Partial(hmx.lagr_softmax, beta=beta), mask=mask)
        return hmx.HAM({"x": hmx.IdentityLayer(4)}, {"m": synapse}, [(("x",), "m")])
    ham = jax.vmap(make)(BANKS, betas, masks).vectorize(axes=0)
    xhats = ham.activations(STARTS)
    s = np.where(masks, np.einsum("bkd,bd->bk", BANKS, STARTS["x"]), -np.inf) * betas[:, None]
    wanted = (STARTS["x"] ** 2).sum(1) / 2 - np.log(np.exp(s).sum(1)) / betas
    np.testing.assert_allclose(ham.energy(xhats, STARTS), wanted, rtol=1e-9)
    np.testing.assert_allclose(hmx.descend(ham, STARTS, clamp="x").energy, wanted, rtol=1e-9)
    warm = {"m": lambda step: jnp.minimum(1.0 + step / 10, 3.0)}
    out = hmx.descend(ham, STARTS, solver=hmx.Euler(0.5), anneal=warm)
    cold = jax.vmap(make)(BANKS, jnp.full(5, 3.0), masks).vectorize(axes=0)
    np.testing.assert_allclose(out.energy, cold.energy(cold.activations(out.xs), out.xs), rtol=1e-9)
    assert out.converged.all() and (out.steps >= 20).all()


@pytest.mark.slow
def test_the_flow_of_each_row():
    out = hmx.flow(stacked(), STARTS, 2.0, saveat=[1.0, 2.0])
    for i in (0, 4):
        row = hmx.flow(memory(BANKS[i]), {"x": STARTS["x"][i]}, 2.0, saveat=[1.0, 2.0])
        np.testing.assert_allclose(out.xs["x"][i], row.xs["x"], rtol=1e-7)
        np.testing.assert_allclose(out.energies[i], row.energies, rtol=1e-7)


def test_rows_keep_their_networks_when_a_batch_shrinks():
    "512 rows of 512 neurons, of which 57 go further, and go on as 64"
    def make(b): return hmx.HAM([hmx.IdentityLayer(512)], [hmx.BiasSynapse(b)], [((0,), 0)])
    far = np.arange(512) % 9 == 4
    own = (np.arange(512.0) * np.where(far, 1e4, 1))[:, None] * np.ones(512)
    out = hmx.descend(
        jax.vmap(make)(own).vectorize(axes=0), {0: jnp.zeros((512, 512))}, solver=hmx.Euler(0.7),
        trace=False, atol=1e-3,
    )
    assert out.converged.all() and out.steps[far].min() > out.steps[~far].max()
    np.testing.assert_allclose(out.xs[0], own, atol=2e-3)


def test_a_stack_is_described_saved_by_row_and_learned(tmp_path):
    ham = stacked()
    assert "over a leading batch axis" in repr(ham) and ham.n_rows == 5
    hmx.save(tmp_path / "row", ham.row(3))
    again = hmx.load(tmp_path / "row")
    np.testing.assert_array_equal(again.hypersynapses["m"].Xi, BANKS[3])
    begin = ham.init_states()
    assert begin["x"].shape == (5, 4)
    slope = jax.grad(lambda ham: ham.energy(ham.activations(STARTS), STARTS).sum())(ham)
    assert slope.hypersynapses["b"].b.shape == (5, 4)
    for i in range(5):
        np.testing.assert_allclose(slope.row(i).hypersynapses["b"].b, -STARTS["x"][i])


@pytest.mark.parametrize("call, error, says", [
    (lambda: memory(BANKS[0]).vectorize(axes=0), ValueError, "one number of rows, got shapes"),
    (lambda: memory(BANKS[0]).vectorize(axes="w"), ValueError, "unknown layer or hypersynapse 'w'"),
    (lambda: memory(BANKS[0]).vectorize(axes="x"), ValueError, "'x' has no array"),
    (lambda: memory(BANKS[0]).vectorize(axes=1), TypeError, "axes must be None"),
    (lambda: memory(BANKS[0]).vectorize(axes=True), TypeError, "axes must be None"),
    (lambda: memory(BANKS[0]).vectorize(axes="m"), ValueError, "'m'.* fails for layers of shapes"),
    (
        lambda: hmx.descend(stacked(), {"x": STARTS["x"][:3]}),
        ValueError, "one row for each network, 5, got 3",
    ),
    (lambda: hmx.stability(stacked(), STARTS), ValueError, r"ham\.row\(i\)"),
    (lambda: hmx.save("nowhere", stacked()), ValueError, r"Take that of a row"),
    (lambda: stacked().unvectorize(), ValueError, "Each of the 5 rows"),
])
def test_bad_input(call, error, says):
    with pytest.raises(error) as e: call()
    assert re.search(says, str(e.value)), str(e.value)


def test_a_row_that_is_not_there():
    X = jnp.ones((4, 5, 3))
    make = lambda X: hmx.HAM(
        {"x": hmx.IdentityLayer(3)}, {"m": hmx.MemorySynapse(X)}, [(("x",), "m")])
    many = jax.vmap(make)(X).vectorize(axes=0)
    for i in (4, -5):
        with pytest.raises(IndexError, match=f"row must be one of 4 rows, got {i}"): many.row(i)
    with pytest.raises(ValueError, match="axes names nothing"): make(X[0]).vectorize(axes=[])
    with pytest.raises(ValueError, match="there must be a row"):
        jax.vmap(make)(X[:0]).vectorize(axes=0)
