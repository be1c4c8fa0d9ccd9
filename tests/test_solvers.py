"""Solvers on thousands of random networks: no rise of the energy, no end without a true reason; stationary laws; records; schedules."""
import os

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from test_hypergraph import network

from hamux import (
    HAM,
    Adaptive,
    AttentionSynapse,
    Backtracking,
    BiasSynapse,
    ConvSynapse,
    LayerNormLayer,
    MemorySynapse,
    PoolSynapse,
    Relaxation,
    ReluLayer,
    SoftmaxLayer,
    TanhLayer,
    Trace,
    descend,
)

CONVERGED, MAX_STEPS, NONFINITE, UNBOUNDED, STUCK, SAMPLED = range(1, 7)
STRUCTURES = int(os.environ.get("HAMUX_STRUCTURES", 3))  # 100 is the full run: 10,000 networks per solver
WIDTH = 100  # networks of one structure, each with weights and a start of its own


@pytest.fixture(autouse=True, scope="module")
def x64():
    with jax.enable_x64(True):  # for this module alone
        yield


def papers(seed):
    "A structure with the synapses of the papers, which the generator of hypergraphs does not draw."
    rng = np.random.default_rng(seed)
    k = jr.split(jr.PRNGKey(seed), 4)
    if seed % 2:
        tokens = LayerNormLayer((4, 6), leak=bool(rng.integers(2)))
        return HAM({"t": tokens, "h": TanhLayer(5)}, {"a": AttentionSynapse.rand_init(k[0], 6, 2, 3), "m": MemorySynapse(jr.normal(k[1], (7, 4, 6))),
                    "w": lambda t, h: -(t.sum(0)[:5] * h).sum()}, [(("t",), "a"), (("t",), "m"), (("t", "h"), "w")])
    kind = ("max", "average")[int(rng.integers(2))]
    return HAM({"g": TanhLayer((4, 4, 2)), "p": ReluLayer((2, 2, 3)), "l": SoftmaxLayer(5)},
               {"c": ConvSynapse(jr.normal(k[0], (3, 2, 3, 3)), pool=PoolSynapse(2, kind=kind)), "b": BiasSynapse(jr.normal(k[1], (2, 2, 3))),
                "w": lambda p, l, W=jr.normal(k[2], (12, 5)): -(p.reshape(-1) @ W @ l)}, [(("g", "p"), "c"), (("p",), "b"), (("p", "l"), "w")])


def many(ham, seed):
    "The same structure with many weights, of scales from 0.1 to 10, and as many starts; a third of the layers start at zero."
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.uniform(-1, 1, WIDTH)
    def draw(W):
        fresh = rng.normal(size=(WIDTH, *W.shape)) * float(np.abs(W).mean() + 0.1)
        return jnp.asarray(fresh * scale.reshape(-1, *[1] * W.ndim), W.dtype)
    synapses = jtu.tree_map(draw, ham._hypersynapses)
    layers = jtu.tree_map(lambda v: jnp.broadcast_to(v, (WIDTH, *v.shape)), ham._neurons)
    stacked = jtu.tree_unflatten(jtu.tree_structure(ham), [*jtu.tree_leaves(layers), *jtu.tree_leaves(synapses)])
    xs = {n: jnp.asarray(rng.normal(size=(WIDTH, *layer.shape)) * 3 * (rng.uniform() > 0.3), ham.dtype) for n, layer in ham.neurons.items()}
    return stacked, xs


def run(ham, xs, solver, max_steps=400):
    size = lambda ham: lambda xs: sum(abs((x * xs[n]).sum()) for n, x in ham.activations(xs).items())
    go = lambda ham, xs: descend(ham, xs, solver=solver, max_steps=max_steps, trace=Trace(parts=True, functions={"size": size(ham)}))
    return jax.jit(jax.vmap(go))(ham, xs)


def examine(ham, xs, out):
    "What must hold of every descent of a guarded solver."
    E, eps = np.asarray(out.energies, float), float(jnp.finfo(out.energies.dtype).eps)
    parts = sum(abs(np.asarray(v, float)) for v in jtu.tree_leaves(out.records["parts"])) + np.asarray(out.records["size"], float)
    lowest = np.fmin.accumulate(E, 1)
    allowed = 64 * eps * np.fmax.accumulate(np.nan_to_num(parts, posinf=np.inf), 1)
    with np.errstate(invalid="ignore"): assert not (E[:, 1:] > lowest[:, :-1] + allowed[:, 1:]).any()
    assert not np.any(out.rises)
    code, again = np.asarray(out.code), jax.vmap(lambda ham, xs: ham.dEdact(ham.activations(xs), xs))(ham, out.xs)
    for i in np.flatnonzero(code == CONVERGED): # the gradient is small, computed anew: all of it where the layer leaks
        for n, layer in ham.neurons.items():
            if layer.leak: assert abs(again[n][i]).max() <= 3e-5 * (1 + abs(out.xs[n][i]).max()) if eps > 1e-10 else 1e-9 * (1 + abs(out.xs[n][i]).max())
    assert np.all(np.asarray(out.steps)[code == MAX_STEPS] == out.energies.shape[1] - 1)
    for i in np.flatnonzero(code == UNBOUNDED): # far below where it began, far beyond any state of its scale
        assert np.nanmin(E[i]) < E[i, 0] and max(abs(np.asarray(x[i])).max() for x in out.xs.values()) > 1e3
    for i in np.flatnonzero(code == NONFINITE): assert not np.isfinite(E[i, 0])
    return np.bincount(code, minlength=7)


@pytest.mark.slow
@pytest.mark.parametrize("solver", [Adaptive(), Backtracking(), Relaxation()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("seed", range(STRUCTURES))
def test_no_rise_and_a_true_reason(seed, solver):
    ham = papers(seed) if seed % 4 == 0 else network(seed + 1000)[0]
    ham, xs = many(ham, seed)
    counts = examine(ham, xs, run(ham, xs, solver))
    print(dict(zip("running converged max_steps nonfinite unbounded stuck sampled".split(), counts.tolist(), strict=True)))
