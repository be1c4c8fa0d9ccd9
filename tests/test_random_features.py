"""The random-feature memory: its kernel, its noise, the slope of its error, and its size."""
import math

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import hamux as hmx
from hamux.synapses.random_features import RandomFeatureMemory, _features


@pytest.fixture(autouse=True, scope="module")
def x64():
    with jax.enable_x64(True):
        yield


features = jax.jit(_features)


def corners(key, n, d=100): return jr.bernoulli(key, shape=(n, d)).astype(float) / math.sqrt(d)
def exact(x, patterns, beta):
    return -jax.nn.logsumexp(-beta / 2 * ((x - patterns) ** 2).sum(-1)) / beta


@pytest.mark.parametrize("beta", [0.5, 10.0])
def test_kernel_is_unbiased(beta):
    """The mean of the estimates is the kernel, within four standard errors; their variance is at
    most that of a cosine, 1/2m"""
    m, trials = 50, 400
    x, y = jnp.array([0.3, -0.2, 0.1]), jnp.array([-0.1, 0.2, 0.2])
    freq = math.sqrt(beta) * jr.normal(jr.key(0), (trials, m, 3))
    estimates = np.asarray(jax.vmap(lambda f: features(x, f) @ features(y, f))(freq))
    want = math.exp(-beta / 2 * float(((x - y)**2).sum()))
    # the variance of cos ω·δ for a normal ω: (1 + k(2δ)) / 2 − k², with k(2δ) = k⁴
    sd = math.sqrt(((1 + want**4) / 2 - want**2) / m)
    assert abs(estimates.mean() - want) < 4 * sd / math.sqrt(trials)
    np.testing.assert_allclose(estimates.std(), sd, rtol=0.15)


@pytest.mark.slow
def test_slope_of_the_error():
    """−½ in log–log over several seeds, in the published setting: corners of a cube of side 1/√d,
    K = 50, β = 10"""
    sizes, beta, rng = [500, 2000, 8000, 32_000], 10.0, np.random.default_rng(0)

    @jax.jit
    def errors(freq, stored, asked):
        memory = RandomFeatureMemory(_features(stored, freq).sum(0), freq, beta)
        return abs(
            jax.vmap(memory)(asked) - jax.vmap(lambda x: exact(x, stored, beta))(asked)
        ).mean()

    found = np.array(
        [
            [
                errors(
                    math.sqrt(beta) * rng.normal(size=(m, 100)),
                    *np.split(corners(jr.key(seed), 80), [50]),
                )
                for m in sizes
            ]
            for seed in range(8)
        ]
    )
    slopes = np.polyfit(np.log(sizes), np.log(found).T, 1)[0]
    assert abs(slopes.mean() + 0.5) < 0.1
    # first order: |ΔE| ≈ |ΔS| / (β S), so with S near 4 and noise √(K/2m) at most some hundredths
    # at the start
    assert found.mean(0)[0] < 2 * math.sqrt(50 / 1000) / (beta * 4)


def test_one_pattern_is_exact_where_it_lies():
    patterns = jr.normal(jr.key(0), (1, 6))
    memory = RandomFeatureMemory.store(jr.key(1), patterns, 2.0, 40)
    energy = jax.jit(lambda memory, x: jax.value_and_grad(memory)(x))
    value, slope = energy(memory, patterns[0])
    np.testing.assert_allclose(value, 0, atol=1e-12)
    np.testing.assert_allclose(slope, 0, atol=1e-10)
    doubled, _ = energy(memory.add(patterns), patterns[0])
    np.testing.assert_allclose(doubled, -math.log(2) / 2, rtol=1e-12)


