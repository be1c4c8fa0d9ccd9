"""Random hypergraphs against numpy and finite differences, a HAM as a pytree, the defects of the
published versions, bad input."""

import functools
import math
import re
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import hamux as hmx
from hamux import (
    HAM,
    BiasSynapse,
    ConvSynapse,
    DenseSynapse,
    IdentityLayer,
    LinearSynapse,
    LinearSynapseWithBias,
    NeuronLayer,
    SigmoidLayer,
    SoftmaxLayer,
    TanhLayer,
    lagr_identity,
    lagr_sigmoid,
    lagr_softmax,
    lagr_tanh,
)


@pytest.fixture(autouse=True, scope="module")
def x64():
    with jax.enable_x64(True):  # for this module alone
        yield


def close(got, expected, rtol=1e-7, atol=1e-9):
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol)


def trees_close(got, expected, **tol):
    assert jtu.tree_structure(got) == jtu.tree_structure(expected)
    jtu.tree_map(lambda a, b: close(a, b, **tol), got, expected)


def counted(f):
    """`f` under plain jax.jit, and a list that grows by one whenever it is traced."""
    traces = []
    def g(*args):
        traces.append(1)
        return f(*args)
    return jax.jit(g), traces


# --------------------------------------------------------------------------------------------------
# -------------------
# (a) random hypergraphs. The reference is numpy: each kind of layer is a pair (L, σ), with
# everything along the last axis


def ref_sphere(x, gamma, delta):
    return (gamma * np.sqrt((x**2).sum(-1, keepdims=True) + 1e-5)).sum() + (delta * x).sum()


def ref_layernorm(x, gamma, delta):
    return (x.shape[-1] * gamma * np.sqrt(x.var(-1, keepdims=True) + 1e-5)).sum() + (
        delta * x
    ).sum()


def ref_softmax(x, beta):
    e = np.exp(beta * x)
    return e / e.sum(-1, keepdims=True)


LAYERS = {
    "Identity": (lambda x: (x**2).sum() / 2, lambda x: x),
    "Relu": (lambda x: (np.maximum(x, 0) ** 2).sum() / 2, lambda x: np.maximum(x, 0)),
    "Repu": (
        lambda x, n: (np.maximum(x, 0) ** n / n).sum(),
        lambda x, n: np.maximum(x, 0) ** (n - 1),
    ),
    "Exp": (lambda x, beta: (np.exp(beta * x) / beta).sum(), lambda x, beta: np.exp(beta * x)),
    "Rexp": (
        lambda x, beta: (np.exp(beta * np.maximum(x, 0)) / beta - np.maximum(x, 0)).sum(),
        lambda x, beta: np.exp(beta * np.maximum(x, 0)) - 1,
    ),
    "Tanh": (
        lambda x, beta: (np.log(np.cosh(beta * x)) / beta).sum(),
        lambda x, beta: np.tanh(beta * x),
    ),
    "Sigmoid": (
        lambda x, beta: (np.log1p(np.exp(beta * x)) / beta).sum(),
        lambda x, beta: 1 / (1 + np.exp(-beta * x)),
    ),
    "Softmax": (
        lambda x, beta: (np.log(np.exp(beta * x).sum(-1, keepdims=True)) / beta).sum(),
        ref_softmax,
    ),
    "Ghostmax": (
        lambda x, beta: (np.log1p(np.exp(beta * x).sum(-1, keepdims=True)) / beta).sum(),
        lambda x, beta: np.exp(beta * x) / (1 + np.exp(beta * x).sum(-1, keepdims=True)),
    ),
    "LayerNorm": (
        ref_layernorm,
        lambda x, gamma, delta: gamma
        * (x - x.mean(-1, keepdims=True))
        / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        + delta,
    ),
    "SphericalNorm": (
        ref_sphere,
        lambda x, gamma, delta: gamma * x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-5) + delta,
    ),
}
# their beta and gamma have size 1 along the last axis
PER_ROW = {"Softmax", "Ghostmax", "LayerNorm", "SphericalNorm"}
HYPER = dict(
    Repu=["n"], LayerNorm=["gamma", "delta"], SphericalNorm=["gamma", "delta"], Identity=[], Relu=[]
)
SHAPES = [(3,), (2,), (2, 3), (2, 1, 2)]
# image (4, 5, 2) and filters 3 × 2
CONVS = [((2, 2), "SAME"), ((1, 1), "VALID"), ((2, 2), ((1, 0), (0, 1)))]


class Coupling(eqx.Module):
    """What a user writes: parameters beside an int, a string, a mask and a function, none of them
    static."""
    w: jax.Array
    power: int
    how: str
    mask: jax.Array
    squash: object

    def __call__(self, *xhats):
        inside = sum((self.w * jnp.where(self.mask, 1.0, 0.5) * x.sum()).sum() for x in xhats)
        return self.squash(inside)**self.power if self.how == "squashed" else inside**self.power


