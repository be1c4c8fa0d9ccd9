"""Two hundred kills each of what writes files: whatever the moment, the old file or the new one is
there, whole, and the next writer leaves nothing else behind."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax

import hamux as hmx

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("KILLS", 200))
KEEP_ALL = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def python(code, *argv, cache):
    "A process that runs some code, with what it compiles kept."
    env = os.environ | KEEP_ALL
    env |= {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, argv)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)


def leftovers(folder): return len(list(folder.glob(".hamux-*.tmp")))


def net(i, n=300):
    "A network all of whose weights are one number."
    synapse = hmx.LinearSynapse(jnp.full((n, n), float(i)))
    return hmx.HAM([hmx.TanhLayer(n), hmx.TanhLayer(n)], [synapse], [([0, 1], 0)])


SAVE = """
import os, random, signal, sys, time, warnings
sys.path.insert(0, sys.argv[2])
warnings.simplefilter("ignore") # of forks: the children only write
from test_kills import net
import hamux as hmx
nets = [net(i) for i in (1, 2)]
for n in nets: hmx.save(sys.argv[1], n)
for _ in range(int(sys.argv[3])):
    child = os.fork()
    while not child:
        for n in nets: hmx.save(sys.argv[1], n)
    time.sleep(random.uniform(0, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print("killed", flush=True)
    sys.stdin.readline()
"""


def test_kills_of_save(tmp_path):
    path, left = tmp_path / "n", 0
    writer = subprocess.Popen(
        [sys.executable, "-c", SAVE, str(path), os.path.dirname(__file__), str(KILLS)],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    for _ in range(KILLS):
        assert writer.stdout.readline() == "killed\n"
        W = np.asarray(hmx.load(path).hypersynapses[0].W)
        assert W.min() == W.max() and W.max() in (1, 2)
        left += leftovers(tmp_path)
        assert leftovers(tmp_path) <= 1 # the next one removes it
        writer.stdin.write("\n")
        writer.stdin.flush()
    assert writer.wait() == 0
    writer.stdout.close(), writer.stdin.close()
    hmx.save(path, net(1))
    assert [p.name for p in tmp_path.iterdir()] == ["n"]
    print(f"save: {KILLS} kills, {left} in the middle of a file, nothing lost")


RECALL = """
import sys
from hamux.cli import hamux_recall
print("ready", flush=True)
hamux_recall(sys.argv[1:])
"""


def test_kills_of_recall(tmp_path):
    rng, cache = np.random.default_rng(0), tmp_path / "cache"
    folder = tmp_path / "files"
    folder.mkdir()
    patterns = rng.standard_normal((50, 40)).astype(np.float32)
    queries = np.where(np.arange(40) < 20, np.tile(patterns, (30, 1)), np.float32(np.nan))
    np.save(folder / "m.npy", patterns)
    np.save(folder / "q.npy", queries)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    out, old = folder / "out.npy", b"what was there"
    argv = [folder / "m.npy", folder / "q.npy", "-o", out, "--batch", "100"]

    def go(wait):
        out.write_bytes(old)
        process = python(RECALL, *argv, cache=cache)
        process.stdout.readline()
        began = time.monotonic()
        if wait is not None:
            time.sleep(wait)
            process.send_signal(signal.SIGKILL)
        process.wait(), process.stdout.close()
        return time.monotonic() - began

    go(None), go(None)
    whole, lasts, counts = out.read_bytes(), go(None), {"old": 0, "new": 0, "left": 0}
    for _ in range(KILLS):
        go(rng.uniform(0, 1.05 * lasts))
        found = out.read_bytes()
        assert found in (old, whole)
        counts["old" if found == old else "new"] += 1
        counts["left"] += leftovers(folder)
        assert leftovers(folder) <= 1
        assert all((folder / n).read_bytes() == data for n, data in before.items())
    go(None)
    assert out.read_bytes() == whole and leftovers(folder) == 0
    print(f"recall: {KILLS} kills in {lasts:.1f} s each, {counts}, nothing lost")


FIT = """
import sys, time
sys.path.insert(0, sys.argv[2])
from test_kills import trained
from hamux.learning import run
rows, calls = run.take_rows, []
def slow(data, index):
    calls.append(time.sleep(0.003))
    if len(calls) == 3: print("ready", flush=True) # all is compiled
    return rows(data, index)
run.take_rows = slow
trained(int(sys.argv[3]), sys.argv[1])
"""


def trained(steps, path=None):
    "A network of one matrix that is drawn to the data."
    pull = lambda ham, batch, key: ((ham.hypersynapses[0].W - batch.mean()) ** 2).sum()
    data, how = np.linspace(-1, 1, 64, dtype=np.float32), dict(batch_size=4, progress=False)
    how |= dict(key=hmx.learning.run.jr.key(7), validation=data[:9], validate_every=5)
    return hmx.fit(net(1, 20), pull, data, optax.adam(0.05), steps=steps, checkpoint=path,
                   checkpoint_every=2, **how)


def test_kills_of_fit(tmp_path):
    "One run, killed again and again: it always goes on, and ends as if nothing had been"
    rng, path, folder = np.random.default_rng(0), tmp_path / "run", os.path.dirname(__file__)
    steps, went_on, left, seen = 10**6, 0, 0, -1
    for _ in range(KILLS):
        process = python(FIT, path, folder, steps, cache=tmp_path / "cache")
        process.stdout.readline()
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait(), process.stdout.close()
        left += leftovers(tmp_path)
        assert leftovers(tmp_path) <= 1
        if not path.exists(): continue
        now = trained(0, path).steps # raises if it is not whole
        assert now >= max(seen, 0)
        went_on, seen = went_on + (now > seen), now
    rest, straight = trained(seen + 5, path), trained(seen + 5)
    assert rest.steps == straight.steps and rest.losses.tobytes() == straight.losses.tobytes()
    ends = [np.asarray(f.last.hypersynapses[0].W) for f in (rest, straight)]
    np.testing.assert_array_equal(*ends)
    assert leftovers(tmp_path) == 0
    print(f"fit: {KILLS} kills, {left} in the middle of a file, {went_on} went on, {seen} steps")
