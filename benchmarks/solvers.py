#!/usr/bin/env python3
"""How many gradients of the energy each solver needs, and whether it ends where the flow ends.

In float64, to a largest |∂E/∂x̂| of 1e-8. The flow is integrated by diffrax (Tsit5, relative
tolerance 1e-8); a start agrees where every activation ends within 1e-3 of the flow's. The best
fixed step is searched on a part of the starts, among those at which at least 95 % converge, for the
least median: it is found in hindsight, for one system, and says nothing of where it ends (that is
in its row). Starts from which the flow itself came to no rest are left out.

    python benchmarks/solvers.py --quick                          # 50 starts a system
    python benchmarks/solvers.py --solvers "Adaptive()" "Relaxation()" --systems rings3
"""

import argparse
import time

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import hamux as hmx

jax.config.update("jax_enable_x64", True)
STEPS = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5)


def digits(beta, n, K=500):
    "Five hundred digits, started at noisy ones with a memory layer that knows nothing yet"
    from sklearn.datasets import load_digits
    X, rng = load_digits().data[:K] / 16, np.random.default_rng(0)
    noisy = X[rng.integers(0, K, n)] + 0.3 * rng.standard_normal((n, X.shape[1]))
    return (
        hmx.memory_ham(X, beta),
        {"pattern": jnp.asarray(noisy), "memory": jnp.zeros((n, K))},
        None,
    )


def ring(scale, key, sizes=(32, 24, 16, 20)):
    """Four layers in a ring, identity, tanh, softmax, tanh, with normal weights of standard
    deviation scale/√(mean size)"""
    pairs = [(i, (i + 1) % 4) for i in range(4)]
    Ws = [
        scale * jr.normal(k, (sizes[i], sizes[j])) * (2 / (sizes[i] + sizes[j])) ** 0.5
        for k, (i, j) in zip(jr.split(key, 4), pairs, strict=True)
    ]
    layers = [
        hmx.IdentityLayer(sizes[0]),
        hmx.TanhLayer(sizes[1]),
        hmx.SoftmaxLayer(sizes[2]),
        hmx.TanhLayer(sizes[3]),
    ]
    return hmx.HAM(
        layers, [hmx.LinearSynapse(W) for W in Ws], [(pair, i) for i, pair in enumerate(pairs)]
    )


