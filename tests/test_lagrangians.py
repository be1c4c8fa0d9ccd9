"""Every Lagrangian, in every dtype and over its whole range, against 200-bit arithmetic
(tests/reference.py): to the last digits, of programs as users compile them."""

import functools
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from lagrangian_cases import (  # of this folder
    C_GRAD,
    C_HVP,
    C_VALUE,
    DIM,
    DTYPES,
    HYPER,
    NAMES,
    NORMS,
    call,
    dtypes,
    every,
    lambda_of,
    ratio,
)
from reference import mp, reference

from hamux import NeuronLayer

# every hypothesis example is a batch of ROWS vectors of DIM entries: one compilation for each
# Lagrangian and dtype
ROWS = 8

# the other dtypes with what is slow
float32_first = pytest.mark.parametrize(
    "dtype",
    [pytest.param(d, marks=() if d == jnp.float32 else pytest.mark.slow) for d in DTYPES],
    ids=lambda d: jnp.dtype(d).name,
)


@pytest.fixture(autouse=True, scope="module")
def x64():
    with jax.enable_x64(True):  # for this module alone
        yield


# --------------------------------------------------------------------------------------------------
# -------------------
# (a), (b): value, gradient and Hessian-vector product over the whole range


def rounded(v, dtype):
    """`v` as the nearest finite number of the dtype that is normal or zero."""
    info = jnp.finfo(dtype)
    with np.errstate(over="ignore"):
        v = float(np.asarray(min(max(v, -float(info.max)), float(info.max))).astype(dtype))
    return v if abs(v) >= float(info.tiny) else 0.0


def numbers(dtype):
    info = jnp.finfo(dtype)
    special = [
        0,
        1,
        2,
        20,
        90,
        float(info.max),
        float(info.max) / 2,
        float(info.tiny),
        float(info.eps),
    ]
    exponents = st.integers(int(info.minexp), int(info.maxexp) - 1)
    log_uniform = st.builds(math.ldexp, st.floats(1, 2, exclude_max=True), exponents)
    moderate = st.floats(0, 25, allow_subnormal=False)
    positive = st.one_of(st.sampled_from(special), log_uniform, moderate)
    signed = st.builds(lambda v, minus: -v if minus else v, positive, st.booleans())
    return signed.map(lambda v: rounded(v, dtype))


def vectors(dtype):
    """Mixed magnitudes; ties and equal entries; one magnitude; a large common part with
    differences of a few ulp or of order one."""
    eps, one = float(jnp.finfo(dtype).eps), numbers(dtype)
    unit = st.floats(-1, 1, allow_subnormal=False)
    four = lambda s: st.lists(s, min_size=DIM, max_size=DIM)
    ties = st.lists(one, min_size=1, max_size=DIM - 1).flatmap(
        lambda pool: four(st.sampled_from(pool))
    )
    scaled = st.builds(lambda a, us: [a * u for u in us], one, four(unit))
    ulps = st.builds(lambda a, ks: [a * (1 + k * eps) for k in ks], one, four(st.integers(-8, 8)))
    offset = st.builds(lambda a, us: [a + 8 * u for u in us], one, four(unit))
    return st.one_of(four(one), ties, scaled, ulps, offset).map(
        lambda v: [rounded(u, dtype) for u in v]
    )


def directions(dtype):
    """Not so small that the product with beta (2⁻⁶ at least) is subnormal: flushed to zero."""
    small = 2**7 * float(jnp.finfo(dtype).tiny)
    number = lambda v: rounded(v, dtype) if abs(v) > small else 0.0
    t = st.floats(-4, 4, allow_subnormal=False).map(number)
    return st.one_of(st.lists(t, min_size=DIM, max_size=DIM), st.sampled_from(np.eye(DIM).tolist()))


