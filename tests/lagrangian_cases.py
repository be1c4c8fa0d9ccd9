"""All Lagrangians with the names of their hyperparameters, and how large an error may be: for
test_lagrangians.py and test_lagrangian_facts.py."""

import functools
import math

import jax.numpy as jnp
import pytest
from reference import SPARSE, mp

import hamux.lagrangians as lagr

# |got − true| ≤ C × eps(dtype) × condition + TINY × (smallest normal), see reference.py for
# "condition"
C_VALUE, C_GRAD, C_HVP = 16, 16, 16
TINY = 4

DTYPES = [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64]
HYPER = dict(
    identity=(),
    repu=("n",),
    relu=(),
    exp=("beta",),
    rexp=("beta",),
    tanh=("beta",),
    sigmoid=("beta",),
    softmax=("beta",),
    ghostmax=("beta",),
    layernorm=("gamma", "delta", "eps"),
    spherical_norm=("gamma", "delta", "eps"),
    sparsemax=("beta",),
    entmax=("alpha", "beta"),
    normmax=("alpha", "beta"),
    ksubsets=("beta",),
)
NAMES = list(HYPER)
WITH_BETA = [k for k, v in HYPER.items() if "beta" in v]
NORMS = ["layernorm", "spherical_norm"]
WITH_AXIS = ["softmax", "ghostmax", *NORMS, *SPARSE]
DIM = 4 # entries of a state

L = {name: getattr(lagr, f"lagr_{name}") for name in NAMES}
L["ksubsets"] = functools.partial(lagr.lagr_ksubsets, k=2)
MINIMAL = {"repu": (2.5,)}  # positional arguments without a default


def call(name, x, hyper):
    return L[name](x, **dict(zip(HYPER[name], hyper)))


def lambda_of(name, hyper):
    return functools.partial(L[name], **dict(zip(HYPER[name], hyper, strict=True)))


dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)


def every(names):
    return pytest.mark.parametrize("name", names)


def ratio(got, true, cond, kink, scale, c, floor, dtype):
    """The error over what is allowed: at most 1 passes. Infinity is right where the true value
    does not fit."""
    info = jnp.finfo(dtype)
    got, eps, tiny, top = float(got), float(info.eps), float(info.tiny), float(info.max)
    allowed = c * eps * cond + kink + TINY * tiny * floor
    # inf × 0
    if math.isnan(got): return 0.0 if true == 0 and scale * (1 + c * eps) > top else math.inf
    if math.isinf(got):
        return (
            0.0
            if got * float(mp.sign(true)) > 0
            and max(abs(true) + allowed, scale * (1 + c * eps)) >= top
            else math.inf
        )
    return float(min(abs(mp.mpf(got) - true) / allowed, mp.mpf(1e30)))
