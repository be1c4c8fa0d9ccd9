"""Losses and training beyond the notebooks: closed forms in float64, what is exact to the bit,
kills, interrupts, damaged files."""

import io
import itertools
import json
import os
import signal
import subprocess
import sys
import tracemalloc
import zipfile

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest

import hamux as hmx
from hamux import cross_entropy, fit, unit_norm
from hamux.learning import (
    batches,
    classification_loss,
    completion_loss,
    denoising_loss,
    hide_half,
    hide_pixels,
    hide_rectangle,
    run,
    training,
)
from hamux.learning.gradients import Gradient
from hamux.learning.run import Run, read_run, run_arrays, run_identity
from hamux.learning.trainable import parameter_places, trainable_mask
from hamux.storage.files import FileProblem
from hamux.storage.saving import digest


def leaves(*trees): return [np.asarray(v) for v in jtu.tree_leaves(trees)]
def same_bits(a, b):
    return all(
        (u.dtype, u.tobytes()) == (v.dtype, v.tobytes())
        for u, v in zip(leaves(a), leaves(b), strict=True)
    )


def two_matrices(dtype=jnp.float32, **kwargs):
    W = jr.normal(jr.key(0), (2, 3), dtype)
    return hmx.HAM(
        {"a": hmx.IdentityLayer(2), "b": hmx.TanhLayer(3, beta=jnp.asarray(1.5, dtype))},
        {"W": hmx.LinearSynapse(W, **kwargs), "V": hmx.LinearSynapse(2 * W)},
        [(("a", "b"), "W"), (("a", "b"), "V")],
    )


def pull(ham, batch, key):
    "No recall: the matrices are drawn to the rows, with noise from the key"
    target = batch.mean() + 0.1 * jr.normal(key, ())
    return (
        ((ham.hypersynapses["W"].W - target) ** 2).sum()
        + (ham.hypersynapses["V"].W ** 4).sum()
        + ham.neurons["b"].lagrangian.keywords["beta"] ** 2
    )


DATA = np.linspace(-1, 1, 23, dtype=np.float32)
QUICK = dict(batch_size=4, key=jr.key(7), progress=False)


# --- losses against closed forms ------------------------------------------------------------------


def quadratic(W, b):
    return hmx.HAM(
        {"v": hmx.IdentityLayer(len(b)), "h": hmx.IdentityLayer(W.shape[1])},
        {"W": hmx.LinearSynapse(W), "b": hmx.BiasSynapse(b)},
        [(("v", "h"), "W"), (("v",), "b")],
    )