def hypers(name, dtype):
    scale = st.one_of(st.just(1.0), st.floats(-6, 6).map(lambda e: rounded(2.0**e, dtype)))
    shift = st.floats(-2, 2).map(lambda v: rounded(v, dtype))
    delta = st.one_of(st.just([0.0] * DIM), st.lists(shift, min_size=DIM, max_size=DIM))
    # 1e-5 is below the smallest normal of float16, and the default nevertheless
    eps = st.sampled_from([0.0, float(jnp.asarray(1e-5, dtype)), rounded(1e-3, dtype), 0.25])
    draw = dict(
        beta=scale,
        gamma=scale,
        delta=delta,
        eps=eps,
        n=st.sampled_from([1.0, 1.5, 2.0, 2.5, 3.0, 7.25, 20.0]),
        # each a number of every dtype
        alpha=st.sampled_from([1.0, 1.0625, 1.25, 1.5, 1.75, 2.0][name == "normmax" :]),
    )
    return st.tuples(*(draw[h] for h in HYPER[name]))


@functools.cache
def evaluator(name):
    """Value, gradient, the Hessian-vector product both ways, and the energy of a layer on its own
    pair, for a batch of vectors with hyperparameters of their own."""
    def one(x, t, hyper):
        f = lambda x: call(name, x, hyper)
        grad = jax.grad(f)
        g, h = jax.jvp(grad, (x,), (t,))
        hrr = jax.grad(lambda x: jnp.sum(grad(x) * t))(x)
        layer = NeuronLayer(lambda_of(name, hyper), x.shape)
        return f(x), g, h, hrr, layer.energy(layer.activations(x), x)

    return jax.jit(jax.vmap(one))


def evaluated(name, dtype, xs, ts, hyper):
    "What `evaluator` gives for rows, in batches of one size: there is one program to compile."
    columns = [np.asarray(v, dtype) for v in (xs, ts, *hyper)]
    parts = []
    for k in range(0, len(xs), ROWS):
        x, t, *h = (v[k : k + ROWS] for v in columns)
        got = evaluator(name)(x, t, tuple(h))
        n, m = x.shape[:1], x.shape
        assert [(v.dtype, v.shape) for v in got] == [(dtype, s) for s in (n, m, m, m, n)]
        parts.append(got)
    return [np.concatenate(v) for v in zip(*parts, strict=True)]


def misses(name, dtype, rows):
    """What is wrong with rows of (x, t, hyperparameters), in words; also asserts (b)."""
    xs, ts, hs = zip(*rows, strict=True)
    got = evaluated(name, dtype, xs, ts, zip(*hs, strict=True))
    f, g, h, hrr, _ = (np.asarray(v, np.float64) for v in got)
    for k, (x, t, hyper) in enumerate(rows):
        ref = reference(name, x, t, hyper, float(jnp.finfo(dtype).eps))
        where = f"lagr_{name} {jnp.dtype(dtype)} x={x} t={t} {dict(zip(HYPER[name], hyper))}"
        quantities = [("value", f[k : k + 1], ref.value, ref.value_cond, [0], [0], C_VALUE)]
        hvp = lambda cond: (ref.hvp, cond, ref.hvp_kink, ref.hvp_scale, C_HVP)
        if not ref.wild:
            quantities += [
                ("grad", g[k], ref.grad, ref.grad_cond, ref.grad_kink, [0] * DIM, C_GRAD)
            ]
        lost = ref.wild or ref.radius < float(jnp.finfo(dtype).tiny)
        # transposed, the products are summed without seeing all of t at once
        if not lost: quantities += [("jvp of grad", h[k], *hvp(ref.hvp_cond)),
                                    ("grad of grad", hrr[k], *hvp(ref.hvp_cond_t or ref.hvp_cond))]
        for what, *columns, c in quantities:
            for i, (a, true, cond, kink, scale) in enumerate(zip(*columns)):
                r = ratio(a, true, cond, kink, scale, c, ref.floor, dtype)
                key = name, jnp.dtype(dtype).name, what
                worst[key] = max(worst.get(key, (0, "")), (r, where))
                error = f"true {mp.nstr(true, 17)}, condition {mp.nstr(cond, 3)}, {r:.3g} × allowed"
                if r > 1: yield f"{what}[{i}] {float(a)!r}, {error}: {where}"
        if lost and np.isnan([*g[k], *h[k], *hrr[k]]).any():
            yield f"NaN {g[k]} {h[k]} {hrr[k]}: {where}"


def check(name, dtype, rows):
    bad = list(misses(name, dtype, rows))
    assert not bad, "\n".join(bad[:12])


worst = {}  # (name, dtype, quantity) → (error over allowed, where); for whoever wants to look


