"""What is known of each Lagrangian: closed forms, hyperparameters, defects of earlier versions, bad
input, axes, conjugates, and `check_lagrangian`."""

import functools
import math
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lagrangian_cases import (  # of this folder
    C_GRAD,
    C_HVP,
    DIM,
    DTYPES,
    HYPER,
    MINIMAL,
    NAMES,
    NORMS,
    WITH_AXIS,
    WITH_BETA,
    L,
    call,
    dtypes,
    every,
    lambda_of,
    ratio,
)
from reference import SPARSE, mp, reference, value_and_gradient, with_cond

import hamux.lagrangians as lagr
from hamux import NeuronLayer

# compiled, for the tests that are not about validation: (value, gradient); axis and eps=0 are
# static
STATIC = {
    name: ["axis", "eps"] if name in NORMS else ["axis"] if name in WITH_AXIS else []
    for name in NAMES
}
VG = {name: jax.jit(jax.value_and_grad(f), static_argnames=STATIC[name]) for name, f in L.items()}


@pytest.fixture(autouse=True, scope="module")
def x64():
    with jax.enable_x64(True):  # for this module alone
        yield


@pytest.mark.slow(but=7)
@every(NAMES)
def test_energies_of_other_pairs_and_their_derivatives(name):
    """E(x̂, x) = <x̂, x> − L(x) for any x̂, with the gradients x and x̂ − ∇L(x), and the derivative
    of −L in what is learned."""
    rng = np.random.default_rng(3)
    hyper = {"repu": (2.5,), "layernorm": (2.0, [0.5, -1.0, 0.25, 2.0], 0.1),
             "spherical_norm": (2.0, [0.5, -1.0, 0.25, 2.0], 0.1),
             "entmax": (1.4, 0.7), "normmax": (1.4, 0.7)}
    h = tuple(np.asarray(v) for v in hyper.get(name, (0.7,) if HYPER[name] else ()))
    x, xhat, t = rng.normal(size=(3, DIM))

    def energy(xhat, x, h): return NeuronLayer(lambda_of(name, h), DIM).energy(xhat, x)

    value = lambda x, h: call(name, x, h)

    @jax.jit
    def both(xhat, x, h):
        slope, in_h = jax.grad(value, (0, 1))(x, h)
        bend = lambda v: jax.jvp(lambda x: jax.grad(value)(x, h), (x,), (v,))[1]
        bend_t, bend_x = jax.vmap(bend)(jnp.stack([t, x]))
        pull = lambda x: jax.value_and_grad(energy, (0, 1, 2))(xhat, x, h)
        (E, (in_xhat, in_x, in_hyper)), (_, (_, bent, _)) = jax.jvp(pull, (x,), (t,))
        ours = E, in_xhat, in_x, in_hyper, bent
        theirs = xhat @ x - value(x, h), x, xhat - slope, tuple(-v for v in in_h), -bend_t
        # the value beside a gradient has its own derivative
        beside = lambda x: jax.value_and_grad(energy, 1)(jax.grad(value)(x, h), x, h)
        rise, at_rest = jax.grad(beside, has_aux=True)(x)
        return (*ours, rise), (*theirs, bend_x), at_rest

    ours, theirs, at_rest = both(xhat, x, h)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
    assert not at_rest.any()


# --------------------------------------------------------------------------------------------------
# -------------------
# (d) the activation is the known closed form

CLOSED = dict(
    identity=lambda x: x,
    repu=lambda x: np.maximum(x, 0) ** 1.5,
    relu=lambda x: np.maximum(x, 0),
    exp=np.exp,
    rexp=lambda x: np.expm1(np.maximum(x, 0)),
    tanh=np.tanh,
    sigmoid=lambda x: 1 / (1 + np.exp(-x)),
    softmax=lambda x: np.exp(x) / np.sum(np.exp(x)),
    ghostmax=lambda x: np.exp(x) / (1 + np.sum(np.exp(x))),
    layernorm=lambda x: (x - np.mean(x)) / np.sqrt(np.var(x) + 1e-5),
    spherical_norm=lambda x: x / np.sqrt(np.sum(x**2) + 1e-5),
    sparsemax=lambda x: by_sorting(x, 1.0),
    entmax=lambda x: by_sorting(x, 0.5),
    normmax=lambda x: by_sorting(x, None),
    ksubsets=lambda x: nearest_subset(x, 2),
)


