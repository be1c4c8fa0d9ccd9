"""Discrete memories against a slow simulation in Python's integers, brute force over all states,
closed forms, and bad input."""
import itertools
import math

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import hamux as hmx

PROPERTY = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
POWERS = {"2": 2, "3": 3, "5": 5, "rectified": lambda x: np.maximum(x, 0)**3}


def signs(seed, *shape):
    return np.random.default_rng(seed).choice([-1, 1], shape)


def couplings(seed, N, most=9):
    W = np.triu(np.random.default_rng(seed).integers(-most, most + 1, (N, N)), 1)
    return W + W.T


def all_states(N):
    return np.array(list(itertools.product([-1, 1], repeat=N)))


def slowly(energy, s, order, held=None):
    """Asynchronous recall by full energies in Python's own integers: the state and the energy
    after each flip."""
    s, path = list(map(int, s)), [energy(list(map(int, s)))]
    while True:
        flips = 0
        for i in order:
            if held is not None and held[i]:
                continue
            t = [-v if j == i else v for j, v in enumerate(s)]
            if energy(t) < path[-1]:
                s, flips = t, flips + 1; path.append(energy(t))
        if not flips:
            return s, path


def pair_energy(W, b):
    "Twice −½ sᵀWs − b·s, as an int."
    W, b = W.tolist(), b.tolist()
    return lambda s: -sum(
        W[i][j] * s[i] * s[j] for i in range(len(s)) for j in range(len(s))
    ) - 2 * sum(x * y for x, y in zip(b, s))


def dense_energy(Xi, n, rectified=False):
    Xi = Xi.tolist()
    cut = (lambda m: max(m, 0)) if rectified else lambda m: m
    return lambda s: -sum(cut(sum(x * y for x, y in zip(xi, s)))**n for xi in Xi)


# --- recall, flip for flip
# -------------------------------------------------------------------------------------------


@PROPERTY
@given(seed=st.integers(0, 10**6))
def test_pairs_flip_for_flip(seed):
    """States, number of flips and energies are those of the slow simulation, exactly, ties (small
    integers) included"""
    W, b, start = (
        couplings(seed, 15, 2),
        np.random.default_rng(seed).integers(-2, 3, 15),
        signs(seed, 12, 15),
    )
    held = np.random.default_rng(seed + 1).random((12, 15)) < 0.2
    out = hmx.recall_bits(hmx.DiscreteHopfield(W, b), start, clamp=held)
    E = pair_energy(W, b)
    for k in range(12):
        s, path = slowly(E, start[k], range(15), held[k])
        assert out.states[k].tolist() == s and int(out.flips[k]) == len(path) - 1
        assert 2 * float(out.energy[k]) == path[-1] and 2 * float(out.energies[k, 0]) == path[0]
        assert (np.asarray(out.states[k]) == start[k])[held[k]].all()
    assert out.converged.all() and not (np.diff(out.energies, axis=1) > 0).any()


@pytest.mark.parametrize("name", POWERS)
def test_dense_flip_for_flip(name):
    Xi, start = signs(1, 20, 15), signs(2, 12, 15)
    out = hmx.recall_bits(hmx.DiscreteMemory(Xi, POWERS[name]), start)
    E = dense_energy(Xi, 3 if name == "rectified" else POWERS[name], name == "rectified")
    for k in range(len(start)):
        s, path = slowly(E, start[k], range(15))
        assert out.states[k].tolist() == s and int(out.flips[k]) == len(path) - 1
        np.testing.assert_allclose(out.energy[k], path[-1], rtol=1e-6)
    assert out.converged.all()


@pytest.mark.parametrize("beta", [0.2, 1.0, 5.0, 40.0])
def test_exponential_flip_for_flip(beta):
    """The exponential in exact fractions of e^2β is out of reach; in float64 the log domain is
    exact enough to decide"""
    Xi, start = signs(3, 20, 15), signs(4, 12, 15)
    E = lambda s: -np.logaddexp.reduce(beta * (Xi @ np.array(s, float))) / beta
    out = hmx.recall_bits(hmx.DiscreteMemory(Xi, "exp", beta), start)
    for k in range(len(start)):
        s, path = slowly(lambda s: round(E(s), 9), start[k], range(15))
        assert out.states[k].tolist() == s and int(out.flips[k]) == len(path) - 1
        np.testing.assert_allclose(out.energy[k], path[-1], rtol=1e-5)