@pytest.mark.slow(but=2)
@dtypes
@every(NAMES)
def test_whole_range(name, dtype, request):
    row = st.tuples(vectors(dtype), directions(dtype), hypers(name, dtype))
    batches = 200 if request.config.getoption("--thorough") else 20

    @seed(zlib.crc32(f"{name} {jnp.dtype(dtype)}".encode()))
    # no shrinking: the message names the row that fails, and a batch shrinks slowly
    @settings(max_examples=batches, deadline=None, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))
    @given(st.lists(row, min_size=ROWS, max_size=ROWS))
    def holds(rows):
        check(name, dtype, rows)

    holds()


def hard_vectors(dtype):
    info = jnp.finfo(dtype)
    top, tiny = float(info.max), float(info.tiny)
    return [
        [0.0] * 4,
        [top] * 4,
        [-top] * 4,
        [top, -top, top, -top],
        [top, top, top, -top],
        [tiny] * 4,
        [tiny, -tiny, tiny, 0.0],
        [tiny, 1.5 * tiny, 2 * tiny, 4 * tiny],
        [top, tiny, -tiny, 0.0],
        [0.0, -20.0, -40.0, -60.0],
        [0.0, -20.5, -20.5, -20.5],
        [1e-4, -1e-4, 1e-3, -1e-3],
        [8.0, -8.0, 5.0, -5.0],
        [90.0, -90.0, 12.0, -12.0],
        [1000.0, -1000.0, 1000.0, 1000.0],
        [1.0, 0.0, 0.0, 0.0],
        [top / 2, top / 4, 1.0, -top],
        [1e4, 1e4, 1e4 - 8, 1e4 - 16],
        [3.0, 3.0, 3.0, 3.0],
        [-3.0, -4.0, 0.0, -0.0],
    ]