def by_sorting(x, a):
    """[1 + at]₊^(1/a) for a = 1 and ½, or the normmax of degree 2, by trying every support."""
    order = np.argsort(-x)
    x = x[order]
    size = np.arange(1, x.size + 1)
    mean, square = np.cumsum(x) / size, np.cumsum(x * x) / size
    if a == 1.0: tau = mean - 1 / size
    else: # Σ (c(x − τ))² = 1, c = ½ or 1
        c = a or 1.0
        tau = mean - np.sqrt(np.maximum(1 / c**2 / size - square + mean**2, 0))
    support = (x > tau).sum()
    v = np.maximum((a or 1.0) * (x - tau[support - 1]), 0)
    p = {1.0: v, 0.5: v * v, None: v / v.sum()}[a]
    return p[np.argsort(order)]


def nearest_subset(x, k):
    """min([x − τ]₊, 1), τ by halving."""
    low, high = x.min() - 1, x.max()
    for _ in range(80):
        middle = (low + high) / 2
        above = np.clip(x - middle, 0, 1).sum() > k
        low, high = (middle, high) if above else (low, middle)
    return np.clip(x - low, 0, 1)


@every(NAMES)
def test_activation_is_the_closed_form(name):
    x = np.random.default_rng(3).normal(size=9) * 3
    got = jax.jit(jax.grad(L[name]))(x, *MINIMAL.get(name, ()))
    np.testing.assert_allclose(got, CLOSED[name](x), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float64], ids=["float16", "float64"])
def test_ghostmax_is_the_activation_of_its_lagrangian(dtype):
    x = jnp.asarray([[3.0, -1.0, 0.5], [-40.0, -50.0, -45.0]], dtype)
    got, grad = jax.jit(
        lambda x: (lagr.ghostmax(x, beta=2.0), jax.grad(lagr.lagr_ghostmax)(x, 2.0))
    )(x)
    assert got.dtype == dtype and got.shape == x.shape
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        np.float64(got), np.float64(grad), rtol=200 * eps, atol=4 * float(jnp.finfo(dtype).tiny)
    )
    for row, at in zip(np.float64(got), np.float64(x).tolist()):
        true = reference("ghostmax", at, [0.0] * 3, (2.0,))
        for a, p, c in zip(row, true.grad, true.grad_cond):
            assert ratio(a, p, c, 0, 0, C_GRAD, 1, dtype) <= 1


def test_sigmoid_activation_is_exactly_jax_nn_sigmoid():
    x = jnp.asarray(np.random.default_rng(4).normal(size=1000) * 10, jnp.float32)
    sigma = jax.jit(jax.nn.sigmoid)(x)
    assert (jax.jit(jax.grad(lagr.lagr_sigmoid))(x) == sigma).all()
    # here sigma moves with x
    assert (
        jax.jit(jax.grad(lambda x: jnp.sum(jax.nn.sigmoid(x) * x) - lagr.lagr_sigmoid(x)))(x) != 0
    ).any()
    assert (
        jax.jit(jax.grad(lambda x, xhat: jnp.sum(xhat * x) - lagr.lagr_sigmoid(x)))(x, sigma) == 0
    ).all()


# --------------------------------------------------------------------------------------------------
# -------------------
# (e) hyperparameters

HYPER_X = dict(
    beta=[
        [0.5, -1.25, 2.0],
        [1.0, 1.0, -1.0],
        [0.0, -20.0, -30.0],
        [90.0, -90.0, 3.0],
        [1e4, -1e4, 0.0],
        [1e-4, -1e-5, 1e-6],
        [-90.0, -1e4, -3.0],
        [0.0, 0.0, 0.0],
    ],
    n=[[0.5, -1.25, 2.0], [1.0, 1.0, -1.0], [1e4, 1e-4, 0.0], [90.0, -90.0, 3.0]],
    alpha=[[0.5, -1.25, 2.0], [1.0, 1.0, -1.0], [0.25, 0.375, 1.0], [90.0, -90.0, 3.0]],
    gamma=[[0.5, -1.25, 2.0], [1e4, -1e4, 0.0], [1e-4, -1e-5, 1e-6], [1e20, 2e20, -3e20]],
)
HYPER_AT = dict(
    beta=[1.0, 0.25, 4.0],
    n=[2.5, 3.0, 1.5],
    gamma=[2.0],
    delta=[0.3],
    eps=[1e-5, 0.5],
    alpha=[1.5, 1.25, 1.875],
)


@functools.cache
def derivatives(name):
    "L and ∂L/∂x, then ∂/∂θ of both for every hyperparameter; last ∂²L/∂x∂θ in the other order."
    def all_of(x, hyper):
        f = lambda x, hyper: call(name, x, hyper)
        slope, first = jax.grad(f), jax.grad(f, 1)
        mixed = jax.jacfwd(lambda hyper: slope(x, hyper))(hyper)
        other = jax.jacrev(lambda x: first(x, hyper))(x)
        return f(x, hyper), slope(x, hyper), first(x, hyper), mixed, other

    return jax.jit(all_of)


