"""Samplers and generative losses against sums over all corners, quadrature and closed forms."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest

import hamux as hmx
from hamux.dynamics.corners import all_corners, corner_law
from hamux.dynamics.gibbs import blocks
from hamux.dynamics.problem import Problem

RNG = np.random.default_rng(0)
XI = 0.4 * RNG.choice([-1.0, 1.0], (3, 6)).astype(np.float32)
W1, W2 = (RNG.normal(size=s).astype(np.float32) for s in ((4, 3), (3, 3)))
COUPLING = RNG.normal(size=(5, 5)).astype(np.float32)


def cube(memory):
    "Six signs in a dense memory, whose energy is concave in them and not affine"
    return hmx.HAM({"s": hmx.TanhLayer(6)}, {"m": memory}, [(("s",), "m")])


NETWORKS = {
    # two classes of layers, each drawn at once
    "a machine of three layers": hmx.HAM(
        {"v": hmx.SigmoidLayer(4), "h": hmx.TanhLayer(3), "c": hmx.GhostmaxLayer(3)},
        {"W": hmx.LinearSynapse(jnp.asarray(W1)), "U": hmx.LinearSynapse(jnp.asarray(W2))},
        [(("v", "h"), "W"), (("h", "c"), "U")],
    ),
    # joined to itself, with a diagonal
    "a Boltzmann machine": hmx.HAM(
        {"s": hmx.SigmoidLayer(5)},
        {"J": hmx.LinearSynapse(jnp.asarray(COUPLING))},
        [(("s", "s"), "J")],
    ),
    "a dense memory": cube(hmx.MemorySynapse(jnp.asarray(XI), hmx.lagr_relu)),
    # Potts units on two axes
    "Potts": hmx.HAM(
        {"a": hmx.SoftmaxLayer((3, 2), axis=0), "b": hmx.SoftmaxLayer((2, 2))},
        {"D": hmx.DenseSynapse(jnp.asarray(RNG.normal(size=(3, 2, 2, 2)), jnp.float32))},
        [(("a", "b"), "D")],
    ),
}


def all_states(ham):
    "Every corner of all layers, and −E of each, by NumPy over a list of them"
    parts = {n: np.asarray(all_corners(corner_law(layer))) for n, layer in ham.neurons.items()}
    index = np.array(list(itertools.product(*(range(len(p)) for p in parts.values()))))
    xhats = {n: jnp.asarray(p[index[:, i]]) for i, (n, p) in enumerate(parts.items())}
    energy = jax.jit(lambda xhats: sum(ham.vectorize().connection_energies(xhats)))
    return xhats, -np.asarray(energy(xhats), float)


def begin(ham, rows):
    "Activations of a batch at its initial states"
    return jax.jit(lambda: ham.activations(ham.init_states(rows)))()


def rows(xhats):
    return np.concatenate([np.asarray(v).reshape(len(v), -1) for v in xhats.values()], 1)


@pytest.mark.slow(but=1)
@pytest.mark.parametrize("name", NETWORKS)
def test_gibbs_meets_every_corner_as_often_as_it_should(name):
    ham, T = NETWORKS[name], 1.3
    many, (xhats, high) = ham.vectorize(), all_states(ham)
    p = np.exp((high - high.max()) / T)
    p /= p.sum()
    start = begin(many, 300)
    out = hmx.sample(many, start, hmx.Gibbs(T), draws=200, warmup=30, key=jr.key(1))
    place = {tuple(row): i for i, row in enumerate(rows(xhats))}
    drawn = rows({n: v.reshape(-1, *v.shape[2:]) for n, v in out.xhats.items()})
    found, times = np.unique(drawn, axis=0, return_counts=True)
    share = np.zeros(len(p))
    share[[place[tuple(row)] for row in found]] = times / times.sum()
    independent = np.sqrt(p * (1 - p) / (2 * np.pi * len(drawn))).sum()
    assert abs(share - p).sum() / 2 < 3 * independent + 1e-3
    # the energy of the law is that of the drawn units
    np.testing.assert_allclose(out.energy.mean(), -p @ high, atol=0.1)
    assert np.nanmax(np.concatenate([hmx.r_hat(v).ravel() for v in out.xhats.values()])) < 1.05


def test_layers_go_at_once_only_where_the_energy_is_affine():
    def of(name):
        ham = NETWORKS[name]
        return blocks(Problem(ham, ham.init_states(), {}, tuple(ham.neurons)))
    together = {frozenset(layers) for layers, _ in of("a machine of three layers")}
    assert together == {frozenset({"v", "c"}), frozenset({"h"})}
    for name in ("a Boltzmann machine", "a dense memory"): assert of(name) == [((), ("s",))]


@pytest.mark.slow
def test_temperature_is_that_of_the_layers_unless_it_is_given():
    "β enters as 1/T; scaling weights and β against each other changes nothing, bit by bit"
    def machine(beta, scale):
        return hmx.HAM(
            {"v": hmx.SigmoidLayer(4, beta), "h": hmx.TanhLayer(3, beta)},
            {"W": hmx.LinearSynapse(scale * jnp.asarray(W1))},
            [(("v", "h"), "W")],
        )
    def drawn(ham, T=None):
        start = ham.activations(ham.init_states())
        return hmx.sample(ham, start, hmx.Gibbs(T), draws=20, key=jr.key(0)).xhats["v"]
    np.testing.assert_array_equal(drawn(machine(4.0, 0.5)), drawn(machine(1.0, 2.0)))
    np.testing.assert_array_equal(drawn(machine(4.0, 0.5)), drawn(machine(1.0, 0.5), 0.25))


@pytest.mark.slow
def test_a_clamp_conditions():
    ham = NETWORKS["a machine of three layers"]
    many, (xhats, high) = ham.vectorize(), all_states(ham)
    given = {"v": jnp.array([1.0, 0, 0, 1]), "h": jnp.array([1.0, -1.0, 0.0])}
    held = {"v": True, "h": jnp.array([True, True, False])}
    start = begin(many, 200)
    start |= {n: jnp.broadcast_to(x, (200, *x.shape)) for n, x in given.items()}
    out = hmx.sample(many, start, hmx.Gibbs(), clamp=held, draws=100, keep=tuple(ham.neurons),
                     key=jr.key(2))
    fits = (xhats["v"] == given["v"]).all(1) & (xhats["h"][:, :2] == given["h"][:2]).all(1)
    p = np.exp(high) * np.asarray(fits)
    p /= p.sum()
    for n in ham.neurons:
        np.testing.assert_allclose(
            out.xhats[n].mean((0, 1)), np.tensordot(p, np.asarray(xhats[n]), 1), atol=0.03)
    assert (out.xhats["h"][..., :2] == given["h"][:2]).all()
    # it may go on from where it stands
    hmx.sample(many, out.last, hmx.Gibbs(), clamp=held, draws=2, warmup=0, key=jr.key(3))


@pytest.mark.slow(but=1)
@pytest.mark.parametrize("dt", [0.1, 1.0])
def test_metropolis_has_the_law_at_any_step(dt):
    """Of two layers with different time constants, one held in part: second moments by quadrature,
    of the density exp(−E/T) over activations, E being written out here"""
    T, w = 0.4, 0.9
    ham = hmx.HAM(
        {"x": hmx.TanhLayer(2, beta=1.5), "y": hmx.IdentityLayer(1, tau=3.0)},
        {"w": hmx.LinearSynapse(jnp.array([[w], [0.3]]))},
        [(("x", "y"), "w")],
    ).vectorize()
    start = ham.init_states(1500) | {"x": jnp.broadcast_to(jnp.array([0.0, 0.7]), (1500, 2))}
    out = hmx.sample(
        ham, start, hmx.MetropolisLangevin(dt, T), clamp={"x": jnp.array([False, True])},
        draws=100, warmup=300, key=jr.key(4),
    )
    a = ((np.arange(600) + 0.5) / 300 - 1)[:, None]
    y = np.linspace(-6, 6, 801)[None]
    own = ((1 + a) * np.log1p(a) + (1 - a) * np.log1p(-a)) / 2 / 1.5
    E = own + y**2 / 2 - w * a * y - 0.3 * np.tanh(1.5 * 0.7) * y
    p = np.exp(-E / T) / np.exp(-E / T).sum()
    x, z = np.asarray(out.xhats["x"][..., 0]), np.asarray(out.xhats["y"][..., 0])
    for drawn, exact in ((x, a), (z, y), (x**2, a**2), (z**2, y**2), (x * z, a * y)):
        error = drawn.mean(1).std() / 1500**0.5
        assert abs(drawn.mean() - (p * exact).sum()) < 4 * error + 1e-3
    assert (out.xhats["x"][..., 1] == out.xhats["x"][0, 0, 1]).all()
    assert 0.2 < out.accepted.mean() < (1.0 if dt == 1.0 else 1.01)


@pytest.mark.slow
def test_a_gaussian_at_a_step_that_is_taken_half_the_time():
    "Means, covariances, and the acceptance of a chain in ten dimensions"
    A = np.eye(10) * np.linspace(1, 4, 10)
    ham = hmx.HAM(
        {"x": hmx.NeuronLayer(hmx.lagr_identity, 10, leak=False)},
        {"q": lambda x: x @ jnp.asarray(A, x.dtype) @ x / 2 - x.sum()},
        [(("x",), "q")],
    ).vectorize()
    out = hmx.sample(ham, ham.init_states(400), hmx.MetropolisLangevin(0.4, 2.0), draws=200,
                     warmup=200, key=jr.key(5))
    x = np.asarray(out.xhats["x"]).reshape(-1, 10)
    error = np.asarray(out.xhats["x"]).mean(1).std(0) / 20
    assert (abs(x.mean(0) - 1 / np.diag(A)) < 4.5 * error).all() and error.max() < 0.03
    np.testing.assert_allclose(np.cov(x.T), 2 * np.linalg.inv(A), atol=0.1)
    assert 0.2 < out.accepted.mean() < 0.95


@pytest.mark.slow
def test_a_swap_keeps_every_law():
    "Two levels of one unit: both marginals, of which the second is not drawn, by its swaps"
    ham = hmx.HAM({"s": hmx.SigmoidLayer(1)}, {"b": hmx.BiasSynapse(jnp.array([2.0]))},
                  [(("s",), "b")]).vectorize()
    start = begin(ham, 500)
    levels = (0.5, 4.0)
    out = hmx.sample(ham, start, hmx.tempering(hmx.Gibbs(), levels), draws=200, key=jr.key(6))
    cold, hot = (1 / (1 + np.exp(-2 / T)) for T in levels)
    np.testing.assert_allclose(out.xhats["s"].mean(), cold, atol=0.01)
    # cold off and hot on is always swapped, cold on and hot off with exp(−(1/T₁ − 1/T₂) 2)
    rate = 1 - cold * (1 - hot) * (1 - np.exp(-2 * (1 / levels[0] - 1 / levels[1])))
    np.testing.assert_allclose(out.accepted["swaps"].mean(), rate, atol=0.01)


def valleys():
    "Ten signs, of which one chooses between a pattern of the other nine and its negative"
    xi = np.array([[1.0, -1, -1, 1, 1, -1, 1, -1, 1]]).T
    return hmx.HAM(
        {"v": hmx.TanhLayer(9), "h": hmx.TanhLayer(1)},
        {"W": hmx.LinearSynapse(jnp.asarray(1.2 * xi, jnp.float32)),
         "b": hmx.BiasSynapse(jnp.array([0.3]))},
        [(("v", "h"), "W"), (("h",), "b")],
    )


@pytest.mark.slow
def test_one_chain_has_the_law_of_the_coldest_level():
    "Of all 1024 corners, where a plain chain stays in the valley that it began in"
    ham, T, ladder = valleys(), 0.8, [0.8, 1.2, 1.8, 2.7, 4.0]
    many, (xhats, high) = ham.vectorize(), all_states(ham)
    p = np.exp((high - high.max()) / T)
    p /= p.sum()
    wrong = np.argmax(np.where(xhats["h"][:, 0] < 0, high, -np.inf))
    start = {n: jnp.tile(v[wrong], (200, 1)) for n, v in xhats.items()}
    one = hmx.tempering(hmx.Gibbs(), ladder, one_chain=True)
    out = hmx.sample(many, start, one, draws=150, warmup=300, keep=("v", "h"), key=jr.key(20))
    drawn = np.concatenate([np.asarray(v) for v in out.xhats.values()], -1)
    corners = np.concatenate([np.asarray(v) for v in xhats.values()], -1)
    # the mean of every unit, of every product of two, and of the energy
    pairs = lambda s: np.einsum("...i,...j->...ij", s, s)[..., *np.triu_indices(10, 1)]
    with_E = lambda s, E: np.concatenate([s, pairs(s), np.asarray(E)[..., None]], -1)
    means = with_E(drawn, out.energy).mean(1)
    error = means.std(0) / 200**0.5
    assert (abs(means.mean(0) - p @ with_E(corners, -high)) < 4.5 * error + 1e-4).all()
    assert error.max() < 0.05
    assert hmx.r_hat(out.energy) < 1.2 and np.nanmax(hmx.r_hat(drawn)) < 1.2
    assert hmx.effective_sample_size(out.xhats["h"])[0] > 500
    levels = out.accepted["levels"].mean(0)
    assert abs(levels.sum() - 1) < 1e-5 and levels.min() > 0.1
    assert {n: v.shape for n, v in out.last.items()} == {"v": (200, 9), "h": (200, 1)}
    np.testing.assert_array_equal(out.last["v"], out.xhats["v"][:, -1])
    stuck = hmx.sample(many, start, hmx.Gibbs(T), draws=100, key=jr.key(21))
    assert (stuck.xhats["h"] > 0).mean() < 0.05 < p @ (xhats["h"][:, 0] > 0)


@pytest.mark.slow
def test_one_chain_has_the_density_of_the_coldest_level():
    "Of a well with two bottoms, and one layer beside it: moments by quadrature"
    T, start = 0.3, {"x": jnp.full((200, 1), -2.0), "y": jnp.zeros((200, 1))}
    wells = lambda x: (0.25 * x**4 - 2.2 * x**2 - 0.08 * x).sum()
    ham = hmx.HAM(
        {"x": hmx.IdentityLayer(1), "y": hmx.TanhLayer(1)},
        {"wells": wells, "w": hmx.LinearSynapse(jnp.array([[0.3]]))},
        [(("x",), "wells"), (("x", "y"), "w")],
    ).vectorize()
    one = hmx.tempering(hmx.MetropolisLangevin(0.15), [0.3, 0.6, 1.2, 2.4], one_chain=True)
    out = hmx.sample(ham, start, one, draws=150, warmup=800, key=jr.key(22))
    x, y = np.linspace(-4, 4, 801)[:, None], ((np.arange(400) + 0.5) / 200 - 1)[None]
    own = ((1 + y) * np.log1p(y) + (1 - y) * np.log1p(-y)) / 2
    E = 0.25 * x**4 - 1.7 * x**2 - 0.08 * x + own - 0.3 * x * y
    p = np.exp(-(E - E.min()) / T)
    p /= p.sum()
    a, b = (np.asarray(out.xhats[n][..., 0]) for n in ("x", "y"))
    products = ((a**2, x**2), (b**2, y**2), (a * b, x * y))
    for drawn, exact in ((a, x), (b, y), (a > 0, x > 0), *products):
        error = drawn.mean(1).std() / 200**0.5
        assert abs(drawn.mean() - (p * exact).sum()) < 4.5 * error + 1e-3
    np.testing.assert_allclose(out.energy.mean(), (p * E).sum(), atol=0.02)
    assert hmx.r_hat(a) < 1.2 and hmx.effective_sample_size(a) > 300
    assert out.accepted["levels"].mean(0).min() > 0.1 and 0.5 < out.accepted["moves"].mean() < 1


@pytest.mark.slow
def test_levels_are_visited_as_the_weights_say():
    """Of four separate units, whose ⟨E⟩ = −Σ b σ(b/T) and log Z = Σ log(1 + exp(b/T)): a level has
    the weight Z exp(g), with g by the trapezoid rule, which is off where levels are far apart"""
    b, T = np.array([3.0, -2.0, 1.0, 4.0]), np.array([0.4, 1.0, 4.0, 40.0])
    ham = hmx.HAM({"s": hmx.SigmoidLayer(4)}, {"b": hmx.BiasSynapse(jnp.asarray(b, jnp.float32))},
                  [(("s",), "b")]).vectorize()
    E = -(b / (1 + np.exp(-b / T[:, None]))).sum(1)
    g = np.append(0, np.cumsum(np.diff(1 / T) * (E[1:] + E[:-1]) / 2))
    wanted = np.exp(g) * (1 + np.exp(b / T[:, None])).prod(1)
    wanted /= wanted.sum()
    assert wanted.max() > 1.3 * wanted.min()
    one = hmx.tempering(hmx.Gibbs(), T, one_chain=True)
    start = ham.activations(ham.init_states(300))
    out = hmx.sample(ham, start, one, draws=100, warmup=800, key=jr.key(23))
    np.testing.assert_allclose(out.accepted["levels"].mean(0), wanted, atol=0.015)
    np.testing.assert_allclose(out.xhats["s"].mean((0, 1)), 1 / (1 + np.exp(-b / 0.4)), atol=0.01)


class Clock(hmx.dynamics.AbstractReturning):
    "Counts its sweeps; what was adapted adds 100; every `period`-th is a draw"
    period: float = 3.0
    temperature = 1.0
    moves_corners = False

    def check(self, problem): pass
    def temperature_at(self, problem, sweep): return sweep
    def init(self, problem, key): return jnp.zeros(2)
    def sweep(self, problem, state, temperature, key):
        return state + jnp.array([1.0, 0.0]), 1.0 * jnp.asarray(temperature)
    def settle(self, problem, state): return state + jnp.array([0.0, 100.0])
    def is_draw(self, problem, state): return state[0] % self.period == 0
    def energy(self, problem, state): return state.sum()
    def values(self, problem, state): return {"v": state, "h": state}
    def xhats(self, problem, state): return {"v": state, "h": state}
    def anywhere(self, ham): return {}
    def estimate(self, problem, state, temperature, means=True): return state.sum()


def test_draws_are_returns():
    """After a warm-up of 4 the sweeps 6, 9, 12, … are draws, every other one is kept; shares are
    means over sweeps 5 to 21, of which each took its number"""
    ham = machine()
    call = lambda sampler: hmx.sample(ham, ham.init_states(), sampler, draws=3, warmup=4, thin=2,
                                      key=jr.key(0))
    out = call(Clock())
    np.testing.assert_array_equal(out.energy, [109, 115, 121])
    np.testing.assert_array_equal(out.xhats["v"][:, 0], [9, 15, 21])
    np.testing.assert_array_equal(out.last["h"], [21, 100])
    np.testing.assert_allclose(out.accepted, np.arange(4, 21).mean())
    with pytest.warns(UserWarning, match="1 of 1 chains were away for 10000 sweeps"):
        lost = call(Clock(12.0 * 1e5))
    assert np.isnan(lost.energy).all()


@pytest.mark.slow(but=1)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_rare_corners_are_as_rare_in_half_precision(dtype):
    "On and of a rare value, with probability 1/1097 each: four standard errors of 200,000 draws"
    units = hmx.HAM(
        {"v": hmx.SigmoidLayer(100), "c": hmx.SoftmaxLayer((100, 2))},
        {"b": hmx.BiasSynapse(jnp.full(100, -7.0, dtype)),
         "p": hmx.BiasSynapse(jnp.tile(jnp.array([-7.0, 0.0], dtype), (100, 1)))},
        [(("v",), "b"), (("c",), "p")],
    )
    start = units.activations(units.init_states(dtype=dtype))
    out = hmx.sample(units, start, hmx.Gibbs(), draws=2000, warmup=0, key=jr.key(0))
    rare = 1 / (1 + np.exp(7.0))
    for xhat in (out.xhats["v"], out.xhats["c"][..., 0]):
        assert xhat.dtype == dtype
        off = np.asarray(xhat, float).mean() - rare
        assert abs(off) < 4 * np.sqrt(rare / xhat.size)


@pytest.mark.slow(but=1)
@pytest.mark.parametrize("x64", [True, False], ids=["x64", "32"])
def test_temperatures_of_another_dtype(x64):
    "A float32 network with 64 bits enabled, and one in half precision without"
    with jax.enable_x64(x64):
        dtype = jnp.float32 if x64 else jnp.bfloat16
        ham = hmx.HAM({"v": hmx.SigmoidLayer(3), "h": hmx.TanhLayer(2)},
                      {"W": hmx.LinearSynapse(jnp.ones((3, 2), dtype))}, [(("v", "h"), "W")])
        start = ham.activations(ham.init_states(dtype=dtype))
        ramp, key = lambda i: 1.0 + 1 / (1 + i), jr.key(0)
        for sampler in (hmx.tempering(hmx.Gibbs(), [0.7, 2.0]), hmx.Gibbs(ramp)):
            out = hmx.sample(ham, start, sampler, draws=3, key=key)
            assert {v.dtype for v in out.xhats.values()} == {jnp.dtype(dtype)}
        exact = np.log(2**3 * 2**2 * 1.0) # at a temperature so high that the energy is nothing
        found = hmx.log_partition(ham, temperature=1e6, steps=4, chains=3, key=key).value
        assert abs(float(found) - exact) < 1e-4


def test_a_start_is_looked_at_in_every_row():
    ham = NETWORKS["a Boltzmann machine"].vectorize()
    good = np.full((3, 5), 0.5, np.float32)
    for bad, says in ((-4.0, "must be activations"), (np.nan, "must be activations")):
        start = np.where(np.arange(3)[:, None] == 2, bad, good).astype(np.float32)
        with pytest.raises(ValueError, match=says):
            hmx.sample(ham, {"s": start}, hmx.Gibbs(), draws=3, key=jr.key(0))
    with pytest.raises(ValueError, match="must be finite, got NaN or inf in row 2"):
        hmx.sample(ham, {"s": start}, hmx.MetropolisLangevin(), draws=3, key=jr.key(0))


def test_the_partition_function_of_what_is_given_is_its_weight():
    ham = NETWORKS["a Boltzmann machine"]
    xhats = {"s": jnp.array([1.0, 0, 1, 1, 0])}
    out = hmx.log_partition(ham, clamp="s", xhats=xhats, temperature=0.5, key=jr.key(0))
    v = np.asarray(xhats["s"], float)
    assert np.isclose(out.value, v @ COUPLING @ v / 0.5) and out.error == 0


def test_effective_draws_and_r_hat_of_what_is_known():
    x = np.zeros((4, 8000))
    noise = np.random.default_rng(1).normal(size=x.shape)
    for t in range(1, x.shape[1]): x[:, t] = 0.8 * x[:, t - 1] + 0.6 * noise[:, t]
    assert abs(hmx.effective_sample_size(x) / x.size * 9 - 1) < 0.12 # (1 − .8) / (1 + .8)
    # of plain normals the ranks change nothing, so that R̂ is the formula of Gelman and Rubin
    shifted = noise[:, :2000] + np.array([0, 0, 0, 1.0])[:, None]
    halves = shifted.reshape(8, 1000)
    W, B = halves.var(1, ddof=1).mean(), 1000 * halves.mean(1).var(ddof=1)
    plain = np.sqrt((999 / 1000 * W + B / 1000) / W)
    assert abs(hmx.r_hat(shifted) - plain) < 0.01
    many = np.stack([x, noise], -1)
    assert hmx.r_hat(many).shape == hmx.effective_sample_size(many).shape == (2,)
    np.testing.assert_allclose(hmx.r_hat(many)[0], hmx.r_hat(x))


def test_what_is_not_finite_agrees_with_nothing():
    draws = np.random.default_rng(0).normal(size=(3, 100, 2))
    draws[0, 3, 0] = np.inf
    for f in (hmx.r_hat, hmx.effective_sample_size):
        found = f(draws)
        assert np.isnan(found[0]) and np.isfinite(found[1])


@pytest.mark.slow
def test_annealing_finds_the_partition_function():
    for name in ("a machine of three layers", "a dense memory"):
        ham = NETWORKS[name]
        exact = np.logaddexp.reduce(all_states(ham)[1] / 0.8)
        out = hmx.log_partition(ham, temperature=0.8, steps=200, chains=200, key=jr.key(7))
        assert abs(out.value - exact) < 4 * out.error + 1e-3, name
        assert out.effective > 20


def test_pseudo_likelihood_of_a_memory_unit_by_unit():
    "Against the quotients of exp(−E/T) of every corner and its neighbours"
    memory = hmx.MemorySynapse(jnp.asarray(XI), hmx.lagr_relu)
    loss = hmx.pseudo_likelihood("s", temperature=0.9)
    s = jnp.asarray(RNG.choice([-1.0, 1.0], (5, 6)), jnp.float32)
    def by_hand(memory):
        flips = s[:, None] * (1 - 2 * jnp.eye(6))
        height = lambda s: -memory(s) / 0.9
        here, there = jax.vmap(height)(s), jax.vmap(jax.vmap(height))(flips)
        return jnp.logaddexp(0, there - here[:, None]).sum(1).mean()
    ours = lambda m: loss(cube(m), s, jr.key(0))
    (value, slope), (exact, wanted) = jax.jit(
        lambda m: (jax.value_and_grad(ours)(m), jax.value_and_grad(by_hand)(m)))(memory)
    np.testing.assert_allclose(value, exact, rtol=1e-5)
    np.testing.assert_allclose(slope.Xi, wanted.Xi, atol=1e-4)


def machine():
    return hmx.HAM(
        {"v": hmx.SigmoidLayer(4), "h": hmx.SigmoidLayer(3)},
        {"W": hmx.LinearSynapse(jnp.asarray(W1)), "b": hmx.BiasSynapse(jnp.asarray(W1[:, 0]))},
        [(("v", "h"), "W"), (("v",), "b")],
    )


@pytest.mark.slow
def test_contrastive_divergence_has_the_slope_of_the_likelihood():
    """With many sweeps, from the data or kept; and with the hidden layer among the data, where the
    first half is the data's own"""
    ham, T = machine(), 1.0
    data = jnp.array([[1.0, 0, 0, 1], [1, 1, 0, 0]])
    shown = jnp.array([[1.0, 0, 1], [0, 0, 1]])
    xhats, _ = all_states(ham)
    def high(ham): return -sum(ham.vectorize().connection_energies(xhats)) / T
    def seen(ham, both):
        fits = jnp.stack([(xhats["v"] == v).all(1) for v in data])
        if both: fits &= jnp.stack([(xhats["h"] == h).all(1) for h in shown])
        return jax.nn.logsumexp(jnp.where(fits, high(ham), -jnp.inf), axis=1).mean()
    exact = jax.jit(jax.grad(lambda ham, both: jax.nn.logsumexp(high(ham)) - seen(ham, both)),
                    static_argnums=1)
    many = lambda v: jnp.tile(v, (6000, 1))
    for layers, batch in (("v", many(data)), (("v", "h"), (many(data), many(shown)))):
        loss = hmx.contrastive_divergence(layers, 25)
        ours, theirs = jax.jit(jax.grad(loss))(ham, batch, jr.key(8)), exact(ham, layers != "v")
        for a, b in zip(jtu.tree_leaves(ours), jtu.tree_leaves(theirs), strict=True):
            np.testing.assert_allclose(a, b, atol=0.02)