@pytest.mark.slow
def test_orders():
    "A random order is another path to a minimum; the key fixes it, and a row is what it is alone"
    memory, start = hmx.DiscreteHopfield(couplings(5, 40)), signs(6, 30, 40)
    a, b, c = (hmx.recall_bits(memory, start, order="random", key=jr.key(k)) for k in (0, 0, 1))
    assert (a.states == b.states).all() and not (a.states == c.states).all()
    assert (
        a.converged.all()
        and c.converged.all()
        and memory.stable(a.states).all()
        and memory.stable(c.states).all()
    )
    alone = hmx.recall_bits(memory, start[11], order="random", key=jr.key(0))
    assert (
        (alone.states == a.states[11]).all()
        and alone.flips == a.flips[11]
        and alone.sweeps == a.sweeps[11]
    )
    np.testing.assert_array_equal(alone.energies, a.energies[11])
    # every sweep has an order of its own: sweeps in the first order over and over lead elsewhere
    s = start
    for _ in range(20):
        s = hmx.recall_bits(memory, s, order="random", key=jr.key(0), max_sweeps=1).states
    assert memory.stable(s).all() and not (s == a.states).all()


# --- fields ---------------------------------------------------------------------------------------
# -------------------


@pytest.mark.parametrize("make", [
    lambda: hmx.DiscreteHopfield(couplings(0, 30), np.arange(30)),
    lambda: hmx.DiscreteHopfield(couplings(0, 30) / 7.0, np.arange(30) / 3.0),
    lambda: hmx.DiscreteMemory(signs(0, 50, 30), 3),
    lambda: hmx.DiscreteMemory(signs(0, 50, 30), lambda x: np.cosh(x / 5)),
    lambda: hmx.DiscreteMemory(signs(0, 50, 30), "exp", 0.5),
])
def test_incremental_is_recomputed(make):
    """After three hundred random flips the fields are those of the state, and a visit decides as
    all changes together do"""
    memory, s, rng = make(), signs(1, 4, 30), np.random.default_rng(2)
    fields = memory.fields(jnp.asarray(s))
    flipped, visit = jax.jit(lambda f, si, i: memory.flipped(f, si, i)), jax.jit(
        lambda f, si, i: memory.visit(f, si, i)
    )
    for i in rng.integers(0, 30, 300):
        which = rng.random(4) < 0.5
        fields = flipped(fields, jnp.asarray(np.where(which, s[:, i], 0)), i)
        s[:, i] = np.where(which, -s[:, i], s[:, i])
    for kept, fresh in zip(fields, memory.fields(jnp.asarray(s))):
        if jnp.issubdtype(fresh.dtype, jnp.integer):
            np.testing.assert_array_equal(kept, fresh)
        else:
            np.testing.assert_allclose(kept, fresh, rtol=1e-4, atol=1e-4 * float(abs(fresh).max()))
    one_by_one = np.stack([visit(fields, jnp.asarray(s[:, i]), i) for i in range(30)], 1)
    np.testing.assert_array_equal(
        one_by_one, memory.costs(jnp.asarray(s), memory.fields(jnp.asarray(s)))[1]
    )


@pytest.mark.parametrize("F", [2, 4, "exp", lambda x: np.maximum(x, 0)**2])
def test_fixed_points_by_brute_force(F):
    """What recall ends in are local minima, and every local minimum stays: all 512 starts, all
    energies from scratch in float64"""
    Xi, every = signs(7, 6, 9), all_states(9)
    f = np.exp if F == "exp" else F if callable(F) else lambda x: x**F
    energies = dict(zip(map(tuple, every.tolist()), -f((every @ Xi.T).astype(float)).sum(1)))
    if F == "exp":
        energies = {s: -math.log(-E) for s, E in energies.items()}
    E = lambda s: energies[tuple(s)]
    minima = {
        s
        for s in energies
        if all(E(s) <= E([-v if j == i else v for j, v in enumerate(s)]) + 1e-9 for i in range(9))
    }
    out = hmx.recall_bits(hmx.DiscreteMemory(Xi, F), every)
    ends = list(map(tuple, out.states.tolist()))
    assert set(ends) == minima and out.converged.all()
    assert all((tuple(s) == e) == (tuple(s) in minima) for s, e in zip(every.tolist(), ends))
    np.testing.assert_allclose(out.energy, [E(e) for e in ends], rtol=1e-5)