@float32_first
@every(NAMES)
def test_hard_cases(name, dtype):
    ts = [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [-1.0, 2.0, 0.5, -0.25]]
    hyper = dict(
        beta=[1.0, 8.0, 0.125],
        gamma=[1.0, 2.0],
        delta=[[0.0] * DIM, [0.5, -1.0, 0.25, 2.0]],
        n=[1.0, 1.5, 2.0, 3.0, 2.5],
        eps=[0.0, float(jnp.asarray(1e-5, dtype)), 0.25],
        alpha=[1.5, 2.0, 1.25],
    )
    xs = [[rounded(v, dtype) for v in x] for x in hard_vectors(dtype)]
    rows = [(x, ts[(k + s) % 3], tuple(hyper[h][(k // 3 + s) % len(hyper[h])] for h in HYPER[name]))
            for s in range(6) for k, x in enumerate(xs)]
    check(name, dtype, rows)


def wrong_energies(name, dtype, rows):
    """What is wrong with the energies of pairs: <σ(x), x> − L(x) in so many bits that the
    difference is exact."""
    xs, hs = zip(*rows, strict=True)
    *_, got = evaluated(name, dtype, xs, np.zeros_like(xs), zip(*hs, strict=True))
    for k, (x, hyper) in enumerate(rows):
        with mp.workprec(2400 if dtype == jnp.float64 else 700):
            ref = reference(name, x, x, hyper, float(jnp.finfo(dtype).eps))
            if ref.wild or ref.radius < float(jnp.finfo(dtype).tiny): continue
            exact = [mp.mpf(v) for v in x]
            true = sum(a * g for a, g in zip(exact, ref.grad)) - ref.value[0]
            bent = sum(abs(a * h) for a, h in zip(exact, ref.hvp))
            cond = abs(true) + 2 * bent + sum(abs(a * g) for a, g in zip(exact, ref.grad)
                                              if name in ("exp", "rexp"))
        # a term that flushes to zero is multiplied by the state
        floor = ref.floor * (1 + max(map(abs, x)))
        r = ratio(got[k], true, cond, 0, 0, C_VALUE, floor, dtype)
        where = f"{name} {jnp.dtype(dtype)} x={x} {dict(zip(HYPER[name], hyper))}"
        if r > 1: yield f"{got[k]!r}, true {mp.nstr(true, 17)}, {r:.3g} × allowed: {where}"


@float32_first
@every(NAMES)
def test_energies_of_pairs_do_not_cancel(name, dtype):
    """At every magnitude: <σ(x), x> − L(x) to a few units in the last place, though both terms
    may be 10³⁸ times as large."""
    rng = np.random.default_rng(zlib.crc32(f"{name} {jnp.dtype(dtype)}".encode()))
    info = jnp.finfo(dtype)
    sizes = 2.0 ** np.linspace(int(info.minexp) / 2, int(info.maxexp) - 2, 30)
    xs = [(s * rng.normal(size=DIM)).tolist() for s in (*sizes, 0.1, 1, 3, 10)]
    xs += hard_vectors(dtype)
    hyper = dict(
        beta=[1.0, 8.0, 0.125],
        gamma=[1.0, 2.0],
        n=[1.5, 2.0, 3.0],
        delta=[[0.0] * DIM, [0.5, -1.0, 0.25, 2.0]],
        eps=[0.0, rounded(1e-3, dtype), 0.25],
        alpha=[1.5, 2.0, 1.25],
    )
    rows = [([rounded(v, dtype) for v in x],
             tuple(hyper[h][k % len(hyper[h])] for h in HYPER[name])) for k, x in enumerate(xs)]
    bad = list(wrong_energies(name, dtype, rows[: len(rows) // ROWS * ROWS]))
    assert not bad, "\n".join(bad[:8])


@every(NAMES)
def test_reference_is_its_own_derivative(name):
    """The reference's gradient, product and invariances, against its own value and central
    differences."""
    rng = np.random.default_rng(7)
    hyper = {
        "repu": (2.5,),
        "layernorm": (2.0, [0.5, -1.0, 0.25, 2.0], 0.1),
        "spherical_norm": (2.0, [0.5, -1.0, 0.25, 2.0], 0.1),
        "entmax": (1.375, 0.7),
        "normmax": (1.375, 0.7),
    }
    h = hyper.get(name, (0.7,) if HYPER[name] else ())
    for x in (rng.normal(size=DIM) * 3, np.array([30.0, -1.0, 0.5, -25.0])):
        x, t = [mp.mpf(float(v)) for v in x], [mp.mpf(float(v)) for v in rng.normal(size=DIM)]
        ref = reference(name, x, t, h)
        for i in range(DIM):
            along = lambda s, v: [a + s * b for a, b in zip(x, v)]
            unit = [mp.mpf(i == j) for j in range(DIM)]
            s = mp.mpf(2) ** -60
            fd = (
                reference(name, along(s, unit), t, h).value[0]
                - reference(name, along(-s, unit), t, h).value[0]
            ) / (2 * s)
            assert abs(fd - ref.grad[i]) <= mp.mpf(1e-25) * ref.grad_cond[i] + mp.mpf(1e-35)
            fd = (
                reference(name, along(s, t), t, h).grad[i]
                - reference(name, along(-s, t), t, h).grad[i]
            ) / (2 * s)
            assert abs(fd - ref.hvp[i]) <= mp.mpf(1e-25) * ref.hvp_cond[i] + mp.mpf(1e-35)


# --------------------------------------------------------------------------------------------------
# -------------------
# (c) convexity


@every(NAMES)
def test_convex(name):
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    hyper = dict(beta=1.5, gamma=2.0, delta=[0.3] * DIM, eps=1e-5, n=2.5, alpha=1.4)
    args = [[hyper[h]] * 200 for h in HYPER[name]]
    x, y, t = (
        rng.normal(size=(200, DIM)) * np.exp(rng.uniform(-5, 4, size=(200, 1))) for _ in range(3)
    )
    (f, _, h, *_), (g, *_), (m, *_) = (
        evaluated(name, jnp.float64, v, t, args) for v in (x, y, (x + y) / 2)
    )
    middle, size = (f + g) / 2 - m, abs(f) + abs(g)
    curve, scale = (t * h).sum(1), (abs(t) * (abs(t) + abs(h))).sum(1)
    eps = np.finfo(np.float64).eps
    assert (np.isposinf(size) | (middle >= -16 * eps * size)).all()
    # the norms' Hessian is of size γ/r, and t.Ht is a difference of terms of that size
    scale = scale + (
        2 * np.sum(t * t, 1) / np.minimum(np.std(x, axis=1), np.linalg.norm(x, axis=1))
        if name in NORMS
        else 0
    )
    assert (curve >= -16 * eps * scale).all()
