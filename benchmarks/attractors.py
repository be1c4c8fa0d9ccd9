#!/usr/bin/env python3
"""Fixed points of a memory from many starts: `find_attractors` beside a loop by hand, in turn.

    python benchmarks/attractors.py                      20,000 starts, 100 patterns of 64 numbers
    python benchmarks/attractors.py --starts 100000 --dim 16 --patterns 30

By hand: a compiled scan of as many whole steps x ← softmax(β …) Ξ as the slowest start needs, then
NumPy: round to cells, unique rows, join centres within the tolerance. It knows that its network is
a memory; it says nothing of stability, energies or convergence. Every contestant is run once before
its time is taken; the first call of each, compilation included, is given too. Both must find the
same points with the same shares."""

import argparse
import resource
import time

import numpy as np


def problem(o):
    rng = np.random.default_rng(0)
    Xi = rng.standard_normal((o.patterns, o.dim), dtype=np.float32)
    picks = rng.integers(0, o.patterns, (o.starts, 2))
    t = rng.random((o.starts, 1), dtype=np.float32)
    noise = 0.3 * rng.standard_normal((o.starts, o.dim), dtype=np.float32)
    return Xi, t * Xi[picks[:, 0]] + (1 - t) * Xi[picks[:, 1]] + noise


def by_hand(Xi, beta, steps, batch, tolerance):
    import jax
    import jax.numpy as jnp

    half = 0.5 * (Xi**2).sum(1)

    @jax.jit
    def follow(x):
        step = lambda x, _: (jax.nn.softmax(beta * (x @ Xi.T - half), -1) @ Xi, None)
        return jax.lax.scan(step, x, None, length=steps)[0]

    def run(starts):
        parts = [np.asarray(follow(jnp.asarray(starts[i : i + batch])))
                 for i in range(0, len(starts), batch)]
        ends = np.concatenate(parts)
        cells = np.floor(ends / (tolerance / (2 * ends.shape[1] ** 0.5))).astype(np.int64)
        _, first, counts = np.unique(cells, axis=0, return_index=True, return_counts=True)
        points, shares = [], []
        for i, n in zip(first, counts):
            near = [j for j, p in enumerate(points) if np.linalg.norm(p - ends[i]) <= tolerance]
            if near: shares[near[0]] += n
            else:
                points.append(ends[i])
                shares.append(n)
        return np.array(points), np.array(shares) / len(starts)
    return run


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--starts", type=int, default=20_000)
    p.add_argument("--patterns", type=int, default=100)
    p.add_argument("--dim", type=int, default=64)
    p.add_argument("--beta", type=float, default=1.0)
    p.add_argument("--batch", type=int, default=1000)
    p.add_argument("-n", type=int, default=5, help="rounds (default: 5)")
    o = p.parse_args()

    import jax
    import jax.numpy as jnp

    import hamux as hmx

    Xi, starts = problem(o)
    lagrangian = jax.tree_util.Partial(hmx.lagr_softmax, beta=o.beta)
    memory = hmx.MemorySynapse(jnp.asarray(Xi), lagrangian, "euclidean")
    ham = hmx.HAM([hmx.IdentityLayer(o.dim, leak=False)], [memory], [((0,), 0)])

    def ours(solver):
        return lambda: hmx.find_attractors(
            ham, {0: starts}, batch=o.batch, solver=solver, max_steps=2000
        )

    unit = ours(hmx.Euler(1.0))
    found = unit()
    x = {0: jnp.asarray(starts[: o.batch])}
    slowest = hmx.descend(ham.vectorize(), x, solver=hmx.Euler(1.0), max_steps=2000, trace=False)
    steps, tolerance = int(slowest.steps.max()), float(found.tolerance)
    hand = by_hand(jnp.asarray(Xi), o.beta, steps, o.batch, tolerance)
    contestants = {
        "by hand": lambda: hand(starts), "hamux, Euler(1)": unit, "hamux, default": ours(hmx.Adaptive())
    }
    times = {name: [] for name in contestants}
    for round_ in range(o.n + 1):
        for name, go in contestants.items():
            begin = time.perf_counter()
            out = go()
            seconds = time.perf_counter() - begin
            if round_: times[name].append(seconds)
            else: print(f"{name:16s} first call {seconds:7.2f} s")
            if name == "by hand": points, shares = out
    print(f"{o.starts:,} starts, {o.patterns} patterns of {o.dim} numbers, {steps} steps by hand;"
          f" {len(points)} points by hand, {len(found)} of hamux")
    least = min(times["by hand"])
    for name, t in times.items():
        print(f"  {name:16s} {o.starts / min(t):9,.0f} starts/s   {min(t) / least:5.2f} × by hand, least"
              f" over least; median over median {np.median(t) / np.median(times['by hand']):5.2f}")
    apart = np.linalg.norm(points[:, None] - np.asarray(found.xs[0])[None], axis=-1)
    same = apart.argmin(1)
    print(f"  furthest point from its own {apart.min(1).max():.1e}; shares differ by"
          f" {abs(shares - np.asarray(found.share)[same]).max():.1e};"
          f" {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB at most")


if __name__ == "__main__":
    main()
