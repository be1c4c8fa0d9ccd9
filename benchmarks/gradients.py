#!/usr/bin/env python3
"""The gradient of a loss through a recall of 784 identity and 1000 softmax neurons, batch 32:
memory and time of every adjoint, against the number of steps.

By hand is the same Euler step in one scan under jax.grad, two matrix products and a softmax, with
no energy, residual or stopping. Memory is what XLA plans beyond arguments and result. The
contestants take turns.
"""

import argparse
import statistics
import time

D, K, B, DT = 784, 1000, 32, 0.1


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", type=int, default=7, help="rounds (default: 7)")
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=[200],
        help="numbers of steps (default: 200; the page has 50 100 200 400 800 1600 3200)",
    )
    parser.add_argument(
        "--most",
        type=float,
        default=4e9,
        help="leave out what plans more bytes than this (default: 4e9)",
    )
    a = parser.parse_args()

    import jax
    import jax.numpy as jnp
    import numpy as np

    import hamux as hmx

    rng = np.random.default_rng(0)
    W, x = jnp.asarray((0.05 * rng.standard_normal((D, K))).astype("f4")), jnp.asarray(
        rng.standard_normal((B, D)).astype("f4")
    )
    h, target = jnp.zeros((B, K)), jnp.asarray(rng.standard_normal((B, D)).astype("f4"))

    def by_hand(W, steps):
        def step(state, _):
            x, h = state
            p = jax.nn.softmax(h, -1)
            return (x + DT * (p @ W.T - x), h + DT * (x @ W - h)), None
        (v, _), _ = jax.lax.scan(step, (x, h), length=steps)
        return ((v - target) ** 2).sum()

    def ours(W, steps, adjoint):
        ham = hmx.HAM(
            {"v": hmx.IdentityLayer(D), "h": hmx.SoftmaxLayer(K)},
            {"s": hmx.LinearSynapse(W)},
            [(("v", "h"), "s")],
        )
        out = hmx.descend(
            ham.vectorize(),
            {"v": x, "h": h},
            solver=hmx.Euler(DT),
            max_steps=steps,
            rtol=0.0,
            atol=0.0,
            trace=False,
            adjoint=adjoint,
        )
        return ((out.xs["v"] - target) ** 2).sum()

    adjoints = {
        "unrolled": "unrolled",
        "checkpointed": "checkpointed",
        "implicit": hmx.ImplicitAdjoint(unconverged="accept"),
        "one-step": "one-step",
    }
    for steps in a.lengths:
        runs = {"by hand": jax.jit(jax.grad(lambda W, n=steps: by_hand(W, n))).lower(W).compile()}
        for name, adjoint in adjoints.items():
            runs[name] = (
                jax.jit(jax.grad(lambda W, n=steps, adjoint=adjoint: ours(W, n, adjoint)))
                .lower(W)
                .compile()
            )
        memory = {name: run.memory_analysis().temp_size_in_bytes for name, run in runs.items()}
        runs = {name: run for name, run in runs.items() if memory[name] < a.most}
        grads = {name: np.asarray(jax.block_until_ready(run(W))) for name, run in runs.items()}
        times = {name: [] for name in runs}
        for _ in range(a.n):
            for name, run in runs.items():
                start = time.perf_counter()
                jax.block_until_ready(run(W))
                times[name].append(time.perf_counter() - start)
        t = {name: statistics.median(v) for name, v in times.items()}
        first = "unrolled" if "unrolled" in t else "checkpointed"
        for name in runs:
            error = np.abs(grads[name] - grads[first]).max() / np.abs(grads[first]).max()
            print(
                f"{steps:5d} steps  {name:13s} {memory[name] / 2**20:8.1f} MiB"
                f" ({memory[name] / memory['unrolled']:.3f} of unrolled)  {1e3 * t[name]:8.1f} ms"
                f" ({t[name] / t[first]:.2f} of {first})  gradient off by {error:.1e}",
                flush=True,
            )


if __name__ == "__main__": main()