@pytest.mark.slow
def test_add_and_remove():
    patterns = jr.normal(jr.key(0), (700, 4))
    whole = RandomFeatureMemory.store(jr.key(1), patterns, 1.0, 30, floor=2.0)
    part = RandomFeatureMemory.store(jr.key(1), patterns[:300], 1.0, 30, floor=2.0)
    grown = part.add(patterns[300:500]).add(patterns[500:])
    np.testing.assert_allclose(grown.T, whole.T, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(grown.remove(patterns[300:]).T, part.T, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(
        features(patterns, whole.frequencies).sum(0), whole.T, rtol=1e-9, atol=1e-9
    )
    assert [leaf.shape for leaf in jax.tree_util.tree_leaves(grown)] == [
        leaf.shape for leaf in jax.tree_util.tree_leaves(part)
    ]
    assert (grown.beta, grown.floor) == (1.0, 2.0)
    empty = whole.remove(patterns)
    assert jnp.isfinite(empty(patterns[0]))


@pytest.mark.slow
def test_gradient_and_floor():
    patterns = jr.normal(jr.key(0), (5, 3))
    memory = RandomFeatureMemory.store(jr.key(1), patterns, 2.0, 500)
    rng, h = np.random.default_rng(2), 1e-6
    x, v, far = np.asarray(patterns[0]) + 0.1, rng.normal(size=3), 1e3 * rng.normal(size=(200, 3))
    energies = jax.jit(lambda memory, x: jax.vmap(jax.value_and_grad(memory))(x))
    E, g = map(np.asarray, energies(memory, np.stack([x, x + h * v, x - h * v, *far])))
    np.testing.assert_allclose(g[0] @ v, (E[1] - E[2]) / (2 * h), rtol=1e-6)
    top = -math.log(memory.noise) / 2
    level = np.isclose(E[3:], top)
    assert (E[3:] <= top + 1e-12).all() and level.mean() > 0.7
    assert (g[3:][level] == 0).all()
    higher = RandomFeatureMemory(memory.T, memory.frequencies, 2.0, floor=3.0)
    E, _ = energies(higher, np.stack([x, x, x, *far]))
    np.testing.assert_allclose(E.max(), -math.log(3 * memory.noise) / 2, rtol=1e-12)
    # over all of space the root mean square of the sum is ‖T‖/√2m
    sums = features(1e4 * rng.random((20_000, 3)), memory.frequencies) @ memory.T
    np.testing.assert_allclose(np.sqrt(np.mean(sums**2)), memory.noise, rtol=0.03)


@pytest.mark.slow
def test_parameters():
    memory = RandomFeatureMemory.store(jr.key(1), jr.normal(jr.key(0), (5, 3)), 2.0, 50)
    slope_of = jax.jit(jax.grad(lambda m: m(jnp.zeros(3))))
    slope = slope_of(memory)
    assert (slope.frequencies == 0).all() and (slope.T != 0).any()
    held = RandomFeatureMemory(memory.T, memory.frequencies, 2.0, trainable=False)
    assert not jax.tree_util.tree_reduce(
        lambda a, g: a or bool((g != 0).any()), slope_of(held), False
    )
    for dtype in (jnp.float32, jnp.float64):
        got = RandomFeatureMemory.store(jr.key(1), jnp.ones((2, 3), dtype), 2.0, 5)
        assert got.T.dtype == got.frequencies.dtype == got(jnp.ones(3, dtype)).dtype == dtype


@pytest.mark.slow
def test_recall():
    "Above the noise, the descent ends where that of the exact memory ends"
    beta, stored = 60.0, corners(jr.key(0), 10, 64)
    asked = stored.at[:, :5].set(1 / 8 - stored[:, :5])
    memory = RandomFeatureMemory.store(jr.key(1), stored, beta, 20_000)
    layer = {"x": hmx.IdentityLayer(64, leak=False)}
    ends = [
        hmx.descend(
            hmx.HAM(layer, {"m": m}, [(("x",), "m")]).vectorize(),
            {"x": asked},
            solver=hmx.Euler(0.3),
            max_steps=100,
            atol=1e-3,
            trace=False,
        ).xs["x"]
        for m in (memory, lambda x: exact(x, stored, beta))
    ]
    np.testing.assert_allclose(ends[1], stored, atol=2e-3)
    assert jnp.sqrt(((ends[0] - ends[1])**2).sum(1)).max() < 0.1
    assert ((ends[0] > 1 / 16) == (stored > 1 / 16)).all()


@pytest.mark.parametrize(
    "bad, words",
    [
        (lambda: RandomFeatureMemory.store(jr.key(0), jnp.ones(3), 1.0, 4), "one per row"),
        (lambda: RandomFeatureMemory.store(jr.key(0), jnp.ones((0, 3)), 1.0, 4), "one per row"),
        (
            lambda: RandomFeatureMemory.store(jr.key(0), jnp.ones((2, 3)) * 1j, 1.0, 4),
            "must be real",
        ),
        (
            lambda: RandomFeatureMemory.store(jr.key(0), jnp.ones((2, 3)), jnp.ones(2), 4),
            "beta must be one positive number",
        ),
        (
            lambda: RandomFeatureMemory.store(jr.key(0), jnp.ones((2, 3)), float("inf"), 4),
            "beta must be one positive number",
        ),
        (
            lambda: RandomFeatureMemory.store(jr.key(0), jnp.ones((2, 3)), 1.0, 4.0),
            "n_features must be a positive int",
        ),
        (
            lambda: RandomFeatureMemory.store(jr.key(0), jnp.ones((2, 3)), 1.0, 4, floor=0),
            "floor must be one positive number",
        ),
        (lambda: RandomFeatureMemory(jnp.ones(8), jnp.ones((3, 4)), 1.0), r"\(8,\) and \(3, 4\)"),
        (
            lambda: hmx.HAM(
                [hmx.IdentityLayer(4)],
                [RandomFeatureMemory.store(jr.key(0), jnp.ones((2, 3)), 1.0, 4)],
                [((0,), 0)],
            ),
            r"must have shape \(3,\), got \(4,\)",
        ),
    ],
)
def test_bad_input(bad, words):
    with pytest.raises((ValueError, TypeError), match=words): bad()
