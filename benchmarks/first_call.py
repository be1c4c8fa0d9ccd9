#!/usr/bin/env python3
"""What a first call costs: seconds from a Python call to its result, tracing and compilation
included, beside the same descent written by hand.

README's network, 64 identity and 100 softmax neurons. By hand is one `lax.scan` of Euler steps
with the energy of each, under `jax.value_and_grad`; the gradient by hand is `jax.grad` through
it. Each row is a process of its own, in which the program by hand comes first, so that it also
pays for what JAX loads once. Where a row asks for a second program (another number of rows, another
beta), the first one is compiled already, and what is timed is what it could not reuse.

    python benchmarks/first_call.py                            # this checkout
    python benchmarks/first_call.py --checkout DIR -n 3        # another one, medians of three
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent

# each adds a row: what is called before the clock starts, and what is timed
ROWS = {
    "descend, Euler(0.1)": ("", "descend(xs(1), solver=hmx.Euler(0.1), max_steps=100)"),
    "descend": ("", "descend(xs(1))"),
    "descend, 100 rows": ("", "descend(xs(100))"),
    "descend, 300 rows": ("", "descend(xs(300))"),
    "gradient": ("", "gradient(W)"),
    "gradient, implicit": ("", "gradient(W, adjoint='implicit')"),
    "7 rows after 6": ("descend(xs(6))", "descend(xs(7))"),
    "a clamp after none": ("descend(xs(6))", "descend(xs(6), clamp={'image': jnp.arange(64) < 40})"),
    "another clamp": (
        "descend(xs(6), clamp={'image': jnp.arange(64) < 40})",
        "descend(xs(6), clamp={'image': jnp.arange(64) < 32})",
    ),
    "another dt": (
        "descend(xs(6), solver=hmx.Euler(0.1))", "descend(xs(6), solver=hmx.Euler(0.11))",
    ),
    "another beta": ("descend(xs(6))", "descend(xs(6), beta=31.0)"),
    "another mask of memories": (
        "descend(xs(6), ham=memory(jnp.arange(100) < 90))",
        "descend(xs(6), ham=memory(jnp.arange(100) < 80))",
    ),
    "recall, 6 rows": ("", "hmx.recall(A, Q[:6])"),
    "recall, 7 rows after 6": ("hmx.recall(A, Q[:6])", "hmx.recall(A, Q[:7])"),
    "recall, one memory more": ("hmx.recall(A[:99], Q[:6])", "hmx.recall(A, Q[:6])"),
}

PROCESS = """
import sys, time
import jax, jax.numpy as jnp, numpy as np
import equinox, optimistix
start = time.perf_counter()
import hamux as hmx; hmx.HAM, hmx.MemorySynapse, hmx.descend
loaded = time.perf_counter() - start
rng = np.random.default_rng(0)
A = rng.uniform(size=(100, 64)).astype("f4")
Q = np.where(rng.uniform(size=(300, 64)) < 0.5, A[rng.integers(0, 100, 300)], np.nan)
W, b = jnp.asarray(A.T), jnp.asarray(-(A**2).sum(1) / 2)
starts = np.nan_to_num(Q).astype("f4")

def energy(xhats, xs, W, b):
    x, p = xhats
    layers = (x * x).sum() / 2 + (p * xs[1]).sum() - jax.nn.logsumexp(30.0 * xs[1]) / 30.0
    return layers - x @ W @ p - b @ p

def by_hand(W, b, x, h):
    def step(xs, _):
        xhats = xs[0], jax.nn.softmax(30.0 * xs[1])
        E, grads = jax.value_and_grad(energy)(xhats, xs, W, b)
        return tuple(x - 0.1 * g for x, g in zip(xs, grads)), E
    return jax.lax.scan(step, (x, h), length=100)

def by_hand_gradient(W, b, x, h):
    return jax.grad(lambda W: (by_hand(W, b, x, h)[0][0] ** 2).sum())(W)

def network(W, beta=30.0):
    return hmx.HAM(
        {"image": hmx.IdentityLayer(64), "memory": hmx.SoftmaxLayer(100, beta=beta)},
        {"digits": hmx.LinearSynapseWithBias(W, b)}, [(("image", "memory"), "digits")])

def memory(mask):
    return hmx.HAM({"image": hmx.IdentityLayer(64)},
                   {"digits": hmx.MemorySynapse(W.T, mask=mask)}, [(("image",), "digits")])

def xs(n):
    x = {"image": jnp.asarray(starts[:n]), "memory": jnp.zeros((n, 100))}
    return {k: v[0] for k, v in x.items()} if n == 1 else x

def descend(xs, beta=30.0, ham=None, **settings):
    ham = network(W, beta) if ham is None else ham
    xs = {n: xs[n] for n in ham.neurons}
    many = ham.vectorize() if xs["image"].ndim == 2 else ham
    return hmx.descend(many, xs, **settings)

def gradient(W, **settings):
    def loss(W):
        return (hmx.descend(network(W), xs(1), max_steps=100, **settings).xs["image"] ** 2).sum()
    return jax.grad(loss)(W)

def seconds(f, *args):
    start = time.perf_counter()
    jax.block_until_ready([v for v in jax.tree.leaves(f(*args)) if isinstance(v, jax.Array)])
    return time.perf_counter() - start

before, timed = sys.argv[1:]
x0 = xs(1)
jax.block_until_ready(x0)
hand = by_hand_gradient if timed.startswith("gradient") else by_hand
args = W, b, x0["image"], x0["memory"]
print(seconds(jax.jit(hand), *args))
exec(before)
print(seconds(lambda: eval(timed)))
print(loaded)
"""


def one(checkout, before, timed):
    "Seconds by hand, of ours, and of the import, in a fresh process"
    env = os.environ | {"PYTHONPATH": str(checkout)}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    env.pop("PYTHONDONTWRITEBYTECODE", None) # what is installed has its bytecode
    run = subprocess.run(
        [sys.executable, "-c", PROCESS, before, timed],
        capture_output=True, text=True, env=env, cwd=checkout,
    )
    if run.returncode: raise RuntimeError(run.stderr)
    return [float(line) for line in run.stdout.split()]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkout", type=Path, default=HERE, help="default: this one")
    parser.add_argument("-n", type=int, default=3, help="processes for each row (default: 3)")
    parser.add_argument("-k", default="", help="only rows whose name contains this")
    a = parser.parse_args()
    start = time.perf_counter()
    one(a.checkout.resolve(), "", "W") # writes the bytecode
    print(f"{'call':28s} {'ours, s':>8s} {'by hand':>8s} {'ratio':>6s}")
    loads = []
    for name, (before, timed) in ROWS.items():
        if a.k not in name: continue
        runs = [one(a.checkout.resolve(), before, timed) for _ in range(a.n)]
        hand, ours, load = map(statistics.median, zip(*runs, strict=True))
        loads.append(load)
        print(f"{name:28s} {ours:8.2f} {hand:8.2f} {ours / hand:6.1f}", flush=True)
    print(f"{'import hamux, base loaded':28s} {statistics.median(loads):8.3f}")
    print(f"({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__": main()