def rings(scale, n, starts=5):
    "Networks of random weights, five normal starts each"
    hams = jax.vmap(lambda k: ring(scale, k))(jr.split(jr.key(1), -(-n // starts)))
    one = ring(scale, jr.key(0))
    return (
        jax.tree.map(lambda W: jnp.repeat(W, starts, 0)[:n], hams),
        jax.vmap(lambda k: one.init_states(key=k))(jr.split(jr.key(2), n)),
        0,
    )


def convolution(n):
    "An image, its convolution, and a layer that competes to explain the maps"
    k = jr.split(jr.key(3), 3)
    ham = hmx.HAM(
        {
            "image": hmx.IdentityLayer((8, 8, 1)),
            "maps": hmx.TanhLayer((4, 4, 6), beta=2.0),
            "causes": hmx.SoftmaxLayer(20, beta=2.0),
        },
        {
            "conv": hmx.ConvSynapse(0.6 * jr.normal(k[0], (6, 1, 3, 3)), 2),
            "top": hmx.DenseSynapse(0.5 * jr.normal(k[1], (4, 4, 6, 20))),
        },
        [(("image", "maps"), "conv"), (("maps", "causes"), "top")],
    )
    return ham, ham.vectorize().init_states(n, key=k[2]), None


class TokenMemory(eqx.Module):
    "The Hopfield block of the Energy Transformer: every token sees the same relu memory"
    one: hmx.MemorySynapse
    def __call__(self, tokens): return jax.vmap(self.one)(tokens).sum()


def transformer(n, tokens=6, d=12):
    "An Energy Transformer block on tokens that leak"
    k = jr.split(jr.key(4), 3)
    ham = hmx.HAM(
        {"tokens": hmx.LayerNormLayer((tokens, d))},
        {
            "attention": hmx.AttentionSynapse.rand_init(k[0], d, 2, 6, scale=1.5),
            "memory": TokenMemory(
                hmx.MemorySynapse(jr.normal(k[1], (24, d)) / d**0.5, lagrangian=hmx.lagr_relu)
            ),
        },
        [(("tokens",), "attention"), (("tokens",), "memory")],
    )
    return ham, ham.vectorize().init_states(n, key=k[2]), None


SYSTEMS = {
    "digits1": lambda n: digits(1.0, n),
    "digits10": lambda n: digits(10.0, n),
    "digits50": lambda n: digits(50.0, n),
    "rings1": lambda n: rings(1.0, n),
    "rings3": lambda n: rings(3.0, n),
    "convolution": convolution,
    "transformer": transformer,
}


def over_rows(f, ham, xs, axis):
    "`f(ham, xs)` for every start; each has weights of its own where `axis` is 0"
    arrays, rest = eqx.partition(ham, eqx.is_array)
    return jax.vmap(lambda a, x: f(eqx.combine(a, rest), x), in_axes=(axis, 0))(arrays, xs)


@eqx.filter_jit
def flow(ham, xs, axis):
    "Where the flow ends, and whether it came to rest"
    def one(ham, xs):

        def velocity(t, x, args):
            return {
                n: -g / ham.neurons[n].tau for n, g in ham.dEdact(ham.activations(x), x).items()
            }

        def residual(x):
            return jnp.stack(
                [abs(g).max() for g in ham.dEdact(ham.activations(x), x).values()]
            ).max()

        out = dfx.diffeqsolve(
            dfx.ODETerm(velocity),
            dfx.Tsit5(),
            0.0,
            3000.0,
            0.01,
            xs,
            max_steps=None,
            adjoint=dfx.ForwardMode(),
            stepsize_controller=dfx.PIDController(rtol=1e-8, atol=1e-10),
            event=dfx.Event(lambda t, y, args, **_: residual(y) < 1e-7),
            throw=False,
        )
        x = {n: v[-1] for n, v in out.ys.items()}
        return ham.activations(x), residual(x) < 1e-6
    return over_rows(one, ham, xs, axis)


@eqx.filter_jit
def run(ham, xs, axis, solver, max_steps):
    """Activations, evaluations of the gradient, whether it converged, and rises of the energy, one
    per start"""
    def one(ham, xs):
        out = hmx.descend(
            ham, xs, solver=solver, max_steps=max_steps, rtol=0.0, atol=1e-8, trace=False
        )
        return out.xhats, getattr(out, "evaluations", out.steps), out.converged, out.rises
    return over_rows(one, ham, xs, axis)


def timed(*args):
    "The result of a second call, and its seconds"
    jax.block_until_ready(run(*args))
    start = time.perf_counter()
    return jax.block_until_ready(run(*args)), time.perf_counter() - start


def agreement(xhats, found, ended, rest):
    "The share of starts that end where the flow does, of those from which it came to rest"
    far = np.max(
        [np.abs(np.asarray(xhats[n] - ended[n])).reshape(len(found), -1).max(1) for n in ended], 0
    )
    return (found & (far < 1e-3))[rest].mean()


def best_step(ham, xs, axis, n, steps):
    "The one of some fixed steps with the least median of evaluations, on `n` of the starts"
    few = jax.tree.map(lambda v: v[:n], xs)
    some = jax.tree.map(lambda v: v[:n], eqx.filter(ham, eqx.is_array)) if axis == 0 else None
    if some is not None: ham = eqx.combine(some, ham)
    medians = {}
    for dt in steps:
        _, evaluations, converged, _ = run(ham, few, axis, hmx.Euler(jnp.array(dt)), 4000)
        if np.mean(converged) >= 0.95: medians[dt] = float(np.median(evaluations))
    return min(medians, key=medians.get)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="50 starts a system in place of 500, and a coarser search",
    )
    parser.add_argument("--starts", type=int, help="starts a system")
    parser.add_argument(
        "--systems",
        nargs="*",
        default=list(SYSTEMS),
        choices=list(SYSTEMS),
        metavar="NAME",
        help=f"of {', '.join(SYSTEMS)}",
    )
    parser.add_argument(
        "--solvers",
        nargs="*",
        help="solvers of hamux, as they are written (default: those that there are)",
    )
    a = parser.parse_args()
    n = a.starts or (50 if a.quick else 500)
    chosen = (
        a.solvers
        if a.solvers is not None
        else [
            f"{name}()" for name in ("Adaptive", "Relaxation", "Backtracking") if hasattr(hmx, name)
        ]
    )
    print(
        f"{n} starts a system. Evaluations of the gradient: quartiles, then the median in units of"
        " Euler(0.1) and of the best fixed step."
    )
    for name in a.systems:
        ham, xs, axis = SYSTEMS[name](n)
        ended, rest = flow(ham, xs, axis)
        rest = np.asarray(rest)
        best = best_step(ham, xs, axis, min(n, 100), STEPS[4:-2:2] if a.quick else STEPS)
        rows = {
            "Euler(0.1)": hmx.Euler(jnp.array(0.1)),
            f"best fixed: Euler({best})": hmx.Euler(jnp.array(best)),
        } | {s: eval(s, vars(hmx) | {"hmx": hmx}) for s in chosen}
        print(f"\n{name}: the flow came to rest from {rest.mean():.1%}")
        base = {}
        for label, solver in rows.items():
            (xhats, evaluations, converged, rises), seconds = timed(ham, xs, axis, solver, 10_000)
            low, median, high = np.quantile(evaluations, (0.25, 0.5, 0.75))
            base.setdefault("euler", (median, seconds))
            if label.startswith("best"): base["best"] = median
            of_best = f"{median / base['best']:5.2f}" if "best" in base else " " * 5
            print(
                f"  {label:24s} {median:6.0f} ({low:.0f}–{high:.0f})".ljust(44),
                f"{median / base['euler'][0]:6.3f} {of_best}   agrees"
                f" {agreement(xhats, np.asarray(converged), ended, rest):6.1%}   converged"
                f" {np.mean(converged):6.1%}   rises {int(np.sum(rises))}   time"
                f" {seconds / base['euler'][1]:5.2f}",
                flush=True,
            )


if __name__ == "__main__": main()
