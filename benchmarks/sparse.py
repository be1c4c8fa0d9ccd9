#!/usr/bin/env python3
"""The gradient of a sparse memory in a batch of queries: entmax of degrees 1 to 2 and normmax,
streamed by passes, against the streamed softmax, and against sparsemax as it is usually written in
JAX, by sorting all similarities.

The contestants take turns, in an order that rotates, each after a pause, so that a machine that
slows down slows them all. Queries are stored patterns with noise; `--beta` decides how many
patterns share the weight. Data are drawn from seed 0.
"""

import argparse
import functools
import os
import statistics
import sys
import time


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default, what in (
        ("memories", 100_000, "memories"),
        ("width", 64, "numbers in each"),
        ("batch", 64, "queries"),
        ("n", 9, "rounds"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"{what} (default: {default})"
        )
    parser.add_argument("--beta", type=float, nargs="+", default=[0.1, 1.0],
                        help="inverse temperatures (default: 0.1 1.0)")
    parser.add_argument("--pause", type=float, default=0.2,
                        help="seconds of rest before each call (default: 0.2)")
    a = parser.parse_args()

    import jax
    import jax.numpy as jnp
    import numpy as np

    import hamux as hmx

    rng = np.random.default_rng(0)
    Xi = jnp.asarray(rng.standard_normal((a.memories, a.width), dtype=np.float32))
    X = Xi[: a.batch] + 0.3 * rng.standard_normal((a.batch, a.width), dtype=np.float32)

    def of(L, beta):
        L = functools.partial(L, beta=beta)
        return lambda Xi, X: jax.vmap(jax.grad(hmx.MemorySynapse(Xi, L)))(X)

    def sorted_sparsemax(z):
        u = jnp.sort(z)[::-1]
        sums = jnp.cumsum(u)
        size = (1 + jnp.arange(1, len(z) + 1) * u > sums).sum()
        return jnp.maximum(z - (sums[size - 1] - 1) / size, 0)

    def by_sorting(beta):
        one = lambda Xi, x: -sorted_sparsemax(beta * (Xi @ x)) @ Xi
        return lambda Xi, X: jax.vmap(one, (None, 0))(Xi, X)

    def clock(f):
        start = time.perf_counter()
        jax.block_until_ready(f(Xi, X))
        return time.perf_counter() - start

    print(f"{a.memories:,} memories × {a.width}, {a.batch} queries, float32,"
          f" {len(os.sched_getaffinity(0))} cores; medians and minima of {a.n} rounds")
    for beta in a.beta:
        programs = {
            "softmax (hamux)": of(hmx.lagr_softmax, beta),
            "sparsemax (hamux)": of(hmx.lagr_sparsemax, beta),
            "1.5-entmax (hamux)": of(hmx.lagr_entmax, beta),
            "1.25-entmax (hamux)": of(functools.partial(hmx.lagr_entmax, alpha=1.25), beta),
            "normmax (hamux)": of(hmx.lagr_normmax, beta),
            "sparsemax by sorting": by_sorting(beta),
        }
        compiled = {n: jax.jit(f).lower(Xi, X).compile() for n, f in programs.items()}
        answers = {name: np.asarray(f(Xi, X)) for name, f in compiled.items()} # warm-up
        order, rounds = list(compiled), []
        for i in range(a.n):
            turn = i % len(order)
            took = {}
            for name in order[turn:] + order[:turn]:
                time.sleep(a.pause)
                took[name] = clock(compiled[name])
            rounds.append(took)
        weights = jax.jit(jax.vmap(jax.grad(functools.partial(hmx.lagr_sparsemax, beta=beta))))
        active = np.asarray((weights(X @ Xi.T) > 0).sum(1))
        print(f"β = {beta:g}: sparsemax has {active.min()} to {active.max()} patterns in a query")
        for name in order:
            times = [r[name] for r in rounds]
            ratio = statistics.median(r[name] / r["softmax (hamux)"] for r in rounds)
            memory = compiled[name].memory_analysis().temp_size_in_bytes / 1e6
            print(f"  {name:22s} {1e3 * statistics.median(times):7.1f} ms  (least"
                  f" {1e3 * min(times):7.1f})  {memory:7.1f} MB  {ratio:5.2f} × softmax")
        off = abs(answers["sparsemax (hamux)"] - answers["sparsemax by sorting"]).max()
        print(f"  largest difference of the two sparsemax: {off:.1e}")


if __name__ == "__main__": sys.exit(main())