def ref_conv(W, strides, padding, x, y):
    """−<y, W * x> by hand, W in OIHW, x and y channels-last."""
    out = y.shape[:2]
    if padding == "SAME":
        need = [max((out[a] - 1) * strides[a] + W.shape[2 + a] - x.shape[a], 0) for a in range(2)]
        padding = [(n // 2, n - n // 2) for n in need]
    x = np.pad(x, [*([(0, 0)] * 2 if padding == "VALID" else padding), (0, 0)])
    total = 0.0
    for i in range(out[0]):
        for j in range(out[1]):
            patch = x[
                i * strides[0] : i * strides[0] + W.shape[2],
                j * strides[1] : j * strides[1] + W.shape[3],
            ]
            total += np.einsum("oihw,hwi,o->", W, patch, y[i, j])
    return -total


def ref_dense(W, *xhats):
    for x in xhats: W = np.tensordot(W, x, (tuple(range(x.ndim)),) * 2)
    return -float(W)


def network(seed):
    """A HAM, its layers and connections in numpy, how many parameters it has, and a generator of
    values."""
    # hypothesis draws the seed alone: drawing the choices, it repeats small networks
    rng = np.random.default_rng(seed)
    pick, upto = lambda options: options[rng.integers(len(options))], lambda n: int(
        rng.integers(1, n + 1)
    )
    normal = lambda *shape: rng.normal(size=shape) * 0.6
    n_leaves, layers = 0, []

    def hyper(kind, name, shape):
        size = (
            [1.0, *shape[-1:]]
            if kind not in PER_ROW or name == "delta"
            else [1.0, (*shape[:-1], 1)]
        )
        how = pick(["number", "numpy scalar", "array", "many"])
        value = rng.uniform(2.0, 3.0) if name == "n" else rng.uniform(0.5, 1.5)
        if how == "number": return value, value
        if how == "numpy scalar": return np.float64(value), value
        value = (
            np.array(value)
            if how == "array"
            else rng.uniform(2, 3, size[1]) if name == "n" else rng.uniform(0.5, 1.5, size[1])
        )
        return pick([np.asarray, jnp.asarray])(value), value

    def layer(kind, shape):
        nonlocal n_leaves
        given = {k: hyper(kind, k, shape) for k in HYPER.get(kind, ["beta"])}
        n_leaves += sum(isinstance(v, np.ndarray | jax.Array) for v, _ in given.values())
        leak = upto(6) > 1
        made = getattr(hmx, f"{kind}Layer")(
            shape, **{k: v for k, (v, _) in given.items()}, leak=leak
        )
        L, sigma = (
            functools.partial(f, **{k: v for k, (_, v) in given.items()}) for f in LAYERS[kind]
        )
        layers.append((made, L if leak else None, sigma))
        return len(layers) - 1

    for _ in range(upto(4)): layer(pick(list(LAYERS)), pick(SHAPES))
    synapses, connections, n_drawn = [], [], len(layers)
    for _ in range(upto(3)):
        kind = pick(
            ["dense", "dense", "linear", "biased", "bias", "conv", "module", "partial", "function"]
        )
        joined = rng.integers(n_drawn, size=upto(4)).tolist()
        if kind in ("linear", "biased"):
            flat = [i for i in range(len(layers)) if len(layers[i][0].shape) == 1]
            if not flat: continue
            joined = [pick(flat), pick(flat)]
        shapes = [layers[i][0].shape for i in joined]
        if kind == "dense":
            W = normal(*sum(shapes, ()))
            made, ref, leaves = DenseSynapse(W), functools.partial(ref_dense, W), 1
        elif kind == "linear":
            W = normal(*shapes[0], *shapes[1])
            made, ref, leaves = LinearSynapse(W), lambda a, b, W=W: -(a @ W @ b), 1
        elif kind == "biased":
            W, b = normal(*shapes[0], *shapes[1]), normal(*shapes[1])
            made, ref, leaves = (
                LinearSynapseWithBias(W, b),
                lambda x, y, W=W, b=b: -(x @ W @ y) - b @ y,
                2,
            )
        elif kind == "bias":
            joined, b = joined[:1], normal(*shapes[0])
            made, ref, leaves = BiasSynapse(b), lambda x, b=b: -(b * x).sum(), 1
        elif kind == "conv":
            (strides, padding), W = pick(CONVS), normal(2, 2, 3, 2)
            grid = np.shape(jnp.zeros((2, 3) if strides == (2, 2) else (2, 4)))
            joined = [layer("Tanh", (4, 5, 2)), layer("Softmax", (*grid, 2))]
            made, ref, leaves = (
                ConvSynapse(W, strides, padding),
                functools.partial(ref_conv, W, strides, padding),
                1,
            )
        elif kind == "module":
            w, mask, how = normal(3), np.array([True, False, True]), pick(["squashed", "plain"])
            made = Coupling(jnp.asarray(w), 2, how, jnp.asarray(mask), jnp.tanh)
            def ref(*xhats, w=w, mask=mask, how=how):
                inside = sum((w * np.where(mask, 1.0, 0.5)).sum() * x.sum() for x in xhats)
                return np.tanh(inside)**2 if how == "squashed" else inside**2
            leaves = 1
        elif kind == "partial":
            c = normal()
            made, leaves = (
                functools.partial(
                    lambda c, *xhats: c * sum(jnp.sin(x).sum() for x in xhats), jnp.asarray(c)
                ),
                1,
            )
            ref = lambda *xhats, c=c: c * sum(np.sin(x).sum() for x in xhats)
        else:
            made, leaves = lambda *xhats: math.prod((x**2).mean() for x in xhats), 0
            ref = made
        n_leaves += leaves
        synapses.append(made)
        # twice: a shared synapse, for two layers its ends exchanged where they fit
        for _ in range(upto(2)):
            connections.append((tuple(joined), len(synapses) - 1, ref))
            if len(set(shapes)) == 1 and kind != "conv": joined = joined[::-1]
    layer_names = pick([None, "zyxwvutsrqpo"])  # positions, or names that do not sort as they stand
    named = list(range(len(layers))) if layer_names is None else list(layer_names[:len(layers)])
    given_layers, given_synapses = [made for made, *_ in layers], synapses
    tag = (lambda s: s) if layer_names is None else (lambda s: f"s{s}")
    if layer_names is not None:
        given_layers = dict(zip(named, given_layers))
        given_synapses = {tag(s): v for s, v in enumerate(synapses)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # isolated layers
        ham = HAM(
            given_layers,
            given_synapses,
            [(tuple(named[i] for i in joined), tag(s)) for joined, s, _ in connections],
        )
    refs = {n: (L, sigma) for n, (_, L, sigma) in zip(named, layers)}
    return (
        ham,
        refs,
        [([named[i] for i in joined], ref) for joined, _, ref in connections],
        n_leaves,
        rng,
    )


def ref_tree(refs, connections, xhats, xs):
    xhats, xs = (jtu.tree_map(np.asarray, t) for t in (xhats, xs))
    neurons = {
        n: 0.0 if L is None else (xhats[n] * xs[n]).sum() - L(xs[n]) for n, (L, _) in refs.items()
    }
    return {
        "neurons": neurons,
        "connections": [ref(*(xhats[n] for n in joined)) for joined, ref in connections],
    }


@jax.jit
def everything(ham, xhats, xs):
    """For rows of states, by the HAM and by the vectorised one, in one program. With numpy around
    it nothing else compiles."""
    def one(ham, xhats, xs):
        (E, dE), dx = ham.dEdact(xhats, xs, return_energy=True), jax.grad(ham.energy, argnums=1)(
            xhats, xs
        )
        return (
            ham.activations(xs),
            ham.energy_tree(xhats, xs),
            E,
            dE,
            dx,
            jax.grad(lambda ham: ham.energy(xhats, xs))(ham),
        )
    many = ham.vectorize()
    return jax.vmap(one, (None, 0, 0))(ham, xhats, xs), (
        many.activations(xs),
        many.energy_tree(xhats, xs),
        *many.dEdact(xhats, xs, return_energy=True),
    )


def slopes(f, tree, h):
    """Central differences of `f` in every element of a dictionary of arrays."""
    tree, out = {n: np.array(v) for n, v in tree.items()}, {}
    for n, v in tree.items():
        moved = lambda i, s: {**tree, n: v + s * h * (np.arange(v.size) == i).reshape(v.shape)}
        out[n] = np.reshape(
            [(f(moved(i, 1)) - f(moved(i, -1))) / (2 * h) for i in range(v.size)], v.shape
        )
    return out


@pytest.mark.slow
@settings(
    max_examples=8, # each compiles; tests/thorough has ten thousand
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(st.integers(0, 2**32 - 1))
def test_random_hypergraphs(seed):
    ham, refs, connections, n_leaves, rng = network(seed)
    leaves = jtu.tree_leaves(ham)
    assert len(leaves) == n_leaves and all(
        isinstance(v, jax.Array) and v.dtype == float for v in leaves
    )

    draw = lambda: {n: rng.normal(size=(3, *layer.shape)) for n, layer in ham.neurons.items()}
    xhats, xs = draw(), draw()
    rows, many = jax.device_get(everything(ham, xhats, xs))
    trees_close(many, rows[:4], rtol=1e-12, atol=1e-12)
    for i in range(3):
        a, x, (acts, tree, E, dE, dx, dham) = jtu.tree_map(lambda v: v[i], (xhats, xs, rows))
        trees_close(tree, ref_tree(refs, connections, a, x))
        close(E, sum(jtu.tree_leaves(tree)))
        trees_close(acts, {n: sigma(x[n]) for n, (_, sigma) in refs.items()})
        trees_close(dx, {n: a[n] - acts[n] if ham.neurons[n].leak else 0 * a[n] for n in a})

    # the last row: every activation, and the parameters along random directions
    trees_close(
        dE,
        slopes(lambda a: sum(jtu.tree_leaves(ref_tree(refs, connections, a, x))), a, 1e-4),
        rtol=1e-6,
        atol=1e-6,
    )
    for _ in range(2):
        d = [rng.normal(size=v.shape) for v in leaves]
        moved = lambda s: jtu.tree_unflatten(
            jtu.tree_structure(ham),
            [jnp.asarray(np.asarray(v) + s * 1e-5 * d) for v, d in zip(leaves, d)],
        )
        up, down = (np.asarray(everything(moved(s), xhats, xs)[0][2])[-1] for s in (1, -1))
        close(
            sum((d * g).sum() for g, d in zip(jtu.tree_leaves(dham), d)),
            (up - down) / 2e-5,
            rtol=1e-6,
            atol=1e-6,
        )


# --------------------------------------------------------------------------------------------------
# -------------------
# (a) a HAM is a pytree like any other


def example(key=0, beta=2.0):
    k1, k2 = jr.split(jr.PRNGKey(key))
    return HAM(
        {"v": TanhLayer(3, tau=2.0), "h": SoftmaxLayer((2,), beta=beta)},
        {
            "w": LinearSynapse.rand_init(k1, 3, 2, scale=1.0),
            "c": Coupling(jr.normal(k2, (2,)), 2, "squashed", jnp.array([True, False]), jnp.tanh),
        },
        [(("v", "h"), "w"), (("v", "v"), "c"), (("h",), "c")],
    )


activations = jax.jit(HAM.activations)
energy = jax.jit(HAM.energy)
gradient = jax.jit(HAM.dEdact, static_argnames="return_energy")
slope = jax.jit(jax.grad(HAM.energy))
current_and_slope = jax.jit(
    lambda ham, xhats, xs: (
        ham.dEdact(xhats, xs, return_energy=True),
        jax.grad(HAM.energy)(ham, xhats, xs),
    )
)


def states(ham, key=9):
    xs = ham.init_states(key=jr.PRNGKey(key))
    return activations(ham, xs), xs


def test_tree_map_flatten_unflatten():
    ham = example(beta=jnp.array(2.0))
    leaves, treedef = jtu.tree_flatten(ham)
    assert [v.shape for v in leaves] == [(2,), (3, 2), ()] or sorted(v.shape for v in leaves) == [
        (),
        (2,),
        (3, 2),
    ]
    back = jtu.tree_unflatten(treedef, leaves)
    assert eqx.tree_equal(back, ham) and repr(back) == repr(ham)
    double, (xhats, _) = jtu.tree_map(lambda v: 2 * v, ham), states(ham)
    energies = jax.jit(HAM.connection_energies)
    close(energies(double, xhats)[0], 2 * energies(ham, xhats)[0])
    assert double.neurons["h"].lagrangian.keywords["beta"] == 4.0
    assert hash(treedef) == hash(jtu.tree_structure(example(key=1, beta=jnp.array(3.0))))


def test_jit_grad_and_optax_take_a_ham_as_it_is():
    ham = example(beta=jnp.array(2.0))
    xhats, xs = states(ham)
    loss = lambda ham: ham.energy(xhats, xs)**2
    optimiser = optax.adam(1e-2)

    @jax.jit
    def step(ham, opt_state):
        value, grads = jax.value_and_grad(loss)(ham)
        updates, opt_state = optimiser.update(grads, opt_state, ham)
        return optax.apply_updates(ham, updates), opt_state, value

    opt_state, values = optimiser.init(ham), []
    for _ in range(30):
        ham, opt_state, value = step(ham, opt_state)
        values.append(float(value))
    assert values[-1] < values[0] and isinstance(ham, HAM)
    rows = jtu.tree_map(lambda v: v[None], (xhats, xs))
    in_rows = jax.jit(jax.grad(lambda many: many.energy(*rows).sum()))(ham.vectorize())
    trees_close(in_rows.unvectorize(), slope(ham, xhats, xs))


def test_vmap_over_stacked_parameters():
    hams = [example(k) for k in range(3)]
    stacked, (xhats, xs) = jtu.tree_map(lambda *v: jnp.stack(v), *hams), states(hams[0])
    energies = jax.jit(jax.vmap(HAM.energy, (0, None, None)))(stacked, xhats, xs)
    close(energies, [energy(ham, xhats, xs) for ham in hams])
    made = jax.vmap(
        lambda key: HAM([TanhLayer(3)], [BiasSynapse(jr.normal(key, (3,)))], [((0,), 0)])
    )(jr.split(jr.PRNGKey(0), 5))
    assert made.hypersynapses[0].b.shape == (5, 3)


@pytest.mark.parametrize(
    "where",
    [
        lambda h: h.hypersynapses["w"].W,
        lambda h: h.hypersynapses["c"].w,
        lambda h: h.neurons["h"].lagrangian.keywords["beta"],
    ],
    ids=["ours", "a user's", "beta"],
)
def test_tree_at(where):
    ham = example(beta=jnp.array(2.0))
    new = eqx.tree_at(where, ham, jnp.full_like(where(ham), 0.25))
    assert jnp.all(where(new) == 0.25) and not jnp.any(where(ham) == 0.25)
    xhats, xs = states(ham)
    assert energy(new, xhats, xs) != energy(ham, xhats, xs)


def test_leaves_can_be_written_and_read(tmp_path):
    ham = example(beta=jnp.array(2.0))
    eqx.tree_serialise_leaves(tmp_path / "ham", ham)
    back = eqx.tree_deserialise_leaves(tmp_path / "ham", example(key=5, beta=jnp.array(1.0)))
    assert eqx.tree_equal(back, ham)
    replaced = eqx.combine(*eqx.partition(ham, eqx.is_array))
    assert eqx.tree_equal(replaced, ham)


def test_equal_structures_share_the_cache_and_constants_retrace():
    f, traces = counted(HAM.energy)
    ham = example()
    xhats, xs = states(ham)
    for key in range(3): f(example(key), xhats, xs)  # built anew: equal constants, other parameters
    assert len(traces) == 1
    f(example(beta=3.0), xhats, xs)
    assert len(traces) == 2
    # an array: swept without compiling
    for beta in (1.0, 2.0, 3.0): f(example(beta=jnp.array(beta)), xhats, xs)
    assert len(traces) == 3


# each pair differs in one constant, which must not be confused by the cache
CONSTANTS = {
    "number": (2, 3),
    "int and float": (1, 1.0),
    "bool and int": (True, 1),
    "string": ("a", "b"),
    "tuple": ((1, 2), (1, 3)),
    "mask": (np.array([True, False]), np.array([False, True])),
    "int array": (jnp.array([1, 2]), jnp.array([1, 3])),
    "int dtype": (np.array([1, 2], np.int32), np.array([1, 2], np.int64)),
    "int shape": (np.array([1, 1]), np.array([[1, 1]])),
    "function": (jnp.sin, jnp.cos),
    "none": (None, 0),
    "key": (jr.key(0), jr.key(1)),
    "old key": (jr.PRNGKey(0), jr.PRNGKey(1)),
    "list": ([1, "a"], [1, "b"]),
    "dict": ({"a": 1}, {"b": 1}),
    "numpy scalar": (np.float64(2.0), np.float64(3.0)),
}


class Holder(eqx.Module):
    w: jax.Array
    what: object
    fixed: str = eqx.field(static=True, default="fixed")
    def __call__(self, xhat): return -(self.w * xhat).sum()


@pytest.mark.parametrize("kind", CONSTANTS)
@pytest.mark.parametrize("held", ["module", "functools", "jax"])
def test_constants_are_structure(kind, held):
    seen = []
    def bind(what):
        seen.clear()
        if held == "module": return Holder(jnp.ones(3), (what,))
        partial = functools.partial if held == "functools" else jtu.Partial
        return partial(
            lambda w, xhat, what: seen.append(what) or -(w * xhat).sum(), jnp.ones(3), what=what
        )
    first, second = CONSTANTS[kind]
    build = lambda what: HAM([IdentityLayer(3)], [bind(what)], [((0,), 0)])
    ham, other = build(first), build(second)
    assert [v.shape for v in jtu.tree_leaves(ham)] == [(3,)]
    assert jtu.tree_structure(ham) != jtu.tree_structure(other)
    x = {0: jnp.ones(3)}
    jax.eval_shape(jax.jit(HAM.energy), ham, x, x)
    kept = ham.hypersynapses[0].what[0] if held == "module" else seen[-1] if seen else first
    if kind not in ("key", "old key"): assert eqx.tree_equal(kept, first), kept
    # compared by value
    if held == "module": assert jtu.tree_structure(build(first)) == jtu.tree_structure(ham)


def test_constants_by_value_share_the_cache():
    f, traces = counted(HAM.energy)
    x = {0: jnp.ones(2)}
    for _ in range(2):  # arrays, keys and nested modules made anew each time
        inner = Holder(
            jnp.ones(2),
            {"mask": np.array([True, False]), "key": jr.key(3), "ids": jnp.arange(2), "name": "n"},
        )
        f(HAM([IdentityLayer(2)], [Holder(jnp.ones(2), inner)], [((0,), 0)]), x, x)
    assert len(traces) == 1
    # as it is, it is no pytree for plain jit
    assert len(jtu.tree_leaves(Holder(jnp.ones(2), inner))) > 3


@pytest.mark.parametrize("bind", [functools.partial, jtu.Partial, eqx.Partial])
def test_lagrangians_bound_by_any_partial(bind):
    x = {0: jnp.array([0.3, -1.0, 2.0])}
    for beta, leaves in ((1.5, 0), (np.float64(1.5), 0), (np.array(1.5), 1), (jnp.array(1.5), 1)):
        ham = HAM(
            [NeuronLayer(bind(lagr_tanh, beta=beta), 3)], [BiasSynapse(jnp.zeros(3))], [((0,), 0)]
        )
        assert len(jtu.tree_leaves(ham)) == leaves + 1
        close(ham.activations(x)[0], np.tanh(1.5 * np.asarray(x[0])))


def test_numpy_weights_learn():
    class Plain(eqx.Module):
        W: np.ndarray
        def __call__(self, a, b): return -(a @ self.W @ b)
    ham = HAM([IdentityLayer(3), IdentityLayer(2)], [Plain(np.ones((3, 2)))], [((0, 1), 0)])
    a, b = jnp.array([1.0, 2.0, 3.0]), jnp.array([4.0, 5.0])
    close(
        jtu.tree_leaves(jax.grad(lambda ham: ham.energy({0: a, 1: b}, {0: a, 1: b}))(ham))[0],
        -np.outer(a, b),
    )


def test_bound_methods_and_networks_of_a_user():
    class Pair(eqx.Module):
        net: eqx.nn.MLP
        def lagrangian(self, x): return lagr_softmax(x) + 0.0 * self.net(x).sum()
        def energy(self, a, b): return (self.net(a) * b).sum()
    pair = Pair(eqx.nn.MLP(3, 2, 4, 1, key=jr.PRNGKey(0)))
    ham = HAM([IdentityLayer(3), IdentityLayer(2)], [pair.energy], [((0, 1), 0)])
    xhats, xs = states(ham)
    close(ham.connection_energies(xhats)[0], (pair.net(xhats[0]) * xhats[1]).sum())
    grads = slope(ham, xhats, xs)
    assert len(jtu.tree_leaves(grads)) == 4 and any(jnp.any(g != 0) for g in jtu.tree_leaves(grads))


@pytest.mark.parametrize(
    "synapse",
    [
        lambda t: LinearSynapse(jnp.ones((2, 2)), trainable=t),
        lambda t: LinearSynapseWithBias(jnp.ones((2, 2)), jnp.ones(2), trainable=t),
        lambda t: DenseSynapse(jnp.ones((2, 2)), trainable=t),
        lambda t: BiasSynapse(jnp.ones(2), trainable=t),
        lambda t: ConvSynapse(jnp.ones((2, 2, 1, 1)), trainable=t),
    ],
    ids=["linear", "biased", "dense", "bias", "conv"],
)
def test_frozen_weights_have_gradient_zero(synapse):
    conv, one = isinstance(synapse(True), ConvSynapse), isinstance(synapse(True), BiasSynapse)
    layers = [IdentityLayer((1, 1, 2) if conv else 2)] * 2
    build = lambda t: HAM(
        layers[:1] if one else layers, [synapse(t)], [((0,) if one else (0, 1), 0)]
    )
    free, frozen = build(True), build(False)
    xhats, xs = states(free)
    (one_way, slopes_free), (other_way, slopes_frozen) = (
        current_and_slope(ham, xhats, xs) for ham in (free, frozen)
    )
    trees_close(other_way, one_way)
    for grads, zero in ((slopes_free, False), (slopes_frozen, True)):
        grads = jtu.tree_leaves(grads)
        assert grads and all(bool(jnp.all(g == 0)) is zero for g in grads)
    assert len(jtu.tree_leaves(frozen)) == len(jtu.tree_leaves(free))


def test_rows_of_linear_and_bias_energies():
    W, b, x, y = (
        np.random.default_rng(k).normal(size=s)
        for k, s in enumerate([(3, 2), (2,), (5, 4, 3), (5, 4, 2)])
    )
    linear, biased, bias = jax.jit(
        lambda W, b, x, y: (
            LinearSynapse(W)(x, y),
            LinearSynapseWithBias(W, b)(x, y),
            BiasSynapse(b)(y),
        )
    )(W, b, x, y)
    close(linear, -np.einsum("nmi,ij,nmj->nm", x, W, y))
    close(biased, -np.einsum("nmi,ij,nmj->nm", x, W, y) - np.einsum("j,nmj->nm", b, y))
    close(bias, -np.einsum("j,nmj->nm", b, y))


# --------------------------------------------------------------------------------------------------
# -------------------
# the published quick example, with synapses as people wrote them


class OldLinear(eqx.Module):
    W: jax.Array
    rank: int = 2
    def __call__(self, xhat1, xhat2): return -jnp.einsum("...c,...d,cd->...", xhat1, xhat2, self.W)


class Labelled(eqx.Module):
    W: jax.Array
    name: str
    def __call__(self, xhat1, xhat2): return -xhat1 @ self.W @ xhat2


def test_quick_example():
    with jax.enable_x64(False):  # as it was published
        k1, k2, k3 = jr.split(jr.PRNGKey(0), 3)
        neurons = {
            "input": NeuronLayer(hmx.lagr_identity, (7,)),
            "labels": NeuronLayer(hmx.lagr_softmax, (8,)),
            "hidden": NeuronLayer(hmx.lagr_softmax, (9,)),
        }
        W1, W2 = jr.normal(k1, (7, 9)), jr.normal(k2, (9, 8))
        ham = hmx.HAM(neurons, {"s1": OldLinear(W1), "s2": Labelled(W2, "to the labels")},
                      [(("input", "hidden"), "s1"), (("hidden", "labels"), "s2")])
        assert (ham.n_neurons, ham.n_hypersynapses, ham.n_connections) == (3, 2, 2)
        xs = ham.init_states()
        assert {n: x.shape for n, x in xs.items()} == {
            "input": (7,),
            "labels": (8,),
            "hidden": (9,),
        }
        xs["input"] = jr.normal(k3, (7,))
        xhats, tree, E, dE = jax.jit(
            lambda xs: (
                a := ham.activations(xs),
                ham.energy_tree(a, xs),
                ham.energy(a, xs),
                ham.dEdact(a, xs),
            )
        )(xs)
        assert set(tree) == {"neurons", "connections"} and len(tree["connections"]) == 2
        close(E, sum(tree["neurons"].values()) + sum(tree["connections"]), rtol=1e-5)
        V, v, h = (np.asarray(a) for a in (W1, xhats["input"], xhats["labels"]))
        close(dE["hidden"], np.asarray(xs["hidden"]) - V.T @ v - np.asarray(W2) @ h, atol=1e-5)

        @jax.jit
        def step(ham, xs):
            E, dE = ham.dEdact(ham.activations(xs), xs, return_energy=True)
            return E, jtu.tree_map(lambda x, g: x - 0.1 * g, xs, dE)

        energies = []
        for _ in range(40):
            E, xs = step(ham, xs)
            energies.append(float(E))
        assert all(np.diff(energies) < 0)

        many = ham.vectorize()
        batch = many.init_states(5)
        assert batch["hidden"].shape == (5, 9)
        batch["input"] = jr.normal(k3, (5, 7))
        E, dE = jax.jit(lambda xs: many.dEdact(many.activations(xs), xs, return_energy=True))(batch)
        assert E.shape == (5,) and dE["labels"].shape == (5, 8)
        assert many.unvectorize() is ham and many.vectorize() is many and ham.unvectorize() is ham


# --------------------------------------------------------------------------------------------------
# -------------------
# (b) what the earlier implementations get wrong (FACTS §1; 1 and 2 in test_packaging.py, 6, 7 and
# 9-13 in test_lagrangian_facts.py,
# 23 in test_dynamics.py)


def test_fact_02_a_star_import_brings_only_public_names():
    space = {}
    exec("from hamux.hypergraph import *", space)
    assert set(space) - {"__builtins__"} == {"HAM", "VectorizedHAM"}


def test_fact_03_init_states_warns_and_returns():
    ham = example()
    with pytest.warns(UserWarning, match=r"ham.vectorize\(\)"):
        assert ham.init_states(bs=5)["v"].shape == (5, 3)
    with pytest.warns(UserWarning, match="batch size"):
        assert ham.vectorize().init_states()["v"].shape == (3,)
    assert ham.vectorize().init_states(5)["v"].shape == (5, 3)


def test_fact_04_an_int_shape_becomes_a_tuple():
    for shape in (5, np.int64(5), (5,), [5]):
        layer = NeuronLayer(lagr_identity, shape)
        assert layer.shape == (5,) and layer.init().shape == (5,) and layer.init(2).shape == (2, 5)


@pytest.mark.parametrize("how", ["partial", "module", "closure"])
def test_fact_05_a_learnable_temperature_in_a_network(how):
    class Learnt(eqx.Module):
        beta: jax.Array
        def __call__(self, x): return lagr_softmax(x, beta=self.beta)

    x, a = {0: jnp.array([0.1, 0.7, -0.4])}, {0: jnp.array([0.2, 0.5, 0.3])}
    def energy(beta):
        L = {
            "partial": functools.partial(lagr_softmax, beta=beta),
            "module": Learnt(beta),
            "closure": lambda x: lagr_softmax(x, beta),
        }[how]
        return HAM([NeuronLayer(L, 3)], [BiasSynapse(jnp.ones(3))], [((0,), 0)]).energy(a, x)
    beta, L = 1.7, lambda b: np.log(np.exp(b * np.asarray(x[0])).sum()) / b
    close(jax.grad(energy)(jnp.array(beta)), -(L(beta + 1e-5) - L(beta - 1e-5)) / 2e-5, rtol=1e-6)
    if how == "closure": return
    made = (
        Learnt(jnp.array(beta))
        if how == "module"
        else functools.partial(lagr_softmax, beta=jnp.array(beta))
    )
    ham = HAM([NeuronLayer(made, 3)], [BiasSynapse(jnp.ones(3))], [((0,), 0)])
    for grad in (jax.grad, eqx.filter_grad):
        close(
            min(jtu.tree_leaves(grad(lambda ham: ham.energy(a, x))(ham)), key=jnp.ndim),
            jax.grad(energy)(jnp.array(beta)),
        )


def test_fact_08_the_energy_has_its_gradient_in_x():
    layer, x, a = SigmoidLayer(3, beta=2.0), jnp.array([-1.0, 0.5, 3.0]), jnp.array([0.1, 0.9, 0.4])
    close(jax.grad(layer.energy, argnums=1)(a, x), a - 1 / (1 + np.exp(-2 * np.asarray(x))))
    close(jax.grad(layer.energy, argnums=0)(a, x), x)
    plain = hmx.legendre_transform(lagr_sigmoid)
    assert jnp.all(jax.grad(plain, argnums=1)(jax.nn.sigmoid(x), x) == 0)


def test_fact_14_bias_term_per_row():
    W, x, y, b = *(
        np.random.default_rng(k).normal(size=s) for k, s in enumerate([(3, 2), (4, 3), (4, 2)])
    ), np.array([1.0, 2.0])
    close(
        LinearSynapseWithBias(W, b)(jnp.asarray(x), jnp.asarray(y)),
        [-(xi @ W @ yi) - b @ yi for xi, yi in zip(x, y)],
    )


def test_fact_15_independent_keys_and_centred_filters():
    syn = LinearSynapseWithBias.rand_init(jr.PRNGKey(0), 1, 500)
    assert abs(np.corrcoef(syn.W[0], syn.b)[0, 1]) < 0.2
    W = np.asarray(ConvSynapse.from_conv_params(jr.PRNGKey(0), 8, 3, (5, 5), (1, 1)).W)
    assert W.shape == (8, 3, 5, 5) and abs(W.mean()) < 4 * 0.01 / math.sqrt(W.size)
    assert abs(W.std() / 0.01 - 1) < 0.1


def test_fact_16_a_convolution_does_not_broadcast():
    syn = ConvSynapse(jnp.ones((2, 1, 3, 3)), (1, 1), "SAME")
    for shape in [(1, 1, 2), (4, 4, 1), (4, 2), (1, 4, 4, 2)]:
        with pytest.raises(
            ValueError, match=r"must have shape \(4, 4, 2\).*got " + re.escape(str(shape))
        ):
            syn(jnp.ones((4, 4, 1)), jnp.ones(shape))


def test_fact_17_batches_and_misfits_are_not_accepted():
    ham = HAM([IdentityLayer(3)], [BiasSynapse(jnp.ones(3))], [((0,), 0)])
    for shape in [(7, 3), (3, 3), (1, 3)]:
        with pytest.raises(ValueError, match=r"layer 0 must have shape \(3,\).*vectorize"):
            ham.activations({0: jnp.ones(shape)})
    with pytest.raises(ValueError, match=r"must have shape \(3,\), got \(3, 7\)"):
        ham.energy({0: jnp.ones(3)}, {0: jnp.ones((3, 7))})


def test_fact_18_descending_updates_the_activations():
    ham = example()
    xs = ham.init_states(key=jr.PRNGKey(3))
    out = hmx.descend(ham, xs, solver=hmx.Euler(0.1), max_steps=30)
    trees_close(out.xhats, activations(ham, out.xs))
    close(out.energy, energy(ham, activations(ham, out.xs), out.xs))
    assert out.energies[int(out.steps)] == out.energy


def test_fact_19_a_softmax_layer_of_two_axes():
    x = {0: np.random.default_rng(0).normal(size=(2, 3))}
    ham = HAM([SoftmaxLayer((2, 3))], [DenseSynapse(np.ones((2, 3)))], [((0,), 0)])
    E, xhats = jax.jit(lambda x: (ham.energy(x, x), ham.activations(x)))(x)
    assert E.shape == ()
    close(xhats[0], ref_softmax(x[0], 1.0))


def test_fact_20_unknown_names_and_extras_are_refused():
    layers, syn = {"img": IdentityLayer(3)}, {"s": BiasSynapse(jnp.ones(3))}
    with pytest.raises(TypeError, match=r"tuple of names.*'img'"): HAM(layers, syn, [("img", "s")])
    with pytest.raises(ValueError, match="unknown neuron layer 'i'.*'img'"):
        HAM(layers, syn, [(("i", "m", "g"), "s")])
    with pytest.raises(ValueError, match="unknown hypersynapse 't'.*'s'"):
        HAM(layers, syn, [(("img",), "t")])
    with pytest.raises(ValueError, match="'s'.*must take 2 layers"):
        HAM(layers, syn, [(("img", "img"), "s")])
    with pytest.warns(UserWarning, match=r"\['spare'\]"):
        HAM(layers, {**syn, "spare": BiasSynapse(jnp.ones(2))}, [(("img",), "s")])
    with pytest.warns(UserWarning, match=r"isolated: \['alone'\]"):
        HAM({**layers, "alone": IdentityLayer(2)}, syn, [(("img",), "s")])
    with pytest.raises(ValueError, match=r"unknown \['more'\]"):
        HAM(layers, syn, [(("img",), "s")]).activations({"img": jnp.ones(3), "more": jnp.ones(2)})


@pytest.mark.parametrize("dtype", [int, bool, complex, jnp.uint8])
def test_fact_21_states_of_other_dtypes(dtype):
    ham = HAM([IdentityLayer(3)], [BiasSynapse(jnp.ones(3))], [((0,), 0)])
    x, bad = {0: jnp.ones(3)}, {0: jnp.ones(3, dtype)}
    for call in (
        lambda: ham.activations(bad),
        lambda: ham.energy(bad, x),
        lambda: ham.energy(x, bad),
        lambda: ham.dEdact(bad, x),
        lambda: ham.connection_energies(bad),
        lambda: hmx.descend(ham, bad),
    ):
        with pytest.raises(TypeError, match=f"layer 0 .*{jnp.ones(3, dtype).dtype}"): call()
    with pytest.raises(ValueError, match="at least one neuron layer"): HAM({}, {}, [])


def test_fact_21_nan_is_reported():
    ham = HAM([IdentityLayer(3)], [BiasSynapse(jnp.ones(3))], [((0,), 0)])
    # the program of fact 25
    out = hmx.descend(ham, {0: jnp.array([1.0, jnp.nan, 1.0])}, max_steps=100)
    assert not out.converged and "finite" in out.result and "NaN" in out.result


def test_fact_22_leaves_are_floating_arrays():
    ham = example()
    assert all(
        isinstance(v, jax.Array) and jnp.issubdtype(v.dtype, jnp.floating)
        for v in jtu.tree_leaves(ham)
    )
    xhats, xs = states(ham)
    jax.eval_shape(jax.jit(jax.grad(HAM.energy)), ham, xhats, xs), optax.sgd(0.1).init(
        ham
    ), jtu.tree_map(jnp.zeros_like, ham)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64])
def test_fact_24_states_have_the_dtype_of_the_parameters(dtype):
    ham = HAM(
        {"v": TanhLayer(3), "h": SoftmaxLayer(2)},
        {"w": LinearSynapse(jnp.ones((3, 2), dtype))},
        [(("v", "h"), "w")],
    )
    xs = ham.init_states()
    parts = jax.eval_shape(
        lambda a, xs: (
            ham.activations(xs),
            ham.dEdact(a, xs),
            ham.energy_tree(a, xs),
            ham.energy(a, xs),
        ),
        xs,
        xs,
    )
    assert {v.dtype for v in jtu.tree_leaves((xs, parts))} == {jnp.dtype(dtype)}
    assert ham.init_states(dtype=jnp.float32)["v"].dtype == jnp.float32
    assert ham.vectorize().init_states(2)["h"].dtype == dtype


def test_fact_25_a_bias_acts_once():
    b, x = jnp.array([1.0, -2.0, 0.5]), {0: jnp.array([0.3, 0.1, -1.0])}
    ham = HAM([IdentityLayer(3)], [BiasSynapse(b)], [((0,), 0)])
    close(ham.energy(x, x), 0.5 * (x[0] @ x[0]) - b @ x[0])
    close(ham.dEdact(x, x)[0], x[0] - b)
    assert hmx.descend(ham, x, max_steps=100).rises == 0


def test_fact_26_energy_first_then_gradient():
    ham = example()
    xhats, xs = states(ham)
    E, dE = gradient(ham, xhats, xs, return_energy=True)
    assert E.shape == () and set(dE) == {"v", "h"}
    trees_close(dE, gradient(ham, xhats, xs))


# --------------------------------------------------------------------------------------------------
# -------------------
# (c) bad input: the type, and the words that a user needs


I3, B3, J = IdentityLayer(3), BiasSynapse(np.ones(3)), [((0,), 0)]
W32 = np.ones((3, 2))


def one(layer=I3, synapse=B3, connections=J): return HAM([layer], [synapse], connections)
def two(synapse, shape1=3, shape2=2):
    return HAM(
        {"a": IdentityLayer(shape1), "b": IdentityLayer(shape2)},
        {"s": synapse},
        [(("a", "b"), "s")],
    )


BAD_NETWORKS = {
    "no layers": (lambda: HAM({}, {"s": B3}, []), ValueError, "at least one neuron layer"),
    "neurons not a table": (
        lambda: HAM(I3, [B3], J),
        TypeError,
        "neurons must be a dictionary by name or a list.*NeuronLayer",
    ),
    "synapses not a table": (
        lambda: HAM([I3], B3, J),
        TypeError,
        "hypersynapses must be a dictionary by name or a list.*BiasSynapse",
    ),
    "neurons a string": (
        lambda: HAM("abc", [B3], J),
        TypeError,
        "neurons must be a dictionary.*str",
    ),
    "mixed names": (
        lambda: HAM({"a": I3, 0: I3}, [B3], J),
        TypeError,
        r"names of neurons must be all strings or all positions.*\['a', 0\]",
    ),
    "positions with a gap": (
        lambda: HAM({1: I3}, [B3], [((1,), 0)]),
        TypeError,
        r"positions 0, 1.*\[1\]",
    ),
    "a layer that is none": (
        lambda: HAM({"a": lagr_identity}, [B3], []),
        TypeError,
        "'a' must be a neuron layer.*lagr_identity",
    ),
    "a synapse that is none": (
        lambda: HAM([I3], {"s": 3.0}, []),
        TypeError,
        "'s' must be a hypersynapse.*3.0",
    ),
    "connections missing": (lambda: one(connections=None), TypeError, "connection.*None"),
    "connections a string": (lambda: one(connections="as"), TypeError, "pair.*'a'"),
    "a bare connection": (
        lambda: one(connections=((0,), 0)),
        TypeError,
        r"pair \(\(layer, …\), hypersynapse\).*\(0,\)",
    ),
    "a flat connection": (lambda: one(connections=[(0, 0, 0)]), TypeError, r"pair.*\(0, 0, 0\)"),
    "a bare position": (
        lambda: one(connections=[(0, 0)]),
        TypeError,
        r"tuple of names.*\(\(0,\), 0\)",
    ),
    "a bare name": (
        lambda: HAM({"img": I3}, {"s": B3}, [("img", "s")]),
        TypeError,
        r"tuple of names.*'img'.*\(\('img',\), 's'\)",
    ),
    "exchanged": (
        lambda: HAM({"img": I3}, {"s": B3}, [("s", ("img",))]),
        TypeError,
        "tuple of names.*'s'",
    ),
    "no layer joined": (lambda: one(connections=[((), 0)]), ValueError, "must join a layer, got"),
    "unknown layer": (
        lambda: HAM({"img": I3}, {"s": B3}, [(("imm",), "s")]),
        ValueError,
        "unknown neuron layer 'imm'.*'img'",
    ),
    "unknown position": (
        lambda: one(connections=[((1,), 0)]),
        ValueError,
        "unknown neuron layer 1.*0",
    ),
    "unknown synapse": (
        lambda: HAM({"img": I3}, {"s": B3}, [(("img",), "t")]),
        ValueError,
        "unknown hypersynapse 't'.*'s'",
    ),
    "a list for a name": (
        lambda: HAM({"img": I3}, {"s": B3}, [((["img"],), "s")]),
        ValueError,
        r"unknown neuron layer \['img'\]",
    ),
    "too many layers": (
        lambda: one(connections=[((0, 0), 0)]),
        ValueError,
        r"hypersynapse 0.*\(0, 0\).*must take 2 layers",
    ),
    "too few layers": (
        lambda: one(synapse=LinearSynapse(W32)),
        ValueError,
        "hypersynapse 0.*must take 1 layer:",
    ),
    "linear shapes": (
        lambda: two(LinearSynapse(W32.T)),
        ValueError,
        r"'s'.*\('a', 'b'\).*\(3,\), \(2,\).*xhat1 must have shape \(2,\), got \(3,\)",
    ),
    "biased shapes": (
        lambda: two(LinearSynapseWithBias(W32, np.ones(2)), 3, 4),
        ValueError,
        r"'s'.*xhat2 must have shape \(2,\), got \(4,\)",
    ),
    "linear over tokens": (
        lambda: two(LinearSynapse(W32), (5, 3), (5, 2)),
        ValueError,
        r"'s'.*one real number.*\(5,\)",
    ),
    "bias shape": (
        lambda: one(IdentityLayer(4)),
        ValueError,
        r"must have shape \(3,\), got \(4,\)",
    ),
    "bias over tokens": (
        lambda: one(IdentityLayer((2, 3))),
        ValueError,
        r"hypersynapse 0.*one real number.*\(2,\)",
    ),
    "dense shapes": (
        lambda: two(DenseSynapse(np.ones((3, 3)))),
        ValueError,
        r"DenseSynapse: W must.*the layers \[\(3,\), \(2,\)\].*got shape \(3, 3\)",
    ),
    "conv image": (
        lambda: two(ConvSynapse(np.ones((2, 1, 3, 3))), (4, 4, 3), (4, 4, 2)),
        ValueError,
        r"'s'.*\(x, y, 1\).*\(4, 4, 3\)",
    ),
    "conv features": (
        lambda: two(ConvSynapse(np.ones((2, 1, 3, 3))), (4, 4, 1), (4, 1, 2)),
        ValueError,
        r"'s'.*\(4, 4, 2\).*\(4, 1, 2\)",
    ),
    "conv vectors": (
        lambda: two(ConvSynapse(np.ones((2, 1, 3, 3)))),
        ValueError,
        r"'s'.*one grid.*\(3,\)",
    ),
    "synapse not scalar": (
        lambda: one(synapse=lambda x: x),
        ValueError,
        r"hypersynapse 0.*one real number.*shape \(3,\)",
    ),
    "synapse of shape (1,)": (
        lambda: one(synapse=lambda x: x[:1]),
        ValueError,
        r"one real number.*shape \(1,\)",
    ),
    "synapse complex": (
        lambda: one(synapse=lambda x: 1j * x.sum()),
        ValueError,
        "one real number.*complex",
    ),
    "synapse an int": (
        lambda: one(synapse=lambda x: jnp.argmax(x)),
        ValueError,
        "one real number.*int",
    ),
    "synapse none": (lambda: one(synapse=lambda x: None), ValueError, "one real number.*None"),
    "synapse a pair": (
        lambda: one(synapse=lambda x: (x.sum(), x.sum())),
        ValueError,
        "one real number",
    ),
    "synapse that raises": (
        lambda: one(synapse=lambda x: {}["w"]),
        ValueError,
        r"hypersynapse 0.*fails.*\(3,\).*'w'",
    ),
    "synapse that branches": (
        lambda: one(synapse=lambda x: x.sum() if x.sum() > 0 else 0.0),
        ValueError,
        "hypersynapse 0.*fails.*boolean",
    ),
    "Lagrangian not scalar": (
        lambda: HAM({"a": NeuronLayer(lambda x: x**2, 3)}, [B3], [(("a",), 0)]),
        ValueError,
        r"layer 'a'.*one number.*\(3,\)",
    ),
    "Lagrangian complex": (
        lambda: one(NeuronLayer(lambda x: 1j * x.sum(), 3)),
        TypeError,
        "layer 0.*real.*complex",
    ),
    "Lagrangian an int": (
        lambda: one(NeuronLayer(lambda x: 3, 3)),
        TypeError,
        "layer 0.*real.*int",
    ),
    "Lagrangian none": (lambda: one(NeuronLayer(lambda x: None, 3)), TypeError, "layer 0.*None"),
    "Lagrangian of two": (
        lambda: one(NeuronLayer(lambda x, y: x.sum(), 3)),
        TypeError,
        "layer 0.*'y'",
    ),
    "Lagrangian that branches": (
        lambda: one(NeuronLayer(lambda x: x.sum() if x.sum() > 0 else 0.0, 3)),
        TypeError | ValueError,
        "layer 0.*boolean",
    ),
    "softmax of a bad axis": (
        lambda: one(SoftmaxLayer(3, axis=1)),
        ValueError,
        "layer 0.*axis must be an axis of the state.*got 1",
    ),
    "beta that does not fit": (
        lambda: one(SigmoidLayer(3, beta=jnp.ones(4))),
        ValueError,
        r"layer 0.*beta.*\(4,\)",
    ),
    "complex weights of a user": (
        lambda: one(synapse=Holder(jnp.ones(3) * 1j, 0)),
        TypeError,
        "real floating.*complex128",
    ),
}
BAD_PARTS = {
    "layer without a function": (
        lambda: NeuronLayer(3, 3),
        TypeError,
        "lagrangian must be a function of the state, got 3",
    ),
    "exchanged": (
        lambda: NeuronLayer((3,), lagr_identity),
        TypeError,
        r"lagrangian must be a function of the state, got \(3,\)",
    ),
    "shape 0": (lambda: IdentityLayer(0), ValueError, "positive int.*0"),
    "shape negative": (lambda: IdentityLayer((2, -1)), ValueError, r"positive int.*\(2, -1\)"),
    "shape a float": (lambda: IdentityLayer(3.0), TypeError | ValueError, "positive int.*3.0"),
    "shape of floats": (lambda: IdentityLayer((3.0,)), ValueError, r"positive int.*\(3.0,\)"),
    "shape none": (lambda: IdentityLayer(None), TypeError | ValueError, "positive int.*None"),
    "shape a string": (lambda: IdentityLayer("three"), ValueError, "positive int.*'three'"),
    **{
        f"tau {tau}": (
            lambda tau=tau: IdentityLayer(3, tau=tau),
            ValueError,
            f"tau.*positive.*{tau}",
        )
        for tau in (0, -1.0, math.inf, math.nan, "fast")
    },
    "tau array": (lambda: IdentityLayer(3, tau=jnp.array(0.0)), ValueError, "tau.*positive.*0"),
    "tau none": (lambda: IdentityLayer(3, tau=None), TypeError | ValueError, "tau.*positive.*None"),
    "tau per neuron": (
        lambda: IdentityLayer(3, tau=jnp.ones(3)),
        ValueError,
        "tau must be a positive finite number",
    ),
    "beta": (
        lambda: one(SoftmaxLayer(3, beta=-1.0)),
        ValueError,
        "beta must be greater than 0, got -1",
    ),
    "n": (lambda: one(hmx.RepuLayer(3, 0.5)), ValueError, "n must be at least 1, got 0.5"),
    "linear axes": (
        lambda: LinearSynapse(np.ones(3)),
        ValueError,
        r"LinearSynapse: W must have 2 axes, got shape \(3,\)",
    ),
    "linear complex": (
        lambda: LinearSynapse(W32 * 1j),
        TypeError,
        "LinearSynapse: W must be real, got dtype complex128",
    ),
    "bias of another size": (
        lambda: LinearSynapseWithBias(W32, np.ones(3)),
        ValueError,
        r"b must have shape \(2,\) to fit W, got \(3,\)",
    ),
    "conv axes": (
        lambda: ConvSynapse(W32),
        ValueError,
        r"ConvSynapse: W must have shape.*got \(3, 2\)",
    ),
    "conv strides": (
        lambda: ConvSynapse(np.ones((1, 1, 2, 2)), (1, 0)),
        ValueError,
        r"window_strides must be a positive int.*\(1, 0\)",
    ),
    "conv three strides": (
        lambda: ConvSynapse(np.ones((1, 1, 2, 2)), (1, 1, 1)),
        ValueError,
        "window_strides must be a positive int",
    ),
    "conv batch": (
        lambda: ConvSynapse(np.ones((1, 1, 2, 2))).forward_conv(jnp.ones((4, 4, 1))),
        ValueError,
        r"\(n, x, y, 1\).*\(4, 4, 1\)",
    ),
    "linear rows": (
        lambda: LinearSynapse(W32)(jnp.ones((4, 3)), jnp.ones((5, 2))),
        ValueError,
        r"leading \(batch\) axes.*\(4,\), \(5,\)",
    ),
    "linear row and batch": (
        lambda: LinearSynapse(W32)(jnp.ones(3), jnp.ones((5, 2))),
        ValueError,
        "leading",
    ),
    "Legendre shapes": (
        lambda: hmx.legendre_transform(lagr_identity)(jnp.ones(3), jnp.ones((2, 3))),
        ValueError,
        r"same shape.*\(3,\).*\(2, 3\)",
    ),
    "Legendre not scalar": (
        lambda: hmx.legendre_transform(jnp.sin)(jnp.ones(3), jnp.ones(3)),
        ValueError,
        r"one number.*\(3,\)",
    ),
    "layer state": (
        lambda: IdentityLayer(3).activations(jnp.ones(4)),
        ValueError,
        r"IdentityLayer|NeuronLayer.*must have shape \(3,\), got \(4,\)",
    ),
    "layer ints": (
        lambda: IdentityLayer(3).energy(jnp.arange(3), jnp.ones(3)),
        TypeError,
        "activation.*real floating.*int",
    ),
    "batch size": (lambda: IdentityLayer(3).init(2.5), ValueError, "batch size bs.*2.5"),
    "batch negative": (lambda: IdentityLayer(3).init(-1), ValueError, "batch size bs.*-1"),
    "dtype": (
        lambda: IdentityLayer(3).init(dtype=int),
        TypeError,
        "dtype must be a floating dtype, got int",
    ),
}
X = {"a": np.ones(3), "b": np.ones(2)}
batch = lambda **kw: {n: np.ones((kw.get(n, 4), *x.shape)) for n, x in X.items()}
BAD_STATES = {
    "missing": (lambda h: h.activations({"a": X["a"]}), ValueError, r"states.*missing \['b'\]"),
    "extra": (lambda h: h.activations({**X, "c": X["a"]}), ValueError, r"states.*unknown \['c'\]"),
    "a list": (lambda h: h.activations([1.0, 2.0]), TypeError, "states must be a dictionary.*list"),
    "an array": (lambda h: h.energy(X, jnp.ones(3)), TypeError, "states must be a dictionary"),
    "shape": (
        lambda h: h.energy({**X, "a": jnp.ones(2)}, X),
        ValueError,
        r"activations of the layer 'a' must have shape \(3,\), got \(2,\)",
    ),
    "batched": (
        lambda h: h.dEdact(batch(), batch()),
        ValueError,
        r"'a' must have shape \(3,\), got \(4, 3\).*vectorize",
    ),
    "none": (lambda h: h.activations({**X, "a": None}), TypeError | ValueError, "'a'"),
    "a word": (lambda h: h.activations({**X, "a": "abc"}), TypeError | ValueError, "'a'"),
    "exchanged": (
        lambda h: h.energy(X, {"a": X["b"], "b": X["a"]}),
        ValueError,
        "states of the layer 'a'",
    ),
    "connections": (
        lambda h: h.connection_energies({**X, "b": jnp.arange(2)}),
        TypeError,
        "activations of the layer 'b'.*int",
    ),
    "single": (
        lambda h: h.vectorize().activations(X),
        ValueError,
        r"batch axis.*\['a', 'b'\].*unvectorize",
    ),
    "partly single": (
        lambda h: h.vectorize().energy(batch(), {**batch(), "b": X["b"]}),
        ValueError,
        r"states of \['b'\]",
    ),
    "sizes": (
        lambda h: h.vectorize().activations(batch(a=4, b=5)),
        ValueError,
        r"one batch size.*'a': 4.*'b': 5",
    ),
    "sizes of the two": (
        lambda h: h.vectorize().energy(batch(), batch(a=5, b=5)),
        ValueError,
        "4.*5|5.*4",
    ),
    "missing in a batch": (
        lambda h: h.vectorize().activations({"a": np.ones((4, 3))}),
        ValueError,
        r"missing \['b'\]",
    ),
    "ints in a batch": (
        lambda h: h.vectorize().activations({**batch(), "a": jnp.ones((4, 3), int)}),
        TypeError,
        "layer 'a'.*int",
    ),
    "row shape": (
        lambda h: h.vectorize().activations({**batch(), "a": jnp.ones((4, 2))}),
        ValueError,
        r"'a' must have shape \(4, 3\), got \(4, 2\)",
    ),
}


def raises(call, error, words):
    kinds = getattr(error, "__args__", (error,))
    with pytest.raises(kinds) as caught: call()
    assert type(caught.value) in kinds, f"a {type(caught.value).__name__} of another library"
    assert re.search(words, str(caught.value), re.DOTALL), str(caught.value)


@pytest.mark.parametrize("case", BAD_NETWORKS)
def test_bad_networks(case): raises(*BAD_NETWORKS[case])


@pytest.mark.parametrize("case", BAD_PARTS)
def test_bad_layers_and_synapses(case): raises(*BAD_PARTS[case])


@pytest.mark.parametrize("case", BAD_STATES)
def test_bad_states(case):
    call, error, words = BAD_STATES[case]
    raises(lambda: call(two(LinearSynapse(W32))), error, words)


def test_bad_states_under_jit_and_grad_raise_where_they_are_made():
    ham = two(LinearSynapse(W32))
    for f in (
        jax.jit(lambda xs: ham.activations(xs)),
        jax.vmap(ham.activations),
        jax.grad(lambda xs: ham.energy(xs, xs)),
    ):
        with pytest.raises(ValueError, match="'a' must have shape"):
            f({"a": jnp.ones((4, 4)), "b": jnp.ones((4, 2))})


def test_a_lagrangian_that_is_not_scalar_raises_at_its_first_use_only():
    layer = NeuronLayer(lambda x: x**2, (2, 3))
    assert layer.init(4).shape == (4, 2, 3)
    with pytest.raises(ValueError, match=r"one number.*\(2, 3\)"):
        layer.activations(jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"one number.*\(2, 3\)"):
        layer.energy(jnp.ones((2, 3)), jnp.ones((2, 3)))


def test_traced_ints_are_refused_in_words():
    with pytest.raises(TypeError, match="constant must not be traced.*int"):
        jax.jit(
            lambda ids: HAM([I3], [Holder(jnp.ones(3), ids)], J).energy(
                {0: jnp.ones(3)}, {0: jnp.ones(3)}
            )
        )(jnp.arange(3))


def test_integer_weights_become_floating():
    for syn in (
        LinearSynapse(np.ones((3, 2), int)),
        LinearSynapse([[1, 2], [3, 4], [5, 6]]),
        DenseSynapse(np.ones((3, 2), bool)),
    ):
        assert syn.W.dtype == float
    assert BiasSynapse(np.arange(3)).b.dtype == float
