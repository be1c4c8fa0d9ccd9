"Files of rows: round trips, every refusal and its words, memory, and what a dying writer leaves."

import errno
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hamux.storage import files
from hamux.storage.files import (
    atomic_file,
    check_finite,
    computing_dtype,
    open_rows,
    write_rows,
)
from hamux.storage.problems import FileProblem, file_problems

FORMATS = [".npy", ".npz", ".csv"]
STORAGE = Path(files.__file__).parent
DTYPES = "bool int8 uint8 int16 uint16 int32 uint32 int64 uint64 float16 float32 float64".split()


def write(path, rows, row_shape=None, size=3, dtype=None):
    with write_rows(path, len(rows), row_shape or rows.shape[1:], dtype or rows.dtype) as out:
        for start in range(0, len(rows), size): out.write(rows[start:start + size])
    return path


def refusal(call, *args, **kwargs):
    "The message of the FileProblem that the call ends in, one line from the file to the advice"
    with pytest.raises(FileProblem) as caught:
        result = call(*args, **kwargs)
        if isinstance(result, files.RowSource):
            for _ in result.batches(2):
                pass
    message = str(caught.value)
    assert message.isprintable() and len(message) < 800
    return message


def leftovers(folder): return [p.name for p in Path(folder).rglob("*.tmp")]


# --- round trips ----------------------------------------------------------------------------------

@st.composite
def arrays(draw, max_dims=3):
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=max_dims, max_side=6))
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    array = draw(hnp.arrays(dtype, shape))
    return array


@settings(max_examples=60, deadline=None)
@given(array=arrays(), size=st.integers(1, 8), suffix=st.sampled_from(FORMATS))
def test_what_is_written_comes_back_bit_for_bit(tmp_path_factory, array, size, suffix):
    folder = tmp_path_factory.mktemp("trip")
    path = write(folder/f"x{suffix}", array, size=size)
    flat, source = array.reshape(len(array), -1), open_rows(path)
    assert source.path == path and source.shape == flat.shape
    assert source.row_shape == (flat.shape[1:] if suffix == ".csv" else array.shape[1:])
    batches = list(source.batches(size))
    assert [len(b) for b in batches[:-1]] == [size] * (len(batches) - 1)
    got = np.concatenate(batches)
    assert got.dtype == source.dtype == (np.float64 if suffix == ".csv" else array.dtype)
    np.testing.assert_array_equal(
        got.astype(array.dtype) if array.dtype.kind == "f" else got, flat.astype(got.dtype)
    )
    np.testing.assert_array_equal(source.read(), got)
    if suffix == ".npy": np.testing.assert_array_equal(np.load(path), array)
    if suffix == ".npz": np.testing.assert_array_equal(np.load(path)["rows"], array)
    if suffix == ".csv" and flat.size > 1:
        np.testing.assert_array_equal(
            np.loadtxt(path, delimiter=",", ndmin=2).reshape(flat.shape), got
        )


@settings(max_examples=60, deadline=None)
@given(
    array=arrays(max_dims=4),
    size=st.integers(1, 8),
    order=st.sampled_from("CF"),
    swap=st.booleans(),
    save=st.sampled_from(["npy", "npz", "deflated"]),
)
def test_what_numpy_saved_is_read(tmp_path_factory, array, size, order, swap, save):
    folder = tmp_path_factory.mktemp("numpy")
    stored = np.array(array, order=order, dtype=array.dtype.newbyteorder() if swap else array.dtype)
    path = folder / f"x.{save[:2] + 'y' if save == 'npy' else 'npz'}"
    if save == "npy":
        np.save(path, stored)
    elif save == "npz":
        np.savez(path, stored)
    else:
        np.savez_compressed(path, stored)
    source = open_rows(path)
    got = np.concatenate(list(source.batches(size)))
    assert (
        source.row_shape == array.shape[1:]
        and source.dtype == got.dtype == array.dtype
        and got.dtype.isnative
    )
    np.testing.assert_array_equal(got, array.reshape(len(array), -1))
    assert all(
        b.dtype == array.dtype and b.flags.writeable and b.flags.c_contiguous
        for b in source.batches(size)
    )


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_text_has_enough_digits(tmp_path, dtype):
    bits = (
        np.random.default_rng(0).integers(0, 256, 80_000, np.uint8)
        if dtype != "float16"
        else np.arange(65536, dtype=np.uint16)
    )
    values = bits.view(dtype)
    values = values[np.isfinite(values)][:, None]
    back = open_rows(write(tmp_path/"x.csv", values, size=5000)).read()
    np.testing.assert_array_equal(back.astype(dtype), values)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_npy_header_versions(tmp_path, version):
    array = np.arange(6.).reshape(3, 2)
    with open(tmp_path/"x.npy", "wb") as file:
        np.lib.format.write_array(file, array, version=version)
    np.testing.assert_array_equal(open_rows(tmp_path/"x.npy").read(), array)


