#!/usr/bin/env python3
"""The gradient of one memory synapse in a batch of queries: streamed, against plain logsumexp with
autodiff, against PyTorch's fused attention.

The update is softmax(βΞq)ᵀΞ for each query q. The contestants take turns, in an order that rotates,
so that a machine that slows down slows them all, and each after a pause: the threads of the one
before spin for a while after their work, which without a pause made PyTorch look three times
slower. PyTorch belongs to no extra: `python -m venv torch; torch/bin/pip install torch==2.13.0`,
and give `--torch torch/bin/python`. It runs in a process of its own, on as many threads.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

TORCH = """
import sys, time, numpy as np, torch
K, d, B = map(int, sys.argv[1:4]); torch.set_num_threads(int(sys.argv[4])); beta = float(sys.argv[5])
rng = np.random.default_rng(0)
Xi, X = (torch.from_numpy(rng.standard_normal(s, dtype=np.float32))[None, None] for s in ((K, d), (B, d)))
with torch.no_grad():
    for line in sys.stdin:
        start = time.perf_counter()
        out = torch.nn.functional.scaled_dot_product_attention(X, Xi, Xi, scale=beta)
        took = time.perf_counter() - start
        print(took, float(out.square().sum()), flush=True)
"""


class Torch:
    "A process that does one attention each time it is asked, and says how long it took."
    def __init__(self, python, *args):
        self.process = subprocess.Popen(
            [python, "-c", TORCH, *map(str, args)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self):
        print("go", file=self.process.stdin, flush=True)
        took, self.check = map(float, self.process.stdout.readline().split())
        return took

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default, what in (
        ("memories", 400_000, "memories"),
        ("width", 64, "numbers in each"),
        ("batch", 64, "queries"),
        ("n", 15, "rounds"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"{what} (default: {default})"
        )
    parser.add_argument(
        "--large",
        type=int,
        default=1_000_000,
        help=(
            "memories of a second, larger bank, for its memory alone (0: none; default: 1,000,000)"
        ),
    )
    parser.add_argument(
        "--pause", type=float, default=0.5, help="seconds of rest before each call (default: 0.5)"
    )
    parser.add_argument("--torch", help="a Python with torch==2.13.0; left out otherwise")
    a = parser.parse_args()

    import jax
    import jax.numpy as jnp
    import numpy as np

    import hamux as hmx
    from hamux.synapses.memory import MemorySynapse

    beta, rng = 1 / a.width**0.5, np.random.default_rng(0)
    Xi, X = (
        jnp.asarray(rng.standard_normal(s, dtype=np.float32))
        for s in ((a.memories, a.width), (a.batch, a.width))
    )
    softmax = jax.tree_util.Partial(hmx.lagr_softmax, beta=beta)

    def streamed(Xi, X): return jax.vmap(jax.grad(MemorySynapse(Xi, softmax)))(X)
    def plain(Xi, X):
        return jax.vmap(jax.grad(lambda x: -jax.nn.logsumexp(beta * (Xi @ x)) / beta))(X)

    def products(Xi, X):
        size = 8192
        def step(i, acc):
            rows = jax.lax.dynamic_slice_in_dim(Xi, i * size, size)
            return acc + (rows @ X.T).T @ rows
        return jax.lax.fori_loop(0, len(Xi) // size, step, jnp.zeros_like(X))

    names = {
        "streamed (hamux)": streamed,
        "plain logsumexp, autodiff": plain,
        "the two products alone": products,
    }
    compiled = {name: jax.jit(f).lower(Xi, X).compile() for name, f in names.items()}

    def clock(f):
        start = time.perf_counter()
        jax.block_until_ready(f(Xi, X))
        return time.perf_counter() - start

    contestants = {name: (lambda f=f: clock(f)) for name, f in compiled.items()}
    if a.torch:
        contestants["PyTorch fused attention"] = Torch(
            a.torch, a.memories, a.width, a.batch, len(os.sched_getaffinity(0)), beta
        )
    for go in contestants.values(): go()
    def rested(name):
        time.sleep(a.pause)
        return contestants[name]()

    order = list(contestants)
    rounds = [
        {name: rested(name) for name in order[i % len(order) :] + order[: i % len(order)]}
        for i in range(a.n)
    ]
    answer = -compiled["streamed (hamux)"](Xi, X)
    print(
        f"{a.memories:,} memories × {a.width}, {a.batch} queries, float32,"
        f" {len(os.sched_getaffinity(0))} cores; medians and minima of {a.n} rounds"
    )
    for name in contestants:
        times = [r[name] for r in rounds]
        ratio = statistics.median(r["streamed (hamux)"] / r[name] for r in rounds)
        memory = (
            f"{compiled[name].memory_analysis().temp_size_in_bytes / 1e6:7.1f} MB"
            if name in compiled
            else " " * 10
        )
        print(
            f"  {name:27s} {1e3 * statistics.median(times):6.1f} ms  (least"
            f" {1e3 * min(times):6.1f}) {memory}   ours takes {ratio:.2f} × its time (least over"
            f" least {min(r['streamed (hamux)'] for r in rounds) / min(times):.2f})"
        )
    print(
        "  largest difference from plain:"
        f" {float(jnp.abs(answer + compiled['plain logsumexp, autodiff'](Xi, X)).max()):.1e}"
    )
    if a.torch:
        contestants["PyTorch fused attention"].close()
        print(
            f"  sum of squares, ours and PyTorch's: {float((answer**2).sum()):.6g}"
            f" {contestants['PyTorch fused attention'].check:.6g}"
        )
    if a.large:
        big = jax.ShapeDtypeStruct((a.large, a.width), jnp.float32)
        print(
            f"  with {a.large:,} memories:"
            f" {jax.jit(streamed).lower(big, X).compile().memory_analysis().temp_size_in_bytes / 1e6:.1f}"
            " MB beyond the bank"
        )


if __name__ == "__main__": sys.exit(main())
