"""The pages that help to choose name all that there is to choose from, and the defaults."""

import inspect
import re
from pathlib import Path

import pytest

import hamux as hmx
from hamux.dynamics.adjoints import ADJOINTS
from hamux.learning.gradients import METHODS
from hamux.network.hypergraph import HAM

PAGES = Path(__file__).resolve().parent.parent / "nbs" / "explanations"


def rows(page: str) -> list[str]:
    "The first cells of the rows of a page's tables"
    text = (PAGES / f"{page}.qmd").read_text(encoding="utf-8")
    return re.findall(r"^\| (.+?) \|", text, re.M)


def offered(kind: type) -> set[str]:
    "The names in the face of the package that are of a kind, and can be made"
    named = ((name, getattr(hmx, name)) for name in dir(hmx))
    classes = ((n, c) for n, c in named if isinstance(c, type) and issubclass(c, kind))
    return {n for n, c in classes if not inspect.isabstract(c)}


def missing(names: set[str], page: str) -> set[str]:
    return {name for name in names if not any(f"`{name}" in row for row in rows(page))}


def test_every_solver_has_its_row():
    solvers = offered(hmx.AbstractSolver)
    assert len(solvers) >= 5 and not missing(solvers | {"flow"}, "choosing_a_solver")


def test_every_gradient_has_its_row():
    assert set(ADJOINTS) < set(METHODS)
    assert not missing({f'"{name}"' for name in METHODS}, "choosing_a_gradient")


@pytest.mark.parametrize(
    "of, parameter, words",
    [
        (hmx.gradient, "method", ("`gradient`", "`RecallLoss`")),
        (hmx.RecallLoss, "method", ("`gradient`", "`RecallLoss`")),
        (hmx.descend, "adjoint", ("`descend`",)),
    ],
)
def test_the_row_of_a_default_says_so(of, parameter, words):
    default = inspect.signature(of).parameters[parameter].default
    (row,) = [r for r in rows("choosing_a_gradient") if f'`"{default}"`' in r]
    assert "the default of" in row and all(word in row for word in words)


def test_every_memory_has_its_row():
    modules = "hamux.memories", "hamux.synapses.memory", "hamux.synapses.random_features"
    public = ((n, getattr(hmx, n)) for n in dir(hmx) if not n.startswith("_"))
    places = {n: getattr(v, "__module__", "") for n, v in public if callable(v)}
    found = {n for n, place in places.items() if str(place).startswith(modules)}
    # a memory is what can be made of patterns: no result, and no recall of a network
    patterns = {"patterns", "memories", "Xi"}
    memories = {
        n
        for n in found | offered(hmx.AbstractDiscreteMemory)
        if patterns & inspect.signature(getattr(hmx, n)).parameters.keys() and n != "Recalled"
    }
    assert {"Memory", "memory_ham", "MemorySynapse", "recall"} <= memories
    assert not missing(memories | {"RandomFeatureMemory", "DiscreteHopfield"}, "choosing_a_memory")


def test_a_memory_of_two_layers_has_the_energy_of_one_synapse():
    "What the page says of hidden layers that are integrated out"
    import jax.numpy as jnp
    import jax.random as jr
    from jax.tree_util import Partial

    Xi, x = jr.normal(jr.key(0), (5, 3)), jr.normal(jr.key(1), (3,))
    two = hmx.memory_ham(Xi, beta=2.0)
    seen = {"pattern": x, "memory": Xi @ x - 0.5 * (Xi**2).sum(1)}
    softmax = Partial(hmx.lagr_softmax, beta=2.0)
    one = HAM(
        {"pattern": hmx.NeuronLayer(hmx.lagr_identity, 3, leak=False)},
        {"memory": hmx.MemorySynapse(Xi, softmax, "euclidean")},
        [(("pattern",), "memory")],
    )
    energies = [
        ham.energy(ham.activations(xs), xs) for ham, xs in ((two, seen), (one, {"pattern": x}))
    ]
    assert jnp.allclose(*energies, atol=1e-5)