@pytest.mark.parametrize("text, rows", [
    ("1,2\n3,4", [[1, 2], [3, 4]]),
    ("a,b\r\n1,2\r\n", [[1, 2]]),
    ("\ufeff1,2\n", [[1, 2]]),
    ("\ufeffa,b\n1,2\n", [[1, 2]]),
    ("# x, y\n\n  \n 1 ,\t2 # two\n", [[1, 2]]),
    ("1\n2\n", [[1], [2]]),
    ("1,,NaN\n , ,-3e-2\n", [[1, np.nan, np.nan], [np.nan, np.nan, -.03]]),
    (",\n1,2\n", [[np.nan, np.nan], [1, 2]]),
    ("inf,-Infinity\n", [[np.inf, -np.inf]]),
    ("id,\n1,2\n", [[1, 2]]),
    ("1,2\r3,4\r", [[1, 2], [3, 4]]),
    ("a_1,a_2\n1,2\n", [[1, 2]]),
    ("0.1,1e308,-0\n", [[.1, 1e308, -0.]]),
])
def test_csv_as_people_write_it(tmp_path, text, rows):
    (tmp_path/"x.csv").write_bytes(text.encode())
    source = open_rows(tmp_path/"x.csv")
    assert source.shape == np.shape(rows) and source.dtype == np.float64
    for size in (1, 2, 5):
        np.testing.assert_array_equal(np.concatenate(list(source.batches(size))), rows)


def test_names_of_arrays(tmp_path):
    np.savez(tmp_path/"x.npz", a=np.zeros((1, 1)), rows=np.ones((2, 2)), c=np.zeros((3, 3)))
    assert open_rows(tmp_path/"x.npz").shape == (2, 2) # `rows` is the obvious one
    assert open_rows(tmp_path/"x.npz", name="c").shape == (3, 3)
    np.savez(tmp_path/"one.NPZ", other=np.zeros((4, 4)))
    os.replace(tmp_path/"one.NPZ.npz", tmp_path/"one.NPZ")
    # a capital extension, and a single array of any name
    assert open_rows(tmp_path/"one.NPZ").shape == (4, 4)