def test_contrastive_divergence_of_a_density():
    "Of a Gaussian, with Metropolis steps: the slope in b is the mean of the law minus the data's"
    ham = hmx.HAM({"x": hmx.IdentityLayer(2)}, {"b": hmx.BiasSynapse(jnp.array([1.0, -1.0]))},
                  [(("x",), "b")])
    data = 2 + jr.normal(jr.key(9), (4000, 2))
    loss = hmx.contrastive_divergence("x", 60, sampler=hmx.MetropolisLangevin(0.5, 0.5))
    slope = jax.jit(jax.grad(loss))(ham, data, jr.key(10)).hypersynapses["b"].b
    wanted = (jnp.array([1.0, -1.0]) - data.mean(0)) / 0.5
    np.testing.assert_allclose(slope, wanted, atol=0.1)


def test_contrastive_divergence_with_many_temperatures_is_that_of_the_first():
    "Of separate units, which a sweep draws afresh: (σ(b/T) − mean of the data) / T in the bias"
    ham = hmx.HAM({"v": hmx.SigmoidLayer(2)}, {"b": hmx.BiasSynapse(jnp.array([0.5, -0.3]))},
                  [(("v",), "b")])
    data, T = jnp.tile(jnp.array([[1.0, 0], [1, 1], [0, 1]]), (3000, 1)), 0.5
    loss = hmx.contrastive_divergence("v", sampler=hmx.tempering(hmx.Gibbs(), [T, 1.0, 2.0]))
    slope = jax.jit(jax.grad(loss))(ham, data, jr.key(13)).hypersynapses["b"].b
    wanted = (jax.nn.sigmoid(jnp.array([0.5, -0.3]) / T) - 2 / 3) / T
    np.testing.assert_allclose(slope, wanted, atol=0.05)