def test_floating_weights_never_climb():
    """Energies in float64, one sweep at a time; weights of 1e6 and 1e-6 side by side, and half
    precision"""
    rng = np.random.default_rng(8)
    for dtype in (np.float32, np.float16):
        W = rng.standard_normal((60, 60)) * np.exp(rng.normal(0, 3, (60, 60)))
        W = np.triu(W, 1).astype(dtype); W = W + W.T
        exact = W.astype(float)
        E = lambda s: -np.einsum("bi,ij,bj->b", s, exact, s) / 2
        memory, s, last = hmx.DiscreteHopfield(W), signs(9, 50, 60), np.inf
        assert memory.W.dtype == dtype and memory.energy(s).dtype == np.float32
        for _ in range(30):
            now = E(s.astype(float))
            assert (now <= last).all()
            s, last = np.asarray(hmx.recall_bits(memory, s, max_sweeps=1).states), now
        assert memory.stable(s).all()


def test_large_powers_and_double_precision():
    "x³⁰ of 200 neurons in units of its own, and integer exactness at the sizes of the papers"
    Xi = signs(10, 60, 200)
    wrong = np.where(np.random.default_rng(0).random(Xi.shape) < 0.2, -Xi, Xi)
    out = hmx.recall_bits(hmx.DiscreteMemory(Xi, lambda x: (x / 200)**30), wrong)
    assert (np.asarray(out.states) == Xi).all() and out.converged.all()
    for N, n, K in ((100, 3, 3000), (50, 4, 4000), (1000, 2, 200)):
        assert hmx.DiscreteMemory(signs(0, K, N), n).up.dtype == jnp.int32
    with jax.enable_x64(True):
        memory = hmx.DiscreteMemory(Xi[:20, :31], 9)
        E = dense_energy(Xi[:20, :31], 9)
        out = hmx.recall_bits(memory, wrong[:5, :31])
        assert out.energy.dtype == jnp.float64
        np.testing.assert_allclose(out.energy, [E(s) for s in out.states.tolist()], rtol=1e-14)
        s, path = slowly(E, wrong[0, :31], range(31))
        assert out.states[0].tolist() == s


# --- closed forms ---------------------------------------------------------------------------------
# -------------------


@PROPERTY
@given(seed=st.integers(0, 10**6))
def test_squares_are_hebb(seed):
    Xi, s = signs(seed, 20, 15), signs(seed + 1, 12, 15)
    pairs, dense = hmx.DiscreteHopfield(hmx.hebbian(Xi)), hmx.DiscreteMemory(Xi, 2)
    np.testing.assert_array_equal(dense.energy(s), 2 * pairs.energy(s) - Xi.size)
    np.testing.assert_array_equal(dense.changes(s), 2 * pairs.changes(s))
    np.testing.assert_array_equal(
        hmx.recall_bits(dense, s).states, hmx.recall_bits(pairs, s).states
    )
    # the customary factor multiplies the energy and moves nothing
    scaled = hmx.recall_bits(hmx.DiscreteHopfield(hmx.hebbian(Xi) / 15), s)
    np.testing.assert_array_equal(scaled.states, hmx.recall_bits(pairs, s).states)


def test_symmetries():
    "Even F: s and −s cost the same. A gauge, flipping a neuron everywhere, changes nothing."
    Xi, s, gauge = signs(11, 20, 15), signs(12, 12, 15), signs(13, 15)
    for F in (2, 3, 4, "exp"):
        memory = hmx.DiscreteMemory(Xi, F)
        if F in (2, 4):
            np.testing.assert_array_equal(memory.energy(s), memory.energy(-s))
        turned = hmx.DiscreteMemory(Xi * gauge, F)
        np.testing.assert_array_equal(memory.energy(s), turned.energy(s * gauge))
        np.testing.assert_array_equal(
            hmx.recall_bits(memory, s).states * gauge, hmx.recall_bits(turned, s * gauge).states
        )