def test_batch_sizes_and_order(tmp_path):
    source = open_rows(write(tmp_path/"x.npy", np.arange(10).reshape(10, 1)))
    assert [b.ravel().tolist() for b in source.batches(4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    with pytest.raises(ValueError, match="size must be at least 1, got 0"): source.batches(0)


# --- what is refused, and in which words ----------------------------------------------------------

def saved(array, save=np.save, **arrays):
    file = io.BytesIO()
    save(file, array) if array is not None else save(file, **arrays)
    return file.getvalue()


good = saved(np.arange(12.).reshape(4, 3))
zipped = saved(np.arange(12.).reshape(4, 3), np.savez)
fortran = saved(np.asfortranarray(np.arange(12.).reshape(4, 3)))


def damaged_zip():
    at = zipped.index(np.arange(12.).tobytes()) + 40
    return zipped[:at] + b"\xff" + zipped[at + 1:]


def zip_of(data, name="arr_0.npy", **how):
    with zipfile.ZipFile(file := io.BytesIO(), "w", **how) as archive: archive.writestr(name, data)
    return file.getvalue()


def damaged_deflated():
    made, start = zip_of(good, compression=zipfile.ZIP_DEFLATED), 30 + len("arr_0.npy")
    return made[:start] + b"\xff" + made[start + 1:]


def directory_byte(data, at, value):
    "The archive with one byte of its directory changed"
    at += data.index(b"PK\x01\x02")
    return data[:at] + bytes([value]) + data[at + 1:]


structured = np.zeros(3, [("a", float)]).reshape(3, 1)
REFUSED = {
    "empty": ("x.npy", b"", "is empty (0 bytes); make it or copy it again"),
    "empty csv": ("x.csv", b"", "is empty (0 bytes)"),
    "extension": ("x.txt", b"1,2", ".txt is no known format; name a .npy, .npz, .csv or .parquet"),
    "no extension": ("x", b"1,2", "a name without extension is no known format"),
    "not npy": ("x.npy", b"1,2\n3,4\n", "is not a .npy file; save it with numpy.save"),
    "pickle": ("x.npy", b"\x80\x04\x95abc", "is not a .npy file"),
    "not npz": ("x.npz", b"1,2\n3,4\n", "is not a .npz file"),
    "npz as npy": ("x.npy", zipped, "is a .npz file by its content; rename it to end in .npz"),
    "npy as npz": ("x.npz", good, "is a .npy file by its content; rename it to end in .npy"),
    "npy as csv": ("x.csv", good, "is a .npy file by its content"),
    "npy cut short": ("x.npy", good[:-1], "is cut short (223 bytes, and 224 by its header)"),
    "npy header only": ("x.npy", good[:128], "is cut short (128 bytes"),
    "npy cut in its header": (
        "x.npy",
        good[:60],
        "its .npy header cannot be read; save it again with numpy.save",
    ),
    "npy mangled header": (
        "x.npy",
        good[:10] + b"((((" + good[14:],
        "its .npy header cannot be read",
    ),
    "npy from the future": (
        "x.npy",
        good[:6] + b"\x09" + good[7:],
        "its .npy header cannot be read",
    ),
    "npy of two arrays": (
        "x.npy",
        good + good,
        "holds more than one array (448 bytes, and 224 by its header)",
    ),
    "fortran cut short": ("x.npy", fortran[:-8], "is cut short"),
    "negative shape": ("x.npy", good.replace(b"(4, 3)", b"(-4,3)"), "holds no values"),
    "huge shape": (
        "x.npy",
        good.replace(b"(4, 3), }", b"(4, 3" + b"9" * 20 + b"), }")[:224],
        "cut short",
    ),
    "npz cut short": ("x.npz", zipped[:-30], "is damaged or cut short; make it or copy it again"),
    "npz checksum": ("x.npz", damaged_zip(), "is damaged or cut short"),
    "npz deflated checksum": (
        "x.npz",
        directory_byte(zip_of(good, compression=zipfile.ZIP_DEFLATED), 16, 0),
        "is damaged or cut short",
    ),
    "npz deflated damage": ("x.npz", damaged_deflated(), "is damaged or cut short"),
    "npz of nothing": (
        "x.npz",
        zip_of(b"a", "readme.txt"),
        "needs a choice between its arrays; it holds none at all",
    ),
    "empty zip": ("x.npz", b"PK\x05\x06" + bytes(18), "it holds none at all"),
    "npz of several": (
        "x.npz",
        saved(None, np.savez, a=np.eye(2), b=np.eye(3)),
        "needs a choice between its arrays; it holds 'a', 'b'",
    ),
    "npz of rubbish": ("x.npz", zip_of(b"rubbish"), "its .npy header cannot be read"),
    "npz member cut short": ("x.npz", zip_of(good[:-1]), "is cut short"),
    "npz packed oddly": (
        "x.npz",
        zip_of(good, compression=zipfile.ZIP_BZIP2),
        "packed in a way that NumPy does not use",
    ),
    "npz encrypted": ("x.npz", directory_byte(zip_of(good), 8, 1), "is encrypted, or packed"),
    "npz from the future": (
        "x.npz",
        directory_byte(zip_of(good), 6, 255),
        "is damaged or cut short",
    ),
    "1-D": (
        "x.npy",
        saved(np.zeros(5)),
        "holds a 1-D array of shape (5,), and a pattern is a row of a 2-D one; save array[None, :]",
    ),
    "0-D": ("x.npy", saved(np.float64(3)), "holds a 0-D array"),
    "no rows": (
        "x.npy",
        saved(np.zeros((0, 5))),
        "holds no values (shape (0, 5)); give at least one row",
    ),
    "no features": ("x.npz", saved(np.zeros((5, 0)), np.savez), "holds no values (shape (5, 0))"),
    "complex": (
        "x.npy",
        saved(np.eye(2) * 1j),
        "holds complex numbers; save real numbers of at most 64 bits, such as float32",
    ),
    "objects": ("x.npy", saved(np.array([[1, None]])), "holds Python objects"),
    "objects in npz": ("x.npz", saved(np.array([[1, None]]), np.savez), "holds Python objects"),
    "text": ("x.npy", saved(np.array([["a", "b"]])), "holds text"),
    "bytes": ("x.npy", saved(np.array([[b"a", b"b"]])), "holds text"),
    "records": ("x.npy", saved(structured), "holds records or raw bytes"),
    "dates": ("x.npy", saved(np.zeros((2, 2), "datetime64[s]")), "holds dates"),
    "durations": ("x.npy", saved(np.zeros((2, 2), "timedelta64[s]")), "holds durations"),
    "csv header only": (
        "x.csv",
        b"a,b\n",
        "holds no rows (a first line without numbers is a header); give at least one",
    ),
    "csv comments only": ("x.csv", b"# 1,2\n\n", "holds no rows"),
    "csv ragged": (
        "x.csv",
        b"a,b\n1,2\n\n3,4,5\n",
        "line 4 has 3 values, and the rows before it 2; give every row as many",
    ),
    "csv word": (
        "x.csv",
        b"a,b\n1,2\n3,four\n",
        "'four' on line 3, column 2 (counted from 1) is not a number",
    ),
    "csv word in line 1": ("x.csv", b"1,two\n", "'two' on line 1, column 2"),
    "csv semicolons": (
        "x.csv",
        b"1;2\n3;4\n",
        "'3;4' on line 2, column 1 (counted from 1) is not a number; put commas between values",
    ),
    "csv underscores": ("x.csv", b"1_0,2\n", "'1_0' on line 1"),
    "csv quoted": ("x.csv", b'1,"2"\n', "is not a number"),
    "csv in UTF-16": (
        "x.csv",
        "1,2\n".encode("utf-16"),
        "is not UTF-8 text; save it as comma-separated UTF-8",
    ),
    "csv in Latin-1": ("x.csv", b"caf\xe9,b\n1,2\n", "is not UTF-8 text"),
    "csv with zeros": ("x.csv", b"1,2\0\n", "is not a number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, case):
    name, content, words = REFUSED[case]
    (tmp_path/name).write_bytes(content)
    message = refusal(open_rows, tmp_path/name)
    assert message.startswith(f"{tmp_path/name}: ") and words in message


@pytest.mark.skipif(np.dtype("longdouble").itemsize == 8, reason="no wider float on this machine")
def test_longdouble_is_refused(tmp_path):
    np.save(tmp_path/"x.npy", np.zeros((2, 2), "longdouble"))
    assert "holds extended-precision numbers; save real numbers" in refusal(
        open_rows, tmp_path / "x.npy"
    )


def test_objects_are_never_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self): return os.mkdir, (str(tmp_path/"exploded"),)
    np.save(tmp_path/"x.npy", np.array([[Bomb()]], dtype=object), allow_pickle=True)
    refusal(open_rows, tmp_path/"x.npy")
    assert not (tmp_path/"exploded").exists()


def test_refused_places(tmp_path):
    assert refusal(open_rows, tmp_path / "no.npy").endswith(
        "no.npy: no such file or folder; check the spelling"
    )
    (tmp_path/"d.npy").mkdir()
    assert "is a folder; name a file" in refusal(open_rows, tmp_path/"d.npy")
    (tmp_path/"f").write_bytes(b"")
    assert "is a file and not a folder" in refusal(open_rows, tmp_path/"f"/"x.npy")
    os.mkfifo(tmp_path/"pipe.csv")
    assert "is a pipe or a device" in refusal(open_rows, tmp_path/"pipe.csv")
    os.symlink("loop.npy", tmp_path/"loop.npy")
    assert "cannot be used (Too many levels" in refusal(open_rows, tmp_path/"loop.npy")
    assert "File name too long" in refusal(open_rows, tmp_path/("x" * 300 + ".npy"))
    assert r"'two\nlines.npy': no such file" in refusal(open_rows, "two\nlines.npy")
    assert "only the arrays of a .npz file have names" in refusal(
        open_rows, tmp_path / "x.csv", name="a"
    )
    np.savez(tmp_path/"x.npz", a=np.eye(2))
    assert "has no array 'b'; it holds 'a'" in refusal(open_rows, tmp_path/"x.npz", name="b")


@pytest.mark.parametrize(
    "number, words",
    [
        (errno.EACCES, "permission denied; check the permissions"),
        (errno.EPERM, "permission denied"),
        (errno.ENOSPC, "the disk is full; free some space"),
        (errno.EDQUOT, "your disk quota is used up"),
        (errno.EROFS, "its file system is read-only; choose another place"),
        (errno.EFBIG, "larger than a file may be here"),
        (errno.EIO, "cannot be used (Input/output error); check the disk"),
    ],
)
def test_what_the_system_refuses(tmp_path, monkeypatch, number, words):
    def refuse(*args, **kwargs): raise OSError(number, os.strerror(number))
    path = write(tmp_path/"x.npy", np.eye(3))
    monkeypatch.setattr(files, "open", refuse, raising=False)
    assert words in refusal(open_rows, path)
    assert words in refusal(write, path, np.zeros((2, 2)))
    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", refuse) # where a disk that is full or broken may say so last
    assert words in refusal(write, path, np.zeros((2, 2)))
    np.testing.assert_array_equal(np.load(path), np.eye(3))
    assert not leftovers(tmp_path)


def test_no_memory(tmp_path):
    with open(tmp_path/"x.npy", "wb") as file: # sparse: 2 rows, 2 TB each
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": (2, 2**41)}
        )
        try:
            file.truncate(file.tell() + 2**42)
        except OSError:
            pytest.skip("no sparse files of this size here")
    out = subprocess.run([sys.executable, "-c", LOADER + textwrap.dedent(f"""
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))
        try:
            files.open_rows({str(tmp_path/'x.npy')!r}).read()
        except files.FileProblem as e:
            print(e)
        """)], capture_output=True, text=True)
    assert "does not fit in memory; ask for smaller batches" in out.stdout, out.stderr


def test_changed_between_passes(tmp_path):
    source = open_rows(write(tmp_path/"x.npy", np.eye(4)))
    np.save(tmp_path/"x.npy", np.zeros((4, 4, 1)))
    assert "was changed while it was in use" in refusal(next, source.batches(1))


def test_changed_during_a_pass(tmp_path):
    source = open_rows(write(tmp_path/"x.csv", np.eye(4)))
    batches = source.batches(2)
    next(batches)
    with open(tmp_path/"x.csv", "a") as file: file.write("1,2,3,4\n")
    next(batches)
    assert "was changed while it was in use" in refusal(next, batches)
    source = open_rows(write(tmp_path/"x.npy", np.zeros((4, 100_000))))
    batches = source.batches(1)
    next(batches)
    os.truncate(tmp_path/"x.npy", 1_000_000)
    assert "is damaged or cut short" in refusal(list, batches)
    np.save(tmp_path/"f.npy", np.zeros((4, 100_000), order="F"))
    batches = open_rows(tmp_path/"f.npy").batches(1)
    next(batches)
    os.truncate(tmp_path/"f.npy", 1_000_000)
    assert "is damaged or cut short" in refusal(list, batches)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["x.npy", "x.npz", "z.npz", "x.csv"]))