@pytest.mark.slow
def test_chains_are_carried_through_fit_and_its_file(tmp_path):
    "A run in two parts is the run in one, chains and all; without the chains it is another"
    data = np.asarray(RNG.integers(0, 2, (60, 4)), np.float32)
    loss, file = hmx.contrastive_divergence("v", 1, persistent=20), tmp_path / "run.hamux"
    settings = dict(batch_size=20, key=jr.key(0), progress=False)
    what = machine(), loss, data, optax.adam(0.05)
    whole = hmx.fit(*what, steps=6, **settings)
    hmx.fit(*what, steps=3, checkpoint=file, **settings)
    parts = hmx.fit(*what, steps=6, checkpoint=file, **settings)
    for a, b in zip(jtu.tree_leaves(whole.ham), jtu.tree_leaves(parts.ham), strict=True):
        np.testing.assert_array_equal(a, b)
    chains = [run.opt_state[1]["v"] for run in (whole, parts)]
    np.testing.assert_array_equal(*chains)
    assert chains[0].shape == (20, 4) and set(np.unique(chains[0])) <= {0.0, 1.0}
    start = eqx.filter_jit(loss.carried)(machine(), jr.key(0))
    assert not np.array_equal(start["v"], chains[0])


@pytest.mark.slow
def test_score_matching_is_least_at_the_law_of_the_noisy_data():
    """A tanh layer with bias: the states of its own law, exp(−U/T), are the data; with noise
    that is small the slope in the bias is nothing, and beside it is not"""
    b, T = jnp.array([0.4]), 0.5
    ham = lambda b: hmx.HAM({"x": hmx.TanhLayer(1)}, {"b": hmx.BiasSynapse(b)}, [(("x",), "b")])
    many = ham(b).vectorize()
    out = hmx.sample(many, many.init_states(20_000), hmx.MetropolisLangevin(1.0, T), draws=1,
                     warmup=150, key=jr.key(11))
    loss = hmx.score_matching("x", 0.1, temperature=T)
    slope = jax.jit(jax.grad(lambda b: loss(ham(b), out.last["x"], jr.key(12))[()].sum()))
    assert abs(slope(b)) < 0.15 * abs(slope(b + 1)) and slope(b - 1) < 0 < slope(b + 1)


