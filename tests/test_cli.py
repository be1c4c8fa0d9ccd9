"""The two commands as a person meets them: files in, files out, one line for every mistake."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from hamux import cli

RNG = np.random.default_rng(0)
PATTERNS = RNG.standard_normal((40, 12)).astype(np.float32)
HOLES = np.where(np.arange(12) < 7, PATTERNS, np.float32(np.nan))


@pytest.fixture
def folder(tmp_path):
    for name, array in {
        "memories": PATTERNS,
        "holes": HOLES,
        "noise": PATTERNS + np.float32(0.05),
    }.items():
        np.save(tmp_path / f"{name}.npy", array)
    return tmp_path


def recall(folder, *argv, memories="memories.npy", queries="holes.npy", out="out.npy"):
    return cli.hamux_recall(
        [str(folder / memories), str(folder / queries), "-o", str(folder / out), *argv]
    )


def refused(folder, capsys, *argv, **files):
    "The one line that a command says when it refuses, with status 2 and nothing left behind"
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    with pytest.raises(SystemExit) as stopped:
        recall(folder, *argv, **files)
    said = capsys.readouterr()
    assert stopped.value.code == 2
    assert said.err.startswith("hamux-recall: ") and said.err.count("\n") == 1 and not said.out
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before
    return said.err


# recall: what comes back


@pytest.mark.parametrize("out", ["out.npy", "out.npz", "out.csv"])
@pytest.mark.parametrize("batch", [[], ["--batch", "7"]])
def test_recall_fills_what_is_unknown(folder, capsys, out, batch):
    assert recall(folder, *batch, out=out) == 0
    read = {
        ".npy": np.load,
        ".npz": lambda p: np.load(p)["rows"],
        ".csv": lambda p: np.loadtxt(p, delimiter=","),
    }[Path(out).suffix]
    answers = read(folder / out)
    np.testing.assert_array_equal(answers[:, :7].astype("f4"), PATTERNS[:, :7])
    np.testing.assert_allclose(answers, PATTERNS, atol=0.02)
    said = capsys.readouterr()
    assert "40 queries recalled from 40 memories of 12 numbers" in said.out
    assert "40 of 40 converged" in said.out and not said.err


def test_noisy_queries_are_free_to_move(folder):
    assert recall(folder, "--noisy", queries="noise.npy") == 0
    np.testing.assert_allclose(np.load(folder / "out.npy"), PATTERNS, atol=0.02)


def test_known_queries_come_back_and_are_said_to(folder, capsys):
    assert recall(folder, queries="memories.npy") == 0
    np.testing.assert_array_equal(np.load(folder / "out.npy"), PATTERNS)
    assert "40 of 40 queries have nothing unknown" in capsys.readouterr().err


@pytest.mark.parametrize(
    "dtype, out",
    [("f2", "f4"), ("f4", "f4"), ("f8", "f8"), ("u1", "f4"), ("i8", "f8"), ("?", "f4")],
)
def test_dtypes(folder, dtype, out):
    bits = RNG.integers(0, 2, (9, 20))
    np.save(folder / "m.npy", bits.astype(dtype))
    np.save(
        folder / "q.npy",
        np.where(np.arange(20) < 14, bits, np.nan).astype("f2" if dtype == "f2" else "f4"),
    )
    assert recall(folder, memories="m.npy", queries="q.npy") == 0
    answers = np.load(folder / "out.npy")
    assert answers.dtype == np.dtype(out)
    np.testing.assert_array_equal(np.round(answers), bits)


@pytest.mark.parametrize("unit, origin", [(1e-30, 0), (1e30, 0), (1, 1e4), (1e-3, -7)])
def test_units_do_not_matter(folder, unit, origin):
    np.save(folder / "m.npy", PATTERNS * unit + origin)
    np.save(folder / "q.npy", HOLES * unit + origin)
    assert recall(folder, memories="m.npy", queries="q.npy") == 0
    np.testing.assert_allclose((np.load(folder / "out.npy") - origin) / unit, PATTERNS, atol=0.03)


def test_images_keep_their_shape(folder):
    np.save(folder / "m.npy", PATTERNS.reshape(40, 3, 4))
    np.save(folder / "q.npy", HOLES.reshape(40, 3, 4))
    assert recall(folder, memories="m.npy", queries="q.npy") == 0
    np.testing.assert_allclose(np.load(folder / "out.npy"), PATTERNS.reshape(40, 3, 4), atol=0.02)


def test_output_over_the_queries(folder):
    assert recall(folder, "--batch", "7", out="holes.npy") == 0
    np.testing.assert_allclose(np.load(folder / "holes.npy"), PATTERNS, atol=0.02)


@pytest.mark.parametrize("similarity", ["dot", "euclidean"])
def test_similarity_and_beta_are_obeyed(folder, capsys, similarity):
    unit = PATTERNS / np.linalg.norm(PATTERNS, axis=1, keepdims=True)
    np.save(folder / "m.npy", unit)
    np.save(folder / "q.npy", np.where(np.isnan(HOLES), np.nan, unit).astype("f4"))
    argv = ["--similarity", similarity, "--beta", "50"]
    assert recall(folder, *argv, memories="m.npy", queries="q.npy") == 0
    assert f"({similarity}, beta = 50)" in capsys.readouterr().out
    np.testing.assert_allclose(np.load(folder / "out.npy"), unit, atol=0.05)


def test_not_converged_is_written_and_said(folder, capsys):
    "Where the temperature is high the way to the common average is longer than one step"
    argv = ["--noisy", "--beta", "0.3", "--max-steps", "1"]
    assert recall(folder, *argv, queries="noise.npy") == 1
    assert np.isfinite(np.load(folder / "out.npy")).all()
    assert "40 of 40 queries did not converge" in capsys.readouterr().err


def test_one_memory_one_query_one_feature(folder):
    np.save(folder / "m.npy", np.array([[3.0]], "f4"))
    np.save(folder / "q.npy", np.array([[np.nan]], "f4"))
    assert recall(folder, memories="m.npy", queries="q.npy") == 0
    np.testing.assert_array_equal(np.load(folder / "out.npy"), [[3]])


def test_memories_may_have_holes(folder):
    "Each memory knows 11 of 12 entries; each query is half of what was there"
    holes = PATTERNS.copy()
    holes[np.arange(40), np.arange(40) % 12] = np.nan
    np.save(folder / "m.npy", holes)
    assert recall(folder, memories="m.npy") == 0
    answers, stored = np.load(folder / "out.npy"), ~np.isnan(holes)
    np.testing.assert_allclose(answers[stored], PATTERNS[stored], atol=0.1)


@pytest.mark.slow
def test_scale_and_noise_are_obeyed(folder, capsys):
    "Columns of units a million apart; noise of 0.05 is a beta of 400"
    units = np.where(np.arange(12) % 2, 1, 1e6)
    np.save(folder / "m.npy", PATTERNS * units)
    np.save(folder / "q.npy", HOLES * units)
    argv = ["--scale", "std", "--noise", "0.05"]
    assert recall(folder, *argv, memories="m.npy", queries="q.npy") == 0
    said = capsys.readouterr()
    assert "beta = 400)" in said.out and not said.err
    np.testing.assert_allclose(np.load(folder / "out.npy") / units, PATTERNS, atol=0.02)


WORDS = np.array([f"word {i // 2}" for i in range(40)])


@pytest.mark.parametrize("name, values", [
    ("v.npy", WORDS), ("v.csv", WORDS),
    ("v.npy", np.arange(40) // 2), ("v.csv", np.arange(40) // 2),
    ("v.npy", RNG.standard_normal(40)), ("v.csv", RNG.standard_normal(40)),
    ("v.npz", RNG.standard_normal((40, 2, 3))),
])
def test_values_come_back(folder, name, values):
    "Those of the memory that a query is half of, in the order of the queries"
    lines = "".join(f"{v}\n" for v in ["a heading", *values.tolist()])
    if name == "v.csv": (folder / name).write_text(lines)
    elif name == "v.npy": np.save(folder / name, values)
    else: np.savez(folder / name, values)
    np.save(folder / "q.npy", HOLES[::-1])
    out = folder / ("w.npy" if values.ndim > 1 or name == "v.npy" else "w.csv")
    files = ["--values", str(folder / name), "--values-output", str(out)]
    assert recall(folder, *files, "--batch", "7", queries="q.npy") == 0
    read = np.load if out.suffix == ".npy" else lambda p: np.loadtxt(p, values.dtype, delimiter=",")
    got = read(out)
    assert got.shape == values.shape
    if values.dtype.kind == "f": np.testing.assert_allclose(got, values[::-1], atol=0.02)
    else: np.testing.assert_array_equal(got, values[::-1])


def read_report(path):
    with open(path, newline="") as file: return list(csv.DictReader(file))


def test_the_report_names_the_memories(folder, capsys):
    "Batches do not show; at the largest weight, and the second, are the memories that are nearest"
    order = np.random.default_rng(1).permutation(40)
    np.save(folder / "q.npy", HOLES[order])
    report = str(folder / "r.csv")
    assert recall(folder, "--report", report, "--k", "3", "--batch", "7", queries="q.npy") == 0
    lines = read_report(report)
    assert [int(line["query"]) for line in lines] == list(range(40))
    assert [int(line["memory_1"]) for line in lines] == order.tolist()
    distances = ((PATTERNS[order, None] - PATTERNS)**2).sum(2)
    second = [int(line["memory_2"]) for line in lines]
    np.testing.assert_array_equal(second, np.argsort(distances)[:, 1])
    weights = np.array([[float(line[f"weight_{i}"]) for i in (1, 2, 3)] for line in lines])
    assert (np.diff(weights) <= 0).all() and (weights.sum(1) <= 1 + 1e-4).all()
    assert {(line["verdict"], line["converged"]) for line in lines} == {("one", "1")}


@pytest.mark.slow
def test_unknown_queries_are_counted_and_marked(folder, capsys):
    "Half of the queries are ten times as far away as any memory; p-values are those of 40 memories"
    near = PATTERNS + np.float32(0.01)
    np.save(folder / "q.npy", np.concatenate([near, 100 + near]))
    argv = ["--noisy", "--unknown", "0.03", "--report", str(folder / "r.csv")]
    assert recall(folder, *argv, queries="q.npy") == 0
    assert "40 of 80 called unknown" in capsys.readouterr().out
    lines = read_report(folder / "r.csv")
    assert [line["verdict"] == "unknown" for line in lines] == 40 * [False] + 40 * [True]
    np.testing.assert_allclose([float(line["p_value"]) for line in lines[40:]], 1 / 41, rtol=1e-5)


@pytest.mark.parametrize("suffix", ["npy", "parquet"])
def test_memories_that_stay_on_the_disk_answer_alike(folder, capsys, monkeypatch, suffix):
    "The same answers, labels and reports as from the same rows in memory"
    np.save(folder / "labels.npy", WORDS)
    values = ["--values", str(folder / "labels.npy"), "--values-output", str(folder / "v.npy")]
    argv, outs = [*values, "--report", str(folder / "r.csv"), "--k", "2"], []
    if suffix == "parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq
        columns = {f"c{i}": column for i, column in enumerate(PATTERNS.T)}
        pq.write_table(pa.table(columns), folder / "memories.parquet")
    for most in (2**26, 0):
        monkeypatch.setattr(cli, "_IN_MEMORY", most)
        assert recall(folder, *argv, memories=f"memories.{suffix}") == 0
        lines = read_report(folder / "r.csv")
        report = [(line["verdict"], line["p_value"], line["memory_1"]) for line in lines]
        outs.append((np.load(folder / "out.npy"), np.load(folder / "v.npy").tolist(), report))
    np.testing.assert_allclose(outs[0][0], outs[1][0], atol=1e-4)
    assert outs[0][1:] == outs[1][1:]


def test_infinite_memories_on_the_disk_are_one_line(folder, capsys, monkeypatch):
    monkeypatch.setattr(cli, "_IN_MEMORY", 0)
    inf = PATTERNS.copy()
    inf[31, 2] = np.inf
    np.save(folder / "inf.npy", inf)
    assert "inf.npy: row 31, column 2" in refused(folder, capsys, memories="inf.npy")


# recall: what is refused


WRONG = {
    "missing": (dict(memories="lost.npy"), "no such file"),
    "queries missing": (dict(queries="lost.npy"), "no such file"),
    "extension": (dict(out="out.txt"), ".txt"),
    "no folder": (dict(out="no/out.npy"), "folder"),
    "width": (dict(queries="wide.npy"), "a query has 13 numbers and a memory 12"),
    "flat": (dict(memories="flat.npy"), "flat.npy"),
    "empty": (dict(memories="none.npy"), "none.npy"),
    "no queries": (dict(queries="none.npy"), "none.npy"),
    "strings": (dict(memories="words.npy"), "words.npy"),
    "objects": (dict(memories="objects.npy"), "objects.npy"),
    "complex": (dict(memories="complex.npy"), "complex"),
    "a column of NaN": (dict(memories="holes.npy"), "holes.npy: A column must be known"),
    "a row of NaN": (dict(memories="blank.npy"), "got only NaN in row 5"),
    "inf in memories": (dict(memories="inf.npy"), "inf.npy: row 31, column 2"),
    "inf in queries": (dict(queries="inf.npy"), "row 31, column 2"),
    "truncated": (dict(queries="cut.npy"), "cut.npy"),
    "not an array": (dict(queries="text.npy"), "not a .npy file"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_files_are_one_line(folder, capsys, what):
    inf = PATTERNS.copy()
    inf[31, 2] = np.inf
    blank = PATTERNS.copy()
    blank[5] = np.nan
    arrays = dict(
        blank=blank,
        wide=np.zeros((3, 13)),
        flat=PATTERNS[0],
        none=PATTERNS[:0],
        words=np.array([["a"]]),
        complex=PATTERNS * 1j,
        inf=inf,
    )
    for name, array in arrays.items(): np.save(folder / f"{name}.npy", array)
    np.save(folder / "objects.npy", np.array([[{}]]), allow_pickle=True)
    (folder / "cut.npy").write_bytes((folder / "holes.npy").read_bytes()[:-100])
    (folder / "text.npy").write_text("1,2,3\n")
    files, words = WRONG[what]
    assert words in refused(folder, capsys, "--batch", "7", **files)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--beta", "0"], "a positive number or one of near, likelihood, completion, got '0'"),
        (["--beta", "nan"], "completion, got 'nan'"),
        (["--noise", "0"], "must be a positive number, got '0'"),
        (["--noise", "1", "--beta", "1"], "not allowed with argument"),
        (["--unknown", "1"], "must be a number between 0 and 1, got '1'"),
        (["--scale", "max"], "invalid choice"),
        (["--k", "2"], "name one"),
        (["--values", "labels.npy"], "go together"),
        (["--dt", "2"], "must be a number above 0, at most 1, got '2'"),
        (["--max-steps", "0"], "must be a positive int, got '0'"),
        (["--batch", "1.5"], "positive int"),
        (["--similarity", "cosine"], "invalid choice"),
        (["--fast"], "unrecognized"),
    ],
)
def test_wrong_options_are_one_line(folder, capsys, argv, words):
    assert words in refused(folder, capsys, *argv)


@pytest.mark.parametrize("values, words", [
    (WORDS[:39], "must hold one for each of 40 patterns, got 39"),
    (np.array(1.0), "v.npy"),
    (np.array([{}] * 40), "v.npy"),
    (np.array([1j] * 40), "v.npy"),
    (np.where(np.arange(40) < 39, 1.0, np.nan), "v.npy: row 39"),
])
def test_wrong_values_are_one_line(folder, capsys, values, words):
    np.save(folder / "v.npy", values, allow_pickle=True)
    argv = ["--values", str(folder / "v.npy"), "--values-output", str(folder / "w.npy")]
    assert words in refused(folder, capsys, *argv)


@pytest.mark.parametrize("argv, words", [
    (["--report", "r.txt"], "a report is a .csv file"),
    (["--report", "no/r.csv"], "folder"),
    (["--report", "r.csv", "--k", "41"], "--k must be at most 40, the number of memories"),
    (["--report", "out.npy"], "a file of its own"),
])
def test_wrong_reports_are_one_line(folder, capsys, monkeypatch, argv, words):
    monkeypatch.chdir(folder)
    assert words in refused(folder, capsys, *argv)


def test_the_old_output_survives_a_late_failure(folder, capsys):
    queries = HOLES.copy()
    queries[39, 0] = np.inf # found in the last batch only
    np.save(folder / "late.npy", queries)
    for name in ("out.npy", "r.csv", "w.npy"): (folder / name).write_bytes(b"what was there")
    np.save(folder / "labels.npy", WORDS)
    files = {"--report": "r.csv", "--values": "labels.npy", "--values-output": "w.npy"}
    argv = [v for option, name in files.items() for v in (option, str(folder / name))]
    assert "row 39, column 0" in refused(folder, capsys, "--batch", "7", *argv, queries="late.npy")
    for name in ("out.npy", "r.csv", "w.npy"):
        assert (folder / name).read_bytes() == b"what was there"


# in a process of its own


RECALL = "import sys; from hamux.cli import hamux_recall; sys.exit(hamux_recall(sys.argv[1:]))"
HERE = {"PYTHONPATH": str(Path(cli.__file__).parents[1])}


class Ended(NamedTuple):
    "What a command has left."
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def forked(tmp_path_factory):
    "A function that runs a command in a process of its own, forked from one that waits here."
    server = Path(__file__).parent / "forked_commands.py"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process = subprocess.Popen([sys.executable, server], env=os.environ | HERE, **pipes)

    def run(command, *argv, **how):
        said = tmp_path_factory.mktemp("said")
        (said / "out").touch(), (said / "err").touch()
        job = {"command": command, "argv": [*map(str, argv)], "out": str(said / "out"),
               "err": str(said / "err"), "folder": str(said), **how}
        print(json.dumps(job), file=process.stdin, flush=True)
        status = int(process.stdout.readline())
        return Ended(status, (said / "out").read_text(), (said / "err").read_text())

    yield run
    process.stdin.close()
    assert process.wait(60) == 0
    process.stdout.close()


@pytest.fixture
def recall_apart(forked, folder):
    "`hamux-recall` in a process of its own"
    def run(*argv, queries="holes.npy", memories=None, **how):
        files = memories or folder / "memories.npy", queries, "-o", "out.npy"
        return forked("hamux_recall", *files, *argv, **{"folder": str(folder), **how})

    return run


@pytest.mark.slow
def test_a_full_disk_is_one_line(folder, recall_apart):
    np.save(folder / "many.npy", np.repeat(HOLES, 2000, 0))
    done = recall_apart(queries="many.npy", limits=[("RLIMIT_FSIZE", 10**6)])
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "larger than a file may be" in done.stderr
    assert not [*folder.glob("out.npy"), *folder.glob("*.tmp"), *folder.glob(".hamux*")]


@pytest.mark.slow
def test_terminated_leaves_no_half_written_file(folder):
    np.save(folder / "many.npy", np.repeat(HOLES, 20_000, 0))
    (folder / "out.npy").write_bytes(b"what was there")
    files = [folder / "memories.npy", folder / "many.npy", "-o", folder / "out.npy"]
    command = [sys.executable, "-c", RECALL, *files, "--batch", "8"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(folder.glob(".hamux*")) and time.monotonic() < deadline: time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert (folder / "out.npy").read_bytes() == b"what was there"
    assert not list(folder.glob(".hamux*"))


@pytest.mark.slow
def test_queries_are_streamed(folder):
    "32 MB of queries pass through a process that grows by less than that"
    many, d = 2**17, 64
    with open(folder / "many.npy", "wb") as f:
        np.lib.format.write_array_header_1_0(
            f, {"descr": "<f4", "fortran_order": False, "shape": (many, d)}
        )
        for _ in range(64): RNG.standard_normal((many // 64, d), np.float32).tofile(f)
    np.save(folder / "m.npy", RNG.standard_normal((16, d), np.float32))
    measure = (
        "import resource, sys; from hamux.cli import hamux_recall; small, *argv = sys.argv[1:];"
        " hamux_recall([argv[0], small, *argv[2:]]);peak = lambda:"
        " resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; before = peak(); hamux_recall(argv);"
        " print(peak() - before)"
    )
    np.save(folder / "few.npy", RNG.standard_normal((2**11, d), np.float32))
    files = [folder / f"{name}.npy" for name in ("few", "m", "many")]
    options = ["--noisy", "--batch", "1024", "--max-steps", "1"]
    command = [sys.executable, "-c", measure, *files, "-o", folder / "out.npy", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 25_000 # kilobytes
    assert os.path.getsize(folder / "out.npy") == os.path.getsize(folder / "many.npy")


@pytest.mark.slow
def test_python_m_hamux_is_the_demo(tmp_path):
    "Where no arrow can be printed, too"
    done = subprocess.run(
        [sys.executable, "-m", "hamux", "-n", "30", "-c", "half", "-o", "picture.png"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | HERE | {"PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "30 of 30" in done.stdout
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


# the demo


def demo(*argv):
    try:
        return cli.hamux_demo([*argv])
    except SystemExit as stopped:
        return stopped.code


@pytest.mark.slow
def test_demo_brings_back_95_of_100_halves(tmp_path, capsys):
    assert demo("-o", f"{tmp_path}/d.png") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {line[0]: line for line in lines if line and line[0] in cli.GOALS}
    assert int(rows["half"][1]) >= 95 and rows["half"][2:4] == ["of", "100"]
    for row in rows.values(): assert float(row[4]) > float(row[6]) # energy before and after


@pytest.mark.parametrize("seed", ["1", "2", "3"])
def test_demo_on_other_digits(tmp_path, seed):
    assert demo("-c", "half", "--seed", seed, "-o", f"{tmp_path}/d.png") == 0


@pytest.mark.slow
def test_demo_says_when_the_recall_fails(tmp_path, capsys):
    assert demo("-n", "60", "-c", "noise", "--noise", "2", "-o", f"{tmp_path}/d.png") == 1
    assert "came back, fewer than 95%" in capsys.readouterr().err
    assert (tmp_path / "d.png").exists()


@pytest.mark.parametrize(
    "argv",
    [
        ["-n", "0"],
        ["-n", "1798"],
        ["-c", "mirror"],
        ["--beta", "-1"],
        ["--seed", "x"],
        ["-o", "d.jpg"],
        ["-o", "no/d.png"],
    ],
)
def test_demo_refuses_in_one_line(tmp_path, capsys, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    assert demo(*argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("hamux-demo: ") and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_demo_without_scikit_learn(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert demo("-o", f"{tmp_path}/d.png") == 2
    assert "pip install 'hamux[demo]'" in capsys.readouterr().err


# what is said, where nobody can hear it


@pytest.mark.slow(but=1)
@pytest.mark.parametrize("how, status, words", [
    ({"out": "closed"}, 2, "standard output cannot be written: it is closed"),
    ({"out": "/dev/full"}, 2, "standard output cannot be written: No space left on device"),
    ({"err": "closed"}, 0, ""),
    ({"err": "/dev/full"}, 0, ""),
    ({"out": "closed", "err": "closed"}, 2, ""),
    ({"out": "/dev/full", "err": "/dev/full"}, 2, ""),
], ids=str)
def test_closed_and_full_outputs(folder, recall_apart, how, status, words):
    "One sentence where there is a place for it, and a status; the answers are there"
    done = recall_apart(**how)
    assert done.returncode == status and words in done.stderr
    assert done.stderr.count("\n") == bool(words)
    np.testing.assert_allclose(np.load(folder / "out.npy"), PATTERNS, atol=0.02)


@pytest.mark.parametrize("err", ["closed", "/dev/full"])
def test_a_mistake_where_errors_cannot_be_said(recall_apart, err):
    assert recall_apart(queries="lost.npy", err=err) == (2, "", "")


@pytest.mark.slow
def test_a_reader_that_has_gone(folder, recall_apart, forked):
    done = recall_apart(out="a pipe")
    assert done.stderr == "" and done.returncode == 141
    done = forked("hamux_recall", "--help", out="/dev/full")
    assert done.returncode == 2 and "No space left on device" in done.stderr


@pytest.mark.slow
def test_a_deleted_working_folder(folder, recall_apart):
    gone = 'mkdir gone && cd gone && rmdir ../gone && exec "$0" -m hamux -n 30 -c half'
    command = ["sh", "-c", gone, sys.executable]
    demo = subprocess.run(
        command, cwd=folder, env=os.environ | HERE, capture_output=True, text=True
    )
    for done in demo, recall_apart(gone=True):
        if "import jax" in done.stderr:
            pytest.skip("this version of JAX cannot be imported from a folder that is gone")
        assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
        assert "the working folder has been deleted; change to one that is there" in done.stderr


# memory, scales, bombs


@pytest.mark.slow
def test_a_batch_is_no_larger_than_the_queries(folder, recall_apart):
    done = recall_apart("--batch", 10**7, limits=[("RLIMIT_DATA", 3 * 2**30)])
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(folder / "out.npy"), PATTERNS, atol=0.02)


def test_columns_that_count_for_nothing_are_said(folder, capsys):
    stamps = np.column_stack([1.76e9 + 60.0 * np.arange(20), RNG.standard_normal((20, 5))])
    np.save(folder / "m.npy", stamps)
    np.save(folder / "q.npy", np.where(np.arange(6) < 1, stamps, np.nan))
    assert recall(folder, memories="m.npy", queries="q.npy") == 0
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and said.err.startswith("hamux-recall: The columns differ")
    np.testing.assert_allclose(np.load(folder / "out.npy"), stamps, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("origin", [1e7, 1.76e9])
def test_far_origins_in_float64(folder, origin):
    np.save(folder / "m.npy", PATTERNS.astype(float) + origin)
    np.save(folder / "q.npy", HOLES.astype(float) + origin)
    assert recall(folder, memories="m.npy", queries="q.npy") == 0
    np.testing.assert_allclose(np.load(folder / "out.npy") - origin, PATTERNS, atol=0.02)


def test_what_cannot_be_told_apart_is_one_line(folder, capsys):
    said = refused(folder, capsys, "--beta", "1e-30", "--batch", "7")
    assert "holes.npy: in the rows from 0 on: All 40 patterns weigh the same for 7 of 7" in said


@pytest.mark.parametrize("name, content", [
    ("q.csv", b"1,2\0\n"),
    ("q.csv", b"1" + b",1" * 10**6 + b"\n"),
    ("q.npz", b"PK\3\4" + bytes(100)),
    ("q.npy", b"\x93NUMPY\1\0\x20\0" + b"(" * 32),
])
def test_hostile_files_are_one_line(folder, capsys, name, content):
    (folder / name).write_bytes(content)
    assert name in refused(folder, capsys, queries=name)
    assert name in refused(folder, capsys, memories=name) or name == "q.csv"


@pytest.mark.slow
def test_programs_are_kept_in_the_cache_folder(tmp_path, forked):
    "Read the second time; none with --no-cache."
    kept = []
    for extra in (["--no-cache"], [], []):
        argv = ["-n", "5", "-c", "half", "-o", "d.png", *extra]
        done = forked("hamux_demo", *argv, folder=str(tmp_path), caches=str(tmp_path))
        assert done.returncode == 0, done.stderr
        # what is small is kept or not by how long its compilation took
        kept.append(sorted(p.name for p in tmp_path.rglob("*descend*-cache")))
    assert not kept[0] and kept[1] and kept[2] == kept[1]
