#!/usr/bin/env python3
"""The gradient of one memory synapse in a batch of queries: on one device, and with its memories
spread over several that JAX makes of this processor.

Such devices share the cores that there are, so that eight of them on two cores cannot be faster
than one, which uses both. What the figures show is what the spreading itself costs: the ratio of
times should be near 1, and what is exchanged must not grow with the number of memories. Each
contestant runs in a process of its own, one after the other, since JAX is told of devices before it
starts.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time


def measure(a):
    "In a process of its own: times, what is exchanged, and the answer's sum of squares."
    import re

    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.tree_util import Partial

    import hamux as hmx
    from hamux.synapses.sharding import shard_memories

    rng = np.random.default_rng(0)
    Xi = rng.standard_normal((a.memories, a.width), dtype=np.float32)
    X = jnp.asarray(rng.standard_normal((a.batch, a.width), dtype=np.float32))
    synapse = hmx.MemorySynapse(Xi, Partial(hmx.lagr_softmax, beta=1 / a.width**0.5))
    if jax.device_count() > 1:
        mesh = jax.make_mesh((jax.device_count(),), ("memories",))
        synapse = shard_memories(synapse, mesh)
    gradient = jax.jit(lambda synapse, X: jax.vmap(jax.grad(synapse))(X))
    run = gradient.lower(synapse, X).compile()
    X = jax.device_put(X, run.input_shardings[0][1])
    times = []
    for _ in range(a.n + 1):
        start = time.perf_counter()
        out = jax.block_until_ready(run(synapse, X))
        times.append(time.perf_counter() - start)
    found = re.findall(r"= ([^=\n]*?) (?:all-\w+|collective-\w+)(?:-start)?\(", run.as_text())
    shapes = re.findall(r"f32\[([\d,]*)\]", " ".join(found))
    count = lambda s: int(np.prod([int(n) for n in s.split(",") if n], initial=1))
    print(json.dumps({
        "times": times[1:],
        "numbers": sum(map(count, shapes)),
        "rows": synapse.Xi.addressable_shards[0].data.shape[0],
        "temporary": run.memory_analysis().temp_size_in_bytes,
        "check": float((np.asarray(out, float) ** 2).sum()),
    }))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default, what in (
        ("memories", 400_000, "memories"),
        ("width", 64, "numbers in each"),
        ("batch", 64, "queries"),
        ("devices", 8, "devices to spread over"),
        ("n", 15, "calls"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"{what} (default: {default})"
        )
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.inside: return measure(a)
    found = {}
    for devices in (1, a.devices):
        flags = os.environ.get("XLA_FLAGS", "")
        more = f"{flags} --xla_force_host_platform_device_count={devices}"
        command = [sys.executable, __file__, "--inside", *sys.argv[1:]]
        done = subprocess.run(
            command, env=os.environ | {"XLA_FLAGS": more}, check=True, stdout=subprocess.PIPE
        )
        found[devices] = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{a.memories:,} memories × {a.width}, {a.batch} queries, float32,"
        f" {len(os.sched_getaffinity(0))} cores; medians and minima of {a.n} calls"
    )
    for devices, one in found.items():
        median, least = statistics.median(one["times"]), min(one["times"])
        ratio = least / min(found[1]["times"])
        print(
            f"  {devices} device{'s'[: devices > 1]:1s}: {1e3 * median:7.1f} ms (least"
            f" {1e3 * least:7.1f}, {ratio:.2f} × that of one), {one['rows']:,} memories on each,"
            f" {one['temporary'] / 1e6:.1f} MB of temporaries on each,"
            f" {4 * one['numbers']:,} bytes sent by each"
        )
    apart = abs(found[a.devices]["check"] / found[1]["check"] - 1)
    print(f"  sums of squares differ by {apart:.0e}")


if __name__ == "__main__": sys.exit(main())