def test_a_damaged_file_is_refused_or_read_and_nothing_else(tmp_path_factory, data, kind):
    whole = {
        "x.npy": good,
        "x.npz": zipped,
        "z.npz": saved(np.eye(4), np.savez_compressed),
        "x.csv": b"a,b\n1,2\n3,4\n",
    }[kind]
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = (
        content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    )
    path = tmp_path_factory.getbasetemp()/f"damaged-{os.getpid()}{Path(kind).suffix}"
    path.write_bytes(content)
    try:
        rows = open_rows(path).read()
    except FileProblem as e:
        assert str(e).startswith(str(path)) and str(e).isprintable()
    else:
        assert rows.ndim == 2 and rows.size


# --- the values -----------------------------------------------------------------------------------

@given(st.lists(st.sampled_from(DTYPES), max_size=4))
def test_computing_dtype(dtypes):
    wide = any(
        np.dtype(d) == np.float64 or (np.dtype(d).kind in "iu" and np.dtype(d).itemsize > 2)
        for d in dtypes
    )
    assert computing_dtype(*dtypes) == (np.float64 if wide else np.float32)


@given(
    rows=hnp.arrays(
        st.sampled_from([np.float16, np.float32, np.float64]),
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=4),
        elements=st.sampled_from([0.0, 1.0, -1.0, np.nan, np.inf, -np.inf]),
    ),
    allow_nan=st.booleans(),
)
def test_check_finite_names_the_first_offender(rows, allow_nan):
    bad = [
        (i, j)
        for i, row in enumerate(rows.tolist())
        for j, v in enumerate(row)
        if abs(v) == np.inf or (v != v and not allow_nan)
    ]
    if not bad: return check_finite(rows, allow_nan=allow_nan, first_row=5, what="q.npy")
    message = refusal(check_finite, rows, allow_nan=allow_nan, first_row=5, what="q.npy")
    assert message.startswith(
        f"q.npy: row {bad[0][0] + 5}, column {bad[0][1]} (counted from 0) is {rows[bad[0]]};"
    )
    assert (
        "NaN marks an unknown entry in queries only"
        if np.isnan(rows[bad[0]])
        else "give a finite number"
    ) in message


