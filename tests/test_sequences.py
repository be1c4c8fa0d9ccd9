"""Sequence memories against the formula in Python's integers, closed forms, and bad input."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hamux import SequenceMemory

rng = np.random.default_rng(0)


def signs(*shape): return rng.choice(np.array([-1, 1], np.int8), shape)


def slowly(Xi, s, f, cyclic=True):
    "One neuron after the other, in Python's integers."
    Xi, s = Xi.tolist(), s.tolist()
    K, N = len(Xi), len(s)
    after = []
    for i in range(N):
        h = 0
        for mu in range(K if cyclic else K - 1):
            x = sum(Xi[mu][j] * s[j] for j in range(N) if j != i)
            h += Xi[(mu + 1) % K][i] * f(x)
        after.append(s[i] if h == 0 else 1 if h > 0 else -1)
    return after


@pytest.mark.parametrize("cyclic", [True, False])
@pytest.mark.parametrize("d", [1, 2, 3, lambda x: np.abs(x) * 2.0 + x], ids=["1", "2", "3", "f"])
def test_next_is_the_formula(d, cyclic):
    "Also from states where the sum is zero, of which d = 1 has many"
    Xi, states = signs(6, 13), signs(40, 13)
    f = (lambda x: float(abs(x)) * 2 + x) if callable(d) else lambda x: x**d
    memory = SequenceMemory(Xi, d, cyclic=cyclic)
    wanted = [slowly(Xi, s, f, cyclic) for s in states]
    np.testing.assert_array_equal(memory.next(states), wanted)
    np.testing.assert_array_equal(memory.next(states.reshape(5, 8, 13))[2, 3], wanted[19])
    if d == 1: assert any((np.array(w) == s).any() for w, s in zip(wanted, states, strict=True))


def test_play_is_next_again_and_again():
    Xi, begin = signs(5, 30), signs(3, 30)
    memory = SequenceMemory(Xi, 2)
    path = memory.play(begin, 7)
    assert path.shape == (3, 8, 30) and path.dtype == begin.dtype
    np.testing.assert_array_equal(path[:, 0], begin)
    for t in range(7): np.testing.assert_array_equal(path[:, t + 1], memory.next(path[:, t]))
    one = memory.play(begin[1].astype(np.float32), 7)
    assert one.dtype == np.float32
    np.testing.assert_array_equal(one, path[1])
    inside = jax.jit(lambda Xi, s: SequenceMemory(Xi, 2).play(s, 7))(Xi, begin)
    np.testing.assert_array_equal(inside, path)


def test_orthogonal_patterns_follow_each_other_for_ever():
    "Rows of a Hadamard matrix do not disturb each other: 40 steps round a cycle of 16"
    H = np.array([[1]])
    while len(H) < 64: H = np.block([[H, H], [H, -H]])
    for d in (1, 3):
        path = SequenceMemory(H[1:17], d).play(H[1], 40)
        np.testing.assert_array_equal(path, H[1:17][np.arange(41) % 16])
    # all even powers take a pattern and its negative for one
    np.testing.assert_array_equal(SequenceMemory(H[1:17], 2).next(-H[1]), H[2])


def test_symmetries():
    "A gauge, flipping a neuron everywhere, changes nothing; odd f: the negative of a sequence"
    Xi, s, gauge = signs(8, 21), signs(10, 21), signs(21)
    for d in (1, 2, 3):
        turned = SequenceMemory(Xi * gauge, d).next(s * gauge)
        np.testing.assert_array_equal(turned * gauge, SequenceMemory(Xi, d).next(s))
    for d in (1, 3):
        memory = SequenceMemory(Xi, d)
        np.testing.assert_array_equal(memory.next(-s), -memory.next(s))


def test_the_share_of_wrong_neurons_is_binomial():
    "d = 1 at a pattern: noise is a sum of (K − 1)(N − 1) signs; 300 sets, five standard errors"
    N, K, sets = 40, 12, 300
    trials = (K - 1) * (N - 1)
    count = lambda wrong: sum(math.comb(trials, k) for k in wrong) / 2**trials
    less = count(k for k in range(trials + 1) if 2 * k - trials > N - 1)
    tie = count(k for k in range(trials + 1) if 2 * k - trials == N - 1)
    shares = []
    for _ in range(sets):
        Xi = signs(K, N)
        after = SequenceMemory(Xi, 1).next(Xi[0])
        shares.append((np.asarray(after) != Xi[1]).mean())
    error = np.std(shares) / math.sqrt(sets)
    assert abs(np.mean(shares) - (less + tie / 2)) < 5 * error


def test_large_powers_do_not_overflow():
    "x⁹ of a hundred neurons: the sum is of one sign, and of 60 terms up to 10¹⁷"
    Xi = signs(60, 100)
    cue = np.where(rng.random(Xi.shape) < 0.1, -Xi, Xi)
    np.testing.assert_array_equal(SequenceMemory(Xi, 9).next(cue), np.roll(Xi, -1, 0))


XI = signs(4, 6)
GOOD = SequenceMemory(XI, 2)


@pytest.mark.parametrize("call, error, said", [
    (lambda: SequenceMemory(XI[0]), ValueError, "must have 2 axes"),
    (lambda: SequenceMemory(XI[:1]), ValueError, "two patterns or more, got 1"),
    (lambda: SequenceMemory((XI + 1) // 2), ValueError, "2 * bits - 1"),
    (lambda: SequenceMemory(XI > 0), TypeError, "jnp.where(bits, 1, -1)"),
    (lambda: SequenceMemory(XI, 0), ValueError, "a power d > 0"),
    (lambda: SequenceMemory(XI, True), ValueError, "a power d > 0"),
    (lambda: SequenceMemory(XI, "exp"), ValueError, "a power d > 0"),
    (lambda: SequenceMemory(XI, np.log), ValueError, "is not finite at the overlap"),
    (lambda: SequenceMemory(XI, np.sum), ValueError, "must be elementwise"),
    (lambda: GOOD.next(XI[:, :5]), ValueError, "6 neurons each"),
    (lambda: GOOD.next(np.zeros(6)), ValueError, "only +1 and -1"),
    (lambda: GOOD.play(XI, 1.5), ValueError, "steps must be a positive int, got 1.5"),
    (lambda: GOOD.play(XI, True), ValueError, "steps must be a positive int"),
])
def test_bad_input(call, error, said):
    with pytest.raises(error) as e: call()
    assert said in str(e.value)


@pytest.mark.slow
def test_a_slow_layer_without_its_reaction_leads_on_and_with_it_comes_to_rest():
    "The one is no energy; the other is, and so it ends"
    import hamux as hmx
    X = jnp.asarray(signs(4, 64), jnp.float32)
    def led(still):
        hold = jax.lax.stop_gradient if still else lambda v: v
        def memory(x, y):
            s = (X @ x + 2.0 * jnp.roll(X, 1, 0) @ hold(y)) / 64
            return -6.4 * jax.nn.logsumexp(10 * s)
        def follow(x, y): return -hold(x) @ y + (hold(x @ y) if still else 0)
        layers = {"x": hmx.TanhLayer(64, beta=2.0), "y": hmx.TanhLayer(64, tau=10.0)}
        return hmx.HAM(layers, [memory, follow], [(("x", "y"), 0), (("x", "y"), 1)])
    ts, begin = np.linspace(0, 150, 301), {"x": X[0], "y": jnp.zeros(64)}
    ends = {still: hmx.flow(led(still), begin, 150.0, saveat=ts) for still in (True, False)}
    order = np.array(jnp.tanh(2 * ends[True].xs["x"]) @ X.T).argmax(1)
    order = order[np.r_[True, order[1:] != order[:-1]]]
    assert len(order) > 3 and (np.diff(order) % 4 == 1).all()
    assert ends[False].converged and not ends[True].converged
    assert (np.diff(ends[False].energies) < 1e-4).all()
    assert (np.diff(ends[True].energies) > 1e-2).any()


@pytest.mark.parametrize(
    "separation, f",
    [
        (np.exp, lambda m: np.exp(m)),
        (lambda m: (m / 200) ** 40, lambda m: [int(v) ** 40 for v in m]),
        (40, lambda m: [int(v) ** 40 for v in m]),
        (lambda m: np.where(m > 50, 2.0**900, 2.0**-900 * m), None),
    ],
    ids=["exp", "scaled", "power", "jump"],
)
def test_steep_separations_have_the_right_signs(separation, f):
    "What is far below the largest overlap of all is not nothing where all overlaps are small"
    rng, N, K = np.random.default_rng(0), 200, 10
    P = np.where(rng.random((K, N)) < 0.5, -1, 1)
    s = np.where(rng.random((6, N)) < 0.5, -1, 1)
    s[3:] = np.where(rng.random((3, N)) < 0.35, -1, 1) * P[3:6]
    got = np.asarray(SequenceMemory(P, separation).next(s))
    for state, new in zip(s, got, strict=True):
        others = (P @ state)[:, None] - P * state  # without the own neuron
        values = np.array([(f or separation)(row) for row in others], object)
        signs = np.roll(P, -1, 0)
        h = [sum(int(a) * b for a, b in zip(signs[:, i], values[:, i])) for i in range(N)]
        assert (new == [1 if v > 0 else -1 if v < 0 else old for v, old in zip(h, state)]).all()


def test_a_separation_is_real():
    with pytest.raises(TypeError, match="must return real numbers, got complex128"):
        SequenceMemory(np.eye(4, dtype=int) * 2 - 1, lambda m: m * (1 + 2j))
