"""Convolution and pooling against loops in NumPy, for every stride, dilation, padding, grouping
and dimension."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hamux as hmx
from hamux.synapses.grids import ConvSynapse, PoolSynapse

SHAPES = {1: (9,), 2: (7, 6), 3: (5, 4, 6)}
PADDINGS = ["SAME", "SAME_LOWER", "VALID", "pairs"]


@pytest.fixture(autouse=True, scope="module")
def x64():
    with jax.enable_x64(True):
        yield


def padding_of(padding, n):
    return tuple((i % 2, 1) for i in range(n)) if padding == "pairs" else padding


def pads_of(size, span, strides, padding):
    """(low, high) by the definition: SAME has ceil(size / stride) places, what is odd goes to one
    side"""
    if padding == "VALID": return [(0, 0)] * len(size)
    if not isinstance(padding, str): return list(padding)
    out = []
    for s, w, t in zip(size, span, strides):
        total = max((math.ceil(s / t) - 1) * t + w - s, 0)
        out.append(
            (total // 2, total - total // 2)
            if padding == "SAME"
            else (total - total // 2, total // 2)
        )
    return out


def places_of(size, span, strides, pads):
    return tuple((s + a + b - w) // t + 1 for s, w, t, (a, b) in zip(size, span, strides, pads))


def entries(place, window, strides, dilation, pads, size):
    "(place in the window, place in the grid) for every entry of a window that lies in the grid"
    for k in itertools.product(*map(range, window)):
        at = tuple(
            p * t - a + i * d for p, t, (a, _), i, d in zip(place, strides, pads, k, dilation)
        )
        if all(0 <= v < s for v, s in zip(at, size)): yield k, at


def naive_conv(x, W, strides, padding, dilation, groups):
    size, window = x.shape[:-1], W.shape[2:]
    span = [(w - 1) * d + 1 for w, d in zip(window, dilation)]
    pads = pads_of(size, span, strides, padding)
    places = places_of(size, span, strides, pads)
    y, cin, cout = np.zeros((*places, W.shape[0])), W.shape[1], W.shape[0] // groups
    for place in np.ndindex(*places):
        for k, at in entries(place, window, strides, dilation, pads, size):
            for g in range(groups):
                y[place][g * cout : (g + 1) * cout] += (
                    W[(slice(g * cout, (g + 1) * cout), slice(None), *k)]
                    @ x[at][g * cin : (g + 1) * cin]
                )
    return y


def naive_pool(x, window, strides, padding, kind):
    size = x.shape[:-1]
    pads = pads_of(size, window, strides, padding)
    places = places_of(size, window, strides, pads)
    y = np.zeros((*places, x.shape[-1]))
    for place in np.ndindex(*places):
        seen = np.stack(
            [x[at] for _, at in entries(place, window, strides, (1,) * len(size), pads, size)]
        )
        y[place] = seen.mean(0) if kind == "average" else seen.max(0)
    return y


SETTINGS = [(1, 1, 1), (2, 1, 2), (1, 2, 1), (3, 2, 2), ("mixed", 1, 2)]  # stride, dilation, groups
# every padding in every dimension, every setting in 2-D, the rest by turns
CASES = [(n, p, SETTINGS[(n + i) % 5]) for n in (1, 2, 3) for i, p in enumerate(PADDINGS)] + [
    (2, p, s) for p, s in zip(PADDINGS * 2, SETTINGS)
]


@pytest.mark.parametrize("n, padding, setting", CASES)
def test_convolution(n, padding, setting):
    rng, padding, (stride, dilation, groups) = (
        np.random.default_rng(n),
        padding_of(padding, n),
        setting,
    )
    strides = tuple(range(1, n + 1)) if stride == "mixed" else (stride,) * n
    x, v = rng.normal(size=(2, *SHAPES[n], 4))
    W = rng.normal(size=(6, 4 // groups, *(2, 2, 2)[:n]))
    naive = lambda x: naive_conv(x, W, strides, padding, (dilation,) * n, groups)
    want, y = naive(x), rng.normal(size=naive(x).shape)
    syn = ConvSynapse(W, strides, padding, dilation=dilation, groups=groups)
    energy, (to_first, to_second) = jax.jit(jax.value_and_grad(syn, (0, 1)))(x, y)
    np.testing.assert_allclose(energy, -(want * y).sum(), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(-to_second, want, atol=1e-12)
    # the transpose, by its definition
    np.testing.assert_allclose((-to_first * v).sum(), (y * naive(v)).sum(), atol=1e-11)


def test_batches_filters_and_transpose():
    rng = np.random.default_rng(5)
    x, W = jnp.asarray(rng.normal(size=(2, 7, 6, 4))), rng.normal(size=(6, 2, 3, 2))
    syn = ConvSynapse(W, (2, 1), "SAME", dilation=(1, 2), groups=2)
    features = syn.forward_conv(x)
    np.testing.assert_allclose(
        features,
        [naive_conv(row, W, (2, 1), "SAME", (1, 2), 2) for row in np.asarray(x)],
        atol=1e-12,
    )
    y = jnp.asarray(rng.normal(size=features.shape[1:]))
    there = lambda x: syn.forward_conv(x[None])[0]
    np.testing.assert_allclose(
        -jax.grad(syn)(x[0], y), jax.linear_transpose(there, x[0])(y)[0], atol=1e-12
    )
    np.testing.assert_allclose(
        (jax.grad(lambda s: s(x[0], y))(syn).W * W).sum(), syn(x[0], y), rtol=1e-10
    )


def test_asymmetric_filter():
    rng = np.random.default_rng(0)
    x, W = rng.normal(size=(8, 9, 3)), rng.normal(size=(2, 3, 3, 1))
    np.testing.assert_allclose(
        ConvSynapse(W, (2, 1), "SAME", dilation=(1, 3)).forward_conv(x[None])[0],
        naive_conv(x, W, (2, 1), "SAME", (1, 3), 1),
        atol=1e-12,
    )


WINDOWS = [(2, None), (3, 2), (2, 3)]
POOLS = [
    (n, p, kind, *WINDOWS[(n + i) % 3])
    for n in (1, 2, 3)
    for i, p in enumerate(PADDINGS)
    for kind in ("average", "max")
]


@pytest.mark.parametrize("n, padding, kind, window, stride", POOLS)
def test_pooling(n, padding, kind, window, stride):
    rng, padding = np.random.default_rng(n), padding_of(padding, n)
    x, v = rng.normal(size=(2, *SHAPES[n], 2))
    naive = lambda x: naive_pool(x, (window,) * n, (stride or window,) * n, padding, kind)
    want, y = naive(x), rng.normal(size=naive(x).shape)
    syn = PoolSynapse(
        window if n == 2 and isinstance(padding, str) else (window,) * n, stride, padding, kind
    )
    energy, (to_first, to_second) = jax.jit(jax.value_and_grad(syn, (0, 1)))(x, y)
    np.testing.assert_allclose(-to_second, want, atol=1e-12)
    np.testing.assert_allclose([energy, (to_first * x).sum()], -(want * y).sum(), rtol=1e-10)
    if kind == "average":
        np.testing.assert_allclose((-to_first * v).sum(), (y * naive(v)).sum(), atol=1e-11)
    else:  # where nothing ties, the derivative is that of finite differences
        h = 1e-6
        np.testing.assert_allclose(
            (-to_first * v).sum(),
            (y * (naive(x + h * v) - naive(x - h * v))).sum() / (2 * h),
            rtol=1e-6,
            atol=1e-8,
        )


@pytest.mark.parametrize("conv", [None, 3])
def test_ties_share(conv):
    """The current of one coarse neuron is shared by all winners: its sum is kept, and a mirrored
    grid gives a mirrored current"""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.integers(0, 2, (8, 8, 1)).astype(float))
    syn = PoolSynapse(4, kind="max")
    y = jnp.asarray(rng.normal(size=(2, 2, 1)))
    W = np.zeros((1, 1, 3, 3)); W[0, 0, 1, 1] = 1
    if conv: syn = ConvSynapse(W, pool=syn)
    g = -jax.grad(syn)(x, y)
    np.testing.assert_allclose(g.reshape(2, 4, 2, 4).sum((1, 3)), y[..., 0], atol=1e-12)
    np.testing.assert_allclose(
        -jax.grad(syn)(x[::-1, ::-1], y[::-1, ::-1]), g[::-1, ::-1], atol=1e-12
    )
    ones = np.asarray(x.reshape(2, 4, 2, 4).sum((1, 3)))
    np.testing.assert_allclose(
        g[..., 0], x[..., 0] * np.kron(np.asarray(y)[..., 0] / ones, np.ones((4, 4))), atol=1e-12
    )


def test_max_is_convex_and_not_affine():
    rng = np.random.default_rng(2)
    a, b = jnp.asarray(rng.normal(size=(2, 50, 6, 6, 1)))
    E = jax.vmap(lambda x: PoolSynapse(3, kind="max")(x, jnp.ones((2, 2, 1))))
    gap = E((a + b) / 2) - (E(a) + E(b)) / 2
    assert (gap >= -1e-12).all() and (gap > 1e-3).any()


@pytest.mark.parametrize("kind", ["average", "max"])
def test_derivatives_of_any_order(kind):
    "Training through a recall takes derivatives of the current, in batches"
    rng = np.random.default_rng(3)
    W, xs, ys = (
        jnp.asarray(rng.normal(size=s)) for s in [(3, 2, 3, 3), (4, 6, 6, 2), (4, 2, 2, 3)]
    )
    current = lambda W, x, y: (
        jax.grad(ConvSynapse(W, pool=PoolSynapse(3, kind=kind)))(x, y) ** 2
    ).sum()
    loss = jax.jit(lambda W: jax.vmap(current, (None, 0, 0))(W, xs, ys).sum())
    V, h = jnp.asarray(rng.normal(size=W.shape)), 1e-6
    np.testing.assert_allclose(
        (jax.jit(jax.grad(loss))(W) * V).sum(),
        (loss(W + h * V) - loss(W - h * V)) / (2 * h),
        rtol=1e-6,
    )


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_dtype_is_kept(dtype):
    x, y = jnp.ones((6, 6, 1), dtype), jnp.ones((2, 2, 1), dtype)
    for kind in ("average", "max"):
        for syn in (
            PoolSynapse(3, kind=kind),
            ConvSynapse(jnp.ones((1, 1, 3, 3), dtype), pool=PoolSynapse(3, kind=kind)),
        ):
            assert {
                v.dtype
                for v in jax.tree_util.tree_leaves(
                    jax.eval_shape(jax.value_and_grad(syn, (0, 1)), x, y)
                )
            } == {jnp.dtype(dtype)}


def test_only_parameters_are_leaves():
    syn = ConvSynapse(jnp.ones((2, 1, 3)), 1, "SAME", dilation=2, pool=PoolSynapse(2, kind="max"))
    ham = hmx.HAM([hmx.IdentityLayer((8, 1)), hmx.ReluLayer((4, 2))], [syn], [((0, 1), 0)])
    assert [leaf.shape for leaf in jax.tree_util.tree_leaves(ham)] == [(2, 1, 3)]
    assert jax.tree_util.tree_leaves(PoolSynapse(2)) == []
    xs = {0: jnp.ones((8, 1)), 1: jnp.ones((4, 2))}
    got = jax.jit(lambda ham, xs: ham.energy(ham.activations(xs), xs))(ham, xs)
    assert jnp.isfinite(got)


def test_published_signature():
    from hamux.core import ConvSynapse as core
    from hamux.synapses.grids import ConvSynapse as synapses
    assert core is synapses is hmx.ConvSynapse is ConvSynapse
    syn = ConvSynapse.from_conv_params(jax.random.key(0), 3, 2, (3, 3), (2, 2), "SAME")
    assert syn.W.shape == (3, 2, 3, 3) and syn.forward_conv(jnp.ones((5, 8, 8, 2))).shape == (
        5,
        4,
        4,
        3,
    )
    assert ConvSynapse(syn.W, (2, 2), "VALID").forward_conv(jnp.ones((5, 8, 8, 2))).shape == (
        5,
        3,
        3,
        3,
    )


@pytest.mark.parametrize(
    "bad, words",
    [
        (
            lambda: ConvSynapse(jnp.ones((1, 1, 3)), window_strides=0),
            "window_strides must be a positive int",
        ),
        (
            lambda: ConvSynapse(jnp.ones((1, 1, 3)), window_strides=(1, 1)),
            "each of the 1 spatial axes",
        ),
        (
            lambda: ConvSynapse(jnp.ones((1, 1, 3)), dilation=True),
            "dilation must be a positive int",
        ),
        (lambda: ConvSynapse(jnp.ones((1, 1, 3)), dilation=1.5), "dilation must be a positive int"),
        (lambda: ConvSynapse(jnp.ones((1, 1, 3)), padding="FULL"), "padding must be 'SAME'"),
        (lambda: ConvSynapse(jnp.ones((1, 1, 3)), padding=1), "padding must be 'SAME'"),
        (lambda: ConvSynapse(jnp.ones((1, 1, 3)), padding=[(-1, 0)]), "padding must be 'SAME'"),
        (lambda: ConvSynapse(jnp.ones((1, 1, 3)), groups=0), "groups must be a positive int"),
        (lambda: ConvSynapse(jnp.ones((1, 1, 3, 3, 3, 3))), "one to three spatial axes"),
        (lambda: ConvSynapse(jnp.ones((0, 1, 3))), "one to three spatial axes"),
        (lambda: PoolSynapse(0), "window must be a positive int"),
        (lambda: PoolSynapse((2, 2), (1,)), "strides must be a positive int"),
        (lambda: PoolSynapse(2, padding="FULL"), "padding must be 'SAME'"),
        (lambda: PoolSynapse(2).pool(jnp.ones(3)), "as many spatial axes as the window"),
        (
            lambda: hmx.HAM(
                [hmx.IdentityLayer((8, 8, 1)), hmx.IdentityLayer((4, 4, 2))],
                [PoolSynapse(2)],
                [((0, 1), 0)],
            ),
            r"shape \(4, 4, 1\)",
        ),
    ],
)
def test_bad_input(bad, words):
    with pytest.raises((ValueError, TypeError), match=words): bad()
