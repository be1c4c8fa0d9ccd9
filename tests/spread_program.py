"""What `test_sharding.py` runs in processes of its own: a network on one device, and the same one
with its memories spread over eight, compared. Prints one line of JSON.

Arguments: a folder, where one process with eight devices leaves what one device gives; then, for
one of two processes with four devices each, its number and the address of the first. These read it.
"""
import json
import sys
import tempfile

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from several_devices import exchanged, once

import hamux as hmx
from hamux.numerics.streaming import gather_rows, spread_over
from hamux.synapses.sharding import gather_memories, join_cluster, shard_memories

folder, *cluster = sys.argv[1:]
if cluster: join_cluster(cluster[1], 2, int(cluster[0]), timeout=120)
jax.config.update("jax_enable_x64", True)

K, d, B = 61, 5, 3 # eight devices do not divide 61
rng = np.random.default_rng(0)
Xi, bias, W = rng.normal(size=(K, d)), 0.1 * rng.normal(size=K), 0.1 * rng.normal(size=(d, 4))
known = rng.random((K, d)) < 0.8
known[:, 0] = True


def network():
    "Two memories, of a competition and of a sum, with a hidden layer between them."
    hot = Partial(hmx.lagr_softmax, beta=jnp.array(3.0))
    beside = dict(bias=bias, known=known, mask=np.arange(K) % 7 > 0)
    return hmx.HAM(
        {"v": hmx.IdentityLayer(d), "h": hmx.TanhLayer(4)},
        {
            "m": hmx.MemorySynapse(Xi, hot, "euclidean", **beside),
            "w": hmx.LinearSynapse(W),
            "n": hmx.MemorySynapse(Xi[:16, :4], hmx.lagr_relu), # sixteen are divided
        },
        [(("v",), "m"), (("v", "h"), "w"), (("h",), "n")],
    ).vectorize()


plain, xs = network(), {"v": rng.normal(size=(B, d)), "h": np.zeros((B, 4))}
mesh = jax.make_mesh((8,), ("memories",))
spread = shard_memories(plain, mesh)
steps = dict(solver=hmx.Euler(0.5), max_steps=6, trace=False)


def loss(ham): return (hmx.descend(ham, xs, **steps).xs["v"] ** 2).sum()


def parameters(ham):
    h = ham.hypersynapses
    return h["m"].Xi, h["m"].bias, h["m"].lagrangian.keywords["beta"], h["w"].W, h["n"].Xi


def recalled(ham):
    out = hmx.descend(ham, jax.tree.map(jnp.asarray, xs)) # arrays of this process
    return out.xs, out.energy


def learned(ham):
    target = np.ones((B, d))
    compare = lambda xhats, t: ((xhats["v"] - t) ** 2).sum()
    out = hmx.gradient(ham, compare, xs, targets=target)
    return out.value, parameters(out.grads)


def trained(ham, *stages):
    def denoise(ham, batch, key):
        start = {"v": batch, "h": jnp.zeros((len(batch), 4))}
        return ((hmx.descend(ham, start, **steps).xs["v"] - batch) ** 2).mean()
    decay = optax.adamw(1e-2, weight_decay=0.5) # which would take a mask to 0
    with tempfile.TemporaryDirectory() as folder: # each process has its own
        for steps_so_far in stages: # each goes on from the file of the one before
            fit = hmx.fit(
                ham, denoise, np.tile(xs["v"], (3, 1)), decay, steps=steps_so_far, batch_size=4,
                key=jax.random.key(0), progress=False, checkpoint=f"{folder}/run",
            )
    return fit.ham


def apart(one, many):
    "The largest difference between what the two networks gave, without rows that were added."
    def difference(a, b):
        b = gather_rows(b, spread_over(mesh)) if np.ndim(b) else np.asarray(b)
        return float(abs(b[: len(a)] - a if np.ndim(a) else b - a).max())
    return max(map(difference, jax.tree.leaves(one), jax.tree.leaves(many)))


def compared(name, f, many):
    "The same of what `f` gives for the plain network, here or where it was alone, and of another."
    return apart(once(f"{folder}/{name}", lambda: f(plain), alone=not cluster), many)


def collectives(compiled):
    "Names of what devices exchange, and the most numbers in one of those exchanges."
    found = exchanged(compiled)
    return sorted({name for name, *_ in found}), max(n for _, *sizes in found for n in sizes)


slope = jax.jit(jax.grad(loss)).lower(spread).compile()
after = trained(spread, 2, 4)
memory = after.hypersynapses["m"]
here = lambda v: np.asarray(v.addressable_shards[0].data)
answer = {
    "devices": [jax.device_count(), jax.process_count()],
    "recall": compared("recall", recalled, recalled(spread)),
    "gradient through descend": compared(
        "through", lambda ham: parameters(jax.grad(loss)(ham)), parameters(slope(spread))
    ),
    "gradient": compared("gradient", learned, learned(spread)),
    "fit": compared("fit", lambda ham: parameters(trained(ham, 4)), parameters(after)),
    "masks after fit": bool((here(memory._mask) == here(spread.hypersynapses["m"]._mask)).all()),
    "rows here": memory.Xi.addressable_shards[0].data.shape[0],
    "exchanged": collectives(slope),
    "gathered": bool(eqx.tree_equal(gather_memories(spread), plain)),
    "config": hmx.to_config(spread) == hmx.to_config(plain),
}
print(json.dumps(answer))
