#!/usr/bin/env python3
"""A bank of many patterns beside one search of faiss and one of NumPy, in turn in one process.

    python benchmarks/memory_banks.py                            1,000,000 × 128, 256 queries
    python benchmarks/memory_banks.py --patterns 100000 --dim 64
    python benchmarks/memory_banks.py --resident                 memory of the process alone, 1,000,000 × 384
    python benchmarks/memory_banks.py --disk                     the bank stays in a .npy file

faiss: pip install faiss-cpu; left out where it is missing. Answers are compared with the descent in the energy of all patterns."""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np


def resident():
    "Megabytes that the process holds at most, so far."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def seconds(f, repeat):
    "The median time of some calls, after one that is not counted."
    f()
    times = []
    for _ in range(repeat):
        begin = time.perf_counter()
        f()
        times.append(time.perf_counter() - begin)
    return float(np.median(times))


def patterns_and_queries(o):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((o.patterns, o.dim), dtype=np.float32)
    q = X[: o.queries] + np.float32(o.noise) * rng.standard_normal((o.queries, o.dim), dtype=np.float32)
    return X, q


def numpy_search(X, q, k=32):
    "The nearest by products, a block at a time, a block's k by partition."
    best = np.full((len(q), k), np.inf, np.float32)
    for start in range(0, len(X), 8192):
        rows = X[start : start + 8192]
        r2 = (rows**2).sum(1) - 2 * q @ rows.T
        best = np.partition(np.concatenate([best, np.partition(r2, k, 1)[:, :k]], 1), k, 1)[:, :k]
    return best


def times(o):
    import hamux as hmx
    from hamux.memories import settle

    X, q = patterns_and_queries(o)
    memory = hmx.Memory(X)
    ours = seconds(lambda: memory.recall(q, noisy=True, k=4), o.repeat)
    rows = [("hamux: recall, answers and weights", ours)]
    rows.append(("NumPy: the 32 nearest", seconds(lambda: numpy_search(X, q), o.repeat)))
    try:
        import faiss
        index = faiss.IndexFlatL2(o.dim)
        index.add(X)
        rows.append(("faiss IndexFlatL2: the 32 nearest", seconds(lambda: index.search(q, 32), o.repeat)))
    except ImportError:
        print("faiss is not installed: pip install faiss-cpu")
    print(f"{o.patterns:,} patterns of {o.dim} numbers, {o.queries} queries with noise {o.noise},"
          f" beta = {memory.beta:.3g}")
    for what, t in rows: print(f"  {what:36s} {t:8.2f} s   hamux / this {ours / t:6.2f}")
    out = memory.recall(q, noisy=True, k=4)
    first, _ = memory._first_step(memory._scaled(q), True)
    ends = settle(memory.bank, first, np.ones(first.shape, bool), memory.inner_beta, max_steps=1000)
    print(f"  queries that needed the whole bank again: {ends.streamed.mean():.1%};"
          f" converged {out.descent.converged.mean():.1%}; right {(out.ids[:, 0] == np.arange(len(q))).mean():.1%}")
    print(f"  difference to the descent among all: {difference(memory, first[:8], ends):.1e} of the spread (8 queries)")


def difference(memory, first, ends):
    "To steps of length one in float64 by NumPy, all patterns at once."
    rows, beta, worst = memory.bank.take(np.arange(memory.bank.size)), memory.inner_beta, 0.0
    for x, end in zip(first.astype(float), ends.descent.xs["pattern"]):
        for _ in range(200):
            s = -0.5 * beta * ((rows - x.astype(rows.dtype))**2).sum(1, dtype=np.float64)
            p = np.exp(s - s.max())
            new = (p / p.sum()) @ rows
            if abs(new - x).max() < 1e-9: break
            x = new
        worst = max(worst, abs(end - x).max())
    return worst


def memory_of_process(o):
    import hamux as hmx
    X, q = patterns_and_queries(o)
    hmx.Memory(X[:100_000]).recall(q, noisy=True) # the programs, and what compiling them takes
    before = resident()
    memory = hmx.Memory(X)
    memory.recall(q, noisy=True)
    bank = X.nbytes / 2**20
    print(f"bank {bank:.0f} MiB; process before {before:.0f}, at most {resident():.0f} MiB:"
          f" bank + {resident() - bank:.0f} MiB in all, {resident() - before:.0f} MiB for this recall")


def from_disk(o):
    import hamux as hmx
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bank.npy"
        X, q = patterns_and_queries(o)
        np.save(path, X)
        del X
        memory = hmx.Memory(path)
        t = seconds(lambda: memory.recall(q, noisy=True), o.repeat)
        print(f"{o.patterns:,} × {o.dim} on the disk ({path.stat().st_size / 2**20:.0f} MiB, in the system's cache):"
              f" {t:.2f} s for {o.queries} queries")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--patterns", type=int, default=1_000_000)
    p.add_argument("--dim", type=int)
    p.add_argument("--queries", type=int, default=256)
    p.add_argument("--noise", type=float, default=0.5)
    p.add_argument("--repeat", type=int, default=3)
    p.add_argument("--resident", action="store_true")
    p.add_argument("--disk", action="store_true")
    o = p.parse_args()
    o.dim = o.dim or (384 if o.resident else 128)
    (memory_of_process if o.resident else from_disk if o.disk else times)(o)
