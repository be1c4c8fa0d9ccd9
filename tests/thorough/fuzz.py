"""A reader of files under atheris, a fuzzer that changes again what has reached new code.

    python tests/thorough/fuzz.py network 1000 FOLDER    # a thousand different files

FOLDER gets the files that reached new code, and one that failed, if one did.
"""

import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
import tracemalloc
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["hamux"]):
    import jax
    import numpy as np
    import test_changed_files as given

    from hamux.network.hypergraph import HAM
    from hamux.storage.saving import load, save

DATA = Path(__file__).parents[1] / "data"
MOST = 2**15 # bytes of a file
SPARE = 64 * 2**20 # by which a process grows between two looks at it, whatever is read


# --- files to begin with --------------------------------------------------------------------------


def bytes_of(save, *args, **kwargs):
    "What a function writes into the file that it is given first."
    save(out := io.BytesIO(), *args, **kwargs)
    return out.getvalue()


def array(v, version): return bytes_of(np.lib.format.write_array, v, version)


def pieces(path):
    "Each hypersynapse of a network that has all, with the layers that it joins."
    whole, out = load(DATA / "everything.hamux"), []
    for s, synapse in whole.hypersynapses.items():
        joined = [c for c in whole.connections if c[1] == s]
        layers = {n: whole.neurons[n] for names, _ in joined for n in names}
        save(path, HAM(layers, {s: synapse}, joined))
        out.append(path.read_bytes())
    return out


def seeds(target, folder):
    "Files of the kind that a target reads."
    given.files(folder)
    mine, rows = lambda *names: [(folder / n).read_bytes() for n in names], given.ROWS
    data = lambda pattern: [p.read_bytes() for p in sorted(DATA.glob(pattern))]
    if target == "network like": return mine("network") + data("given/*.hamux")
    if target == "network": return mine("network") + data("[!e]*.hamux") + pieces(folder / "piece")
    if target == "training": return mine("training") + data("given/training*.hamux")
    if target == "rows.npz":
        several = {"a": rows, "b": rows[:2], "rows": np.asfortranarray(rows > 0)}
        return mine("rows.npz", "packed.npz") + data("*.npz") + [bytes_of(np.savez, **several)]
    if target == "rows.npy":
        kinds = [rows.astype(t) for t in (">f8", "<f2", "i1", ">u4", "?", "S3", "c8")]
        others = map(array, [*kinds, rows.reshape(3, 4, 5), rows[0]], [None] * 9)
        return mine("rows.npy", "columns.npy") + [*others, array(rows, (2, 0)), array(rows, (3, 0))]
    lines = b"1,2\n", b"\xef\xbb\xbfa,b\r\n1,\r\n\r\n,2 # c\r\n", b"# c\nnan,-inf\n 1e3 , +.5\n"
    return mine("rows.csv") + [*lines]


# --- changes --------------------------------------------------------------------------------------


def by_fuzzer(data, rng): return atheris.Mutate(data, MOST)


def agreeing(data):
    "A saved network or run with the checksums of the arrays that it has now."
    members = given.members_of(data)
    header = json.loads(members["hamux.json"])
    values = [members[f"{i}.npy"].split(b"\n", 1)[1] for i in range(len(header["checksums"]))]
    header["checksums"] = [hashlib.sha256(v).hexdigest() for v in values]
    return given.archive_of(members | {"hamux.json": given.as_json(header)})


def mutate(data, most, seed):
    "Another file: changed as bytes, or, of an archive, in a member."
    rng = np.random.default_rng(seed)
    way, known = rng.random(), contextlib.suppress(Exception) # of what is no archive by now
    if way < 0.7 and data.startswith(b"PK"):
        with known:
            data = given.repacked(data, rng, by_fuzzer if rng.random() < 0.7 else given.changed)
            if rng.random() < 0.5: data = agreeing(data)
        return data[:most]
    return given.changed(data, rng)[:most] if way < 0.3 else by_fuzzer(data, rng)


# --- what is asked --------------------------------------------------------------------------------


def read_training(path):
    given.read_run(path, given.RUN, given.IDENTITY)


READERS = {
    "network": load,
    "network like": lambda path: load(path, like=given.HAM),
    "training": read_training,
    "rows.npz": given.read_rows,
    "rows.npy": given.read_rows,
    "rows.csv": given.read_rows,
}


def sizes():
    "Bytes of memory that the process has held at most since `forget`, and has asked for at most."
    status = Path("/proc/self/status").read_text()
    return np.array([int(status.split(f"{n}:")[1].split()[0]) for n in ("VmHWM", "VmPeak")]) * 1024


def forget(): Path("/proc/self/clear_refs").write_text("5")


class Count:
    "Reads files, and counts them, and what they take."

    def __init__(self, target, wanted, path, known):
        self.read, self.path, self.wanted, self.known = READERS[target], path, wanted, known
        self.seen, self.counts, self.most = set(), {"read": 0, "refused": 0}, 0

    def __call__(self, data):
        self.path.write_bytes(data)
        limit = 10 * len(data) + np.array([given.FLOOR, SPARE, SPARE])
        for _ in range(2): # a cache of JAX's grows but once
            forget()
            before = sizes()
            done, traced = given.attempt(self.read, self.path)
            grown = np.array([traced, *(sizes() - before)])
            if (grown <= limit).all(): break
        else:
            raise AssertionError(f"{grown} bytes for a file of {len(data)}")
        if data in self.known or (name := hashlib.sha256(data).digest()) in self.seen: return
        self.seen.add(name)
        self.counts[done] += 1
        self.most = max(self.most, traced)
        if len(self.seen) % 500 == 0: jax.clear_caches()
        if len(self.seen) == self.wanted:
            print(json.dumps(self.counts | {"most": self.most}), flush=True)
            os._exit(0)


def main(target, wanted, folder):
    begin, new = Path(folder) / "begin", Path(folder) / "new"
    for f in (begin, new): f.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as tmp:
        files = seeds(target, Path(tmp))
        for i, data in enumerate(files): (begin / f"{i}").write_bytes(data)
        suffix = target if target.startswith("rows") else "file"
        count = Count(target, int(wanted), Path(tmp) / suffix, {b"", b"\n", *files})
        options = ["-seed=1", f"-max_len={MOST}", "-timeout=100", "-rss_limit_mb=0"]
        options += ["-report_slow_units=100"]
        options += [f"-artifact_prefix={folder}/failed-", str(new), str(begin)]
        atheris.Setup(["fuzz", *options], count, custom_mutator=mutate)
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*in no connection", UserWarning)
        tracemalloc.start()
        atheris.Fuzz()


if __name__ == "__main__": main(*sys.argv[1:])