def test_check_finite_passes_integers():
    check_finite(np.eye(2, dtype=np.int64), allow_nan=False)
    check_finite(np.eye(2, dtype=bool), allow_nan=False)


# --- writing --------------------------------------------------------------------------------------

@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    "trouble", [KeyboardInterrupt, SystemExit, RuntimeError, OSError, GeneratorExit]
)
def test_an_exception_leaves_the_old_file(tmp_path, suffix, trouble):
    path = write(tmp_path/f"x{suffix}", np.eye(3))
    old = path.read_bytes()
    with pytest.raises(trouble), write_rows(path, 100, 3, "float32") as out:
        out.write(np.zeros((50, 3)))
        raise trouble
    assert path.read_bytes() == old and os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    "n, words",
    [
        (2, "3 rows were written where 2 were announced"),
        (4, "3 rows were written where 4 were announced"),
    ],
)
def test_the_announced_number_of_rows(tmp_path, suffix, n, words):
    with (
        pytest.raises(ValueError, match=words),
        write_rows(tmp_path / f"x{suffix}", n, 3, "float32") as out,
    ):
        out.write(np.eye(3))
    assert os.listdir(tmp_path) == []


def test_batches_that_do_not_fit(tmp_path):
    with write_rows(tmp_path/"x.npy", 4, (2, 3), "float32") as out:
        for bad in (np.zeros((2, 5)), np.zeros(6), np.zeros((1, 3, 2)), np.float32(1)):
            with pytest.raises(ValueError, match=r"does not fit rows of shape \(2, 3\)"):
                out.write(bad)
        with pytest.raises(TypeError): out.write(np.zeros((1, 6), complex))
        out.write(np.ones((2, 6)))
        out.write(np.zeros((0, 6)))
        out.write(np.asfortranarray(np.arange(6).reshape(1, 2, 3)))
        out.write(np.asfortranarray(np.arange(6, dtype="float32").reshape(1, 6)))
        with pytest.raises(ValueError, match="5 rows were written where 4 were announced"):
            out.write(np.ones((1, 6)))
    np.testing.assert_array_equal(
        np.load(tmp_path / "x.npy").reshape(4, 6), [[1] * 6, [1] * 6, range(6), range(6)]
    )
    with write_rows(tmp_path/"f.npy", 3, 2, "float32") as out:
        out.write(np.asfortranarray(np.arange(6, dtype="float32").reshape(3, 2)))
    np.testing.assert_array_equal(np.load(tmp_path/"f.npy"), [[0, 1], [2, 3], [4, 5]])
    with pytest.raises(TypeError), write_rows(tmp_path/"y.npy", 1, 1, "int8") as out:
        out.write(np.array([[.5]]))


@pytest.mark.parametrize("make, words", [
    (lambda d: d/"x.txt", "is no known format; name a .npy, .npz or .csv file"),
    (lambda d: d/"no"/"x.npy", "its folder does not exist; make the folder first"),
    (lambda d: (d/"x.npy").mkdir() or d/"x.npy", "is a folder; name a file"),
    (lambda d: os.mkfifo(d/"x.npy") or d/"x.npy", "is a pipe or a device; name an ordinary file"),
    (lambda d: os.symlink("x.npy", d/"x.npy") or d/"x.npy", "cannot be used (Too many levels"),
    (lambda d: os.symlink(d/"no"/"y.npy", d/"x.npy") or d/"x.npy", "its folder does not exist"),
    (lambda d: d/("x" * 300 + ".npy"), "File name too long"),
])
def test_no_place_for_it_is_said_at_once(tmp_path, make, words):
    path, started = make(tmp_path), False
    with pytest.raises(FileProblem, match=re.escape(words)), write_rows(path, 1, 1, "float32"):
        started = True
    assert not started and not leftovers(tmp_path)


def test_a_dtype_or_shape_that_could_not_be_read_is_not_written(tmp_path):
    assert "holds complex numbers" in refusal(write, tmp_path/"x.npy", np.eye(2), dtype=complex)
    assert "holds no values" in refusal(write, tmp_path/"x.npy", np.zeros((0, 2)))
    assert os.listdir(tmp_path) == []


