"""AttentionSynapse against loops and closed forms in float64 NumPy, finite differences, and the
identities of attention."""

import itertools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import hamux as hmx
from hamux.synapses.attention import AttentionSynapse

# queries, keys of the second layer, heads, d_head, sizes of their tokens
N, M, HEADS, Y, D, E = 4, 3, 2, 3, 5, 6


@pytest.fixture(autouse=True, scope="module")
def x64():
    with jax.enable_x64(True):  # for this module alone
        yield


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


WQ, WK, X, BETA = (
    normal(0, HEADS, Y, D),
    normal(1, HEADS, Y, D),
    normal(2, N, D),
    np.array([0.4, 1.3]),
)
WK2, X2 = normal(3, HEADS, Y, E), normal(4, M, E)
# the second query sees nothing
HOLES = np.array([[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 0]], bool)


def by_loops(x, y, Wq, Wk, beta, seen):
    "The energy and its negative gradients in x and y: one query, one key, one head at a time."
    energy, to_x, to_y = 0.0, np.zeros_like(x), np.zeros_like(y)
    for h, a in itertools.product(range(len(Wq)), range(len(x))):
        keys = [c for c in range(len(y)) if seen[a, c]]
        if not keys: continue
        q, ks = Wq[h] @ x[a], [Wk[h] @ y[c] for c in keys]
        z = np.array([beta[h] * (k @ q) for k in ks])
        w = np.exp(z - z.max())
        energy -= (z.max() + np.log(w.sum())) / beta[h]
        for c, k, p in zip(keys, ks, w / w.sum()):
            to_x[a] += p * Wq[h].T @ k
            to_y[c] += p * Wk[h].T @ q
    return energy, to_x, to_y


SELF = {
    "plain": ({}, ~np.eye(N, dtype=bool)),
    "include_self": (dict(include_self=True), np.ones((N, N), bool)),
    "causal": (dict(causal=True), np.tri(N, k=-1, dtype=bool)),
    "causal with itself": (dict(causal=True, include_self=True), np.tri(N, dtype=bool)),
    "mask": (dict(mask=HOLES), HOLES & ~np.eye(N, dtype=bool)),
    "mask with itself": (dict(mask=HOLES, include_self=True), HOLES),
    "padding": (
        dict(key_mask=[True, False, True, True]),
        ~np.eye(N, dtype=bool) & np.outer([1, 0, 1, 1], [1, 0, 1, 1]).astype(bool),
    ),
    "all": (
        dict(mask=HOLES, key_mask=[True, True, True, False], causal=True),
        HOLES & np.tri(N, k=-1, dtype=bool) & np.outer([1, 1, 1, 0], [1, 1, 1, 0]).astype(bool),
    ),
    "nothing": (dict(mask=np.zeros((N, N), bool)), np.zeros((N, N), bool)),
}
every_self = pytest.mark.parametrize("settings, seen", SELF.values(), ids=SELF)
CROSS = {
    "plain": ({}, np.ones((N, M), bool)),
    "mask": (dict(mask=HOLES[:, :M]), HOLES[:, :M]),
    "padding": (dict(key_mask=[True, True, False]), np.array([[True, True, False]] * N)),
    "both": (
        dict(mask=HOLES[:, :M], key_mask=[True, True, False]),
        HOLES[:, :M] & [True, True, False],
    ),
}
every_cross = pytest.mark.parametrize("settings, seen", CROSS.values(), ids=CROSS)