def derivatives_in(name, k, x, hyper):
    "The same for the k-th hyperparameter alone."
    value, slope, *rest = derivatives(name)(x, tuple(hyper))
    return value, slope, *(v[k] for v in rest)


every_hyperparameter = pytest.mark.parametrize(
    "name, k", [(n, k) for n in NAMES for k in range(len(HYPER[n]))], ids=lambda v: str(v)
)


@pytest.mark.slow(but=9)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64], ids=["float32", "float64"])
@every_hyperparameter
def test_hyperparameter_derivatives(name, k, dtype):
    """∂L/∂θ and ∂²L/∂x∂θ at ordinary and extreme arguments, componentwise."""
    param, bad = HYPER[name][k], []
    for x in HYPER_X[param if param in HYPER_X else "gamma"]:
        for v in HYPER_AT[param]:
            xd = np.asarray(x, dtype)
            hyper = [np.asarray(HYPER_AT[h][0], dtype) for h in HYPER[name]]
            hyper[k] = vd = np.asarray(v, dtype)
            *_, first, mixed, mixed2 = derivatives_in(name, k, xd, hyper)
            assert first.dtype == mixed.dtype == dtype

            def both(a): # with delta for every entry
                given = [*map(float, hyper[:k]), a[-1], *map(float, hyper[k + 1:])]
                pairs = zip(HYPER[name], given, strict=True)
                return value_and_gradient(
                    name, a[:-1], [[u] * 3 if h == "delta" else u for h, u in pairs]
                )

            with mp.workprec(600):
                true, cond = with_cond(both, [mp.mpf(float(u)) for u in [*xd, vd]], 3)
            floor = 1 + max(1, v) / min(1, v) ** 3
            for what, got, t, c in zip(["first", *["mixed"] * 3, *["mixed, other order"] * 3],
                                       [first, *mixed, *mixed2], true + true[1:], cond + cond[1:]):
                # central differences are good to 1e-30
                r = ratio(got, t, c * 1.0000001 + mp.mpf(10) ** -40, 0, 0, C_HVP, floor, dtype)
                error = f"true {mp.nstr(t, 12)}, condition {mp.nstr(c, 3)}, {r:.3g} × allowed"
                if r > 1: bad.append(f"{what} {param}: {float(got)!r}, {error}, x={x} {param}={v}")
    assert not bad, f"lagr_{name} {jnp.dtype(dtype)}:\n" + "\n".join(bad)


@every_hyperparameter
def test_hyperparameter_gradients_match_finite_differences(name, k):
    """In float64, through the library alone: no reference between."""
    base = dict(beta=0.7, gamma=2.0, delta=0.3, eps=0.1, n=2.5, alpha=1.4)
    s, at = 1e-6, np.array([base[h] for h in HYPER[name]])
    for x in np.array([[0.5, -1.25, 2.0], [3.0, 0.25, -0.75]]):
        step = s * (np.arange(len(at)) == k)
        rows = [derivatives_in(name, k, x, at + d) for d in (-step, 0, step)]
        value, grad, first, mixed, _ = zip(*rows, strict=True)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-7, atol=1e-8)
        close(first[1], (value[2] - value[0]) / (2 * s))
        close(mixed[1], (grad[2] - grad[0]) / (2 * s))


@pytest.mark.slow(but=1)
@every(["entmax", "normmax"])
def test_second_derivatives_in_degree_and_temperature(name):
    "By finite differences of the first, which are tested above; and in the order of either"
    x, at, s = jnp.asarray([[0.5, -1.25, 2.0], [3.0, 2.75, -0.75]]), jnp.asarray([1.4, 0.7]), 1e-6
    first = jax.grad(lambda v: call(name, x, (v[0], v[1])))
    around = at + s * jnp.asarray([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]])
    slope, second = jax.jit(jax.vmap(lambda v: (first(v), jax.jacfwd(first)(v))))(around)
    wanted = jnp.stack([slope[1] - slope[2], slope[3] - slope[4]]) / (2 * s)
    np.testing.assert_allclose(second[0], wanted, rtol=1e-6, atol=1e-8)


@every(NORMS)
def test_delta_of_the_shape_of_x_has_the_gradient_x(name):
    x = jnp.asarray(np.random.default_rng(5).normal(size=(4, 3)))
    grad = jax.jit(jax.grad(lambda d: L[name](x, 1.5, d)))
    np.testing.assert_allclose(grad(jnp.ones((4, 3))), x, rtol=1e-15)
    np.testing.assert_allclose(grad(jnp.ones(3)), x.sum(0), rtol=1e-14)
    np.testing.assert_allclose(grad(jnp.ones(())), x.sum(), rtol=1e-13)