def test_sizes_may_be_numpy_integers(tmp_path):
    with write_rows(tmp_path/"x.npy", np.int64(2), np.int32(3), "float32") as out:
        out.write(np.ones((2, 3)))
    np.testing.assert_array_equal(np.load(tmp_path/"x.npy"), np.ones((2, 3)))


def test_a_write_protected_file_is_not_replaced(tmp_path, monkeypatch):
    path = write(tmp_path/"x.npy", np.eye(3))
    # root may write everything, so it is simulated
    monkeypatch.setattr(os, "access", lambda *args, **kwargs: False)
    assert "permission denied" in refusal(write, path, np.zeros((2, 2)))
    np.testing.assert_array_equal(np.load(path), np.eye(3))


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere"
)
def test_a_write_protected_folder(tmp_path):
    tmp_path.chmod(0o555)
    assert "permission denied" in refusal(write, tmp_path/"x.npy", np.eye(2))


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions(tmp_path, mask):
    before = os.umask(mask)
    try:
        new = write(tmp_path/"new.npy", np.eye(2))
        assert new.stat().st_mode & 0o777 == 0o666 & ~mask
        (tmp_path/"private.csv").touch(0o600)
        (tmp_path/"private.csv").chmod(0o604)
        with write_rows(tmp_path/"private.csv", 1, 1, "float32") as out:
            # from the start
            assert [p.stat().st_mode & 0o777 for p in tmp_path.glob(".hamux-*")] == [0o604]
            out.write(np.ones((1, 1)))
        assert (tmp_path/"private.csv").stat().st_mode & 0o777 == 0o604
    finally:
        os.umask(before)


def test_a_link_stays_a_link(tmp_path):
    (tmp_path/"far").mkdir()
    for there in (True, False):
        target = tmp_path/"far"/f"{there}.npy"
        if there: write(target, np.eye(2))
        os.symlink(target, tmp_path/f"{there}.npy")
        write(tmp_path/f"{there}.npy", np.zeros((3, 3)))
        assert (tmp_path/f"{there}.npy").is_symlink() and not target.is_symlink()
        np.testing.assert_array_equal(np.load(target), np.zeros((3, 3)))


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("link", [False, True])
def test_answers_over_their_queries(tmp_path, suffix, link):
    queries = np.arange(60.).reshape(20, 3)
    path = write(tmp_path/f"q{suffix}", queries)
    out_path = tmp_path/f"link{suffix}" if link else path
    if link: out_path.symlink_to(path)
    source = open_rows(path)
    with write_rows(out_path, *source.shape, source.dtype) as out:
        for batch in source.batches(7): out.write(batch + 1)
    np.testing.assert_array_equal(open_rows(path).read(), queries + 1)


def test_equal_rows_make_equal_files(tmp_path):
    for suffix in FORMATS:
        write(tmp_path/f"a{suffix}", np.eye(3), size=1)
        write(tmp_path/f"b{suffix}", np.eye(3), size=3)
        assert (tmp_path/f"a{suffix}").read_bytes() == (tmp_path/f"b{suffix}").read_bytes()
    # and no time of day
    with zipfile.ZipFile(tmp_path/"a.npz") as archive:
        assert archive.infolist()[0].date_time[0] == 1980


def test_a_disk_that_is_too_small_is_said_at_once(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=799))
    started = False
    with (
        pytest.raises(
            FileProblem, match="needs 800 bytes, and its disk has 799 left; free some space"
        ),
        write_rows(tmp_path / "x.npy", 10, 10, "float64"),
    ):
        started = True
    assert not started and os.listdir(tmp_path) == []


def test_concurrent_writers_do_not_meet(tmp_path):
    path, both, problems = tmp_path/"x.npy", threading.Barrier(4), []

    def work(k):
        try:
            with write_rows(path, 100, 50, "float32") as out:
                both.wait()
                for _ in range(10): out.write(np.full((10, 50), k))
                both.wait()
        except BaseException as e:
            problems.append(e)
    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not problems and os.listdir(tmp_path) == ["x.npy"]
    assert len(np.unique(np.load(path))) == 1


def test_file_problems_leaves_other_errors_alone():
    with pytest.raises(KeyError), file_problems("x"): raise KeyError
    with pytest.raises(FileProblem, match=r"^x: a thing$"), file_problems("y"):
        raise FileProblem.at("x", "a thing")


def test_atomic_file_does_not_blame_the_file_for_the_block(tmp_path):
    with pytest.raises(BrokenPipeError), atomic_file(tmp_path/"x"): raise BrokenPipeError
    assert os.listdir(tmp_path) == []


# --- in processes of their own: memory, limits, sudden death --------------------------------------

# only these modules, without JAX behind them: quick to start, and a small process to measure
LOADER = textwrap.dedent(f"""
    import os, sys, types, numpy as np
    for name, folder in (("hamux", {str(STORAGE.parent)!r}), ("hamux.storage", {str(STORAGE)!r})):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [folder]
    import hamux.storage.files as files
    """)


def python(code, *args):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", LOADER + textwrap.dedent(code), *map(str, args)],
        capture_output=True,
        text=True,
    )