@every_self
def test_self_is_loops(settings, seen):
    beta = 0.7 if settings.get("causal") else BETA
    syn = AttentionSynapse(WQ, WK, beta, **settings)
    energy, to_x, to_y = by_loops(X, X, WQ, WK, np.broadcast_to(beta, HEADS), seen)
    value, grad = jax.jit(jax.value_and_grad(syn))(X)
    np.testing.assert_allclose(value, energy, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(-grad, to_x + to_y, rtol=1e-11, atol=1e-12)
    p = syn.attention(X)
    np.testing.assert_array_equal(p == 0, np.broadcast_to(~seen, p.shape))
    np.testing.assert_allclose(p.sum(-1), np.broadcast_to(seen.any(1), (HEADS, N)), atol=1e-14)


@every_cross
def test_cross_is_loops(settings, seen):
    syn = AttentionSynapse(WQ, WK2, BETA, **settings)
    energy, to_x, to_y = by_loops(X, X2, WQ, WK2, BETA, seen)
    value, grads = jax.jit(jax.value_and_grad(syn, argnums=(0, 1)))(X, X2)
    np.testing.assert_allclose(value, energy, rtol=1e-12)
    np.testing.assert_allclose(-grads[0], to_x, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(-grads[1], to_y, rtol=1e-11, atol=1e-12)


def whole(settings):
    "The energy as a function of one vector: tokens, projections and beta."
    parts = [X, WQ, WK, BETA]
    cuts = np.cumsum([p.size for p in parts])[:-1]
    def f(v):
        x, wq, wk, b = (s.reshape(p.shape) for s, p in zip(jnp.split(v, cuts), parts))
        return AttentionSynapse(wq, wk, b, **settings)(x)
    return f, jnp.concatenate([p.ravel() for p in parts])


@pytest.mark.parametrize("name", ["mask", "padding"])
def test_first_and_second_derivatives(name):
    "Along a line in tokens, projections and temperatures together."
    f, v = whole(SELF[name][0])
    t = jnp.asarray(normal(5, v.size)) * jnp.where(jnp.arange(v.size) < v.size - HEADS, 1, 0.2)
    both = jax.jit(jax.value_and_grad(f))
    curve = jax.jit(jax.grad(lambda v: jax.grad(f)(v) @ t))  # reverse over reverse
    h = 1e-5
    (up, g_up), (_, g), (down, g_down) = both(v + h * t), both(v), both(v - h * t)
    np.testing.assert_allclose(g @ t, (up - down) / (2 * h), rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(curve(v), (g_up - g_down) / (2 * h), rtol=2e-6, atol=1e-7)


def test_masked_rows_are_zero_to_third_order():
    f, v = whole(SELF["mask"][0])
    t = jnp.ones_like(v)
    third = lambda f: jax.jvp(lambda w: jax.jvp(jax.grad(f), (w,), (t,))[1], (v,), (t,))[1]
    nothing, _ = whole(SELF["nothing"][0])
    some, *none = jax.jit(lambda: (third(f), nothing(v), jax.grad(nothing)(v), third(nothing)))()
    assert np.isfinite(some).all() and abs(some).max() > 0
    for zero in none: assert (zero == 0).all()


# float64 is all the others
@pytest.mark.parametrize(
    "dtype", [jnp.float16, jnp.bfloat16, jnp.float32], ids=lambda d: jnp.dtype(d).name
)
def test_dtype_is_kept(dtype):
    syn = AttentionSynapse(*(jnp.asarray(v, dtype) for v in (WQ, WK, BETA)), mask=HOLES)
    x = jnp.asarray(X, dtype)
    (value, grad), p = jax.jit(lambda x: (jax.value_and_grad(syn)(x), syn.attention(x)))(x)
    assert value.dtype == grad.dtype == p.dtype == dtype
    energy, to_x, to_y = by_loops(
        *(np.asarray(v, float) for v in (x, x, syn.Wq, syn.Wk, syn.beta)), SELF["mask"][1]
    )
    eps = float(jnp.finfo(dtype).eps)
    assert abs(float(value) - energy) <= 16 * eps * abs(energy)
    np.testing.assert_allclose(
        np.asarray(-grad, float), to_x + to_y, atol=64 * eps * abs(to_x + to_y).max()
    )


def test_half_precision_scores_may_leave_the_range():
    # 300 · 300 > 65504, the largest float16
    x = jnp.asarray([[300.0], [300.0], [1.0]], jnp.float16)
    syn = AttentionSynapse(jnp.ones((1, 1, 1), jnp.float16), jnp.ones((1, 1, 1), jnp.float16))
    p, grad = jax.jit(lambda x: (syn.attention(x), jax.grad(syn)(x)))(x)
    np.testing.assert_array_equal(p[0], [[0, 1, 0], [1, 0, 0], [0.5, 0.5, 0]])
    np.testing.assert_array_equal(-np.asarray(grad)[:, 0], [600.5, 600.5, 300])


def test_one_key_has_no_temperature():
    "With two tokens each sees only the other: E = −Σ (k₂·q₁ + k₁·q₂), at any temperature."
    x = X[:2]
    q, k = np.einsum("hed,nd->hne", WQ, x), np.einsum("hed,nd->hne", WK, x)
    want = -(k[:, 1] * q[:, 0] + k[:, 0] * q[:, 1]).sum()
    both = jax.jit(jax.value_and_grad(lambda b: AttentionSynapse(WQ, WK, b)(x)))
    for beta in (1e-3, 1.0, 1e6):
        value, slope = both(jnp.asarray(beta))
        np.testing.assert_allclose(value, want, rtol=1e-12)
        assert slope == 0


def test_limits_of_the_temperature():
    "β → ∞: the best key alone. β → 0: the mean score, and log(number of keys)/β."
    scores = np.einsum("hed,nd,hef,mf->hnm", WQ, X, WK2, X2)
    np.testing.assert_allclose(
        AttentionSynapse(WQ, WK2, 1e8)(X, X2), -scores.max(-1).sum(), rtol=1e-7
    )
    b = 1e-6
    np.testing.assert_allclose(
        AttentionSynapse(WQ, WK2, b)(X, X2) + HEADS * N * np.log(M) / b,
        -scores.mean(-1).sum(),
        rtol=1e-3,
    )


def test_order_and_arrangement_mean_nothing():
    syn, order = AttentionSynapse(WQ, WK, BETA), [2, 0, 3, 1]
    run = jax.jit(
        lambda x: (
            syn(x),
            syn.attention(x),
            jax.grad(syn)(x),
            jax.grad(syn)(x.reshape(2, 2, D)).reshape(N, D),
        )
    )
    (E, p, grad, on_grid), (E2, p2, *_) = map(jax.device_get, (run(X), run(X[order])))
    np.testing.assert_allclose(E2, E, rtol=1e-13)
    np.testing.assert_allclose(p2, p[:, order][:, :, order], rtol=1e-12)
    np.testing.assert_allclose(on_grid, grad, rtol=1e-13)


def test_masks_of_a_grid():
    grid = X.reshape(2, 2, D)
    want = AttentionSynapse(WQ, WK, mask=HOLES)(X)
    for mask in (HOLES, HOLES.reshape(2, 2, 2, 2)):
        np.testing.assert_allclose(AttentionSynapse(WQ, WK, mask=mask)(grid), want, rtol=1e-13)
    there = np.array([[True, False], [True, True]])
    for mask in (there, there.ravel()):
        np.testing.assert_allclose(
            AttentionSynapse(WQ, WK, key_mask=mask)(grid),
            AttentionSynapse(WQ, WK)(X[there.ravel()]),
            rtol=1e-12,
        )


def test_padding_takes_a_token_out_altogether():
    syn, x = AttentionSynapse(WQ, WK, BETA, key_mask=[True, True, True, False]), jnp.asarray(X)
    alone = AttentionSynapse(WQ, WK, BETA)
    padded, (E_alone, grad_alone) = jax.jit(jax.value_and_grad(syn)), jax.jit(
        jax.value_and_grad(alone)
    )(x[:3])
    E, grad = jax.device_get(padded(x))
    np.testing.assert_allclose(E, E_alone, rtol=1e-13)
    np.testing.assert_allclose(grad[:3], grad_alone, rtol=1e-12)
    assert (grad[3] == 0).all() and padded(x.at[3].set(99.0))[0] == E


def test_a_causal_mask_is_no_one_way_street():
    syn, x = AttentionSynapse(WQ, WK, BETA, causal=True), jnp.asarray(X)
    later = x.at[3].add(1.0)
    np.testing.assert_array_equal(syn.attention(later)[:, :3], syn.attention(x)[:, :3])
    _, as_query, as_key = by_loops(X, X, WQ, WK, BETA, SELF["causal"][1])
    _, as_query2, as_key2 = by_loops(
        np.asarray(later), np.asarray(later), WQ, WK, BETA, SELF["causal"][1]
    )
    np.testing.assert_array_equal(as_query2[:3], as_query[:3])  # nothing through the query term …
    moved = jax.grad(syn)(x) - jax.grad(syn)(later)
    # … all through the key term
    np.testing.assert_allclose(moved[:3], (as_key2 - as_key)[:3], rtol=1e-9, atol=1e-12)
    assert (abs(moved[:3]).max(1) > 1e-3).all()


def test_the_update_is_attention():
    """With values W_Qᵀ k, the current into the queries is the attention of any deep-learning
    library."""
    syn = AttentionSynapse(WQ, WK2)
    q, k = (np.einsum("hed,nd->nhe", W, x)[None] for W, x in ((WQ, X), (WK2, X2)))
    out = jax.nn.dot_product_attention(q, k, k)[0]  # (queries, heads, d_head), scale 1/√d_head
    # its softmax is in float32
    np.testing.assert_allclose(
        -jax.jit(jax.grad(syn))(X, X2), np.einsum("nhe,hed->nd", out, WQ), rtol=1e-4
    )


def layered(syn, n=N, d=D):
    return hmx.HAM(
        {"tokens": hmx.LayerNormLayer((n, d), leak=False)},
        {"attention": syn},
        [(("tokens",), "attention")],
    )


def test_in_a_network():
    ham = layered(AttentionSynapse(WQ, WK, jnp.asarray(BETA), mask=HOLES))
    assert sorted(v.shape for v in jax.tree.leaves(ham)) == [(HEADS,), (HEADS, Y, D), (HEADS, Y, D)]
    # a number is a constant
    assert [v.shape for v in jax.tree.leaves(layered(AttentionSynapse(WQ, WK)))] == [
        (HEADS, Y, D)
    ] * 2
    many = hmx.descend(
        ham.vectorize(), {"tokens": np.stack([X, X[::-1]])}, solver=hmx.Euler(0.02), max_steps=60
    )
    assert (np.diff(many.energies) < 0).all() and not many.rises.any()
    start = {"tokens": jnp.asarray(X)}
    np.testing.assert_allclose(
        many.energies[0, 0],
        jax.jit(lambda xs: ham.energy(ham.activations(xs), xs))(start),
        rtol=1e-10,
    )


def test_equal_masks_share_a_compilation():
    traces = []
    @jax.jit
    def energy(ham, xs):
        traces.append(1)
        return ham.energy(ham.activations(xs), xs)
    xs = {"tokens": jnp.asarray(X)}
    values = [
        energy(layered(AttentionSynapse(WQ, WK, mask=m)), xs) for m in (HOLES, HOLES.copy(), ~HOLES)
    ]
    assert len(traces) == 2 and values[0] == values[1] != values[2]


def test_trainable():
    grads = jax.grad(lambda s: s(X))(AttentionSynapse(WQ, WK, jnp.asarray(BETA), trainable=False))
    assert all((g == 0).all() for g in jax.tree.leaves(grads))
    grads = jax.grad(lambda s: s(X))(AttentionSynapse(WQ, WK, jnp.asarray(BETA)))
    assert len(jax.tree.leaves(grads)) == 3 and all(
        abs(g).min() > 0 for g in jax.tree.leaves(grads)
    )


@pytest.mark.parametrize("n, d, heads, d_head", [(2, 16, 1, 16), (32, 128, 8, 16)])
def test_fresh_currents_are_of_order_one(n, d, heads, d_head):
    @jax.jit
    def rms(seed):
        k1, k2 = jr.split(jr.key(seed))
        x = jr.normal(k2, (n, d))
        x = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
        return jnp.sqrt((jax.grad(AttentionSynapse.rand_init(k1, d, heads, d_head))(x)**2).mean())
    assert 0.2 < np.mean([rms(seed) for seed in range(3)]) < 3


def test_rand_init():
    d, heads, d_head = 8, 2, 4
    other = AttentionSynapse.rand_init(
        jr.key(0), d, heads, d_head, d_key=3, beta=2.0, scale=2.0, include_self=True
    )
    assert other.Wk.shape == (heads, d_head, 3) and other.beta == 2 and other.include_self
    np.testing.assert_allclose(
        other.Wq, 2 * np.asarray(AttentionSynapse.rand_init(jr.key(0), d, heads, d_head).Wq)
    )


@pytest.mark.parametrize(
    "error, words, call",
    [
        (ValueError, "Wq must have 3 axes", lambda: AttentionSynapse(WQ[0], WK[0])),
        (ValueError, "same heads and d_head", lambda: AttentionSynapse(WQ, WK[:1])),
        (TypeError, "Wq must be real", lambda: AttentionSynapse(WQ * 1j, WK)),
        (ValueError, "one per head", lambda: AttentionSynapse(WQ, WK, np.ones(3))),
        (ValueError, "one per head", lambda: AttentionSynapse(WQ, WK, True)),
        (ValueError, "positive and finite", lambda: AttentionSynapse(WQ, WK, -1.0)),
        (ValueError, "positive and finite", lambda: AttentionSynapse(WQ, WK, np.nan)),
        (
            ValueError,
            "positive and finite",
            lambda: AttentionSynapse(WQ, WK, np.array([1.0, np.inf])),
        ),
        (
            TypeError,
            "mask must be booleans",
            lambda: AttentionSynapse(WQ, WK, mask=np.ones((N, N))),
        ),
        (
            TypeError,
            "key_mask must be booleans",
            lambda: AttentionSynapse(WQ, WK, key_mask=[1, 0, 1, 1]),
        ),
        (
            ValueError,
            r"mask must have shape \(4, 4\), got \(4, 3\)",
            lambda: AttentionSynapse(WQ, WK, mask=HOLES[:, :3])(X),
        ),
        (
            ValueError,
            r"mask must have shape \(4, 3\), got \(4, 4\)",
            lambda: AttentionSynapse(WQ, WK2, mask=HOLES)(X, X2),
        ),
        (
            ValueError,
            r"key_mask must have shape \(3,\)",
            lambda: AttentionSynapse(WQ, WK2, key_mask=[True] * 4)(X, X2),
        ),
        (
            ValueError,
            "causal must be False between two layers",
            lambda: AttentionSynapse(WQ, WK2, causal=True)(X, X2),
        ),
        (
            ValueError,
            r"queries must be tokens of shape \(…, 5\)",
            lambda: AttentionSynapse(WQ, WK2)(X2, X2),
        ),
        (
            ValueError,
            r"keys must be tokens of shape \(…, 6\)",
            lambda: AttentionSynapse(WQ, WK2)(X, X),
        ),
        (ValueError, r"keys \(of the same layer\)", lambda: AttentionSynapse(WQ, WK2)(X)),
        (ValueError, "at least one axis", lambda: AttentionSynapse(WQ, WK)(X[0])),
        (
            ValueError,
            "must take 3 layers",
            lambda: hmx.HAM(
                [hmx.LayerNormLayer((N, D))], [AttentionSynapse(WQ, WK)], [((0, 0, 0), 0)]
            ),
        ),
        (
            ValueError,
            "fails for layers of shapes",
            lambda: layered(AttentionSynapse(WQ, WK), N, D + 1),
        ),
    ],
)
def test_bad_input(error, words, call):
    with pytest.raises(error, match=words): call()