# --------------------------------------------------------------------------------------------------
# -------------------
# (f) defects of earlier implementations (the numbers are those of the project's list of facts)


@every(WITH_BETA)
def test_fact_05_a_learnable_temperature_learns(name):
    class Learnable(eqx.Module):
        beta: jax.Array

        def __call__(self, x):
            return L[name](x, beta=self.beta)

    def energy(lagrangian, x):  # the Legendre energy at rest
        return jnp.vdot(jax.grad(lagrangian)(x), x) - lagrangian(x)

    x, s = jnp.asarray([0.5, -1.25, 2.0]), 1e-6
    learn = eqx.filter_jit(eqx.filter_value_and_grad(energy))
    (up, _), (down, _), (_, got) = (learn(Learnable(jnp.asarray(0.7 + d)), x) for d in (s, -s, 0))
    np.testing.assert_allclose(got.beta, (up - down) / (2 * s), rtol=1e-7)
    if name == "tanh":  # and without jit, where a leaked tracer would be seen
        np.testing.assert_allclose(
            eqx.filter_grad(energy)(Learnable(jnp.asarray(0.7)), x).beta, got.beta, rtol=1e-13
        )


def test_fact_06_beta_gradient_of_tanh_and_sigmoid():
    x, beta = jnp.asarray([-2.0, 0.3, 1.5]), jnp.asarray(0.7)
    z = beta * x
    tanh, sigmoid = (jax.grad(f, 1)(x, beta) for f in (lagr.lagr_tanh, lagr.lagr_sigmoid))
    np.testing.assert_allclose(
        tanh, jnp.sum(x * jnp.tanh(z) / beta - jnp.log(jnp.cosh(z)) / beta**2), rtol=1e-13
    )
    np.testing.assert_allclose(
        sigmoid, jnp.sum(x * jax.nn.sigmoid(z) / beta - jnp.log1p(jnp.exp(z)) / beta**2), rtol=1e-13
    )
    assert abs(tanh) > 0.1 and abs(sigmoid) > 0.1


@dtypes
def test_fact_07_second_derivative_of_sigmoid_at_minus_100(dtype):
    second = jax.jit(jax.grad(jax.grad(lagr.lagr_sigmoid)))
    assert second(jnp.asarray(-1e4, dtype)) == 0 and second(jnp.asarray(1e4, dtype)) == 0
    true = math.exp(-100) if float(jnp.finfo(dtype).tiny) < math.exp(-100) else 0
    for x in (-100.0, 100.0):
        np.testing.assert_allclose(
            float(second(jnp.asarray(x, dtype))),
            true,
            rtol=0.02,
            atol=4 * float(jnp.finfo(dtype).tiny),
        )


def test_fact_09_repu_of_real_degree_is_flat_below_zero():
    hess = jax.jit(jax.hessian(lagr.lagr_repu))(jnp.asarray([-1.0, 0.0, 4.0]), 1.5)
    np.testing.assert_allclose(hess, np.diag([0.0, 0.0, 0.25]), rtol=1e-14)
    np.testing.assert_array_equal(
        jax.grad(lambda x: jnp.sum(jax.grad(lagr.lagr_repu)(x, 1.5)))(jnp.asarray([-1.0, -1e300])),
        0,
    )


@dtypes
def test_fact_10_sigmoid_and_tanh_do_not_overflow(dtype):
    for x in (90.0, 1000.0, 30000.0):
        x, eps = jnp.asarray(x, dtype), float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(float(VG["sigmoid"](x)[0]), float(x), rtol=eps)
        np.testing.assert_allclose(float(VG["tanh"](x)[0]), float(x) - math.log(2), rtol=eps)
        np.testing.assert_allclose(float(VG["tanh"](-x)[0]), float(x) - math.log(2), rtol=eps)
        tiny = 4 * float(jnp.finfo(dtype).tiny)
        np.testing.assert_allclose(
            float(VG["sigmoid"](-x)[0]), math.exp(-float(x)), rtol=100 * eps, atol=tiny
        )


