#!/usr/bin/env python3
"""What `import hamux` adds to `import jax, equinox, optimistix`, and what it adds with the names of a
first recall, which import their wings: medians over fresh processes, taken in turn."""

import argparse
import statistics
import subprocess
import sys

BASE = "import jax, equinox, optimistix"
CLOCK = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"


def seconds(statement: str) -> float:
    "Import time in a fresh interpreter, its own start-up left out"
    run = subprocess.run(
        [sys.executable, "-c", CLOCK.format(statement)], capture_output=True, text=True, check=True
    )
    return float(run.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=9, help="processes of each kind (default: 9)")
    n = parser.parse_args().n
    statements = {
        "jax, equinox, optimistix": BASE,
        "hamux": f"{BASE}; import hamux",
        "hamux, HAM, MemorySynapse, descend":
            f"{BASE}; from hamux import HAM, MemorySynapse, descend",
    }
    # fills the file cache and writes the .pyc files
    for statement in statements.values(): seconds(statement)
    # in turn, so that a machine that slows down slows both
    times = {name: [] for name in statements}
    for _ in range(n):
        for name, statement in statements.items(): times[name].append(seconds(statement))
    medians = {name: statistics.median(ts) for name, ts in times.items()}
    base = medians["jax, equinox, optimistix"]
    for name, median in medians.items():
        spread = f"(from {min(times[name]):.3f} to {max(times[name]):.3f})"
        print(f"import {name:36s} {median:.3f} s  {spread}  {median - base:+.3f} s")


if __name__ == "__main__": main()
