"""What `test_spread.py` runs in processes of its own: memories on one device, and the same ones
spread over eight, compared. Prints one line of JSON.

Arguments: a folder with `rows.npy`, where one process leaves what one device says; then, for one of
two processes, its number and the address of the first. These read it.
"""
import functools as ft
import json
import sys
import warnings

import jax
import numpy as np
from several_devices import exchanged, once

from hamux.memories.arrays import Memory
from hamux.memories.candidates import settle
from hamux.memories.looking import Query, look
from hamux.memories.spread import look_on_all
from hamux.synapses.sharding import join_cluster

folder, *cluster = sys.argv[1:]
if cluster: join_cluster(cluster[1], 2, int(cluster[0]), timeout=120)
jax.config.update("jax_enable_x64", True)
warnings.simplefilter("ignore") # of queries that are whole

K, d, n = 203, 6, 9 # eight devices do not divide 203
rng = np.random.default_rng(0)
rows, weights = rng.normal(size=(K, d)), rng.uniform(0, 2, K)
holes = np.where(rng.random((K, d)) < 0.2, np.nan, rows)
holes[:, 0], labels = rows[:, 0], np.array(["a", "b", "c"])[np.arange(K) % 3]
x = rows[:n] + 0.3 * rng.normal(size=(n, d))
partial = np.where(rng.random((n, d)) < 0.4, np.nan, x)
partial[:, 0] = x[:, 0]
mesh = jax.make_mesh((8,), ("memories",))
grid = jax.make_mesh((4, 2), ("memories", "batch"))


def change(memory):
    "Patterns come and go: more than there was room for."
    memory.remove([3, 77, K - 1])
    for _ in range(3):
        memory.add(rows[:30] + 1, None if memory.classes is None else ["a"] * 30)
    memory.replace([5, K + 2], rows[:2] - 1, None if memory.classes is None else ["b", "c"])
    memory.weigh(np.linspace(0, 1, len(memory)))


def answers(memory):
    "What a memory says: numbers, and what is no number."
    out, noisy = memory.recall(partial, k=3, alpha=0.1), memory.recall(x, noisy=True, k=2)
    numbers = [out.patterns, out.weights, out.energy, out.p_value, out.descent.energy]
    numbers += [noisy.patterns, noisy.weights, noisy.energy, memory.energy(partial)]
    numbers += [memory.score_samples(x), np.float64(memory.beta)]
    if out.label_weights is not None: numbers.append(out.label_weights)
    if not memory.bank.holes: # among its nearest patterns, which is for banks that are larger
        beta, some = memory._inner, memory._scaled(x)
        settled = settle(memory.bank, some, np.isfinite(some), beta, max_steps=100, m=8, k=2)
        numbers += [settled.descent.xs["pattern"], settled.descent.energy, settled.seen.logits]
    things = [out.ids, noisy.ids, out.verdict, np.array(memory.ids, object)]
    if memory.classes is not None: things.append(out.values)
    return numbers, things


def compare(name, make, changed):
    "The largest difference, and whether all else is the same."
    def asked(**where):
        memory = make(**where)
        if changed: change(memory)
        return answers(memory)

    others, other_things = asked(mesh=mesh)
    numbers, things = once(f"{folder}/{name}-on-one", asked, alone=not cluster)
    apart = max(float(np.abs(a - b).max()) for a, b in zip(numbers, others))
    pairs = zip(things, other_things, strict=True)
    return apart, all(np.array_equal(a, b) for a, b in pairs)


def places(**given):
    "The same memory over other axes: the largest difference."
    energy = Memory(rows, beta=2.0, **given).energy(x)
    known = once(f"{folder}/energy", lambda: Memory(rows, beta=2.0).energy(x), not cluster)
    return float(np.abs(known - energy).max())


def travels(K):
    "What devices exchange in one look at K patterns with an average of them and of 2 values."
    memory = Memory(np.tile(rows, (K // 203, 1)), np.ones((K, 2)), beta=2.0, mesh=mesh)
    source, query = memory.bank.source, Query(np.zeros((8, d)), None, np.full(8, -1, np.int32))
    how = dict(spread=source.spread, m=4, block=64, averages=True, holes=False)
    parts = source.parts(memory.bank, True)
    return exchanged(look_on_all.lower(parts, query, 2.0, **how).compile())


def bounds():
    "Whether no pattern that was not returned is nearer than a look says."
    memory = Memory(rows, beta=2.0, mesh=mesh)
    some, K = memory._scaled(x), len(rows)
    few, all = (look(memory.bank, some, memory._inner, m) for m in (4, K))
    return bool((few.rivals >= all.logits[:, 4] - 1e-12).all() and np.isneginf(all.rivals).all())


file = f"{folder}/rows.npy"
cases = { # a memory, and whether it changes
    "holes": (ft.partial(Memory, holes, labels, beta=3.0, scale="std"), True),
    "file": (ft.partial(Memory, file, labels, weights=weights, beta=3.0), False),
}
if not cluster: # where they cost less
    cases |= {
        "changed": (ft.partial(Memory, rows, labels, beta=3.0), True),
        "dot": (ft.partial(Memory, rows, beta=0.5, similarity="dot"), False),
    }
many = Memory(rows, mesh=mesh)
answer = {
    "devices": [jax.device_count(), jax.process_count()],
    "cases": {name: compare(name, *case) for name, case in cases.items()},
    "one axis of two": places(mesh=grid),
    "both axes": places(mesh=grid, axis=("memories", "batch")),
    "exchanged": [travels(203), travels(16 * 203)],
    "bounds": bounds(),
    "rows here": many.bank.source.rows.addressable_shards[0].data.shape[0],
    "shards here": len(many.bank.source.rows.addressable_shards),
}
print(json.dumps(answer))