def test_one_pattern():
    """E = −F(N − 2d) at distance d, for every distance, and recall returns it in one sweep for a
    rectified F"""
    xi, N = signs(14, 1, 21), 21
    s = np.where(np.arange(N) < np.arange(N + 1)[:, None], -xi, xi)
    for n in (2, 3, 5):
        np.testing.assert_allclose(
            hmx.DiscreteMemory(xi, n).energy(s), -((N - 2.0 * np.arange(N + 1)) ** n), rtol=1e-6
        )
    np.testing.assert_allclose(
        hmx.DiscreteMemory(xi, "exp", 2.0).energy(s), -(N - 2.0 * np.arange(N + 1)), rtol=1e-6
    )
    out = hmx.recall_bits(hmx.DiscreteMemory(xi, "exp"), s)
    assert (
        (out.states == xi).all()
        and out.flips.tolist() == list(range(N + 1))
        and out.sweeps.tolist() == [1] + [2] * N
    )


def test_pseudo_inverse():
    """P ξ = ξ, so the fields at the patterns are (1 − P_ii) ξ_i, however alike the patterns;
    dependent ones change nothing"""
    Xi = np.where(np.random.default_rng(15).random((12, 50)) < 0.15, -1, 1)
    P = np.linalg.pinv(Xi) @ Xi
    W = np.asarray(hmx.pseudo_inverse(Xi))
    np.testing.assert_allclose(Xi @ W, Xi * (1 - np.diag(P)), atol=2e-5)
    np.testing.assert_allclose(hmx.pseudo_inverse(np.concatenate([Xi, -Xi[:4]])), W, atol=2e-5)
    assert (
        hmx.DiscreteHopfield(W).stable(Xi).all()
        and not hmx.DiscreteHopfield(hmx.hebbian(Xi)).stable(Xi).all()
    )


def test_bit_error_is_binomial():
    """n = 2: the probability of a wrong bit after one update is a binomial tail; 300 sets, five
    standard errors"""
    N, K, sets, rng = 40, 12, 300, np.random.default_rng(16)
    trials = (K - 1) * (N - 1)
    p = sum(math.comb(trials, k) for k in range(trials + 1) if 2 * k - trials > N - 1) / 2**trials
    shares = []
    for _ in range(sets):
        Xi = rng.choice([-1, 1], (K, N))
        shares.append((np.asarray(hmx.flip_together(hmx.DiscreteMemory(Xi, 2), Xi)) != Xi).mean())
    assert abs(np.mean(shares) - p) < 5 * np.std(shares) / math.sqrt(sets)


# --- under transformations, and bad input
# ----------------------------------------------------------------------------


def test_under_jit_and_vmap():
    Xi, s = signs(17, 3, 20, 15), signs(18, 3, 12, 15)
    def run(Xi, s):
        out = hmx.recall_bits(hmx.DiscreteMemory(Xi, 3), s)
        return out.states, out.converged, out.energy
    states, converged, energy = jax.jit(jax.vmap(run))(Xi, s)
    assert converged.all()
    for k in range(3):
        np.testing.assert_array_equal(states[k], run(Xi[k], s[k])[0])
        np.testing.assert_array_equal(energy[k], run(Xi[k], s[k])[2])
    memory = hmx.DiscreteMemory(Xi[0], 3)
    np.testing.assert_array_equal(
        jax.jit(lambda m, s: m.energy(s))(memory, s[0]), memory.energy(s[0])
    )
    assert (
        memory.energy(s).shape == (3, 12)
        and memory.changes(s).shape == s.shape
        and memory.energy(s[0, 0]).shape == ()
    )


def test_result():
    memory, s = hmx.DiscreteHopfield(couplings(0, 30)), signs(0, 3, 30)
    out = hmx.recall_bits(memory, s, max_sweeps=1)
    assert out.code.tolist() == [2] * 3 and "Allow more sweeps" in out.result[0]
    quiet = hmx.recall_bits(memory, s, trace=False)
    assert quiet.energies is None and (quiet.states == hmx.recall_bits(memory, s).states).all()
    all_held = hmx.recall_bits(memory, s, clamp=np.ones(30, bool))
    assert (
        (all_held.states == s).all()
        and all_held.converged.all()
        and all_held.flips.tolist() == [0] * 3
    )
    for dtype in (np.int8, np.float32):
        assert hmx.recall_bits(memory, s.astype(dtype)).states.dtype == dtype
    assert hmx.recall_bits(memory, s[:0]).states.shape == (0, 30)
    bad = jax.jit(lambda W: hmx.recall_bits(hmx.DiscreteHopfield(W), s).code)(
        jnp.full((30, 30), jnp.nan)
    )
    assert bad.tolist() == [3] * 3


