"""Random networks, and a judge in float64 of what a descent claims of them.

Written from the definitions: the energy is Σ <x̂, x> − L(x) plus the synapses, the gradient is
JAX's own of it at the activation. Nothing of `hamux.dynamics` but `descend` is used.

    python tests/thorough/claims.py 40          # forty structures, every solver and dtype
"""

import functools as ft
import sys
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import hamux as hmx

SOLVERS = {
    "adaptive": hmx.Adaptive(),
    "backtracking": hmx.Backtracking(),
    "relaxation": hmx.Relaxation(),
    "euler": hmx.Euler(0.1),
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float64": jnp.float64}
def soft_abs(x): return jnp.sqrt(1 + x**2).sum() # declares nothing


LAGRANGIANS = {
    "soft abs": soft_abs,
    "identity": hmx.lagr_identity,
    "relu": hmx.lagr_relu,
    "repu": ft.partial(hmx.lagr_repu, n=2.5),
    "exp": hmx.lagr_exp,
    "rexp": hmx.lagr_rexp,
    "tanh": hmx.lagr_tanh,
    "sigmoid": hmx.lagr_sigmoid,
    "softmax": hmx.lagr_softmax,
    "ghostmax": hmx.lagr_ghostmax,
    "layernorm": hmx.lagr_layernorm,
    "spherical": hmx.lagr_spherical_norm,
}
TEMPERED = {"exp", "rexp", "tanh", "sigmoid", "softmax", "ghostmax"}
SEPARATIONS = {
    "softmax": hmx.lagr_softmax,
    "relu": hmx.lagr_relu,
    "repu": ft.partial(hmx.lagr_repu, n=3.0),
    "tents": hmx.log_sum_relu,
}


def bowl(x, c): return ((x - c) ** 2).sum() / 2
def hinge(x, c): return jnp.maximum(x - c, 0).sum()
def ridge(x, c): return -jnp.maximum(x - c, 0).sum()
def edge(x, c): return abs(x - c).sum()
def pool(x, c): return (x - c).max()
def dip(x, c): return -(x * c).max()
CURVES = {f.__name__: f for f in (bowl, hinge, ridge, edge, pool, dip)}


@dataclass(frozen=True)
class Layer:
    kind: str
    shape: tuple
    leak: bool
    slow: bool # whether time constants are drawn from 10⁻³ to 10³
    clamp: tuple | None # a mask as nested tuples; (True,) for all


@dataclass(frozen=True)
class Structure:
    layers: tuple
    synapses: tuple # of (kind, names of layers)
    wild: bool # whether weights and starts are drawn from 10⁻³ to 10⁶


def structure(seed: int) -> Structure:
    "What does not change among the networks that are compiled together."
    rng = np.random.default_rng(seed)
    grid = rng.random() < 0.2
    count = int(rng.integers(1, 4))
    kinds = list(LAGRANGIANS)
    layers = []
    for i in range(count):
        kind = kinds[(seed + 5 * i) % len(kinds)] if i == 0 else str(rng.choice(kinds))
        shape = (int(rng.integers(2, 4)), 4) if grid else (int(rng.integers(2, 7)),)
        clamp, u = None, rng.random()
        if u < 0.15 and i: clamp = (True,)
        elif u < 0.4: clamp = tuple(map(bool, rng.random(int(np.prod(shape))) < 0.4))
        layers.append(Layer(kind, shape, rng.random() < 0.75, rng.random() < 0.4, clamp))
    names = range(count)
    synapses = []
    for n in names:
        choices = ["bias", "memory softmax", "memory relu", "memory repu", "memory tents", "self"]
        choices += [f"curve {c}" for c in CURVES] + ["memory euclidean"] * 2
        if grid: choices += ["attention"] * 4
        for _ in range(int(rng.integers(1, 3))): synapses.append((str(rng.choice(choices)), (n,)))
    for n in names[1:]:
        m = int(rng.integers(0, n))
        synapses.append((str(rng.choice(["linear", "linear", "dense"])), (m, n)))
    return Structure(tuple(layers), tuple(synapses), bool(rng.random() < 0.6))


def log_uniform(key, low, high): return jnp.exp(jr.uniform(key, (), minval=jnp.log(low),
                                                           maxval=jnp.log(high)))


def draw(what: Structure, key):
    "Parameters and starts of one network, in float64."
    keys = iter(jr.split(key, 64))
    scale = lambda: log_uniform(next(keys), 1e-3, 1e6) if what.wild else \
        log_uniform(next(keys), 0.3, 3)
    taus = [log_uniform(next(keys), 1e-3, 1e3) if l.slow else jnp.ones(()) for l in what.layers]
    betas = [log_uniform(next(keys), 0.1, 30.0) for _ in what.layers]
    starts = {n: scale() * jr.normal(next(keys), l.shape) for n, l in enumerate(what.layers)}
    weights = []
    for kind, names in what.synapses:
        size = scale()
        shapes = [what.layers[n].shape for n in names]
        n = int(np.prod(shapes[0]))
        normal = lambda *s, size=size: size * jr.normal(next(keys), s)
        if kind in ("linear", "dense"): w = (normal(n, int(np.prod(shapes[1]))) / n**0.5,)
        elif kind == "self": w = (normal(n, n) / n**0.5,)
        elif kind.startswith("memory"):
            w = (normal(5, *shapes[0]), log_uniform(next(keys), 0.1, 10.0) / size)
        elif kind == "attention": w = (normal(2, 2, 3, 4), log_uniform(next(keys), 0.1, 10.0))
        else: w = (normal(*shapes[0]),)
        weights.append(w)
    return starts, taus, betas, weights


def synapse(kind, w, shapes):
    first, *rest = kind.split()
    if first in ("linear", "dense", "self"):
        return lambda a, b=None: -jnp.einsum(
            "i,ij,j->", a.ravel(), w[0], a.ravel() if b is None else b.ravel())
    if first == "bias": return hmx.BiasSynapse(w[0])
    if first == "curve": return lambda x: CURVES[rest[0]](x, w[0])
    if first == "attention": return hmx.AttentionSynapse(w[0][0], w[0][1], w[1])
    euclidean = rest[0] in ("euclidean", "tents")
    L = SEPARATIONS["softmax" if rest[0] == "euclidean" else rest[0]]
    if rest[0] in ("softmax", "euclidean", "tents"): L = ft.partial(L, beta=w[1])
    return hmx.MemorySynapse(w[0], L, similarity="euclidean" if euclidean else "dot")


def build(what: Structure, taus, betas, weights):
    "The network of some numbers, in their dtype."
    layers = []
    for l, tau, beta in zip(what.layers, taus, betas, strict=True):
        L = LAGRANGIANS[l.kind]
        if l.kind in TEMPERED: L = ft.partial(L, beta=beta)
        layers.append(hmx.NeuronLayer(L, l.shape, tau=tau, leak=l.leak))
    synapses, connections = [], []
    for i, ((kind, names), w) in enumerate(zip(what.synapses, weights, strict=True)):
        shapes = [what.layers[n].shape for n in names]
        if kind == "linear" and all(len(s) == 1 for s in shapes): s = hmx.LinearSynapse(w[0])
        elif kind == "dense" and all(len(s) == 1 for s in shapes): s = hmx.DenseSynapse(w[0])
        elif kind == "self" and len(shapes[0]) == 1:
            s, names = hmx.LinearSynapse(w[0]), names * 2
        else: s = synapse(kind, w, shapes)
        synapses.append(s)
        connections.append((names, i))
    return hmx.HAM(layers, synapses, connections)


def clamps(what: Structure) -> dict:
    masks = {}
    for n, l in enumerate(what.layers):
        if l.clamp == (True,): masks[n] = True
        elif l.clamp: masks[n] = np.reshape(l.clamp, l.shape)
    return masks


def free_mask(what, n):
    clamp = clamps(what).get(n, False)
    return np.broadcast_to(~np.asarray(clamp), what.layers[n].shape)


# The judge


def energy(what, ham, xhats, xs):
    "The total energy of activations and states, and the sum of the magnitudes of its terms."
    own = [
        jnp.where(l.leak, (xhats[n] * xs[n]).sum() - LAGR(what, ham, n)(xs[n]), 0.0)
        for n, l in enumerate(what.layers)
    ]
    between = ham.connection_energies(xhats)
    return sum(own) + sum(between)


def LAGR(what, ham, n): return ham.neurons[n].lagrangian


def activations(what, ham, xs):
    return {n: jax.grad(LAGR(what, ham, n))(x) for n, x in xs.items()}


def gradients(what, ham, xs):
    "∂E/∂x̂ of every layer where it is free, and ∂E/∂x where a clamp cuts a row."
    xhats = activations(what, ham, xs)
    direct = jax.grad(lambda xhats: energy(what, ham, xhats, xs))(xhats)
    whole = jax.grad(lambda xs: energy(what, ham, activations(what, ham, xs), xs))(xs)
    elementwise = {"identity", "relu", "repu", "exp", "rexp", "tanh", "sigmoid"}
    out = {}
    for n, l in enumerate(what.layers):
        free = free_mask(what, n)
        cut = 0 < free.sum() < free.size and l.kind not in elementwise
        out[n] = jnp.where(free, whole[n] if cut else direct[n], 0)
    return out


def is_cut(what, n):
    free = free_mask(what, n)
    elementwise = {"identity", "relu", "repu", "exp", "rexp", "tanh", "sigmoid"}
    return 0 < free.sum() < free.size and what.layers[n].kind not in elementwise


def flushed(v, dtype):
    "What the dtype can tell of a number: none below its smallest normal."
    v = jnp.where(abs(v) < float(jnp.finfo(dtype).tiny), 0, v)
    return v.astype(dtype).astype(jnp.float64)


def residuals(what, ham, xs, dtype):
    "By layer: the residual, and the size against which it is small."
    gs, out, eps = gradients(what, ham, xs), {}, float(jnp.finfo(dtype).eps)
    for n, l in enumerate(what.layers):
        g, x, free = gs[n], xs[n], free_mask(what, n)
        if not free.any(): continue
        if l.leak or is_cut(what, n):
            out[n] = abs(g).max(), (abs(x) * free).max()
        else:
            L = jax.grad(LAGR(what, ham, n))
            far = 1e13 * (1 + abs(x).max())
            steep = abs(g).max()
            seen = lambda x: flushed(L(x), dtype)
            here, there = seen(x), seen(x - jnp.where(steep > 0, far / steep, 0) * g)
            size = jnp.maximum(abs(here).max(), abs(there).max())
            share = abs(there - here) / jnp.where(size > 0, size, 1)
            share = jnp.where(share <= 1, share, 1)
            share = jnp.where(share < 8 * eps, 0, share) # what rounds to no change at all
            out[n] = (abs(g) * share).max(), abs(g).max()
    return out


def size_of(what, ham, xs, eps):
    "The sum of the magnitudes of the terms of the energy and of what they are made of."
    xhats = activations(what, ham, xs)
    E = [abs(v) for v in ham.connection_energies(xhats)]
    g = jax.grad(lambda xhats: sum(ham.connection_energies(xhats)))(xhats)
    for n, l in enumerate(what.layers):
        E.append((abs(xhats[n] * g[n])).sum())
        # and what the judge itself cannot tell
        E.append(2.0**-50 / eps * abs(xhats[n] * xs[n]).sum())
        E.append(abs((xhats[n] * xs[n]).sum() - LAGR(what, ham, n)(xs[n])) if l.leak
                 else (xhats[n] ** 2).sum())
    return sum(E)


def judge_one(what, numbers, dtype, out, path, tols):
    "The numbers of one network's descent, recomputed in float64."
    eps = float(jnp.finfo(dtype).eps)
    rounded = jax.tree_util.tree_map(lambda v: v.astype(dtype), numbers)
    wide = jax.tree_util.tree_map(lambda v: v.astype(jnp.float64), rounded)
    ham, narrow = build(what, *wide[1:]), build(what, *rounded[1:])
    xs = {n: x.astype(jnp.float64) for n, x in out["xs"].items()}
    rest = residuals(what, ham, xs, dtype)
    g64 = gradients(what, ham, xs)
    g = gradients(what, narrow, out["xs"])
    excess = []
    for n, (r, size) in rest.items():
        pull = (abs(xs[n]) + abs(xs[n] - g64[n])).max()
        noise = abs(g[n].astype(jnp.float64) - g64[n]).max() * 8 + 64 * eps * pull
        excess.append((r - noise) / (tols[1] + tols[0] * size))
    E = lambda xs: energy(what, ham, activations(what, ham, xs), xs)
    along = jax.lax.map(lambda xs: jnp.stack([E(xs), size_of(what, ham, xs, eps)]),
                        {n: x.astype(jnp.float64) for n, x in path.items()})
    # plain steps of every length
    lengths = 2.0 ** jnp.arange(-70, 20)
    def lower(h):
        new = {}
        for n, l in enumerate(what.layers):
            f = h / rounded[1][n].astype(jnp.float64)
            if l.leak: f = jnp.minimum(f, 1)
            step = (out["xs"][n] - (f * g[n].astype(jnp.float64))).astype(dtype)
            new[n] = jnp.where(free_mask(what, n), step, out["xs"][n])
        moved = jnp.stack([(new[n] != out["xs"][n]).any() for n in new]).any()
        there = {n: x.astype(jnp.float64) for n, x in new.items()}
        drop = E(xs) - E(there)
        # and what the network itself can tell in its dtype
        seen = jnp.isfinite(energy(what, narrow, activations(what, narrow, new), new))
        fits = abs(E(there)) < float(jnp.finfo(dtype).max) / 64
        return jnp.where(moved & fits & seen, drop, -jnp.inf)
    drops = jax.lax.map(lower, lengths)
    return dict(excess=jnp.stack(excess).max(), energies=along[:, 0], sizes=along[:, 1],
                drop=drops.max(), best=lengths[drops.argmax()], size=size_of(what, ham, xs, eps))


def tolerance(dtype): return float(jnp.finfo(dtype).eps) ** (2 / 3)


@ft.lru_cache(3) # of any solver
def judge(what, dtype):
    "`judge_one` of all rows, compiled."
    tol = tolerance(dtype)
    return jax.jit(jax.vmap(lambda *a: judge_one(what, a[0], dtype, a[1], a[2], (tol, tol))))


@ft.lru_cache(1)
def draws(what, seed, rows):
    "The networks of some rows."
    return jax.vmap(ft.partial(draw, what))(jr.split(jr.key(seed), rows))


def run(what: Structure, solver, dtype, seed=0, rows=21, max_steps=300):
    "Descend from every draw, and judge."
    numbers, tol = draws(what, seed, rows), tolerance(dtype)

    @jax.jit
    def descend(numbers):
        starts, *rest = jax.tree_util.tree_map(lambda v: v.astype(dtype), numbers)
        d = hmx.descend(build(what, *rest), starts, solver=solver, clamp=clamps(what),
                        max_steps=max_steps, trace=hmx.Trace(states=True), rtol=tol, atol=tol)
        out = dict(xs=d.xs, energy=d.energy, energies=d.energies, code=d.code, rises=d.rises,
                   steps=d.steps, residual=d.residual)
        return out, d.records["states"]

    out, path = jax.vmap(descend)(numbers)
    alone, _ = descend(jax.tree_util.tree_map(lambda v: v[0], numbers))
    judged = judge(what, dtype)(numbers, out, path)
    return numbers, {**out, "alone": alone}, judged


def verdicts(what, dtype, numbers, out, judged):
    "Rows of false claims by kind."
    eps = float(jnp.finfo(dtype).eps)
    code, steps = np.array(out["code"]), np.array(out["steps"])
    E, sizes = np.array(judged["energies"]), np.array(judged["sizes"])
    n = np.arange(E.shape[1] - 1)
    up = E[:, 1:] - E[:, :-1]
    room = eps * (sizes[:, 1:] + sizes[:, :-1])
    within = n < steps[:, None]
    with np.errstate(invalid="ignore"):
        real = (within & np.isfinite(up) & (up > 128 * room)).sum(1)
        possible = (within & ~(up < -4 * room)).sum(1)
    rises = np.array(out["rises"])
    false = {
        "rest": (code == 1) & (np.array(judged["excess"]) > 1.1),
        "stuck": (code == 5) & (np.array(judged["drop"]) > 64 * eps * np.array(judged["size"])),
        "rises missed": real > rises,
        "rises false": rises > possible,
    }
    # the first row by itself: the same reason, and the same energy to rounding
    other = out["alone"]
    apart = abs(float(other["energy"]) - float(out["energy"][0]))
    near = apart <= 1e3 * eps * float(judged["size"][0]) or not apart < np.inf
    finished = code[0] not in (2, 3) # kinks and overflows are reached or not by a rounding
    # without a floor it is on its way, far from what its size was
    differs = finished and (int(other["code"]) != code[0] or not (near or code[0] == 4))
    false["alone"] = (np.arange(len(code)) == 0) & differs
    starts = jax.tree_util.tree_map(lambda v: v.astype(dtype), numbers[0])
    for n in range(len(what.layers)):
        held = ~free_mask(what, n)
        moved = np.array(out["xs"][n] != starts[n])[:, held].any(-1) if held.any() else False
        false["clamp"] = false.get("clamp", False) | (moved & (code != 0))
    return {k: np.broadcast_to(v, code.shape) for k, v in false.items()}, code, real


def campaign(seeds, solvers=SOLVERS, dtypes=DTYPES, rows=21, show=print):
    totals, codes, guarded = {}, {}, 0
    for seed in seeds:
        what = structure(seed)
        for s, solver in solvers.items():
            for d, dtype in dtypes.items():
                numbers, out, judged = run(what, solver, dtype, seed, rows)
                false, code, real = verdicts(what, dtype, numbers, out, judged)
                for c in code.tolist(): codes[s, c] = codes.get((s, c), 0) + 1
                if s != "euler" and real.any():
                    guarded += int((real > 0).sum())
                    show(f"ROSE {seed} {s} {d} rows {np.flatnonzero(real).tolist()}")
                for k, v in false.items():
                    totals[k] = totals.get(k, 0) + int(v.sum())
                    if v.any(): show(f"{k}: {seed} {s} {d} rows {np.flatnonzero(v).tolist()}")
        show(f"structure {seed}: {sum(totals.values())} false claims so far")
        jax.clear_caches()
    return totals, codes, guarded


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    import time
    t0 = time.time()
    lo, hi = (0, int(sys.argv[1])) if len(sys.argv) == 2 else map(int, sys.argv[1:3])
    solvers = {k: v for k, v in SOLVERS.items() if len(sys.argv) < 4 or k in sys.argv[3].split(",")}
    dtypes = {k: v for k, v in DTYPES.items() if len(sys.argv) < 5 or k in sys.argv[4].split(",")}
    print(*campaign(range(lo, hi), solvers, dtypes, show=ft.partial(print, flush=True)), sep="\n")
    print(f"{time.time() - t0:.0f} s")
