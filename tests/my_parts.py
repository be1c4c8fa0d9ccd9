"""Functions and classes of a user, which know nothing of hamux; files in `data` name them."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array


def quartic(x):
    "A Lagrangian: the activation is x + x³."
    return (x**2).sum() / 2 + (x**4).sum() / 4


def soft_abs(x, width=1.0):
    "A Lagrangian with a setting: the activation is x/√(width² + x²)."
    return jnp.sqrt(width**2 + x**2).sum()


class Curved(eqx.Module):
    "A Lagrangian that is a module with a parameter: the activation is x + tanh(gain x)."
    gain: Array

    def __call__(self, x):
        return (x**2).sum() / 2 + (jnp.log(jnp.cosh(self.gain * x)) / self.gain).sum()


def backwards(a, b):
    "A plain function as a synapse: what one layer shows forwards, the other shows backwards."
    return -0.3 * (a * b[::-1]).sum()


def cosine(a):
    "A plain function on one layer of any shape; not quadratic."
    return 0.2 * jnp.cos(2 * a).sum()


class Gate(eqx.Module):
    "A synapse of two layers that says of itself what `Relaxation` asks."
    W: Array
    power: float = eqx.field(static=True, default=1.0)

    def __call__(self, a, b): return -self.power * a @ self.W @ b
    def alone(self, position): return "affine"


class Ring(eqx.Module):
    "A synapse of one layer whose arguments are not its fields, so it has `config`."
    strength: Array
    shift: int = eqx.field(static=True)

    def __init__(self, strength, by=1): self.strength, self.shift = jnp.asarray(strength), by
    def __call__(self, a): return -(self.strength * a * jnp.roll(a, self.shift)).sum()
    def config(self): return {"strength": self.strength, "by": self.shift}


class PerToken(eqx.Module):
    "A synapse made of another one: the same memory for every token of a grid."
    memory: eqx.Module

    def __call__(self, tokens):
        return jax.vmap(self.memory)(tokens.reshape(-1, tokens.shape[-1])).sum()


def cubes(s, gain=1.0):
    "A separation function that hamux does not know: Σ (gain s)₊³."
    return ((gain * jnp.maximum(s, 0))**3).sum() / 3