WRONG = {
    "continuous": (lambda: hmx.sample(
        hmx.HAM([hmx.ReluLayer(2)], [jnp.sum], [([0], 0)]), {0: jnp.ones(2)}, hmx.Gibbs(1.0),
        key=jr.key(0)), "whose neurons are continuous"),
    "no density": (lambda: hmx.sample(
        hmx.HAM([hmx.ReluLayer(2)], [jnp.sum], [([0], 0)]), {0: jnp.ones(2)},
        hmx.MetropolisLangevin(), key=jr.key(0)), "lagr_relu"),
    "cold": (lambda: hmx.Gibbs(-1.0), "temperature must be positive and finite, got -1.0"),
    "no step": (lambda: hmx.MetropolisLangevin(0.0), "dt must be positive and finite, got 0.0"),
    "states for activations": (lambda: hmx.sample(
        machine(), {"v": jnp.full(4, -3.0), "h": jnp.zeros(3)}, hmx.Gibbs(), key=jr.key(0)),
        "start of the layer 'v' must be activations"),
    "a cold schedule": (lambda: hmx.Gibbs(lambda i: -1.0), "at step 0 must be positive"),
    "a schedule of rows": (lambda: hmx.Gibbs(lambda i: jnp.ones(1)), r"got shape \(1,\)"),
    "a schedule of one value": (
        lambda: hmx.pseudo_likelihood("v", temperature=lambda i: 1.0),
        "temperature must be a number or an array, got a function"),
    "many keys": (lambda: hmx.sample(machine(), machine().init_states(), hmx.Gibbs(),
                                     key=jr.split(jr.key(0), 3)), "key must be a PRNG key"),
    "a layer that is not there": (lambda: hmx.sample(
        machine(), machine().init_states(), hmx.Gibbs(), keep="vv", key=jr.key(0)),
        r"keep must name layers, got \['vv'\]"),
    "traced levels": (lambda: jax.jit(lambda t: hmx.tempering(hmx.Gibbs(), [t, 2.0]))(1.0),
                      "must be known numbers, got traced ones"),
    "rows that do not match": (lambda: hmx.contrastive_divergence(["v", "h"])(
        machine(), (jnp.ones((3, 4)), jnp.ones((2, 3))), jr.key(0)), "must have as many rows"),
    "no draw": (lambda: hmx.r_hat(np.zeros((0, 10))), "draws must have shape"),
    "one level": (lambda: hmx.tempering(hmx.Gibbs(), [1.0]), "two or more positive numbers"),
    "one chain that trains": (lambda: hmx.contrastive_divergence(
        "v", sampler=hmx.tempering(hmx.Gibbs(), [1.0, 2.0], one_chain=True)),
        "each of whose states is a draw"),
    "images that are no corners": (lambda: hmx.fit(
        machine(), hmx.contrastive_divergence("v"), np.full((8, 4), 1.5, np.float32),
        optax.sgd(0.1), steps=1, batch_size=4, key=jr.key(0), progress=False),
        "must be corners, or probabilities"),
    "hidden layers": (lambda: hmx.pseudo_likelihood("v")(machine(), jnp.ones((2, 4)), jr.key(0)),
                      "all layers must hold data"),
    "what cannot be summed": (lambda: hmx.free_energy(
        machine(), machine().init_states(), clamp=None), "must not share a hypersynapse"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_are_named(case):
    call, words = WRONG[case]
    with pytest.raises((ValueError, TypeError), match=words): call()