W, XI = couplings(0, 6).astype(float), signs(0, 4, 6)
GOOD = hmx.DiscreteMemory(XI, 3)


@pytest.mark.parametrize(
    "call, error, said",
    [
        (
            lambda: hmx.DiscreteHopfield(W[:4]),
            ValueError,
            "square, one row per neuron, got shape (4, 6)",
        ),
        (
            lambda: hmx.DiscreteHopfield(W + np.triu(np.ones((6, 6)), 1)),
            ValueError,
            "differs from its transpose by up to 1",
        ),
        (lambda: hmx.DiscreteHopfield(W + np.eye(6)), ValueError, "zero diagonal, got 1"),
        (lambda: hmx.DiscreteHopfield(W * np.nan), ValueError, "NaN or inf"),
        (lambda: hmx.DiscreteHopfield(W > 0), TypeError, "real numbers, got dtype bool"),
        (lambda: hmx.DiscreteHopfield("W"), TypeError, "real numbers"),
        (lambda: hmx.DiscreteHopfield(W, np.ones(5)), ValueError, "b must have shape (6,)"),
        (lambda: hmx.DiscreteMemory(XI[0]), ValueError, "must have 2 axes"),
        (lambda: hmx.DiscreteMemory(XI[:0]), ValueError, "none of size 0"),
        (lambda: hmx.DiscreteMemory((XI + 1) // 2), ValueError, "2 * bits - 1"),
        (lambda: hmx.DiscreteMemory(XI > 0), TypeError, "jnp.where(bits, 1, -1)"),
        (lambda: hmx.DiscreteMemory(XI, 0), ValueError, "a power n > 0"),
        (lambda: hmx.DiscreteMemory(XI, True), ValueError, "a power n > 0"),
        (lambda: hmx.DiscreteMemory(XI, "exponential"), ValueError, "'exp'"),
        (lambda: hmx.DiscreteMemory(XI, 400), ValueError, "does not fit in float32"),
        (lambda: hmx.DiscreteMemory(XI, np.log), ValueError, "F is not finite"),
        (
            lambda: hmx.DiscreteMemory(XI, "exp", -1.0),
            ValueError,
            "beta must be one number between 0 and",
        ),
        (lambda: hmx.DiscreteMemory(XI, 2, 1.0), ValueError, "beta belongs to F='exp'"),
        (lambda: hmx.recall_bits(GOOD, np.zeros(6)), ValueError, "got 0.0"),
        (lambda: hmx.recall_bits(GOOD, np.full(6, np.nan)), ValueError, "got nan"),
        (lambda: hmx.recall_bits(GOOD, XI[:, :5]), ValueError, "6 neurons each"),
        (lambda: hmx.recall_bits(GOOD, XI[None]), ValueError, "1 to 2 axes"),
        (lambda: hmx.recall_bits(XI, XI), TypeError, "memory must be a discrete one"),
        (
            lambda: hmx.recall_bits(GOOD, XI, max_sweeps=0),
            ValueError,
            "max_sweeps must be a positive int",
        ),
        (lambda: hmx.recall_bits(GOOD, XI, order="both"), ValueError, "'cyclic' or 'random'"),
        (lambda: hmx.recall_bits(GOOD, XI, order="random"), ValueError, "needs a key"),
        (lambda: hmx.recall_bits(GOOD, XI, key=jr.key(0)), ValueError, "order='random'"),
        (
            lambda: hmx.recall_bits(GOOD, XI, clamp=[0, 1]),
            TypeError,
            "zeros(shape, bool).at[indices]",
        ),
        (
            lambda: hmx.recall_bits(GOOD, XI, clamp=np.ones((2, 6), bool)),
            ValueError,
            "(6,) or (4, 6), got (2, 6)",
        ),
        (lambda: hmx.flip_together(GOOD, XI, clamp=np.ones(4, bool)), ValueError, "got (4,)"),
        (lambda: hmx.hebbian(XI[0]), ValueError, "must have 2 axes"),
        (lambda: hmx.pseudo_inverse(2 * XI), ValueError, "only +1 and -1"),
    ],
)
def test_bad_input(call, error, said):
    with pytest.raises(error) as e:
        call()
    assert said in str(e.value)