# the others reach as far as float32
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32], ids=["float16", "float32"])
@every(NORMS)
def test_fact_11_norms_at_extremes(name, dtype):
    scale = 0.25 * float(jnp.finfo(dtype).max) if dtype == jnp.float16 else 1e20
    unit = np.array([1.0, -1.0, 0.5, -0.5]) / math.sqrt(2.5 / (4 if name == "layernorm" else 1))
    x = jnp.asarray(scale * np.array([1.0, -1.0, 0.5, -0.5]), dtype)
    eps, f = 4 * float(jnp.finfo(dtype).eps), L[name]

    @jax.jit
    def found(x, zero):
        at_zero = lambda *hyper: jax.value_and_grad(lambda x: f(x, *hyper, eps=0.0))(zero)
        return (
            jax.grad(f)(x),
            f(x / 2),
            at_zero(),
            at_zero(2.0, 0.5)[1],
            jax.hessian(lambda x: f(x, eps=0.0))(zero),
        )

    far, half, (value, grad), shifted, bend = found(x, jnp.zeros(4, dtype))
    np.testing.assert_allclose(np.float64(far), unit, rtol=eps)
    np.testing.assert_allclose(
        float(half), scale / 2 * math.sqrt(2.5 * (4 if name == "layernorm" else 1)), rtol=eps
    )
    # by convention the direction of nothing is 0, and never NaN
    assert value == 0 and (grad == 0).all() and (shifted == 0.5).all() and (bend == 0).all()


@every(NORMS)
def test_facts_12_and_13_a_shift_moves_the_activation_by_itself_and_norms_are_per_token(name):
    x, shift = (jnp.asarray(np.random.default_rng(k).normal(size=(4, 3))) for k in (6, 8))
    g = lambda *delta: jax.grad(L[name])(x, 1.0, *delta)
    plain, *moved = jax.jit(lambda: (g(), g(0.5), g(shift), g(shift[0])))()
    np.testing.assert_allclose(plain, [CLOSED[name](row) for row in np.asarray(x)], rtol=1e-12)
    for got, d in zip(moved, (0.5, shift, shift[0]), strict=True):
        np.testing.assert_allclose(got - plain, jnp.broadcast_to(d, x.shape), rtol=1e-12)


@every(NAMES)
def test_fact_19_one_scalar_for_any_shape(name):
    rng = np.random.default_rng(10)
    f = lambda x: L[name](x, *MINIMAL.get(name, ()))
    xs = [jnp.asarray(rng.normal(size=shape)) for shape in ((2, 3), (2, 1, 3))]
    both = jax.jit(
        lambda xs: (
            [jax.value_and_grad(f)(x) for x in xs],
            jax.vmap(f)(jnp.concatenate([x.reshape(-1, 3) for x in xs])),
        )
    )
    wholes, rows = both(xs)
    for x, (got, grad), parts in zip(xs, wholes, np.reshape(rows, (2, 2)), strict=True):
        assert got.shape == () and got.dtype == x.dtype and grad.shape == x.shape
        np.testing.assert_allclose(got, parts.sum(), rtol=1e-13)


# --------------------------------------------------------------------------------------------------
# -------------------
# (g) bad input


@every(NAMES)
@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool", "complex64"])
def test_states_must_be_real_floating(name, dtype):
    with pytest.raises(TypeError, match=rf"(?s)lagr_{name}\b.*{dtype}|{dtype}.*lagr_{name}\b"):
        L[name](jnp.ones(3, dtype), *MINIMAL.get(name, ()))


BAD = [
    (n, dict(beta=b))
    for n in WITH_BETA
    for b in (0.0, -1.0, np.float32(-2), jnp.asarray(0.0), math.nan)
]
BAD += [("repu", dict(n=n)) for n in (0.5, 0, -2, math.nan)]
BAD += [
    (n, bad)
    for n in NORMS
    for bad in (
        dict(gamma=-1.0),
        dict(eps=-1e-5),
        dict(gamma=jnp.asarray(-2.0)),
        dict(eps=math.nan),
    )
]
BAD += [("entmax", dict(alpha=a)) for a in (0.99, 2.01, jnp.asarray(3.0), math.nan)]
BAD += [("normmax", dict(alpha=a)) for a in (1.0, 0.5, math.nan, math.inf)]
BAD += [(n, dict(axis=a)) for n in WITH_AXIS for a in (1, -2, (0, 3))]


def words(v):
    return v if isinstance(v, str) else "-".join(f"{k}={u}" for k, u in v.items())


