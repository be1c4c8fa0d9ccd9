"""Memories on many devices: one process with eight, two processes with four each."""

import pickle
import socket

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.tree_util import Partial
from several_devices import said, said_by_two, start

import hamux as hmx
from hamux.numerics.streaming import gather_rows, spread_over, spread_rows, stream
from hamux.synapses.sharding import gather_memories, join_cluster, shard_memories

PROGRAM = "spread_program.py"
K, D, B = 61, 5, 3 # as there


def check(answer, processes):
    assert answer["devices"] == [8, processes]
    for what in "recall", "gradient through descend", "gradient", "fit":
        assert answer[what] < 1e-9, (what, answer[what])
    assert answer["masks after fit"] and answer["gathered"] and answer["config"]
    assert answer["rows here"] == 8 # of 64, 61 of them memories
    names, most = answer["exchanged"] # never anything of size K
    assert names == ["all-reduce"] and most <= B * D


@pytest.mark.slow(minute=True)
def test_eight_devices_are_one_in_one_process_or_two(tmp_path):
    check(said(start(PROGRAM, 8, tmp_path)), processes=1)
    for answer in said_by_two(PROGRAM, tmp_path): check(answer, processes=2)


# --- on the devices that are here -----------------------------------------------------------------


def mesh(): return jax.make_mesh((jax.device_count(),), ("memories",))


def test_a_bank_in_a_file_is_read_in_parts(tmp_path):
    rows = np.random.default_rng(0).normal(size=(7, 3)).astype("f4")
    np.save(tmp_path / "bank.npy", rows)
    mapped, spread = np.load(tmp_path / "bank.npy", mmap_mode="r"), spread_over(mesh())
    np.testing.assert_array_equal(gather_rows(spread_rows(mapped, spread), spread)[:7], rows)
    x, L = jnp.ones(3), Partial(hmx.lagr_softmax, beta=2.0)
    known = np.arange(21).reshape(7, 3) % 4 > 0
    for given in ({}, dict(bias=np.arange(7.0)), dict(known=known, mask=np.arange(7) > 2)):
        one = hmx.MemorySynapse(rows, L, "euclidean", **given)
        many = hmx.MemorySynapse(mapped, L, "euclidean", **given, spread=spread)
        np.testing.assert_allclose(many(x), one(x), rtol=1e-6)
        assert eqx.tree_equal(many.on(None), one)


def test_a_number_for_each_memory_is_spread_with_them():
    x = jnp.ones(3)
    L = Partial(hmx.lagr_exp, beta=jnp.linspace(0.5, 1, 6))
    one = hmx.MemorySynapse(jr.normal(jr.key(0), (6, 3)), L)
    many = shard_memories(one, mesh())
    np.testing.assert_allclose(many(x), one(x), rtol=1e-6)
    assert eqx.tree_equal(gather_memories(many), one)


def test_a_fold_that_does_not_say_how_is_given_every_part():
    def largest(size, args, blocks): return ((blocks[0] @ args[0]).max(),), ()
    rows, x, spread = jr.normal(jr.key(0), (8, 3)), jnp.ones(3), spread_over(mesh())
    keep = lambda args, old, new: (jnp.maximum(old[0], new[0]),)
    got = stream(
        largest, (x,), (spread_rows(rows, spread),), fold=keep, start=(-jnp.inf,), block=3,
        spread=spread,
    )
    np.testing.assert_allclose(got[0], (rows @ x).max(), rtol=1e-6)


def net():
    layer = hmx.NeuronLayer(hmx.lagr_identity, 3, leak=False)
    synapse = hmx.MemorySynapse(
        jr.normal(jr.key(0), (6, 3)), bias=jnp.zeros(6), known=np.arange(18).reshape(6, 3) % 5 > 0
    )
    return hmx.HAM({"v": layer}, {"m": synapse}, [(("v",), "m")])


def test_a_saved_network_has_no_devices(tmp_path):
    plain, spread = net(), shard_memories(net(), mesh())
    hmx.save(tmp_path / "n", spread.vectorize())
    assert eqx.tree_equal(hmx.load(tmp_path / "n"), plain)
    assert eqx.tree_equal(hmx.load(tmp_path / "n", like=spread), plain)
    again = shard_memories(hmx.load(tmp_path / "n"), mesh())
    assert eqx.tree_equal(shard_memories(again, mesh()), again)


def test_what_cannot_be_spread_is_refused():
    with pytest.raises(ValueError, match="among those of the mesh, 'memories', each once"):
        shard_memories(net(), mesh(), "rows")
    with pytest.raises(ValueError, match="each once"): spread_over(mesh(), ())
    with pytest.raises(TypeError, match="must be a jax.sharding.Mesh"): shard_memories(net(), 8)
    bias = hmx.HAM([hmx.IdentityLayer(3)], [hmx.BiasSynapse(jnp.ones(3))], [([0], 0)])
    for nothing in (bias, np.ones((3, 3))):
        with pytest.raises(TypeError, match="no memories to spread"):
            shard_memories(nothing, mesh())
    own = hmx.MemorySynapse(np.ones((6, 3)), lambda s: (s**2).sum())
    with pytest.raises(ValueError, match="a Lagrangian that says how it streams"):
        shard_memories(own, mesh())
    with pytest.raises(TypeError, match="outside of jit"):
        jax.jit(lambda x: hmx.MemorySynapse(x, spread=spread_over(mesh()))(x[0]))(np.ones((6, 3)))
    with pytest.raises(TypeError, match="gather_memories"):
        pickle.dumps(shard_memories(net(), mesh()))


def test_a_machine_that_is_gone_is_named():
    with socket.create_server(("127.0.0.1", 0)) as probe: port = probe.getsockname()[1]
    for process, says in ((0, r"Processes \[1, 2\] of 3 did not call"), (1, "Process 0 did not")):
        with pytest.raises(TimeoutError, match=says):
            join_cluster(f"127.0.0.1:{port}", 3, process, timeout=0.3)
    for wrong in (("here", 2, 0), ("127.0.0.1:1", None, 0), ("127.0.0.1:1", 2, None)):
        with pytest.raises(ValueError, match="needs coordinator='host:port'"):
            join_cluster(*wrong)
