#!/usr/bin/env python3
"""Gibbs sweeps per second of a restricted Boltzmann machine, against the same by hand.

784 pixels, 500 hidden units, 100 chains, single precision. A sweep draws all hidden units, then all
pixels. By hand it is written in NumPy, and in JAX. They run in turn, after a first call that
compiles; the median and the least of each.

    python benchmarks/gibbs.py
    python benchmarks/gibbs.py --pixels 64 --hidden 16
"""

import argparse
import time

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import hamux as hmx


def ours(W, chains, sweeps):
    "A function that takes so many sweeps, and returns the mean of the pixels"
    pixels, hidden = W.shape
    many = hmx.HAM(
        {"v": hmx.SigmoidLayer(pixels), "h": hmx.SigmoidLayer(hidden)},
        {"W": hmx.LinearSynapse(jnp.asarray(W)), "b": hmx.BiasSynapse(jnp.zeros(pixels)),
         "c": hmx.BiasSynapse(jnp.zeros(hidden))},
        [(("v", "h"), "W"), (("v",), "b"), (("h",), "c")],
    ).vectorize()
    start = many.activations(many.init_states(chains))
    def run(seed):
        out = hmx.sample(many, start, hmx.Gibbs(), draws=1, warmup=0, thin=sweeps, key=jr.key(seed))
        return float(jax.block_until_ready(out.xhats["v"]).mean())
    return run


def by_hand(W, chains, sweeps):
    "The same in NumPy"
    W, b, c = W.copy(), np.zeros(W.shape[0], np.float32), np.zeros(W.shape[1], np.float32)
    def draw(rng, field):
        chance = 1 / (1 + np.exp(-field))
        return (rng.random(field.shape, np.float32) < chance).astype(np.float32)
    def run(seed):
        rng = np.random.default_rng(seed)
        v = (rng.random((chains, len(b))) < 0.5).astype(np.float32)
        for _ in range(sweeps):
            h = draw(rng, v @ W + c)
            v = draw(rng, h @ W.T + b)
        return float(v.mean())
    return run


def in_jax(W, chains, sweeps):
    "The same in JAX, without a library"
    @jax.jit
    def go(key, W):
        def draw(key, field):
            return (jr.uniform(key, field.shape) < jax.nn.sigmoid(field)).astype(W.dtype)
        def sweep(i, v):
            up, down = jr.split(jr.fold_in(key, i))
            return draw(down, draw(up, v @ W) @ W.T)
        start = draw(jr.fold_in(key, sweeps), jnp.zeros((chains, len(W))))
        return jax.lax.fori_loop(0, sweeps, sweep, start).mean()
    W = jnp.asarray(W)
    return lambda seed: float(go(jr.key(seed), W))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pixels", type=int, default=784)
    parser.add_argument("--hidden", type=int, default=500)
    parser.add_argument("--chains", type=int, default=100)
    parser.add_argument("--sweeps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    shape = args.pixels, args.hidden
    W = (0.05 * np.random.default_rng(0).standard_normal(shape)).astype(np.float32)
    ways = {"hamux": ours, "NumPy": by_hand, "JAX by hand": in_jax}
    runs = {name: way(W, args.chains, args.sweeps) for name, way in ways.items()}
    means = {name: run(0) for name, run in runs.items()}
    times = {name: [] for name in runs}
    for i in range(args.rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            run(i + 1)
            times[name].append(time.perf_counter() - began)
    print("mean of the pixels:", {name: round(mean, 3) for name, mean in means.items()})
    for name, seconds in times.items():
        middle, least = np.median(seconds), min(seconds)
        print(f"{name}: {args.sweeps / middle:.0f} sweeps/s in the median,"
              f" {args.sweeps / least:.0f} at best")
    for name in list(runs)[1:]:
        ratio = lambda f, name=name: f(times[name]) / f(times["hamux"])
        print(f"time of {name} over ours: {ratio(np.median):.2f} in the median,"
              f" {ratio(min):.2f} at best")


if __name__ == "__main__":
    main()
