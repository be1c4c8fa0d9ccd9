"""Memories of arrays on many devices: one process with eight, two processes with four each."""

import pickle

import jax
import numpy as np
import pytest
from several_devices import said, said_by_two, start

from hamux.memories.arrays import Memory, recall

PROGRAM = "spread_memory_program.py"
D, N, M, V, DEVICES = 6, 8, 4, 2, 8 # as there: of one look


@pytest.fixture
def folder(tmp_path):
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).normal(size=(203, 6)))
    return tmp_path


def check(answer, processes):
    assert answer["devices"] == [8, processes]
    assert {"holes", "file"} <= set(answer["cases"])
    for what, (apart, same) in answer["cases"].items():
        assert apart < 1e-8 and same, (what, apart, same)
    assert answer["one axis of two"] < 1e-12 and answer["both axes"] < 1e-12
    assert answer["bounds"]
    assert answer["rows here"] == 32 # of 256, 203 of them patterns
    assert answer["shards here"] == 8 // processes
    few, many = answer["exchanged"]
    assert few == many # sixteen times as many patterns
    sums = sum(sum(sizes) for name, *sizes in many if name == "all-reduce")
    gathered = sum(sum(sizes) for name, *sizes in many if name == "all-gather")
    assert {name for name, *_ in many} == {"all-reduce", "all-gather"}
    assert sums == N * (M * D + D + V + 4) and gathered == 2 * N * M * DEVICES


@pytest.mark.slow(minute=True)
def test_eight_devices_are_one_in_one_process_or_two(folder):
    check(said(start(PROGRAM, 8, folder)), processes=1)
    for answer in said_by_two(PROGRAM, folder): check(answer, processes=2)


# --- on the devices that are here -----------------------------------------------------------------


def mesh(): return jax.make_mesh((jax.device_count(),), ("memories",))


ROWS = np.random.default_rng(0).normal(size=(40, 3))


@pytest.mark.slow
def test_recall_takes_a_mesh():
    queries = np.where(np.arange(3) > 0, ROWS[:5], np.nan)
    one, many = recall(ROWS, queries, k=2), recall(ROWS, queries, k=2, mesh=mesh())
    np.testing.assert_allclose(many.patterns, one.patterns, atol=1e-4)
    np.testing.assert_array_equal(many.ids, one.ids)


@pytest.mark.parametrize("bad, error, says", [
    (dict(axis="rows"), ValueError, "among those of the mesh, 'memories'"),
    (dict(axis=()), ValueError, "each once"),
    (dict(mesh=8), TypeError, r"must be a jax\.sharding\.Mesh"),
    (dict(mesh=jax.devices()), TypeError, r"must be a jax\.sharding\.Mesh"),
])
def test_what_is_no_mesh_is_refused(bad, error, says):
    with pytest.raises(error, match=says): Memory(ROWS, **(dict(mesh=mesh()) | bad))


def test_inf_in_a_file_is_found(tmp_path):
    np.save(tmp_path / "bad.npy", np.where(np.arange(150_000).reshape(-1, 3) == 7, np.inf, 1.0))
    bad = np.load(tmp_path / "bad.npy")
    bad[:, 1] += np.arange(len(bad))
    np.save(tmp_path / "bad.npy", bad) # in a row that no sample has
    with pytest.raises(ValueError, match="must be finite, or NaN"):
        Memory(tmp_path / "bad.npy", beta=1.0, mesh=mesh())


def test_a_refused_change_changes_nothing():
    memory = Memory(ROWS, mesh=mesh())
    before = memory.energy(ROWS[:3])
    with pytest.raises(ValueError, match="no pattern with id 99"): memory.remove([1, 99])
    with pytest.raises(ValueError, match="3 columns"): memory.add(np.ones((1, 2)))
    np.testing.assert_array_equal(memory.energy(ROWS[:3]), before)


def test_devices_have_no_name_in_a_pickle():
    with pytest.raises(TypeError, match="Make it anew from its patterns"):
        pickle.dumps(Memory(ROWS, mesh=mesh()))
