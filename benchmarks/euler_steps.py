#!/usr/bin/env python3
"""Forty Euler steps of 784 identity and 1000 softmax neurons, batch 32: `descend`, the same step by
hand in one scan, and the published package.

By hand is two matrix products and a softmax per step, and no energy, residual or stopping. The
published hamux 0.2.2 is driven as its README does, a Python loop over `dEdact`, with the
activations recomputed (its README forgot that), in a process of its own: `pip install --no-deps
--target old hamux==0.2.2 fastcore`, and give `--old old`. The contestants take turns.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

D, K, B, N, DT = 784, 1000, 32, 40, 0.1

OLD = """
import sys, time, numpy as np, jax, jax.numpy as jnp, jax.tree_util as jtu, equinox as eqx
import hamux as hmx
D, K, B, N, DT = map(float, sys.argv[1:]); D, K, B, N = map(int, (D, K, B, N))
rng = np.random.default_rng(0)
W, x = (0.02 * rng.standard_normal((D, K))).astype("f4"), rng.standard_normal((B, D)).astype("f4")
class Linear(eqx.Module):
    W: jax.Array
    def __call__(self, a, b): return -(a @ self.W @ b)
ham = hmx.HAM({"v": hmx.NeuronLayer(hmx.lagr_identity, (D,)), "h": hmx.NeuronLayer(hmx.lagr_softmax, (K,))}, {"s": Linear(jnp.asarray(W))}, [(("v", "h"), "s")]).vectorize()
for line in sys.stdin:
    xs = {"v": jnp.asarray(x), "h": jnp.zeros((B, K))}
    jax.block_until_ready(xs)
    start = time.perf_counter()
    for _ in range(N):
        xhats = ham.activations(xs)
        E, g = ham.dEdact(xhats, xs, return_energy=True)
        xs = jtu.tree_map(lambda x, g: x - DT * g, xs, g)
    jax.block_until_ready((xs, E))
    print(time.perf_counter() - start, float(xs["v"].sum()), flush=True)
"""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--old", help="a directory with hamux==0.2.2 and fastcore; left out otherwise"
    )
    parser.add_argument("-n", type=int, default=25, help="rounds (default: 25)")
    a = parser.parse_args()

    import jax
    import jax.numpy as jnp
    import numpy as np

    import hamux as hmx

    def timed(go):
        "The result of a call, and the median time of five more."
        out, t = jax.block_until_ready(go()), []
        for _ in range(5):
            start = time.perf_counter()
            jax.block_until_ready(go())
            t.append(time.perf_counter() - start)
        return out, statistics.median(t)

    rng = np.random.default_rng(0)
    W, x = jnp.asarray((0.02 * rng.standard_normal((D, K))).astype("f4")), jnp.asarray(
        rng.standard_normal((B, D)).astype("f4")
    )
    h = jnp.zeros((B, K))

    @jax.jit
    def by_hand(W, x, h):
        def step(state, _):
            x, h = state
            p = jax.nn.softmax(h, -1)
            return (x + DT * (p @ W.T - x), h + DT * (x @ W - h)), None
        return jax.lax.scan(step, (x, h), None, length=N)[0]

    ham = hmx.HAM(
        {"v": hmx.IdentityLayer(D), "h": hmx.SoftmaxLayer(K)},
        {"s": hmx.LinearSynapse(W)},
        [(("v", "h"), "s")],
    ).vectorize()

    def ours(max_steps=N, **settings):
        return hmx.descend(
            ham,
            {"v": x, "h": h},
            solver=hmx.Euler(DT),
            max_steps=max_steps,
            rtol=0,
            atol=0,
            **settings,
        )

    assert jnp.allclose(ours().xs["v"], by_hand(W, x, h)[0], atol=1e-4)

    runs = {
        "by hand": lambda: by_hand(W, x, h),
        "descend": ours,
        "descend, no trace": lambda: ours(trace=False),
    }
    times = {name: [] for name in runs}
    old = None
    if a.old:
        env = os.environ | {"PYTHONPATH": a.old}
        old = subprocess.Popen(
            [sys.executable, "-c", OLD, *map(str, (D, K, B, N, DT))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        times["hamux 0.2.2"] = []
        def published():
            print("go", file=old.stdin, flush=True)
            took, total = map(float, old.stdout.readline().split())
            assert (
                abs(total - float(ours().xs["v"].sum())) < 1e-2 * abs(total) + 1
            ), "the published package ends elsewhere"
            return took
        published()
    for run in runs.values(): jax.block_until_ready(run())
    for i in range(a.n):
        order = list(runs)[i % len(runs):] + list(runs)[:i % len(runs)]
        for name in order:
            time.sleep(0.05)
            start = time.perf_counter()
            jax.block_until_ready(runs[name]())
            times[name].append(time.perf_counter() - start)
        if old and i % 4 == 0: times["hamux 0.2.2"].append(published())
    if old: old.stdin.close()

    base = statistics.median(times["by hand"])
    print(
        f"{N} Euler steps, {D} identity and {K} softmax neurons, batch {B}; medians of {a.n} turns"
    )
    for name, t in times.items():
        print(
            f"  {name:20s} {statistics.median(t) * 1e3:9.2f} ms   median/median"
            f" {statistics.median(t) / base:7.3f}   least/least"
            f" {min(t) / min(times['by hand']):7.3f}"
        )
    if old:
        print(
            "  descend is"
            f" {statistics.median(times['hamux 0.2.2']) / statistics.median(times['descend']):.0f}"
            " times faster than hamux 0.2.2"
        )

    print("\nWhat a maximum of steps costs that is not used: 512 rows that converge, Euler(0.5)")
    many = {"v": jnp.asarray(rng.standard_normal((512, D)).astype("f4")), "h": jnp.zeros((512, K))}
    spent = {}
    for limit in (200, 2_000, 20_000):
        go = lambda limit=limit: hmx.descend(ham, many, solver=hmx.Euler(0.5), max_steps=limit)
        out, spent[limit] = timed(go)
        print(
            f"  max_steps {limit:6d}: {spent[limit] * 1e3:8.1f} ms, {int(out.steps.max())} steps  "
            f" ratio {spent[limit] / spent[200]:.3f}"
        )

    print(
        "\nRows that have converged: 2048 rows of which all but 16 begin at a fixed point, against"
        " all of them on the way"
    )
    busy = {
        "v": jnp.asarray(rng.standard_normal((2048, D)).astype("f4")),
        "h": jnp.zeros((2048, K)),
    }
    there = hmx.descend(ham, busy, solver=hmx.Euler(0.5), max_steps=500).xs
    mostly = {n: jnp.concatenate([there[n][:-16], busy[n][-16:]]) for n in busy}
    for name, xs in (("all", busy), ("16", mostly)):
        go = lambda xs=xs: hmx.descend(ham, xs, solver=hmx.Euler(0.5), max_steps=500)
        out, spent[name] = timed(go)
        print(
            f"  {name:4s} rows on the way: {spent[name] * 1e3:8.1f} ms, {int(out.steps.sum())}"
            " steps in all"
        )
    print(f"  ratio {spent['16'] / spent['all']:.3f}")


if __name__ == "__main__": main()
