"""Memory synapses against the same energy in one piece: every derivative that training through a
recall takes, and the memory that it takes."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.tree_util import Partial

import hamux as hmx
from hamux.dynamics.programs import network_as_data
from hamux.lagrangians.separation import log_sum_relu
from hamux.storage.config import from_config, to_config
from hamux.synapses.memory import MemorySynapse
from hamux.synapses.similarities import Cosine, Mahalanobis, MappedSimilarity

MASK = np.arange(23) % 3 > 0
CASES = [  # lagrangian, its learned hyperparameter, similarity, mask
    (hmx.lagr_softmax, {"beta": 0.7}, "dot", None),
    (hmx.lagr_softmax, {"beta": 0.7}, "euclidean", MASK),
    (hmx.lagr_ghostmax, {"beta": 0.7}, "dot", MASK),
    (hmx.lagr_identity, {}, "dot", MASK),
    (hmx.lagr_repu, {"n": 3.5}, "dot", None),
    (hmx.lagr_exp, {"beta": 0.7}, "euclidean", MASK),
    (log_sum_relu, {"beta": 0.2}, "euclidean", MASK),
    (hmx.lagr_entmax, {"alpha": 1.4, "beta": 0.7}, "dot", None),
    (Partial(hmx.lagr_ksubsets, k=3), {"beta": 0.7}, "euclidean", MASK),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        (hmx.lagr_sparsemax, {"beta": 0.7}, "euclidean", MASK),
        (hmx.lagr_normmax, {"alpha": 1.7, "beta": 0.7}, "dot", MASK),
    )),
]


def in_one_piece(L, similarity, mask):
    "The energy written plainly, from the memories that are there."
    def energy(Xi, hyper, x):
        if mask is not None: Xi = Xi[np.flatnonzero(mask)]
        return -L(Xi @ x if similarity == "dot" else -0.5 * ((x - Xi) ** 2).sum(1), **hyper)
    return energy


def derivatives(f, Xi, hyper, X):
    """Energies, gradients, products with the Hessian, and the gradients of a function of the
    gradients: in memories, hyperparameters and queries."""
    over = lambda g: jax.vmap(g, (None, None, 0))
    both = over(jax.value_and_grad(f, 2))
    def loss(*args):
        energies, currents = both(*args)
        return (currents**2).sum() + energies.sum()
    every = (0, 1, 2)
    (energies, _), (_, hessian) = jax.jvp(lambda X: both(Xi, hyper, X), (X,), (jnp.cos(X),))
    return (
        energies,
        jax.grad(lambda *a: over(f)(*a).sum(), every)(Xi, hyper, X),
        jax.grad(loss, every)(Xi, hyper, X),
        hessian,
    )


def derivatives_of_two(ours, plain, Xi, hyper, X):
    "The derivatives of two functions, from one program."
    return jax.jit(lambda *args: [derivatives(f, *args) for f in (ours, plain)])(Xi, hyper, X)


@pytest.mark.slow(but=2)
@pytest.mark.parametrize(
    "L, hyper, similarity, mask", CASES, ids=lambda v: getattr(v, "__name__", None)
)
def test_the_streamed_energy_is_the_plain_one_in_every_derivative(L, hyper, similarity, mask):
    with jax.enable_x64(True):
        X, Xi = jr.normal(jr.key(1), (4, 3), float), jr.normal(jr.key(2), (23, 3), float)
        hyper = {n: jnp.array(v) for n, v in hyper.items()}
        ours = lambda Xi, hyper, x: MemorySynapse(
            Xi, Partial(L, **hyper), similarity, mask=mask, block=7
        )(x)
        got, wanted = derivatives_of_two(ours, in_one_piece(L, similarity, mask), Xi, hyper, X)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "L",
    [Partial(hmx.lagr_softmax, beta=jnp.array(0.1)), Partial(hmx.lagr_tanh, beta=jnp.array(0.1))],
    ids=["softmax", "tanh"],
)
def test_no_array_of_batch_times_memories_is_ever_live(L):
    K, d, B = 100_000, 16, 64
    array = 4 * B * K  # bytes
    rows = 4 * d * K
    X, synapse = jnp.zeros((B, d)), MemorySynapse(jnp.zeros((K, d)), L, "euclidean")
    energy = jax.value_and_grad(lambda s, X: jax.vmap(s)(X).sum(), (0, 1))
    def trained(s, X):  # through a recall of three steps
        return (
            jax.lax.scan(lambda X, _: (X - jax.vmap(jax.grad(s))(X), None), X, length=3)[0] ** 2
        ).sum()
    for f in (energy, jax.grad(trained)):
        used = jax.jit(f).lower(synapse, X).compile().memory_analysis().temp_size_in_bytes
        assert (
            used < array / 2 + 3 * rows
        ), f"{used / 1e6} MB of temporaries, against {array / 1e6} for batch × memories"


def test_batches_of_memories_and_batches_of_batches():
    X, Xi = (
        np.random.default_rng(k).normal(size=s).astype("f4")
        for k, s in enumerate([(2, 5, 3), (2, 23, 3)])
    )
    ours = jax.jit(jax.vmap(lambda Xi, X: jax.vmap(jax.grad(MemorySynapse(Xi, block=7)))(X)))(Xi, X)
    e = np.exp(np.einsum("nkd,nbd->nbk", Xi, X))
    p = e / e.sum(-1, keepdims=True)
    np.testing.assert_allclose(ours, -p @ Xi, rtol=1e-4, atol=1e-6)


def test_half_precision_is_summed_in_single():
    Xi, x = jr.normal(jr.key(2), (5000, 8)).astype(jnp.float16), jr.normal(jr.key(1), (8,)).astype(
        jnp.float16
    )
    synapse = MemorySynapse(Xi, hmx.lagr_relu, block=64)
    value, grad = jax.jit(jax.value_and_grad(synapse))(x)
    assert value.dtype == grad.dtype == jnp.float16
    exact = -0.5 * np.maximum(np.asarray(Xi, float) @ np.asarray(x, float), 0) ** 2
    np.testing.assert_allclose(float(value), exact.sum(), rtol=2e-3)


def test_numbers_that_are_far_apart_do_not_overflow():
    Xi = jnp.array([[1e4, 0.0], [0.0, 1e4], [1e4, 1.0]])
    synapse = MemorySynapse(Xi, Partial(hmx.lagr_softmax, beta=10.0), block=1)
    value, grad = jax.jit(jax.value_and_grad(synapse))(jnp.array([1e4, 0.0]))
    np.testing.assert_allclose(value, -1e8 - np.log(2) / 10, rtol=1e-6)
    np.testing.assert_allclose(grad, [-1e4, -0.5], rtol=1e-6)


def test_what_is_in_an_empty_slot_does_not_matter():
    Xi = jr.normal(jr.key(0), (6, 3)).at[2].set(jnp.nan)
    for L in (hmx.lagr_softmax, hmx.lagr_exp):
        synapse = MemorySynapse(Xi, L, "euclidean", mask=np.arange(6) != 2, block=4)
        grads = jax.jit(jax.grad(lambda s: (jax.grad(s)(jnp.ones(3)) ** 2).sum()))(synapse).Xi
        assert jnp.isfinite(grads).all() and (grads[2] == 0).all() and (grads[0] != 0).all()


# --- Lagrangians of a user's own, tokens, traced masks --------------------------------------------


@hmx.with_facts(form="competition", silent=2.0)
class Shy(eqx.Module):
    "A softmax with two silent competitors, its temperature a field."
    beta: jax.Array

    def __call__(self, s):
        return jnp.log(2 + jnp.exp(self.beta * s).sum()) / self.beta


@hmx.with_facts(form="sum")
class Bumps(eqx.Module):
    width: jax.Array

    def __call__(self, s): return (jnp.sqrt(1 + (self.width * s) ** 2)).sum()


@hmx.with_facts(
    form="function of a sum",
    terms=lambda s, gain: jnp.cosh(gain * s).sum(),
    outer=lambda total, gain: jnp.log(total) / gain,
)
class LogCosh(eqx.Module):
    gain: jax.Array

    def __call__(self, s): return jnp.log(jnp.cosh(self.gain * s).sum()) / self.gain


@pytest.mark.parametrize("kind", [Shy, Bumps, LogCosh])
@pytest.mark.parametrize("masked", [False, True])
def test_modules_of_a_user_stream_with_all_their_derivatives(kind, masked):
    with jax.enable_x64(True):
        Xi, x, number = jr.normal(jr.key(0), (13, 4)), jr.normal(jr.key(1), (4,)), jnp.array(0.7)
        mask = np.arange(13) % 3 > 0 if masked else None
        rows = slice(None) if mask is None else np.flatnonzero(mask)
        ours = lambda x, Xi, n: hmx.MemorySynapse(Xi, kind(n), mask=mask, block=5)(x)
        plain = lambda x, Xi, n: -kind(n)(Xi[rows] @ x)
        both = lambda *args: [jax.value_and_grad(f, (0, 1, 2))(*args) for f in (ours, plain)]
        (value, slopes), (exact, wanted) = jax.jit(both)(x, Xi, number)
        np.testing.assert_allclose(value, exact, rtol=1e-12)
        for a, b in zip(slopes, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_over_the_last_axis_is_a_sum_over_tokens():
    with jax.enable_x64(True):
        Xi, tokens = jr.normal(jr.key(0), (9, 4)), jr.normal(jr.key(1), (2, 3, 4))
        for lagrangian in (hmx.lagr_softmax, hmx.lagr_relu):
            block = hmx.MemorySynapse(Xi, lagrangian, over="last", block=4)
            by_hand = lambda t: -jax.vmap(lambda v: lagrangian(Xi @ v))(t.reshape(-1, 4)).sum()
            both = jax.jit(lambda t: [jax.value_and_grad(f)(t) for f in (block, by_hand)])
            (energy, slope), (wanted, wanted_slope) = both(tokens)
            np.testing.assert_allclose(energy, wanted, rtol=1e-12)
            np.testing.assert_allclose(slope, wanted_slope, rtol=1e-9)
    with pytest.raises(ValueError, match="must be 'all' or 'last'"):
        hmx.MemorySynapse(Xi, over="rows")


def test_masks_may_be_traced():
    Xi, x = jr.normal(jr.key(0), (6, 4)), jr.normal(jr.key(1), (4,))
    masks = np.array([[True] * 6, [True, False] * 3])
    energy = lambda mask: hmx.MemorySynapse(Xi, mask=mask)(x)
    exact = [-np.log(np.exp(np.asarray(Xi)[m] @ np.asarray(x)).sum()) for m in masks]
    for f in (jax.vmap(energy), jax.jit(jax.vmap(energy))):
        np.testing.assert_allclose(f(masks), exact, rtol=1e-6)
    tokens = jr.normal(jr.key(2), (5, 4))
    Wq, Wk = jr.normal(jr.key(3), (2, 2, 3, 4))
    there = np.array([[True] * 5, [True, True, False, True, False]])
    looks = lambda mask: hmx.AttentionSynapse(Wq, Wk, key_mask=mask)(tokens)
    both = jax.jit(lambda: (jax.vmap(looks)(jnp.asarray(there)), [looks(m) for m in there]))
    np.testing.assert_allclose(*both(), rtol=1e-5)


@pytest.mark.parametrize("L", [hmx.lagr_softmax, hmx.log_sum_relu, hmx.lagr_relu],
                         ids=["competition", "function of a sum", "sum"])
def test_distances_do_not_depend_on_where_zero_is(L):
    "Patterns four thousand times their spread from the origin, in single precision."
    on_a_grid = lambda key, *s: jnp.round(2**9 * jr.normal(jr.key(key), s, jnp.float32)) / 2**9
    Xi, x = on_a_grid(0, 30, 5), on_a_grid(1, 5)

    program = eqx.filter_jit(lambda memory, x: jax.value_and_grad(memory)(x))

    def energy(shift):
        memory = hmx.MemorySynapse(Xi + shift, L, similarity="euclidean", block=7)
        return program(memory, x + shift)

    (near, g), (far, there) = energy(jnp.float32(0)), energy(jnp.float32(2**12))
    np.testing.assert_allclose(far, near, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(there, g, rtol=2e-3, atol=2e-3) # x̂ itself resolves 5e-4 there


# --- a bias per memory, and entries that a memory does not know -----------------------------------


KNOWN = np.random.default_rng(5).random((23, 3)) < 0.6
KNOWN[~KNOWN.any(1), 0] = True


def in_one_piece_with_gaps(L, similarity, mask):
    "The energy written plainly, from what each memory knows."
    def energy(Xi, hyper, x):
        hyper = dict(hyper)
        bias, share = hyper.pop("bias"), len(x) / KNOWN.sum(1)
        s = (KNOWN * Xi * x).sum(1)
        if similarity == "euclidean": s = -0.5 * share * (KNOWN * (x - Xi) ** 2).sum(1)
        s = s + bias
        return -L(s if mask is None else s[np.flatnonzero(mask)], **hyper)
    return energy


@pytest.mark.slow(but=1)
@pytest.mark.parametrize("L, hyper, similarity, mask", [
    (hmx.lagr_softmax, {"beta": 0.7}, "dot", MASK),
    (hmx.lagr_softmax, {"beta": 0.7}, "euclidean", MASK),
    (hmx.lagr_ghostmax, {"beta": 0.7}, "euclidean", None),
    (hmx.lagr_exp, {"beta": 0.7}, "euclidean", MASK),
    (log_sum_relu, {"beta": 0.2}, "euclidean", MASK),
    (lambda s, beta: jnp.log(jnp.exp(beta * s).sum()) / beta, {"beta": 0.7}, "dot", MASK),
], ids=lambda v: getattr(v, "__name__", None))
def test_biases_and_gaps_have_the_derivatives_of_the_plain_energy(L, hyper, similarity, mask):
    with jax.enable_x64(True):
        X, Xi = jr.normal(jr.key(1), (4, 3), float), jr.normal(jr.key(2), (23, 3), float)
        hyper = {n: jnp.array(v) for n, v in hyper.items()}
        hyper["bias"] = jr.normal(jr.key(3), (23,), float)

        def ours(Xi, hyper, x):
            hyper = dict(hyper)
            given = dict(bias=hyper.pop("bias"), known=KNOWN, mask=mask, block=7)
            return MemorySynapse(Xi, Partial(L, **hyper), similarity, **given)(x)

        plain = in_one_piece_with_gaps(L, similarity, mask)
        got, wanted = derivatives_of_two(ours, plain, Xi, hyper, X)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-8)


def test_distances_are_weighed_as_those_of_scikit_learn():
    pairwise = pytest.importorskip("sklearn.metrics.pairwise")
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        Xi, x, bias = rng.normal(size=(23, 3)), rng.normal(size=3), rng.normal(size=23)
        holes = np.where(KNOWN, Xi, np.nan)
        s = bias - pairwise.nan_euclidean_distances(x[None], holes, squared=True)[0] / 2
        for L in (Partial(hmx.lagr_softmax, beta=2.0), hmx.lagr_identity):
            synapse = MemorySynapse(holes, L, "euclidean", bias=bias, known=KNOWN, block=6)
            step = 1e-6 * np.eye(3)
            at = x + np.concatenate([np.zeros((1, 3)), step, -step])
            values, slopes = jax.jit(jax.vmap(jax.value_and_grad(synapse)))(at)
            np.testing.assert_allclose(values[0], -L(s), rtol=1e-12)
            wanted = (values[1:4] - values[4:]) / 2e-6
            np.testing.assert_allclose(slopes[0], wanted, rtol=1e-6, atol=1e-7)


def test_a_bias_is_a_number_of_copies():
    "The logarithm of a weight, over β: a memory stored three times, and three of them as one."
    with jax.enable_x64(True):
        Xi, x = jr.normal(jr.key(0), (5, 3), float), jr.normal(jr.key(1), (3,), float)
        copies = np.array([1, 3, 1, 2, 1])
        L = Partial(hmx.lagr_softmax, beta=4.0)
        for similarity in ("dot", "euclidean"):
            stored = MemorySynapse(jnp.repeat(Xi, copies, axis=0), L, similarity)
            weighed = MemorySynapse(Xi, L, similarity, bias=np.log(copies) / 4)
            np.testing.assert_allclose(weighed(x), stored(x), rtol=1e-12)
        lengths = MemorySynapse(Xi, L, bias=-0.5 * (Xi**2).sum(1))
        distances = MemorySynapse(Xi, L, "euclidean")(x) - 0.5 * x @ x
        np.testing.assert_allclose(lengths(x), distances, rtol=1e-12)


@eqx.filter_jit
def slopes(synapse):
    "Of a function of a gradient."
    return jax.grad(lambda s: (jax.grad(s)(jnp.ones(3)) ** 2).sum())(synapse)


@pytest.mark.parametrize("hole", [np.nan, 1e30])
def test_what_stands_for_an_unknown_entry_does_not_matter(hole):
    Xi, bias = jr.normal(jr.key(0), (23, 3)), jnp.zeros(23)
    holes = jnp.where(KNOWN, Xi, hole)
    put_back = lambda synapse: eqx.tree_at(lambda s: s.Xi, synapse, holes) # as a training might
    for L in (hmx.lagr_softmax, hmx.lagr_relu):
        for similarity in ("dot", "euclidean"):
            make = lambda Xi: MemorySynapse(Xi, L, similarity, bias=bias, known=KNOWN, block=4)
            got = [slopes(s) for s in (make(Xi), make(holes), put_back(make(Xi)))]
            for g in got:
                np.testing.assert_allclose(g.Xi, got[0].Xi, rtol=1e-6)
                np.testing.assert_allclose(g.bias, got[0].bias, rtol=1e-6)
            assert (np.asarray(got[0].Xi)[~KNOWN] == 0).all()
    assert jnp.isfinite(make(holes).Xi).all()


def test_a_bias_learns_as_the_memories_do():
    Xi, x = jr.normal(jr.key(0), (6, 3)), jnp.ones(3)
    make = lambda trainable: MemorySynapse(Xi, bias=jnp.zeros(6), trainable=trainable)
    learn = eqx.filter_jit(lambda s: jax.grad(lambda s: s(x))(s).bias)
    slopes = {t: learn(make(t)) for t in (True, False)}
    p = jax.nn.softmax(Xi @ x)
    np.testing.assert_allclose(slopes[True], -p, rtol=1e-5)
    assert (slopes[False] == 0).all()
    alone = lambda bias: MemorySynapse(Xi, bias=bias)(x) # nothing else has a derivative
    slope, bend = jax.jit(lambda b: (jax.grad(alone)(b), jax.hessian(alone)(b)))(jnp.zeros(6))
    np.testing.assert_allclose(slope, -p, rtol=1e-5)
    np.testing.assert_allclose(bend, np.outer(p, p) - np.diag(p), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_gaps_are_data_of_a_compiled_program():
    Xi, x = jr.normal(jr.key(0), (23, 3)), {"v": jnp.ones(3)}
    layer = hmx.NeuronLayer(hmx.lagr_identity, 3, leak=False)
    net = lambda known: hmx.HAM(
        {"v": layer},
        {"m": MemorySynapse(Xi, hmx.lagr_softmax, "euclidean", bias=jnp.zeros(23), known=known)},
        [(("v",), "m")],
    )
    hmx.descend(net(KNOWN), x, max_steps=3)
    with hmx.compiled_programs() as names: hmx.descend(net(KNOWN[:, ::-1]), x, max_steps=3)
    assert "_descend" not in " ".join(names)
    plain, (data, _) = net(KNOWN), network_as_data(net(KNOWN), jnp.float32)
    assert data.dtype == plain.dtype == jnp.float32
    np.testing.assert_allclose(data.energy(x, x), plain.energy(x, x), rtol=1e-6)


def test_gaps_and_biases_are_described():
    def net(known, dtype):
        bias, layer = jnp.arange(23.0, dtype=dtype), hmx.IdentityLayer((3, 1))
        Xi = jr.normal(jr.key(0), (23, 3, 1))
        return hmx.HAM([layer], [MemorySynapse(Xi, bias=bias, known=known)], [([0], 0)])
    for dtype in (jnp.float32, jnp.float16): # that of the memories, and another
        ham = net(KNOWN[..., None], dtype)
        made = from_config(to_config(ham), key=jr.key(1))
        assert to_config(made) == to_config(ham)
        assert jax.tree.structure(made) == jax.tree.structure(ham)
        assert made.hypersynapses[0].bias.dtype == dtype
        assert (made.hypersynapses[0].known == KNOWN[..., None]).all()
    other = to_config(net(KNOWN[..., None], jnp.float32))["hypersynapses"][0]["known"]
    for text in ("no", "AAAA", other):
        with pytest.raises(ValueError, match="known must be booleans of shape"):
            hmx.build(
                [hmx.IdentityLayer(9)], [MemorySynapse.lazy(23, known=text)], [([0], 0)],
                key=jr.key(0),
            )


@pytest.mark.parametrize("given, message", [
    (dict(bias=np.zeros(3)), r"bias must have shape \(23,\)"),
    (dict(bias=np.full(23, -np.inf)), "bias must be finite, got -inf for the memory 0"),
    (dict(bias="large"), "bias must be an array"),
    (dict(known=KNOWN[0]), r"known must have shape \(23, 3\), got \(3,\)"),
    (dict(known=KNOWN.astype(float)), "known must be booleans"),
    (dict(known=KNOWN & (np.arange(23) != 4)[:, None]), "none for 1 memories, the first of them 4"),
])
def test_unfit_biases_and_gaps_are_refused(given, message):
    with pytest.raises((ValueError, TypeError), match=message):
        MemorySynapse(np.ones((23, 3)), **given)


def test_an_empty_slot_may_know_nothing():
    Xi, x = jr.normal(jr.key(0), (23, 3)), jnp.ones(3)
    known = KNOWN & MASK[:, None]
    for L in (hmx.lagr_softmax, hmx.lagr_relu):
        ours = MemorySynapse(Xi, L, "euclidean", mask=MASK, known=known)
        rows = MemorySynapse(Xi[MASK], L, "euclidean", known=known[MASK])
        both = jax.jit(lambda x: [jax.grad(s)(x) for s in (ours, rows)])
        np.testing.assert_allclose(*both(x), rtol=1e-5)


SOLVERS = [
    hmx.Adaptive(), hmx.Backtracking(), hmx.Euler(0.5), hmx.Relaxation(),
    hmx.Langevin(0.1, 0.01),
]


@pytest.mark.slow(but=1)
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_a_batch_of_networks_descends_as_each_alone(solver):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        Xi, bias = rng.normal(size=(5, 6, 4)), 0.1 * rng.normal(size=(5, 6))
        known, mask = rng.random((5, 6, 4)) < 0.8, rng.random((5, 6)) < 0.8
        known[..., 0], mask[:, 0] = True, True
        L = Partial(hmx.lagr_softmax, beta=3.0)
        make = lambda Xi, bias, known, mask: MemorySynapse(
            Xi, L, "euclidean", bias=bias, known=known, mask=mask, block=4
        )

        def end(synapse, x):
            layer = hmx.NeuronLayer(hmx.lagr_identity, 4, leak=False)
            ham = hmx.HAM({"pattern": layer}, {"bank": synapse}, [(("pattern",), "bank")])
            key = jr.key(0) if isinstance(solver, hmx.Langevin) else None
            out = hmx.descend(ham, {"pattern": x}, solver=solver, max_steps=40, key=key)
            return out.xs["pattern"], out.energy, out.steps, out.code

        x = Xi[:, 0] + 0.3 * rng.normal(size=(5, 4))
        synapses = eqx.filter_vmap(make)(Xi, bias, known, mask)
        together = eqx.filter_jit(eqx.filter_vmap(end))(synapses, jnp.asarray(x))
        for i in range(5):
            alone = end(make(Xi[i], bias[i], known[i], mask[i]), x[i])
            for a, b in zip(together, alone, strict=True):
                np.testing.assert_allclose(a[i], b, rtol=1e-9, atol=1e-9)


# --- similarities of a user's own, and memories that are recalled to the bit ----------------------


@pytest.mark.parametrize("dtype, most", [(jnp.float32, 1e9), (jnp.float16, 1e4)])
def test_the_cosine_does_not_depend_on_lengths(dtype, most):
    x, xi = np.array([3.0, -1, 2, 0.5]), np.array([1.0, 2, -1, 4])
    exact = x @ xi / np.sqrt((x @ x) * (xi @ xi))
    slope = jax.jit(jax.value_and_grad(Cosine()))
    for a, b in ((1, 1), (1 / most, 1), (most, 1), (1, most), (most, most), (1, 1 / most)):
        value, g = slope(jnp.asarray(a * x, dtype), jnp.asarray(b * xi, dtype))
        assert abs(float(value) - exact) < 20 * float(jnp.finfo(dtype).eps)
        if dtype == jnp.float32:
            unit = x / np.sqrt(x @ x)
            np.testing.assert_allclose(
                a * np.asarray(g, float), (xi / np.sqrt(xi @ xi) - exact * unit) / np.sqrt(x @ x),
                atol=1e-6)
    zero = jnp.zeros(4, dtype)
    assert Cosine()(zero, jnp.asarray(xi, dtype)) == 0 == Cosine()(jnp.asarray(x, dtype), zero)


class Bilinear(eqx.Module):
    "A similarity that is none of the library's, with a number that is a constant."
    W: jax.Array
    power: int = eqx.field(static=True)

    def __call__(self, xhat, xi): return jnp.tanh(xhat @ self.W @ xi) ** self.power


OWN = {
    "mapped": lambda W: MappedSimilarity(W, 2 * W[::-1]),
    "mahalanobis": Mahalanobis,
    "cosine": lambda W: Cosine(),
    "bilinear": lambda W: Bilinear(W, 3),
}


@pytest.mark.slow(but=1)
@pytest.mark.parametrize("L, names", [
    (hmx.lagr_exp, ["bilinear"]),
    (hmx.lagr_ghostmax, ["mapped"]),
    (hmx.lagr_softmax, ["mahalanobis", "cosine"]),
    pytest.param(hmx.lagr_entmax, ["bilinear"], marks=pytest.mark.slow),
], ids=lambda v: getattr(v, "__name__", None))
def test_own_similarities_stream_in_every_derivative(L, names):
    with jax.enable_x64(True):
        X, Xi = jr.normal(jr.key(1), (4, 3), float), jr.normal(jr.key(2), (13, 3), float)
        hyper = {"W": jr.normal(jr.key(3), (3, 3), float), "beta": jnp.array(0.7)}
        rows = np.flatnonzero(MASK[:13])

        def ours(Xi, hyper, x, name):
            how = dict(similarity=OWN[name](hyper["W"]), mask=MASK[:13], block=5)
            return MemorySynapse(Xi, Partial(L, beta=hyper["beta"]), **how)(x)

        def plain(Xi, hyper, x, name):
            one = OWN[name](hyper["W"])
            return -L(jnp.stack([one(x, xi) for xi in Xi[rows]]), beta=hyper["beta"])

        def every(f): # all similarities in one program
            return [derivatives(lambda *a, name=name: f(*a, name), Xi, hyper, X) for name in names]

        got, wanted = jax.jit(lambda: [every(f) for f in (ours, plain)])()
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-8)


def test_an_own_similarity_is_saved_and_described(tmp_path):
    W, Xi = jr.normal(jr.key(3), (3, 3)), jr.normal(jr.key(2), (13, 3))
    net = lambda W: hmx.HAM(
        [hmx.NeuronLayer(hmx.lagr_identity, 3, leak=False)],
        [MemorySynapse(Xi, Partial(hmx.lagr_sparsemax, beta=4.0), Mahalanobis(W))],
        [([0], 0)],
    )
    hmx.save(tmp_path / "net.hamux", net(W))
    back, x = hmx.load(tmp_path / "net.hamux"), {0: jnp.ones(3)}
    np.testing.assert_array_equal(back.hypersynapses[0].similarity.A, W)
    assert back.energy(x, x) == net(W).energy(x, x)
    slope = jax.grad(lambda ham: ham.energy(x, x))(back).hypersynapses[0].similarity.A
    assert slope.shape == W.shape and (slope != 0).any()


@pytest.mark.parametrize("similarity", ["dot", "euclidean"])
def test_a_pattern_that_leads_by_the_margin_is_recalled_to_the_bit(similarity):
    """Santos et al. 2024: it is a fixed point if and only if its separation is 1/(β(α − 1))."""
    rng = np.random.default_rng(0)
    Xi = rng.normal(size=(300, 24)).astype(np.float32)
    stored = jnp.asarray(Xi)
    s = Xi.astype(float) @ Xi.T.astype(float)
    if similarity == "euclidean": s = s - (Xi.astype(float) ** 2).sum(1) / 2
    lead = np.diag(s) - np.where(np.eye(300) > 0, -np.inf, s).max(1)

    @jax.jit
    def after(alpha, beta):
        memory = MemorySynapse(stored, Partial(hmx.lagr_entmax, alpha=alpha, beta=beta), similarity,
                               block=64)
        slope = jax.vmap(jax.grad(memory))(stored)
        return slope if similarity == "euclidean" else slope + Xi

    for alpha in (1.0, 1.25, 1.5, 2.0):
        for beta in (0.07, 0.3, 1.0, 11.0):
            margin = 1 / (beta * (alpha - 1)) if alpha > 1 else 1e9
            sure = abs(lead - margin) > 0.05 * margin # nearer, what others weigh may round to 0
            still = (np.asarray(after(alpha, beta)) == 0).all(1)
            # a softmax whose other weights round to nothing has moved nothing either
            if alpha > 1: np.testing.assert_array_equal(still[sure], (lead >= margin)[sure])
            elif beta < 1: assert not still.any()


@pytest.mark.slow
def test_sparse_memories_on_rows_that_are_traced_and_masked():
    Xi, x = jr.normal(jr.key(0), (9, 4)), jr.normal(jr.key(1), (4,))
    masks = np.array([[True] * 9, [True, False, True] * 3])
    L = Partial(hmx.lagr_sparsemax, beta=2.0)
    for f in (jax.value_and_grad(lambda x, m: MemorySynapse(Xi, L, mask=m, block=4)(x)),):
        value, slope = jax.jit(jax.vmap(f, (None, 0)))(x, masks)
        for m, v, g in zip(masks, value, slope, strict=True):
            rows = Xi[np.flatnonzero(m)]
            np.testing.assert_allclose(v, -L(rows @ x), rtol=1e-5)
            np.testing.assert_allclose(g, -jax.grad(L)(rows @ x) @ rows, rtol=1e-4, atol=1e-6)


def test_a_mask_leaves_as_many_memories_as_win():
    L, Xi = Partial(hmx.lagr_ksubsets, k=3), jnp.eye(8, 4)
    with pytest.raises(ValueError, match="leave 3 memories, which lagr_ksubsets.* got 2"):
        MemorySynapse(Xi, L, mask=np.arange(8) < 2)
    np.testing.assert_allclose(MemorySynapse(Xi, L, mask=np.arange(8) < 3)(jnp.ones(4)), -3.0)


@pytest.mark.slow
def test_subsets_are_taken_from_all_blocks_and_filled_slots():
    "Far apart, the best in the first block; or all negative, so that an empty slot's 0 is better"
    rng = np.random.default_rng(0)
    Xi, mask = rng.normal(size=(40, 3)) * np.linspace(30, 1, 40)[:, None], np.arange(40) % 4 > 0
    Xi[:, 0] = -10 - abs(Xi[:, 0])
    for beta in (0.02, 3.0):
        L = Partial(hmx.lagr_ksubsets, k=5, beta=beta)
        with jax.enable_x64(True):
            ours = MemorySynapse(Xi, L, mask=mask, block=7)
            plain = lambda x: -L(jnp.asarray(Xi[mask]) @ x)
            x = jnp.array([[1.0, 0.0, 0.0], [-1.0, 2.0, 0.5]])
            both = lambda x: [jax.value_and_grad(f)(x) for f in (ours, plain)]
            got, wanted = jax.jit(jax.vmap(both))(x)
            np.testing.assert_allclose(got[0], wanted[0], rtol=1e-9)
            np.testing.assert_allclose(got[1], wanted[1], rtol=1e-9)