def agrees(loss, ham, batch, closed, key, plain=False):
    "Value and gradient, by `gradient` and jax.grad, are those of a closed form of (W, b)"
    W, b = ham.hypersynapses["W"].W, ham.hypersynapses["b"].b
    value, (dW, db) = jax.jit(jax.value_and_grad(closed, (0, 1)))(W, b)
    out = jax.jit(lambda ham: loss.gradient(ham, batch, key))(ham)
    more = [jax.jit(jax.value_and_grad(loss))(ham, batch, key)] if plain else []
    for mean, grads in [(out.value, out.grads), *more]:
        np.testing.assert_allclose(grads.hypersynapses["W"].W, dW, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(grads.hypersynapses["b"].b, db, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(mean, value, rtol=1e-8)


SETTINGS = dict(
    solver=hmx.Euler(0.9),
    rtol=1e-12,
    atol=1e-12,
    max_steps=500,
    method=hmx.ImplicitAdjoint(rtol=1e-12),
)


@pytest.mark.slow
def test_denoising_closed_form():
    "With one attractor the end does not depend on the noise: v* = (1 − WWᵀ)⁻¹ b"
    with jax.enable_x64(True):
        W, b, y = (
            s * jr.normal(k, n)
            for s, k, n in zip((0.2, 1, 1), jr.split(jr.key(0), 3), ((4, 2), (4,), (5, 4)))
        )
        def closed(W, b): return ((jnp.linalg.solve(jnp.eye(4) - W @ W.T, b) - y)**2).mean()
        agrees(denoising_loss("v", 0.7, **SETTINGS), quadratic(W, b), y, closed, jr.key(1))


@pytest.mark.slow
def test_completion_closed_form():
    "The hidden pixels u given the known k: v_u = (1 − W_u W_uᵀ)⁻¹ (b_u + W_u W_kᵀ v_k)"
    with jax.enable_x64(True):
        W, b, y = (
            s * jr.normal(k, n)
            for s, k, n in zip((0.3, 1, 1), jr.split(jr.key(0), 3), ((4, 2), (4,), (3, 4)))
        )
        loss, ham, key = (
            completion_loss("v", hide_pixels(0.5), **SETTINGS),
            quadratic(W, b),
            jr.key(1),
        )
        hidden = np.asarray(loss.inputs(ham, y, key)[1][1])
        def closed(W, b):
            rows = []
            for v, u in zip(y, hidden, strict=True):
                free = jnp.linalg.solve(
                    jnp.eye(u.sum()) - W[u] @ W[u].T, b[u] + W[u] @ W[~u].T @ v[~u]
                )
                rows.append(((free - v[u])**2).mean())
            return jnp.stack(rows).mean()
        assert (hidden.sum(1) == 2).all() and len({u.tobytes() for u in hidden}) > 1
        agrees(loss, ham, y, closed, key, plain=True)


@pytest.mark.slow
def test_classification_closed_form():
    "Image – label in one synapse is logistic regression"
    with jax.enable_x64(True):
        W, b, v = (jr.normal(k, n) for k, n in zip(jr.split(jr.key(0), 3), ((3, 4), (4,), (6, 3))))
        ham = hmx.HAM(
            {"v": hmx.IdentityLayer(3), "y": hmx.SoftmaxLayer(4)},
            {"W": hmx.LinearSynapse(W), "b": hmx.BiasSynapse(b)},
            [(("v", "y"), "W"), (("y",), "b")],
        )
        labels = jnp.array([0, 1, 2, 3, 3, 1])
        def closed(W, b): return -jax.nn.log_softmax(v @ W + b)[jnp.arange(6), labels].mean()
        agrees(classification_loss("y", "v", **SETTINGS), ham, (v, labels), closed, jr.key(0))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_cross_entropy_is_finite(dtype):
    "Of probabilities that underflow, with their derivative through the softmax"
    def loss(x): return cross_entropy("y")({"y": jax.nn.softmax(x)}, jnp.array(0))
    gaps = np.array([0.0, 5.0, 50.0, 95.0, 103.0, 1e4])
    x = jnp.asarray(np.stack([0 * gaps, gaps], 1), dtype)
    values, slopes = jax.jit(jax.vmap(jax.value_and_grad(loss)))(x)
    assert values.dtype == slopes.dtype == dtype
    values, slopes = (np.asarray(v, float) for v in (values, slopes))
    assert np.isfinite(values).all() and np.isfinite(slopes).all()
    np.testing.assert_allclose(values[:2], np.log1p(np.exp(gaps[:2])), rtol=0.02)
    assert jnp.isnan(jax.jit(lambda y: cross_entropy("y")({"y": jnp.ones(3) / 3}, y))(3))


@pytest.mark.parametrize(
    "hide, shape, counts",
    [
        (hide_half((4, 6)), (24,), {12}),
        (hide_half(), (3, 3), {3}),
        (hide_half(), (4, 4, 3), {24}),
        (hide_rectangle(0.5, 0.5), (4, 6), {6}),
        (hide_pixels(1 / 3), (6, 2), {4}),
        (hide_pixels(0.5, grid=(6,)), (6, 7), {21}),
        (hide_pixels(0.25, grid=(2, 2)), (4, 9), {9}),
    ],
)
def test_hidden_counts(hide, shape, counts):
    image = jnp.zeros(shape)
    masks = np.asarray(jax.jit(jax.vmap(hide, (0, None)))(jr.split(jr.key(0), 60), image))
    assert (
        masks.shape == (60, *shape)
        and masks.dtype == bool
        and set(masks.sum(tuple(range(1, masks.ndim))).tolist()) == counts
    )
    # an odd side: the middle is in neither half
    assert masks.any(0).all() if shape != (3, 3) else not masks[:, 1, 1].any()
    # the channels of a pixel together
    if len(shape) == 3: assert (masks.any(-1) == masks.all(-1)).all()


def test_rectangles():
    hide = jax.vmap(hide_rectangle(0.2, 0.6), (0, None))
    masks = np.asarray(jax.jit(hide)(jr.split(jr.key(1), 300), jnp.zeros((10, 10))))
    high, wide = masks.any(2).sum(1), masks.any(1).sum(1)
    assert (
        (high * wide == masks.sum((1, 2))).all()
        and set(high) == set(wide) == {2, 3, 4, 5, 6}
        and masks.any(0).all()
    )
    edges = np.diff(np.pad(masks.any(2), [(0, 0), (1, 1)]).astype(int), axis=1)
    assert (abs(edges).sum(1) == 2).all() # in one piece


def test_corruptions_as_version_03_had_them():
    "(image, key) and (key, shape) draw the same as (key, image), and warn"
    ham = quadratic(jnp.ones((4, 2)), jnp.ones(4))
    images, key = jr.normal(jr.key(0), (3, 4)), jr.key(1)
    noise = lambda key, image: image * jr.normal(key, image.shape)
    hide = lambda key, image: jr.bernoulli(key, 0.5, image.shape)
    with pytest.warns(DeprecationWarning, match=r"denoising_loss: .* \(key, image\)"):
        old = denoising_loss("v", lambda x, k: noise(k, x))
    new = denoising_loss("v", noise)
    assert same_bits(*(loss.inputs(ham, images, key)[0] for loss in (new, old)))
    with pytest.warns(DeprecationWarning, match=r"completion_loss: .* \(key, image\)"):
        old = completion_loss("v", lambda key, shape: jr.bernoulli(key, 0.5, shape))
    new = completion_loss("v", hide)
    assert same_bits(*(loss.inputs(ham, images, key)[:2] for loss in (new, old)))
    for hide in (hide_pixels(0.5), hide_half((2, 2)), hide_rectangle(grid=(2, 2))):
        with pytest.warns(DeprecationWarning, match="not its shape"): old = hide(key, (4,))
        assert same_bits(hide(key, images[0]), old)


def test_corruptions_of_a_basin_are_those_of_a_loss():
    "One convention: what `basin_size` takes, with its level, is noise here"
    ham, images = quadratic(jnp.ones((4, 2)), jnp.ones(4)), jr.normal(jr.key(0), (3, 4))
    half = eqx.Partial(hmx.flip_signs, level=0.5)
    xs, targets, _ = denoising_loss("v", half).inputs(ham, images, jr.key(1))
    assert ((xs["v"] == -images).sum(1) == 2).all() and same_bits(targets, images)


# --- batches --------------------------------------------------------------------------------------


def test_batches_are_a_function_of_the_step(tmp_path):
    np.save(tmp_path / "rows.npy", DATA)
    data = {"x": np.load(tmp_path / "rows.npy", mmap_mode="r"), "i": jnp.arange(23)}
    run = list(itertools.islice(batches(data, 5, key=jr.key(0)), 13))
    for epoch in range(3):
        rows = np.concatenate([b["i"] for b, _ in run[4 * epoch:4 * epoch + 4]])
        assert len(set(rows.tolist())) == 20
        assert (
            np.concatenate([b["x"] for b, _ in run[4 * epoch : 4 * epoch + 4]]) == DATA[rows]
        ).all()
    assert (
        len({r["i"].tobytes() for r, _ in run}) == 13
        and len({jr.key_data(k).tobytes() for _, k in run}) == 13
    )
    for first in (1, 4, 7, 12):
        batch, key = next(batches(data, 5, key=jr.key(0), first=first))
        assert (batch["i"] == run[first][0]["i"]).all() and (
            jr.key_data(key) == jr.key_data(run[first][1])
        ).all()
    old = next(batches(data, 5, key=jr.PRNGKey(0)))[0]["i"]
    assert (old == run[0][0]["i"]).all()


# --- fit ------------------------------------------------------------------------------------------


def test_gradient_descent_by_hand():
    "On the quadratic ½·2‖W − t‖² a step of gradient descent is W ← W − 2η(W − t)"
    with jax.enable_x64(True):
        ham = two_matrices(jnp.float64)
        def loss(ham, batch, key): return ((ham.hypersynapses["W"].W - batch.mean())**2).sum()
        out = fit(ham, loss, DATA.astype(float), optax.sgd(0.1), epochs=3, **QUICK)
        W, losses = np.asarray(ham.hypersynapses["W"].W), []
        for batch, _ in itertools.islice(batches(DATA.astype(float), 4, key=jr.key(7)), 15):
            losses.append(((W - batch.mean())**2).sum())
            W = W - 0.2 * (W - batch.mean())
        assert out.steps == 15 and out.ok and out.ham.dtype == jnp.float64
        np.testing.assert_allclose(out.ham.hypersynapses["W"].W, W, rtol=1e-12)
        np.testing.assert_allclose(out.losses, losses, rtol=1e-12)
        assert same_bits(out.ham.hypersynapses["V"], ham.hypersynapses["V"])


def test_dtype_is_kept():
    out = fit(
        two_matrices(jnp.bfloat16),
        lambda ham, batch, key: (ham.hypersynapses["W"].W ** 2).sum(),
        DATA,
        optax.adam(0.1),
        steps=3,
        **QUICK,
    )
    assert {str(v.dtype) for v in leaves(out.ham)} == {"bfloat16"} and out.losses[-1] < out.losses[
        0
    ]


@pytest.mark.parametrize(
    "trainable, moved",
    [
        (None, {"b.beta", "W.W", "V.W"}),
        ("W", {"W.W"}),
        (["b", "V"], {"b.beta", "V.W"}),
        (lambda leaf: leaf.ndim == 0, {"b.beta"}),
        (True, {"b.beta", "W.W", "V.W"}),
        ("tree", {"V.W"}),
    ],
)
def test_frozen_to_the_bit(trainable, moved):
    "Also by an optimizer that moves what has no gradient"
    ham = two_matrices()
    if trainable == "tree":
        trainable = jtu.tree_unflatten(
            jtu.tree_structure(ham), [place.part == "V" for place in parameter_places(ham)]
        )
    out = fit(
        ham, pull, DATA, optax.adamw(0.1, weight_decay=0.5), steps=4, trainable=trainable, **QUICK
    )
    names = [f"{place.part}.{place.name}" for place in parameter_places(ham)]
    assert {
        n
        for n, a, b in zip(names, leaves(ham), leaves(out.ham), strict=True)
        if not same_bits(a, b)
    } == moved


def test_weights_that_are_held_do_not_decay():
    ham = two_matrices(trainable=False)
    out = fit(ham, pull, DATA, optax.adamw(0.1, weight_decay=0.5), steps=4, **QUICK)
    assert same_bits(out.ham.hypersynapses["W"], ham.hypersynapses["W"]) and not same_bits(
        out.ham.hypersynapses["V"], ham.hypersynapses["V"]
    )


def test_projections_hold_after_every_step():
    seen = []
    def loss(ham, batch, key):
        jax.debug.callback(
            lambda W, beta: seen.append((np.linalg.norm(W, axis=1), beta)),
            ham.hypersynapses["V"].W,
            ham.neurons["b"].lagrangian.keywords["beta"],
        )
        return pull(ham, batch, key)
    project = {"V": {"W": unit_norm}, "b": {"beta": optax.projections.projection_non_negative}}
    by_name = fit(two_matrices(), loss, DATA, optax.sgd(0.6), steps=5, project=project, **QUICK)
    assert len(seen) == 5 and all(np.allclose(norms, 1) and beta >= 0 for norms, beta in seen)
    assert by_name.ham.neurons["b"].lagrangian.keywords["beta"] == 0 and np.allclose(
        np.linalg.norm(by_name.ham.hypersynapses["V"].W, axis=1), 1
    )

    def function(ham):
        return eqx.tree_at(
            lambda h: [h._hypersynapses[s].W for s in "VW"], ham, replace_fn=unit_norm
        )

    frozen = fit(
        two_matrices(),
        pull,
        DATA,
        optax.sgd(0.1),
        steps=5,
        project=function,
        trainable="V",
        **QUICK,
    )
    assert same_bits(
        frozen.ham.hypersynapses["W"], two_matrices().hypersynapses["W"]
    ) and np.allclose(np.linalg.norm(frozen.ham.hypersynapses["V"].W, axis=1), 1)


def test_unit_norm():
    rows = jnp.array([[1e37, 1e37], [1e-30, 0], [0, 0], [3, -4]])
    np.testing.assert_allclose(
        unit_norm(rows), [[0.5**0.5] * 2, [1, 0], [0, 0], [0.6, -0.8]], rtol=1e-6
    )
    assert unit_norm(jnp.ones((2, 3), jnp.bfloat16)).dtype == jnp.bfloat16


def test_validation_chooses_and_stops(tmp_path):
    "The loss falls to its least at W = 0 and climbs when W goes past it at a constant speed"
    ham = two_matrices()
    ham = eqx.tree_at(lambda h: h._hypersynapses["W"].W, ham, jnp.full((2, 3), 1.05))
    def loss(ham, batch, key):
        return jnp.where(
            batch.mean() > 5, (ham.hypersynapses["W"].W ** 2).sum(), ham.hypersynapses["W"].W.sum()
        )

    settings = QUICK | dict(validation=np.full(9, 10.0), trainable="W")
    out = fit(ham, loss, DATA, optax.sgd(0.1), steps=100, patience=3, validate_every=2, **settings)
    assert out.code == "early" and out.ok and out.steps == 16
    np.testing.assert_allclose(out.ham.hypersynapses["W"].W, 0.05, rtol=1e-4) # after 10 steps
    np.testing.assert_allclose(out.last.hypersynapses["W"].W, 1.05 - 1.6, rtol=1e-4)
    assert out.validation[0].tolist() == list(range(0, 17, 2)) and np.argmin(out.validation[1]) == 5
    np.testing.assert_allclose(
        out.validation[1], 6 * (1.05 - 0.1 * out.validation[0]) ** 2, rtol=1e-3
    )
    for steps in (12, 16):
        two = fit(
            ham,
            loss,
            DATA,
            optax.sgd(0.1),
            steps=steps,
            validate_every=2,
            checkpoint=tmp_path / "run.hamux",
            **settings,
        )
    assert same_bits(two.ham, out.ham) and same_bits(two.last, out.last) # the best is in the file
    odd = fit(ham, loss, DATA, optax.sgd(0.1), steps=11, validate_every=4, **settings)
    assert odd.validation[0].tolist() == [0, 4, 8, 11] and odd.code == "done" # the end too


def test_the_last_good_state_is_kept():
    "whatever stops being finite: the loss, the gradient or the parameters"

    start = two_matrices()
    W = lambda ham: ham.hypersynapses["W"].W
    @jax.custom_jvp
    def kink(x):
        return x

    kink.defjvp(
        lambda primals, tangents: (
            primals[0],
            jnp.where(primals[0] < 0, jnp.nan, 1.0) * tangents[0],
        )
    )
    cases = {
        "the loss is nan": lambda ham, batch, key: jnp.log(W(ham)[0, 0] + 0.0) + 0 * batch.sum(),
        "the gradient of W.W": lambda ham, batch, key: kink(W(ham)[0, 0]),
    }
    ham = eqx.tree_at(lambda h: h._hypersynapses["W"].W, start, jnp.ones((2, 3)))
    for said, loss in cases.items():
        out = fit(ham, loss, DATA, optax.sgd(0.3), steps=50, **QUICK)
        assert (
            not out.ok
            and out.code == "not finite"
            and said in out.result
            and f"in step {out.steps + 1}" in out.result
            and 0 < out.steps < 50
        )
        assert (
            np.isfinite(out.losses).all()
            and len(out.losses) == out.steps
            and all(np.isfinite(v).all() for v in leaves(out.ham))
        )
        again = fit(ham, loss, DATA, optax.sgd(0.3), steps=out.steps, **QUICK)
        assert again.ok and same_bits(again.ham, out.ham)
    big = fit(
        ham, lambda ham, batch, key: 1e30 * W(ham).sum(), DATA, optax.sgd(1e20), steps=5, **QUICK
    )
    assert (
        big.steps == 0
        and "the new value of W.W is not finite" in big.result
        and same_bits(big.ham, ham)
    )


def test_an_error_in_a_recall_ends_the_run():
    def loss(ham, batch, key):
        w = ham.hypersynapses["W"].W[0, 0]
        return eqx.error_if(w, w < 0, "The recall went wrong. Do something.")
    ham = eqx.tree_at(lambda h: h._hypersynapses["W"].W, two_matrices(), jnp.full((2, 3), 0.45))
    out = fit(ham, loss, DATA, optax.sgd(0.1), steps=50, **QUICK)
    assert (
        out.code == "failed"
        and not out.ok
        and out.steps == 5
        and "The recall went wrong. Do something. The network is that after 5 steps" in out.result
    )
    np.testing.assert_allclose(out.ham.hypersynapses["W"].W[0, 0], -0.05, atol=1e-6)


def test_what_a_loss_may_be():
    class Sprung: # as equilibrium propagation: a gradient that is no derivative of a value

        def gradient(self, ham, batch, key):
            return Gradient(jnp.array(1.5), jtu.tree_map(jnp.ones_like, ham), {})

    out = fit(two_matrices(), Sprung(), DATA, optax.sgd(0.5), steps=2, validation=DATA, **QUICK)
    for a, b in zip(leaves(two_matrices()), leaves(out.last), strict=True):
        np.testing.assert_allclose(b, a - 1, rtol=1e-5, atol=1e-6)
    assert out.losses.tolist() == [1.5, 1.5] and out.unconverged.tolist() == [-1, -1]
    both = [
        fit(h, f, DATA, optax.adam(0.1), steps=3, **QUICK).ham
        for h, f in (
            (two_matrices(), pull),
            (two_matrices().vectorize(), lambda ham, *args: pull(ham.unvectorize(), *args)),
        )
    ]
    assert isinstance(both[1], hmx.VectorizedHAM) and same_bits(*both)


def test_optimizers_with_a_value():
    "reduce_on_plateau needs the loss; a state that is given is gone on with"
    optimizer = optax.chain(optax.sgd(0.01), optax.contrib.reduce_on_plateau(patience=2))
    one = fit(two_matrices(), pull, DATA, optimizer, steps=4, **QUICK)
    two = fit(one.ham, pull, DATA, optimizer, steps=2, opt_state=one.opt_state, **QUICK)
    assert int(two.opt_state[1].count) == 6 % optimizer.init(one.ham)[1].avg_value.size or two.ok
    adam = optax.adam(0.1)
    one = fit(two_matrices(), pull, DATA, adam, steps=4, **QUICK)
    assert (
        int(
            fit(one.ham, pull, DATA, adam, steps=2, opt_state=one.opt_state, **QUICK)
            .opt_state[0]
            .count
        )
        == 6
    )
    for wrong in (
        adam.init(two_matrices(jnp.bfloat16)),
        adam.init(eqx.filter(two_matrices(), trainable_mask(two_matrices(), "W"))),
        optax.sgd(0.1).init(two_matrices()),
    ):
        with pytest.raises(ValueError, match="opt_state does not fit"):
            fit(one.ham, pull, DATA, adam, steps=2, opt_state=wrong, **QUICK)


def test_a_recall_that_is_not_finite_has_no_loss():
    "An infinite parameter: what comes back is the start, whose distance to the target is no loss"
    ham = hmx.HAM(
        {"v": hmx.IdentityLayer(2)},
        {"b": hmx.BiasSynapse(jnp.array([0, jnp.inf]))},
        [(("v",), "b")],
    )
    loss = denoising_loss("v", 0.1, solver=hmx.Euler(0.5), method="one-step")
    value, out = jax.jit(
        lambda ham: (loss(ham, jnp.eye(2), jr.key(0)), loss.gradient(ham, jnp.eye(2), jr.key(0)))
    )(ham)
    assert (
        jnp.isnan(value)
        and jnp.isnan(out.value)
        and jnp.isfinite(out.equilibria["free"].xhats["v"]).all()
    )


@pytest.mark.slow
def test_unconverged_rows_are_counted():
    "Row i starts further away than row i − 1, and a fixed number of steps is enough for some"
    ham = hmx.HAM(
        {"v": hmx.IdentityLayer(1)}, {"b": hmx.BiasSynapse(jnp.zeros(1))}, [(("v",), "b")]
    )
    # |x| = 2⁻⁴ |x₀| at the end
    loss = denoising_loss("v", 0.0, solver=hmx.Euler(0.5), max_steps=4, rtol=0.0, atol=0.1)
    data = np.array([[0.1], [1.0], [1.5], [1.7], [3.0]], np.float32)
    out = fit(ham, loss, data, optax.sgd(0.0), steps=2, **QUICK | dict(batch_size=5))
    assert (
        out.unconverged.tolist() == [2, 2]
        and "In 2 of 2 batches some recalls did not converge, 2 rows" in out.result
    )


# --- the file -------------------------------------------------------------------------------------


RUN = """
import sys, time
sys.path[:0] = [{tests!r}]
from test_training import *
signal.signal(signal.SIGINT, signal.default_int_handler) # a shell may have it ignored
calls, rows = [], run.take_rows
def slow(data, index):
    calls.append(time.sleep(0.01))
    if len(calls) == 13: print("go", flush=True)
    return rows(data, index)
run.take_rows = slow
settings = dict(checkpoint_every=3, validation=DATA, validate_every=7, **QUICK)
for path in {paths!r}:
    calls.clear()
    out = fit(two_matrices(), pull, DATA, optax.adam(0.05), steps=2000, checkpoint=path, **settings)
    print(out.code, flush=True)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_exactly(tmp_path):
    "One process has two runs, of which the first is interrupted and the second killed"
    paths, settings = [], dict(validation=DATA, validate_every=7, **QUICK)
    for how in ("interrupted", "killed"): paths.append(str(tmp_path / f"{how}.hamux"))
    with subprocess.Popen(
        [sys.executable, "-c", RUN.format(tests=os.path.dirname(__file__), paths=paths)],
        stdout=subprocess.PIPE,
    ) as child:
        child.stdout.readline()
        child.send_signal(signal.SIGINT)
        assert child.stdout.readline() == b"interrupted\n"
        child.stdout.readline()
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -9
    for path in paths:
        steps = len(read_run(path, *started()).losses)
        assert steps >= 3 and ("interrupted" in path or steps % 3 == 0)
        go = lambda n=steps + 8, **more: fit(
            two_matrices(), pull, DATA, optax.adam(0.05), steps=n, **settings, **more
        )
        rest, whole = go(checkpoint=path), go()
        assert same_bits(parts(rest), parts(whole)) and rest.seconds > 0.1


def parts(f): return f.last, f.ham, f.opt_state, f.losses, f.validation, f.unconverged


def started():
    "What the file of RUN is read with"
    ham, mask = two_matrices(), trainable_mask(two_matrices(), None)
    start = Run((0, ham, jtu.tree_map(jnp.asarray, optax.adam(0.05).init(ham))))
    return start, run_identity(start, mask, DATA, 4, jr.key(7))


@pytest.mark.slow
def test_an_interrupt_loses_nothing(tmp_path):
    "at whatever line of the loop it comes: the run goes on from its file to the same bits"
    settings = dict(validation=DATA, validate_every=3, **QUICK)
    optimizer = optax.adam(0.05)
    whole = fit(two_matrices(), pull, DATA, optimizer, steps=8, **settings)
    loop = "_train", "_take_step", "validate_if_due", "since_best", "note_validation"
    loop = {*loop, "batches", "validate"}
    lines = 0
    def trace(frame, event, arg):
        nonlocal lines
        if frame.f_code.co_filename not in (training.__file__, run.__file__): return None
        if frame.f_code.co_name not in loop: return None
        def local(frame, event, arg):
            nonlocal lines
            lines += event == "line"
            if lines == at: raise KeyboardInterrupt
            return local
        return local
    for at in itertools.count(1, 17):
        path, lines = tmp_path / f"{at}.hamux", 0
        sys.settrace(trace)
        try:
            cut = fit(
                two_matrices(),
                pull,
                DATA,
                optimizer,
                steps=8,
                checkpoint=path,
                checkpoint_every=100,
                **settings,
            )
        finally:
            sys.settrace(None)
        assert (
            cut.code == ("interrupted" if lines >= at else "done")
            and cut.steps <= 8
            and len(cut.losses) == cut.steps
        )
        rest = fit(
            two_matrices(),
            pull,
            DATA,
            optimizer,
            steps=8,
            checkpoint=path,
            checkpoint_every=100,
            **settings,
        )
        assert rest.ok and same_bits(parts(rest), parts(whole)), at
        if cut.code == "done": break


def test_other_exceptions_keep_the_file(tmp_path):
    path, calls = tmp_path / "run.hamux", 0
    def rows(data, index):
        nonlocal calls
        calls += 1
        if calls == 5: raise OSError("the disk of the data went away")
        return whole(data, index)
    whole = run.take_rows
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="went away"):
        patch.setattr(run, "take_rows", rows)
        fit(
            two_matrices(),
            pull,
            DATA,
            optax.adam(0.05),
            steps=9,
            checkpoint=path,
            checkpoint_every=100,
            **QUICK,
        )
    assert len(read_run(path, *started()).losses) == 4


def test_files_of_something_else(tmp_path):
    path = tmp_path / "run.hamux"
    go = lambda ham=None, data=DATA, optimizer=None, **more: fit(
        ham or two_matrices(),
        pull,
        data,
        optimizer or optax.adam(0.05),
        **dict(steps=2, checkpoint=path) | QUICK | more,
    )
    done = go()
    assert (
        same_bits(go().ham, done.ham)
        and go(steps=1).steps == 2
        and "holds 2 steps already, and 1 were wanted" in go(steps=1).result
    )
    other = hmx.HAM(
        {"a": hmx.IdentityLayer(2), "b": hmx.TanhLayer(4, beta=jnp.asarray(1.5))},
        {s: hmx.LinearSynapse(jnp.ones((2, 4))) for s in "WV"},
        [(("a", "b"), "W"), (("a", "b"), "V")],
    )
    for said, more in {
        "/neurons/b": dict(ham=other),
        "/optimizer": dict(optimizer=optax.sgd(0.1)),
        "/data/0/shape/0 is 23 in the file": dict(data=DATA[:22]),
        "/batch_size is 4 in the file": dict(batch_size=5),
        "/key": dict(key=jr.key(8)),
        "/neurons/b/lagrangian/beta/dtype": dict(ham=two_matrices(jnp.bfloat16)),
    }.items():
        with pytest.raises(FileProblem, match=said): go(**more)
    with pytest.raises(FileProblem, match="/optimizer|/trained"): go(trainable="W")
    hmx.save(path, two_matrices())
    with pytest.raises(FileProblem, match="is not a training run saved by hamux"): go()
    with pytest.raises(FileProblem, match="its folder does not exist"):
        go(checkpoint=tmp_path / "none" / "run.hamux")


def test_other_numbers_of_the_same_shapes(tmp_path):
    "Data, start, state of the optimizer and validation data are compared, not only their shapes"
    path, data = tmp_path / "run.hamux", np.array(DATA)
    adam = optax.adam(0.05)
    go = lambda ham=None, data=data, **more: fit(
        ham or two_matrices(), pull, data, adam, steps=2, checkpoint=path, **QUICK | more
    )
    done = go(validation=data)
    assert same_bits(go(validation=data.copy()).last, done.last)
    assert same_bits(go().last, done.last) # without validation it is the same run
    data[7] += 1e-3
    moved = jtu.tree_map(lambda v: v + 1e-6, two_matrices())
    state = jtu.tree_map(lambda v: v + 1, adam.init(two_matrices()))
    for said, more in {
        "on other data of the same shapes": dict(data=data, validation=DATA),
        "that began with other parameters": dict(ham=moved, data=DATA),
        "another state of the optimizer": dict(data=DATA, opt_state=state),
        "validated on other data": dict(data=DATA, validation=data),
    }.items():
        with pytest.raises(FileProblem, match=f"{said}.*checksum .* in the file.*another file"):
            go(**more)
    assert same_bits(go(data=DATA, validation=DATA).last, done.last)


@pytest.mark.parametrize("order", ["C", "F"])
def test_large_data_are_read_in_parts(tmp_path, order):
    "A checksum of a memory map takes no memory of its size, in whatever order it lies"
    shape = (3, 2_000_000)
    rows = np.memmap(tmp_path / "rows", np.float32, "w+", shape=shape, order=order)
    rows[:] = np.arange(6e6).reshape(shape)
    tracemalloc.start()
    there = digest(rows)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert there == digest(np.array(rows)) and most < 1.7e7
    assert digest(np.zeros((0, 3)), np.float32(1)) == digest(np.ones(1, np.float32))


@pytest.mark.slow
def test_validation_may_be_added(tmp_path):
    "At whatever step, also when all are done, and again at each retry"
    more = dict(validation=DATA, validate_every=3, patience=4)
    go = lambda steps, path=None, **more: fit(
        two_matrices(), pull, DATA, optax.adam(0.05), steps=steps, checkpoint=path, **QUICK | more
    )
    whole = go(9, **more)
    for first in (0, 1, 3, 5, 9):
        path = tmp_path / f"{first}.hamux"
        go(first, path)
        for _ in range(2):
            out = go(9, path, **more)
            assert same_bits(out.last, whole.last) and same_bits(out.losses, whole.losses)
            steps = [step for step in (0, 3, 6, 9) if step >= first]
            np.testing.assert_array_equal(out.validation[0], steps)
            np.testing.assert_array_equal(out.validation[1], whole.validation[1][-len(steps):])
        assert same_bits(go(9, path).last, whole.last) # and it may be left out


def rewritten(path, change):
    "The file at `path` with its header changed, and its arrays, by name"
    with zipfile.ZipFile(path) as archive:
        members = {n: archive.read(n) for n in archive.namelist()}
    header = json.loads(members["hamux.json"])
    change(header, members)
    members["hamux.json"] = json.dumps(header).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for n, data in members.items(): archive.writestr(n, data)


def narrow(header, members, name="network"):
    "Put float16 for the first array of some name."
    i, row = next((i, r) for i, r in enumerate(header["parameters"]) if r["name"].startswith(name))
    array = np.load(io.BytesIO(members[f"{i}.npy"])).astype(np.float16)
    np.save(file := io.BytesIO(), array)
    members[f"{i}.npy"], row["dtype"] = file.getvalue(), "float16"
    header["checksums"][i] = digest(array)


@pytest.mark.parametrize("said, change", [
    ("/0/dtype is 'float16' in the file, and 'float32' here", narrow),
    ("/dtype is 'float16'", lambda h, m: narrow(h, m, "optimizer")),
    ("/dtype is 'float16'", lambda h, m: narrow(h, m, "best")),
    ("arrays/14", lambda h, m: narrow(h, m, "failed")),
    ("arrays", lambda h, m: h["parameters"][0].update(name="network.other")),
    ("arrays", lambda h, m: (h["parameters"].pop(), h["checksums"].pop())),
    ("damaged", lambda h, m: h.update(seconds="x")),
    ("damaged", lambda h, m: h.pop("seconds")),
    ("damaged", lambda h, m: h.update(seconds=10**400)),
    ("damaged", lambda h, m: h.update(parameters=3)),
    ("its checksum", lambda h, m: h["checksums"].reverse()),
    ("something else", lambda h, m: h.update(run=3)),
    ("something else", lambda h, m: h.update(run={})),
    ("other data", lambda h, m: h.update(digests={"data": []})),
])
def test_files_that_say_something_else(said, change, tmp_path):
    path = tmp_path / "run.hamux"
    go = lambda: fit(two_matrices(), pull, DATA, optax.adam(0.05), steps=3, checkpoint=path,
                     validation=DATA, **QUICK)
    go()
    rewritten(path, change)
    with pytest.raises(FileProblem, match=said): go()


def test_files_without_checksums_go_on(tmp_path):
    "As 0.3.0 wrote them: nothing is compared that is not there"
    path = tmp_path / "run.hamux"
    go = lambda steps: fit(
        two_matrices(), pull, DATA, optax.adam(0.05), steps=steps, checkpoint=path, **QUICK
    )
    go(3)
    rewritten(path, lambda h, m: (h.pop("checksums"), h.pop("digests")))
    assert go(5).steps == 5
    with zipfile.ZipFile(path) as archive: header = json.loads(archive.read("hamux.json"))
    assert set(header["digests"]) == {"data", "start"} # from now on they are


@pytest.mark.slow
def test_losses_keep_their_dtype(tmp_path):
    "A run in float64 goes on with the losses that it had"
    with jax.enable_x64(True):
        ham = jtu.tree_map(lambda v: v.astype(jnp.float64), two_matrices())
        more = dict(validation=DATA, **QUICK)
        go = lambda steps, path=None: fit(
            ham, pull, DATA, optax.adam(0.05), steps=steps, checkpoint=path, **more
        )
        go(3, tmp_path / "run.hamux")
        rest, whole = go(7, tmp_path / "run.hamux"), go(7)
        assert same_bits(rest.losses, whole.losses) and same_bits(rest.last, whole.last)


def test_damaged_files(tmp_path):
    path = tmp_path / "run.hamux"
    go = lambda: fit(
        two_matrices(),
        pull,
        DATA,
        optax.adam(0.05),
        steps=3,
        checkpoint=path,
        validation=DATA,
        **QUICK,
    )
    go()
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for n in [0, 3, 30, *rng.integers(50, len(whole) - 1, 8)]:
        path.write_bytes(whole[:n])
        with pytest.raises(FileProblem, match="cut short|damaged"): go()
    blank, identity = started()
    for at in rng.integers(0, len(whole), 40): # a bit that flips is found, or was one of padding
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1:])
        try:
            back = read_run(path, blank, identity)
        except FileProblem:
            continue
        path.write_bytes(whole)
        assert same_bits(run_arrays(back), run_arrays(read_run(path, blank, identity)))


def test_random_keys_of_optimizers_are_kept(tmp_path):
    "An optimizer that draws: a typed key in its state goes into the file and comes back"
    def update(grads, state, params=None):
        key, now = jr.split(state)
        return jtu.tree_map(lambda g: -0.01 * g + 0.01 * jr.normal(now, g.shape), grads), key
    noisy = optax.GradientTransformation(lambda params: jr.key(3), update)
    whole = fit(two_matrices(), pull, DATA, noisy, steps=6, **QUICK)
    for steps in (2, 6):
        parts = fit(
            two_matrices(),
            pull,
            DATA,
            noisy,
            steps=steps,
            checkpoint=tmp_path / "run.hamux",
            **QUICK,
        )
    assert parts.opt_state.dtype == whole.opt_state.dtype and same_bits(
        (parts.ham, jr.key_data(parts.opt_state)), (whole.ham, jr.key_data(whole.opt_state))
    )


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, said, more",
    [
        (ValueError, "steps must be an int, 0 or more, got -1", dict(steps=-1)),
        (ValueError, "epochs must be a positive int, got 0", dict(steps=None, epochs=0)),
        (ValueError, "checkpoint_every must be a positive int", dict(checkpoint_every=0)),
        (ValueError, "batch_size must be a positive int", dict(batch_size=0)),
        (TypeError, "ham must be a HAM or a VectorizedHAM, got int", dict(ham=3)),
        (TypeError, "loss must be a function", dict(loss=3)),
        (ValueError, "must be built as the data", dict(validation=np.ones((3, 2)))),
        (ValueError, "does not fit", dict(trainable={"W": True})),
        (ValueError, "no layer or hypersynapse 'U'", dict(trainable="U")),
        (ValueError, "'b' has no parameter 'tau'; it has", dict(project={"b": {"tau": abs}})),
        (TypeError, "project must be a function of the network", dict(project={"b": abs})),
        (ValueError, "is not trained", dict(trainable="W", project={"b": {"beta": abs}})),
        (ValueError, "of the same shapes and dtypes", dict(project={"W": {"W": lambda W: W[0]}})),
        (TypeError, "got dtype int32", dict(loss=lambda *_: jnp.array(1))),
        (TypeError, "got dtype bool", dict(loss=lambda *_: jnp.array(True))),
        (TypeError, "key must be a PRNG key", dict(key=jr.split(jr.key(0)))),
        (TypeError, "The data must be an array", dict(data=[])),
        (TypeError, "data must be a plain array", dict(data=np.ma.masked_less(DATA, 0))),
    ],
)
def test_mistakes(error, said, more):
    settings = (
        dict(ham=two_matrices(), loss=pull, data=DATA, optimizer=optax.sgd(0.1), steps=1)
        | QUICK
        | more
    )
    with pytest.raises(error, match=said): fit(**settings)


@pytest.mark.parametrize(
    "missing, said", [("tqdm.auto", "progress=False"), ("optax", "fit trains with optax")]
)
def test_the_extra_is_named(missing, said, monkeypatch):
    optimizer = optax.sgd(0.1)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=said) as e:
        fit(two_matrices(), pull, DATA, optimizer, steps=1, **QUICK | dict(progress=True))
    assert "hamux[train]" in str(e.value)


def test_the_bar(capsys):
    fit(
        two_matrices(),
        pull,
        DATA,
        optax.sgd(0.1),
        steps=3,
        validation=DATA,
        **QUICK | dict(progress=True),
    )
    said = capsys.readouterr().err
    assert (
        "3/3" in said
        and "loss=" in said
        and "validation=" in said
        and "step/s" in said
        and "unconverged" not in said
    )