@pytest.mark.parametrize("name, bad", BAD, ids=words)
def test_hyperparameters_out_of_range(name, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        L[name](jnp.ones(3), **bad)
    if "axis" not in bad:  # a traced value cannot be looked at, and passes
        k = next(iter(bad))
        jax.eval_shape(lambda v: L[name](jnp.ones(3), **{k: v}), jnp.asarray(bad[k], jnp.float64))


@every(WITH_BETA)
def test_a_beta_that_would_enlarge_x(name):
    for beta in (jnp.ones((2, 3)), jnp.ones((2, 1)), jnp.ones(2)):
        with pytest.raises(ValueError, match="beta"):
            L[name](jnp.ones(3), beta=beta)


@every(NORMS)
def test_a_delta_that_does_not_fit(name):
    for delta in (jnp.ones((2, 3)), jnp.ones(2)):
        with pytest.raises(ValueError, match="delta"):
            L[name](jnp.ones(3), 1.0, delta)


# --------------------------------------------------------------------------------------------------
# -------------------
# (h) axes, and the Legendre transform


@every(WITH_AXIS)
def test_any_axis(name):
    x, vg = jnp.asarray(np.random.default_rng(11).normal(size=(2, 3, 4))), jax.value_and_grad(
        L[name]
    )
    ways = {  # axis: the same numbers with that axis last, and back
        0: (lambda x: jnp.moveaxis(x, 0, -1), lambda g: jnp.moveaxis(g, -1, 0)),
        -2: (lambda x: jnp.moveaxis(x, -2, -1), lambda g: jnp.moveaxis(g, -1, -2)),
        (-1, 0): (
            lambda x: jnp.moveaxis(x, 1, 0).reshape(3, 8),
            lambda g: jnp.moveaxis(g.reshape(3, 2, 4), 0, 1),
        ),
        None: (lambda x: x.reshape(-1), lambda g: g.reshape(x.shape)),
    }

    @jax.jit
    def pairs(x):
        there = {axis: vg(move(x)) for axis, (move, _) in ways.items()}
        ghosts = (
            {axis: lagr.ghostmax(x, axis=axis) for axis in (0, (-1, 0))}
            if name == "ghostmax"
            else {}
        )
        return [
            (vg(x, axis=axis), (there[axis][0], back(there[axis][1])), ghosts.get(axis))
            for axis, (_, back) in ways.items()
        ]

    for (f, g), (f2, g2), ghost in pairs(x):
        np.testing.assert_allclose(f, f2, rtol=1e-13)
        np.testing.assert_allclose(g, g2, rtol=1e-12)
        if ghost is not None: np.testing.assert_allclose(ghost, g, rtol=1e-12)


def xlogx(y):
    return jnp.where(y > 0, y * jnp.log(jnp.where(y > 0, y, 1)), 0)


# beta, n, gamma, eps, alpha of the conjugates; y is the activation, less 0.3 for the norms
B, N, G, E, A = 0.7, 2.5, 1.5, 0.1, 1.4
CONJUGATE = dict(
    identity=lambda y: jnp.sum(y**2) / 2,
    repu=lambda y: (1 - 1 / N) * jnp.sum(y ** (N / (N - 1))),
    relu=lambda y: jnp.sum(y**2) / 2,
    exp=lambda y: jnp.sum(xlogx(y) - y) / B,
    rexp=lambda y: jnp.sum(xlogx(1 + y) - (1 + y)) / B,
    tanh=lambda y: jnp.sum(xlogx(1 + y) + xlogx(1 - y)) / 2 / B,
    sigmoid=lambda y: jnp.sum(xlogx(y) + xlogx(1 - y)) / B,
    softmax=lambda y: jnp.sum(xlogx(y)) / B,
    ghostmax=lambda y: (jnp.sum(xlogx(y)) + jnp.sum(xlogx(1 - jnp.sum(y, -1)))) / B,
    layernorm=lambda y: -jnp.sum(
        y.shape[-1] * jnp.sqrt(E) * jnp.sqrt(G**2 - jnp.mean((y - 0.3) ** 2, -1))
    ),
    spherical_norm=lambda y: -jnp.sum(jnp.sqrt(E) * jnp.sqrt(G**2 - jnp.sum((y - 0.3) ** 2, -1))),
    sparsemax=lambda y: jnp.sum(jnp.sum(y * y, -1) - 1) / 2 / B,
    entmax=lambda y: jnp.sum(jnp.sum(y**A, -1) - 1) / A / (A - 1) / B,
    normmax=lambda y: jnp.sum(jnp.sum(y**A, -1) ** (1 / A) - 1) / B,
    ksubsets=lambda y: jnp.sum(jnp.sum(y * y, -1) - 2) / 2 / B,
)


@every(NAMES)
def test_fenchel_young(name):
    x = jnp.asarray(np.random.default_rng(12).normal(size=(3, 4)) * 2)
    args = {"repu": (N,), "layernorm": (G, 0.3, -1, E), "spherical_norm": (G, 0.3, -1, E)}.get(
        name, ()
    )
    bound = dict(beta=B, alpha=A) if name in SPARSE or name in WITH_BETA else {}
    value, y = VG[name](x, *args, **{h: bound[h] for h in HYPER[name] if h in bound})
    np.testing.assert_allclose(value + CONJUGATE[name](y), jnp.vdot(x, y), rtol=1e-11)


def test_the_sum_over_the_rest_does_not_overflow_before_it_must():
    top = float(jnp.finfo(jnp.float32).max)
    x = jnp.asarray([[top, 0.0], [top, 0.0], [-top, -top], [-top, -top]], jnp.float32)
    np.testing.assert_allclose(
        float(lagr.lagr_softmax(x)),
        2 * math.log(2),
        atol=16 * float(jnp.finfo(jnp.float32).eps) * 4 * top,
    )


def test_norms_of_a_constant_row_have_no_direction():
    """Var = 0 and eps = 0: 0.1 + 0.1 + 0.1 + … is not what the mean times their number gives, and
    must not become a direction."""
    for dtype in DTYPES:
        _, g = VG["layernorm"](jnp.full(7, 0.1, dtype), eps=0.0)
        np.testing.assert_array_equal(np.float64(g), 0)


# --------------------------------------------------------------------------------------------------
# -------------------
# (i) check_lagrangian: no false alarm, and every fault named


ARRAYS = dict(beta=jnp.array(1.7), n=jnp.array(2.5), gamma=jnp.array(0.8), delta=jnp.array(0.3),
              alpha=jnp.array(1.4))


@pytest.mark.slow(but=5)
@pytest.mark.parametrize("shape", [(5,), pytest.param((3, 4), marks=pytest.mark.slow)], ids=str)
# which is computed as entmax is
@every([pytest.param(n, marks=pytest.mark.slow) if n == "normmax" else n for n in NAMES])
def test_no_false_alarm(name, shape):
    bound = {k: v for k, v in ARRAYS.items() if k in HYPER[name]}
    report = lagr.check_lagrangian(
        functools.partial(L[name], **bound), shape, key=jax.random.key(shape[0])
    )
    assert report.ok, report
    questions = {f.question for f in report.findings}
    wanted = {"scalar", "convex", "finite", "derivatives", "bounded", "facts"}
    assert questions - {"hyperparameters"} == wanted
    assert "hyperparameters" in questions or not bound
    (bounded,) = (f.sentence for f in report.findings if f.question == "bounded")
    unbounded = name in ("identity", "repu", "relu", "exp", "rexp")
    assert ("not bounded" in bounded) == unbounded


class Halting(eqx.Module):
    "A temperature as a field, with or without its derivative."
    beta: jax.Array
    stop: bool

    def __call__(self, x):
        beta = jax.lax.stop_gradient(self.beta) if self.stop else self.beta
        return jax.nn.logsumexp(beta * x) / self.beta


@jax.custom_vjp
def by_hand(x): return (x**4).sum() / 4
by_hand.defvjp(lambda x: (by_hand(x), x), lambda x, g: (g * x**3,))


@jax.custom_jvp
def wrong_rule(x): return (x**2).sum() / 2
wrong_rule.defjvp(lambda p, t: (wrong_rule(*p), (p[0] * t[0]).sum() * 1.01))


def branching(x, beta): return lagr.lagr_tanh(x, beta) if beta > 1 else lagr.lagr_tanh(x)
def stopped_inside(x, beta=2.0): return lagr.lagr_softmax(jax.lax.stop_gradient(beta) * x) / beta
def declared(**facts): return lambda f: lagr.with_facts(**facts)(f)
def log_cosh(x): return jnp.log(jnp.cosh(x)).sum()
def own_softmax(x, beta=1.0): return jax.nn.logsumexp(beta * x) / beta


bind = functools.partial
FAULTS = {  # the Lagrangian, the question that it fails, what the sentence names
    "negative": (lambda x: -(x**2).sum(), "convex", r"x = \[.*curvature is -2 along v"),
    "a saddle": (lambda x: (x**2).sum() - 3 * x[0] * x[1], "convex", "curvature is -1 "),
    "a kink": (lambda x: (x**2).sum() - abs(x).sum(), "convex", "half way between"),
    "declared not convex": (lagr.log_sum_relu, "convex", r"convex=False.*not in a layer"),
    "a vector": (lambda x: x**2, "scalar", r"array of shape \(3,\).*Sum"),
    "complex": (lambda x: 1j * x.sum(), "scalar", "complex128"),
    "an int": (lambda x: jnp.argmax(x), "scalar", "int64"),
    "none": (lambda x: None, "scalar", "fails on a state"),
    "a branch": (lambda x: x.sum() if x.sum() > 0 else 0.0, "scalar", "boolean"),
    "log cosh": (log_cosh, "finite", "value is infinite at x = .*1000.*logsumexp"),
    "a root": (lambda x: jnp.sqrt((x**2).sum()), "finite", "NaN at the state 0. Add a small"),
    "stopped state": (lambda x: x @ jax.lax.stop_gradient(x), "derivatives", "activation is not"),
    "wrong rule": (wrong_rule, "derivatives", "activation is not the derivative of its value"),
    "stopped default": (stopped_inside, "hyperparameters", "beta is wrong.*bind it as a number"),
    "stopped": (bind(stopped_inside, beta=jnp.array(2.0)), "hyperparameters", "autograd gives"),
    "stopped field": (Halting(jnp.array(2.0), True), "hyperparameters", "value in beta is wrong"),
    "branching": (bind(branching, beta=jnp.array(2.0)), "hyperparameters", "beta is an array"),
    "no sum": (
        declared(form="sum")(lambda x: (x.sum() ** 2)),
        "facts",
        "a sum over entries.*but it",
    ),
    "no competition": (
        declared(form="competition")(lambda x: (x**2).sum()),
        "facts",
        "a competition.*but it is",
    ),
    "a ghost": (
        declared(form="competition", silent=1.0)(lambda x: own_softmax(x)),
        "facts",
        "a competition",
    ),
    "no threshold": (
        declared(form="threshold", threshold=lagr.sparse.entmax_threshold)(
            lambda x, alpha=1.5: lagr.lagr_entmax(x, 1.75)
        ),
        "facts",
        "a threshold, which at .* but it is",
    ),
    "another energy": (
        declared(form="threshold", threshold=lagr.sparse.sparsemax_threshold,
                 conjugate=lambda x: lagr.lagr_sparsemax(x))(lambda x: lagr.lagr_sparsemax(x)),
        "facts",
        "to have the energy .* but it has",
    ),
    "other terms": (
        declared(form="function of a sum", terms=lambda x: (x**2).sum(), outer=lambda s: 3 * s)(
            lambda x: (x**2).sum()
        ),
        "facts",
        "a function of a sum",
    ),
    "no setting": (
        declared(form="function of a sum", terms=lambda x, b: b * x.sum(), outer=lambda s: s)(
            lambda x: x.sum()
        ),
        "facts",
        r"cannot be evaluated.*\['b'\]",
    ),
    "log slope": (
        declared(form="sum", log_slope=lambda xhat: xhat)(lambda x: lagr.lagr_tanh(x)),
        "facts",
        "d log σ′/dx",
    ),
}


@pytest.mark.slow(but=14)
@pytest.mark.parametrize("case", FAULTS)
def test_faults_are_named(case):
    f, question, words = FAULTS[case]
    report = lagr.check_lagrangian(f, 3)
    assert not report.ok
    said = [f.sentence for f in report.findings if f.question == question and not f.ok]
    assert len(said) == 1 and re.search(words, said[0]), report
    assert str(report).count("\n") == len(report.findings) and f"✗ {said[0]}" in str(report)
    others = [f.question for f in report.findings if not f.ok and f.question != question]
    assert not others or case in ("a ghost",), report


PASSES = {
    "a field": Halting(jnp.array(2.0), False),
    "declared": declared(form="competition")(own_softmax),
    "a custom vjp": by_hand,
    "single precision inside": lambda x: (x.astype(jnp.float32) ** 2).sum() / 2,
    "a single array": bind(lagr.lagr_softmax, beta=jnp.array(3.0, jnp.float32)),
    "one number per entry": bind(lagr.lagr_tanh, beta=jnp.array([0.5, 1.0, 2.0])),
    "a number that branches": bind(branching, beta=2.0),
    "a position": bind(lambda W, x: lagr.lagr_relu(W @ x), jnp.eye(3)),
}


@pytest.mark.parametrize("case", PASSES)
def test_what_is_right_passes(case):
    report = lagr.check_lagrangian(PASSES[case], 3)
    assert report.ok, report


def test_a_layer_looks_first_if_asked():
    from hamux.network import NeuronLayer
    with pytest.raises(ValueError, match="NeuronLayer: .*It is not convex: at x = "):
        NeuronLayer(lambda x: -(x**2).sum(), 3, check=True)
    with pytest.raises(ValueError, match="not one number"): NeuronLayer(jnp.sin, 3, check=True)
    assert NeuronLayer(lagr.lagr_tanh, 3, check=True).shape == (3,)
    assert NeuronLayer(lambda x: -(x**2).sum(), 3).shape == (3,)
    with pytest.raises(ValueError, match=r"hamux.check_lagrangian\(L, shape\) says more"):
        NeuronLayer(jnp.sin, 3).activations(jnp.ones(3))


def test_bad_arguments_of_the_check():
    with pytest.raises(TypeError, match="must be a function, got 3"): lagr.check_lagrangian(3, 3)
    with pytest.raises(ValueError, match="samples must be an int from 3 up, got 1"):
        lagr.check_lagrangian(lagr.lagr_relu, 3, samples=1)
    with pytest.raises(TypeError, match="beta must be known"):
        jax.jit(lambda b: lagr.check_lagrangian(bind(lagr.lagr_tanh, beta=b), 3).ok)(2.0)