@pytest.mark.slow(but=2)
@pytest.mark.parametrize("suffix", FORMATS)
def test_streaming_needs_batches_only(tmp_path, suffix):
    "30 MB (of text: 5) go through in batches of 0.3 MB; little more than two may be alive"
    n, size = (600 if suffix == ".csv" else 7500), 75
    batch = np.random.default_rng(0).random((size, 500))
    tracemalloc.start()
    try:
        with write_rows(tmp_path / f"x{suffix}", n, 500, "float64") as out:
            for _ in range(n // size):
                out.write(batch)
        source, total = open_rows(tmp_path / f"x{suffix}"), 0
        with write_rows(tmp_path / f"y{suffix}", *source.shape, source.dtype) as out:
            for rows in source.batches(size):
                out.write(rows)
                total += len(rows)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == n and peak < 4 * batch.nbytes
    assert (tmp_path / f"x{suffix}").read_bytes() == (tmp_path / f"y{suffix}").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["x.npy", "fortran.npy", "x.npz", "deflated.npz"])
def test_peak_memory_of_a_large_file(tmp_path, kind):
    "200 MB are copied by a process that grows by less than 20"
    path = tmp_path/kind
    if "x." in kind:
        with write_rows(path, 50_000, 1000, "float32") as out:
            for i in range(50): out.write(np.full((1000, 1000), i, np.float32))
    elif kind == "fortran.npy":
        array = np.lib.format.open_memmap(path, "w+", "float32", (50_000, 1000), fortran_order=True)
        array[:] = np.repeat(np.arange(50), 1000)[:, None]
        del array
    else:
        np.savez_compressed(
            path, np.repeat(np.arange(50, dtype=np.float32), 1_000_000).reshape(50_000, 1000)
        )
    out = python("""
        import resource
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        source = files.open_rows(sys.argv[1])
        before = peak()
        with files.write_rows(sys.argv[2], *source.shape, source.dtype) as out:
            for i, batch in enumerate(source.batches(500)):
                assert (batch == i // 2).all()
                out.write(batch)
        print(peak() - before)
        """, path, tmp_path/"copy.npy")
    assert out.returncode == 0, out.stderr
    # a map brings 16 pages at a time, for each column
    assert float(out.stdout) < (90 if "fortran" in kind else 20)
    assert (tmp_path/"copy.npy").stat().st_size > 2e8


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_killed_writer_leaves_the_old_file(tmp_path, suffix):
    path = write(tmp_path/f"x{suffix}", np.eye(3))
    old = path.read_bytes()
    with subprocess.Popen([sys.executable, "-c", LOADER + textwrap.dedent("""
        import time
        with files.write_rows(sys.argv[1], 1000, 1000, "float64") as out:
            out.write(np.ones((500, 1000)))
            print("half", flush=True)
            time.sleep(60)
        """), path], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout.readline() == "half\n"
        writer.send_signal(signal.SIGKILL)
    assert writer.returncode == -signal.SIGKILL
    assert path.read_bytes() == old and len(leftovers(tmp_path)) == 1 # which is what the page says
    write(path, np.zeros((2, 2))) # it is in nobody's way, and the next writer removes it
    np.testing.assert_array_equal(open_rows(path).read(), np.zeros((2, 2)))
    assert os.listdir(tmp_path) == [path.name]


def test_a_living_writer_keeps_its_file(tmp_path):
    "Others in the same folder, and other processes, leave it alone."
    with atomic_file(tmp_path / "slow") as slow:
        slow.write(b"first")
        write(tmp_path / "quick.npy", np.eye(2))
        python("files.write_rows(sys.argv[1], 1, 1, 'f4').__enter__()", tmp_path / "other.npy")
        slow.write(b", and last")
    assert (tmp_path / "slow").read_bytes() == b"first, and last"


@pytest.mark.parametrize("call", [open_rows, lambda p: write_rows(p, 1, 1, "f4").__enter__()])
@pytest.mark.parametrize("name", ["a\0.npy", b"a\0.npy", "\ud800.npy", ""])
def test_names_that_no_file_can_have(call, name):
    assert "no file can have the name" in refusal(call, name)


@pytest.mark.parametrize("path", [3, None, 1.5, ["x.npy"]])
def test_what_is_no_name(path):
    with pytest.raises(TypeError, match="path must be the name of a file"): open_rows(path)


def test_names_in_bytes(tmp_path):
    path = write(tmp_path / "x.npy", np.eye(2))
    np.testing.assert_array_equal(open_rows(os.fsencode(path)).read(), np.eye(2))
    assert "no such file" in refusal(open_rows, b"none.npy")


def peak(call, *args):
    "What a call allocates at most, as Python and NumPy count it, in bytes, and how it ends"
    tracemalloc.start()
    try:
        return refusal(call, *args), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def bomb(size, promised):
    "An archive of zeros, whose directory and header promise more"
    header = io.BytesIO()
    shape = (promised // 1000, 1000)
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    data = bytearray(zip_of(header.getvalue() + bytes(size), compression=zipfile.ZIP_DEFLATED))
    at = data.index(b"PK\x01\x02") + 24 # the size of the member in the directory
    data[at:at + 4] = (len(header.getvalue()) + promised).to_bytes(4, "little")
    return bytes(data)


@pytest.mark.parametrize("size, promised, words", [
    (10**3, 4 * 10**9, "more than it can"),
    (10**6, 4 * 10**9, "more than it can"),
    (10**5, 2 * 10**5, "is damaged or cut short"),
])
def test_what_an_archive_promises_is_not_allocated(tmp_path, size, promised, words):
    (tmp_path / "x.npz").write_bytes(bomb(size, promised))
    message, most = peak(lambda path: open_rows(path).read(), tmp_path / "x.npz")
    assert words in message and most < 10 * size + 10**6


@pytest.mark.slow(but=1)
@pytest.mark.parametrize("last", ["1", "x"])
def test_a_million_columns(tmp_path, last):
    "Eight bytes a number and a few copies of the line, not a word object for each"
    path = tmp_path / "x.csv"
    path.write_text("1," * 999_999 + last + "\n")
    tracemalloc.start()
    try:
        rows = open_rows(path).read()
        assert last == "1" and rows.shape == (1, 10**6) and rows.sum() == 10**6
    except FileProblem as e:
        assert last == "x" and "'x' on line 1, column 1000000" in str(e)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 10 * path.stat().st_size


@pytest.mark.parametrize("header", [
    "{" * 5000, "(" * 9000, "[" * 9000, "{'descr': '<f8', 'fortran_order': False}", "1" * 9999,
    "{'descr': '<f8', 'fortran_order': False, 'shape': (2, 2), 'more': 1}", "-" * 5000, "'",
    "{'descr': 'f8,f8', 'fortran_order': False, 'shape': (2, 2)}", "__import__('os')", "\x00",
    "{'descr': 8, 'fortran_order': False, 'shape': (2, 2)}", "{'descr': '<f3', 'shape': (2, 2)}",
    "{'descr': '<f8', 'fortran_order': 1, 'shape': (2, 2)}", "\\", "1if 1else 1", "{1: {2: 3}}",
    "{'descr': '<f8', 'fortran_order': False, 'shape': [2, 2]}", "{'a': 'b', 'a': 'b', 'a': 'b'}",
    "{'descr': '<f8', 'fortran_order': False, 'shape': (" + "1," * 70 + ")}", "", " ",
    "{'descr': '<f8', 'fortran_order': False, 'shape': (2.0, 2)}", "{'descr': '<U99999999999'}",
])
def test_headers_that_are_none(tmp_path, header):
    "Whatever it would make of a parser of Python, it is one sentence"
    text = header.encode("latin1") + b"\n"
    magic = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little")
    (tmp_path / "x.npy").write_bytes(magic + text + bytes(32))
    assert "its .npy header cannot be read" in refusal(open_rows, tmp_path / "x.npy")


@pytest.mark.parametrize("header", [
    '{"shape":(3,2),"descr":"<f4","fortran_order":False}',
    "{'descr': '<f4', 'fortran_order': False, 'shape': (3L, 2L), }",
    "  {'fortran_order':False , 'shape':( 3, 2 ,) ,'descr':'<f4'}  ",
])
def test_headers_of_other_programs(tmp_path, header):
    text = header.encode() + b"\n"
    magic = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little")
    (tmp_path / "x.npy").write_bytes(magic + text + np.arange(6, dtype="<f4").tobytes())
    np.testing.assert_array_equal(open_rows(tmp_path / "x.npy").read().ravel(), np.arange(6))


def test_a_terminated_writer_cleans_up(tmp_path):
    with subprocess.Popen([sys.executable, "-c", LOADER + textwrap.dedent("""
        import signal, time
        signal.signal(signal.SIGTERM, lambda *args: sys.exit(143))
        with files.write_rows(sys.argv[1], 1000, 1000, "float64") as out:
            out.write(np.ones((500, 1000)))
            print("half", flush=True)
            time.sleep(60)
        """), tmp_path/"x.npz"], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout.readline() == "half\n"
        writer.terminate()
    assert writer.returncode == 143 and os.listdir(tmp_path) == []


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("limit", [1_000_000, 100, 0])
def test_a_file_that_may_not_grow(tmp_path, suffix, limit):
    "A real failure of write(2): one problem, no late noise, the old file as it was"
    path = write(tmp_path / f"x{suffix}", np.eye(3))
    old = path.read_bytes()
    out = python(
        """
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
        try:
            with files.write_rows(sys.argv[1], 300, 1000, "float64") as out:
                for _ in range(3): out.write(np.full((100, 1000), 1 / 3))
        except files.FileProblem as e:
            print(e)
        """,
        path,
        limit,
    )
    assert out.returncode == 0 and out.stderr == ""
    assert (
        out.stdout
        == f"{path}: is larger than a file may be here; raise the limit (ulimit -f), or choose"
        " another place\n"
    )
    assert path.read_bytes() == old and os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_full_disk_when_the_file_is_closed(tmp_path, suffix):
    "So few bytes that all of them wait in the buffer until the end"
    out = python("""
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        try:
            with files.write_rows(sys.argv[1], 1, 1, "float64") as out: out.write(np.ones((1, 1)))
        except files.FileProblem as e:
            print(e)
        """, tmp_path/f"x{suffix}")
    assert out.returncode == 0 and out.stderr == "" and "larger than a file may be" in out.stdout
    assert os.listdir(tmp_path) == []


def test_importing_needs_numpy_only():
    out = python("print(sorted(m for m in ('jax', 'equinox', 'matplotlib') if m in sys.modules))")
    assert out.stdout == "[]\n", out.stderr
