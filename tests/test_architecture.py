"""The house: where knowledge lives, what may import what, and that whoever adds a part adds one
file."""

import ast
import importlib
import re
import subprocess
import sys
import types
import warnings
from pathlib import Path
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from text_pages import text_pages

import hamux as hmx

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, PAGES = ROOT / "hamux", ROOT / "nbs" / "api"
# every wing may import from those of the rows before its own, and from itself
FLOORS = [
    ("numerics",),
    ("lagrangians",),
    ("network",),
    ("synapses", "dynamics", "display"),
    ("storage",),
    ("analysis", "memories"),
    ("learning", "cli"),
]
FLOOR = {wing: i for i, wings in enumerate(FLOORS) for wing in wings}
BY_HAND = {"__init__.py", "__main__.py", "_modidx.py", "_reference.py"}
ALIASES = {"sklearn": "memories.estimators"} # faces without a wing: names under another's name


def modules() -> dict[str, ast.Module]:
    "The syntax tree of every exported module, by its path without the suffix"
    paths = [p for p in PACKAGE.rglob("*.py") if p.name not in BY_HAND]
    name = lambda p: p.relative_to(PACKAGE).with_suffix("").as_posix()
    return {name(p): ast.parse(p.read_text(encoding="utf-8")) for p in sorted(paths)}


MODULES = modules()


def imports(name: str) -> list[tuple[str, list[str]]]:
    "What a module imports of the package: (module or wing, names), function-level imports included"
    here, found = name.split("/")[:-1], []
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Import):
            found += [
                (n.name.split(".", 1)[-1], []) for n in node.names if n.name.startswith("hamux.")
            ]
        if not isinstance(node, ast.ImportFrom): continue
        path = (node.module or "").split(".") if node.module else []
        if node.level:
            path = here[: len(here) - node.level + 1] + path
        elif path[:1] == ["hamux"]:
            path = path[1:]
        else:
            continue
        names = [n.name for n in node.names]
        found += [("/".join(path), names)] if path else [(n, []) for n in names]
    return found


def target(module: str, names: list[str]) -> list[str]:
    "The modules that an import reads; a wing as a whole if it is imported by its face"
    inside = [f"{module}/{n}" for n in names if f"{module}/{n}" in MODULES]
    return inside or [module]


# --- the plan of the house
# -------------------------------------------------------------------------------------------


def test_folders_mirror():
    pages = {
        p.relative_to(PAGES).with_suffix("").as_posix()
        for p in [*PAGES.rglob("*.ipynb"), *text_pages(PAGES)]
        if ".ipynb_" not in str(p)
    }
    assert pages == set(MODULES)
    faces = {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    wings = {m.split("/")[0] for m in MODULES if "/" in m}
    assert faces - set(ALIASES) == wings == set(FLOOR) - {"cli"}


@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_only_passes_names_on(alias):
    face = importlib.import_module(f"hamux.{alias}")
    home = importlib.import_module(f"hamux.{ALIASES[alias]}")
    assert [p.name for p in (PACKAGE / alias).glob("*.py")] == ["__init__.py"]
    assert all(getattr(face, n) is getattr(home, n) for n in face.__all__)


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name):
    "From the code's own imports: a wing knows only the floors below its own"
    wing = name.split("/")[0]
    if wing == "core": return # passes names on
    for module, names in imports(name):
        other = module.split("/")[0]
        assert other in FLOOR, f"{name} imports {module}, which is in no wing"
        assert (
            other == wing or FLOOR[other] < FLOOR[wing]
        ), f"{name} imports {module}: up, or across"
        assert (
            other != wing or "/" in target(module, names)[0]
        ), f"{name} imports the face of its own wing"


def test_no_circle():
    edges = {
        name: {t for module, names in imports(name) for t in target(module, names)} & set(MODULES)
        for name in MODULES
    }
    left = dict(edges)
    while leaves := [n for n, out in left.items() if not out & set(left)]:
        for n in leaves: del left[n]
    assert left == {}


def test_no_private_name_crosses_a_file():
    crossing = {
        (name, n)
        for name in MODULES
        for _, names in imports(name)
        for n in names
        if n.startswith("_")
    }
    assert crossing == set()


def test_lagrangians_are_asked_and_not_compared():
    """Outside of their wing no Lagrangian stands in a comparison, as a key, or in a table of its
    likes"""
    is_one = lambda node: getattr(node, "id", getattr(node, "attr", "")).startswith("lagr_")
    for name, tree in MODULES.items():
        if name.startswith("lagrangians/"): continue
        for node in ast.walk(tree):
            parts = {
                ast.Compare: lambda n: [n.left, *n.comparators],
                ast.Dict: lambda n: n.keys,
                ast.Tuple: lambda n: n.elts,
                ast.List: lambda n: n.elts,
                ast.Set: lambda n: n.elts,
            }.get(type(node), lambda n: [])(node)
            assert not any(map(is_one, parts)), f"{name}, line {node.lineno}"


@pytest.mark.parametrize("name", MODULES)
def test_no_module_is_hidden(name):
    "A function of the same name in the face of a wing would hide the module"
    module = importlib.import_module("hamux." + name.replace("/", "."))
    wing = importlib.import_module(".".join(module.__name__.split(".")[:-1]))
    assert getattr(wing, name.split("/")[-1]) is module


def test_display_is_put_on_the_network():
    "The hypergraph does not know its table"
    assert "display" not in (PACKAGE / "network" / "hypergraph.py").read_text(encoding="utf-8")
    assert repr(sample()).startswith("HAM: 2 layers")


# --- the face -------------------------------------------------------------------------------------
# -------------------


def test_face_can_be_read():
    assert len(hmx.__all__) == len(set(hmx.__all__)) < 150
    assert not any(isinstance(getattr(hmx, n), types.ModuleType) for n in hmx.__all__)
    homes = [
        getattr(hmx, n).__module__.split(".")[1]
        for n in hmx.__all__
        if hasattr(getattr(hmx, n), "__module__")
    ]
    order = list(dict.fromkeys(homes))
    # one group a wing
    assert len(order) == len([h for i, h in enumerate(homes) if i == 0 or homes[i - 1] != h])


@pytest.mark.parametrize("name", sorted(hmx._LEFT))
def test_names_that_left_go_on_working(name):
    assert name not in hmx.__all__
    with pytest.warns(DeprecationWarning, match=rf"write hamux\.\w+\.{name}"):
        found = getattr(hmx, name)
    assert found is getattr(importlib.import_module(f"hamux.{hmx._LEFT[name]}"), name)


OLD = {
    "adaptive": "Adaptive",
    "adjoints": "ImplicitAdjoint",
    "attention": "AttentionSynapse",
    "attractors": "wilson",
    "build": "Lazy Site build",
    "config": "to_config",
    "core": "HAM ConvSynapse",
    "derivatives": "logsumexp",
    "discrete": "hebbian",
    "drawing": "draw",
    "dynamics": "descend Euler AbstractSolver",
    "files": "FileProblem",
    "flow": "flow Flow",
    "grids": "PoolSynapse",
    "hypergraph": "HAM",
    "lagrangians": "lagr_softmax ghostmax",
    "langevin": "Langevin",
    "learning": "gradient nudged",
    "loop": "Setup Trace CONVERGED",
    "losses": "hide_half",
    "memories": "recall memory_ham",
    "memory_synapse": "MemorySynapse log_sum_relu",
    "neurons": "TanhLayer",
    "parameters": "seal",
    "plots": "plot_energy",
    "random_features": "RandomFeatureMemory",
    "relaxation": "Relaxation",
    "saving": "save load",
    "solvers": "Euler Backtracking Problem Point Move",
    "streaming": "stream",
    "synapses": "LinearSynapse ConvSynapse",
    "tables": "describe",
    "training": "fit",
}


@pytest.mark.parametrize("old", OLD)
def test_old_paths_import(old):
    module = importlib.import_module(f"hamux.{old}")
    assert sys.modules[f"hamux.{old}"] is module
    for name in OLD[old].split():
        assert getattr(module, name).__name__ == name if name != "CONVERGED" else True


@pytest.mark.slow
def test_old_star_imports():
    code = (
        "from hamux.solvers import *; from hamux.build import *; Euler, Backtracking, Site, build"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert (run.returncode, run.stderr) == (0, "")


# --- whatever can stand in a network survives load(save(…))
# ----------------------------------------------------------


def sample():
    return hmx.HAM(
        [hmx.IdentityLayer(4), hmx.TanhLayer(3)],
        [hmx.LinearSynapse(jnp.ones((4, 3)))],
        [([0, 1], 0)],
    )


def wing_things(wing: str, test) -> list[str]:
    face = importlib.import_module(f"hamux.{wing}")
    return sorted(n for n in vars(face) if not n.startswith("_") and test(getattr(face, n)))


NEEDED = {"lagr_ksubsets": {"k": 2}, "lagr_repu": {"n": 3.0}}
STANDS = {
    "LinearSynapse": ([4, 3], {}),
    "LinearSynapseWithBias": ([4, 3], {}),
    "BiasSynapse": ([(2, 3)], {}),
    "DenseSynapse": ([4, (2, 3), 2], {}),
    "ConvSynapse": ([(6, 6, 2), (6, 6, 3)], {"filter_shape": 3}),
    "AttentionSynapse": ([(5, 4)], {"heads": 2}),
    "MemorySynapse": ([(5, 4)], {"memories": 3, "over": "last"}),
}
MADE = {
    "PoolSynapse": lambda: ([(6, 6, 2), (3, 3, 2)], hmx.PoolSynapse(2)),
    "RandomFeatureMemory": lambda: (
        [4], hmx.RandomFeatureMemory.store(jr.key(0), jnp.eye(4), beta=2.0, n_features=8)
    ),
}


def same_after_a_file(ham, tmp_path, **how):
    hmx.save(tmp_path / "network.hamux", ham)
    back = hmx.load(tmp_path / "network.hamux", **how)
    assert jtu.tree_structure(back) == jtu.tree_structure(ham)
    for a, b in zip(jtu.tree_leaves(ham), jtu.tree_leaves(back), strict=True):
        np.testing.assert_array_equal(a, b)
    return back


@pytest.mark.parametrize(
    "name", wing_things("lagrangians", lambda v: getattr(v, "facts", None) is not None)
)
def test_lagrangians_survive_a_file(name, tmp_path):
    lagrangian = getattr(importlib.import_module("hamux.lagrangians"), name)
    bound = eqx.Partial(lagrangian, **NEEDED[name]) if name in NEEDED else lagrangian
    parts = {"m": hmx.MemorySynapse(jnp.eye(3, 4), bound, "euclidean")}
    layer = hmx.NeuronLayer(bound if lagrangian.facts.convex else hmx.lagr_identity, 4)
    same_after_a_file(hmx.HAM({"v": layer}, parts, [(("v",), "m")]), tmp_path)


@pytest.mark.parametrize(
    "name", wing_things("synapses", lambda v: isinstance(v, type) and hasattr(v, "config_name"))
)
def test_synapses_survive_a_file(name, tmp_path):
    if name in STANDS:
        shapes, settings = STANDS[name]
        made = getattr(hmx, name).lazy(**settings)
    else:
        shapes, made = MADE[name]()
    layers = [hmx.TanhLayer(s) for s in shapes]
    same_after_a_file(hmx.build(layers, [made], [(range(len(shapes)), 0)], key=jr.key(0)), tmp_path)


# --- a part of a user's own, in one cell each
# ------------------------------------------------------------------------


@hmx.with_facts(form="competition", silent=3.0, beta="sharpness", axis="along")
def lagr_shy(x, sharpness=1.0, along=-1):
    "A softmax with three silent competitors."
    top = jnp.maximum(x.max(along, keepdims=True), 0)
    rest = jnp.exp(sharpness * (x - top)).sum(along) + 3 * jnp.exp(-sharpness * top).sum(along)
    return (top.sum(along) + jnp.log(rest) / sharpness).sum()


@hmx.with_facts(form="sum", log_slope=lambda xhat, beta: -2 * beta * xhat)
def lagr_mine(x, beta=1.0): return jnp.log(jnp.cosh(beta * x)).sum() / beta


def test_a_lagrangian_of_yours_streams():
    "Same value and gradients as in one piece, and no array of queries × memories"
    with jax.enable_x64(True):
        Xi, x, b = jr.normal(jr.key(0), (50, 6)), jr.normal(jr.key(1), (6,)), jnp.array(1.7)
        ours = lambda x, Xi, b: hmx.MemorySynapse(Xi, eqx.Partial(lagr_shy, sharpness=b), block=8)(
            x
        )
        plain = lambda x, Xi, b: -lagr_shy(Xi @ x, b)
        (value, slopes), (exact, wanted) = (
            jax.jit(jax.value_and_grad(f, (0, 1, 2)))(x, Xi, b) for f in (ours, plain)
        )
        for a, b in zip(slopes, wanted, strict=True): np.testing.assert_allclose(a, b, rtol=1e-10)
        np.testing.assert_allclose(value, exact, rtol=1e-12)
    like = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((20_000, 8), (256, 8))]
    f = lambda Xi, X: jax.vmap(jax.grad(hmx.MemorySynapse(Xi, lagr_shy)))(X)
    assert (
        jax.jit(f).lower(*like).compile().memory_analysis().temp_size_in_bytes
        < 4 * 20_000 * 256 / 2
    )


def test_a_lagrangian_of_yours_is_sampled_or_refused():
    settings = dict(solver=hmx.Langevin(0.01), max_steps=5, key=jr.key(0))
    bias = lambda x: x.sum()
    for lagrangian in (lagr_mine, eqx.Partial(lagr_mine, beta=2.0)):
        ours = hmx.HAM([hmx.NeuronLayer(lagrangian, 4)], [bias], [([0], 0)])
        beta = 2.0 if isinstance(lagrangian, eqx.Partial) else 1.0
        theirs = hmx.HAM([hmx.TanhLayer(4, beta)], [bias], [([0], 0)])
        ends = [hmx.descend(ham, {0: jnp.ones(4)}, **settings).xs[0] for ham in (ours, theirs)]
        np.testing.assert_allclose(*ends, rtol=1e-4)
    shy = hmx.HAM([hmx.NeuronLayer(lagr_shy, 4)], [bias], [([0], 0)])
    with pytest.raises(ValueError, match="lagr_shy.*wrong law"):
        hmx.descend(shy, {0: jnp.ones(4)}, **settings)


def test_a_lagrangian_of_yours_is_relaxed_described_saved_drawn(tmp_path):
    memory = hmx.MemorySynapse(jr.normal(jr.key(0), (7, 4)), eqx.Partial(lagr_shy, sharpness=2.0))
    ham = hmx.HAM({"v": hmx.NeuronLayer(lagr_mine, 4)}, {"m": memory}, [(("v",), "m")])
    assert memory.alone(0) == "concave"
    end = hmx.descend(ham, {"v": jnp.ones(4)}, solver=hmx.Relaxation())
    assert end.converged and end.rises == 0
    hot = hmx.with_beta(ham, "m", 5.0)
    np.testing.assert_allclose(
        hot.hypersynapses["m"](jnp.ones(4)), -lagr_shy(memory.Xi @ jnp.ones(4), 5.0), rtol=1e-5
    )
    assert "mine" in repr(ham) and "shy(" in repr(ham)
    back = same_after_a_file(ham, tmp_path, known=[lagr_mine, lagr_shy])
    assert back.energy({"v": jnp.ones(4)}, {"v": jnp.ones(4)}) == ham.energy(
        {"v": jnp.ones(4)}, {"v": jnp.ones(4)}
    )
    texts = [t.get_text() for t in hmx.draw(ham).texts]
    assert "mine" in texts


class Springs(eqx.Module):
    "−k (a·x̂₁)(a·x̂₂)."
    a: jax.Array
    stiffness: float = 1.0

    def __call__(self, xhat1, xhat2): return -self.stiffness * (self.a @ xhat1) * (self.a @ xhat2)
    def alone(self, position): return "affine"
    def config(self): return {"stiffness": self.stiffness}

    @classmethod
    def lazy(cls, stiffness=1.0):
        return hmx.Lazy(
            lambda key, s1, s2, *, site: cls(site.normal(key, s1, 0.3), stiffness), "Springs.lazy()"
        )


def test_a_synapse_of_yours(tmp_path):
    layers = {"a": hmx.TanhLayer(3), "b": hmx.TanhLayer(3)}
    ham = hmx.build(layers, {"s": Springs.lazy(0.5)}, [(("a", "b"), "s")], key=jr.key(0))
    end = hmx.descend(ham, ham.init_states(key=jr.key(1)), solver=hmx.Relaxation())
    assert end.converged and end.evaluations < 40 # it jumps: both ends are affine
    same_after_a_file(ham, tmp_path, known=[Springs])
    again = hmx.from_config(hmx.to_config(ham), key=jr.key(2), known=[Springs])
    assert again.hypersynapses["s"].stiffness == 0.5


class Halving(hmx.AbstractSolver):
    "Goes half of the way to the input current."
    def init(self, problem, xs): return None
    def step(self, problem, now, state, step, key):
        return hmx.Move(now, {n: x - 0.5 * now.grads[n] for n, x in now.xs.items()}, None)
    def descends(self, step): return True
    def cost(self, problem): return 1.0


class Frozen(hmx.AbstractAdjoint):
    "No derivative at all."
    def ends(self, setup, last): return jax.lax.stop_gradient(last.ahead)


@pytest.mark.slow
def test_a_solver_and_an_adjoint_of_yours():
    ham = hmx.HAM([hmx.TanhLayer(4)], [hmx.BiasSynapse(jnp.arange(4.0))], [([0], 0)])
    end = hmx.descend(ham, ham.init_states(), solver=Halving())
    assert end.converged
    np.testing.assert_allclose(end.xs[0], jnp.arange(4.0), atol=1e-3)
    f = (
        lambda ham, adjoint: hmx.descend(ham, ham.init_states(), solver=Halving(), adjoint=adjoint)
        .xs[0]
        .sum()
    )
    slope = lambda adjoint: jax.grad(f)(ham, adjoint).hypersynapses[0].b
    np.testing.assert_allclose(slope("implicit"), jnp.ones(4), rtol=1e-3)
    np.testing.assert_array_equal(slope(Frozen()), jnp.zeros(4))


class Differences(hmx.AbstractMethod):
    "Central differences in every parameter: slow, and independent of everything else."
    step: ClassVar[float] = 1e-3

    def gradient(self, ham, loss, xs, targets, clamp, recall):
        leaves, tree = jtu.tree_flatten(ham)
        flat, back = jax.flatten_util.ravel_pytree(leaves)
        def value(move):
            out = recall(jtu.tree_unflatten(tree, back(flat + move)), xs, clamp=clamp)
            return loss(out.xhats, targets), out
        n = len(flat)
        moves = self.step * jnp.concatenate([jnp.zeros((1, n)), jnp.eye(n), -jnp.eye(n)])
        values, outs = jax.vmap(value)(moves)
        slopes = back((values[1 : n + 1] - values[n + 1 :]) / (2 * self.step))
        free = jtu.tree_map(lambda v: v[0], outs)
        return hmx.Gradient(values[0], jtu.tree_unflatten(tree, slopes), {"free": free})


class Farthest(eqx.Module):
    "A loss with a gradient of its own making, for `fit`."
    def __call__(self, ham, batch, key):
        settings = dict(solver=hmx.Euler(1.0), trace=False, adjoint="implicit")
        end = hmx.descend(ham.vectorize(), {0: batch}, **settings)
        return (end.xhats[0] ** 2).mean()


@pytest.mark.slow
def test_a_learning_method_and_a_loss_of_yours():
    ham = hmx.HAM(
        [hmx.IdentityLayer(3)], [hmx.BiasSynapse(jnp.array([1.0, -2.0, 0.5]))], [([0], 0)]
    )
    loss = lambda xhats, target: ((xhats[0] - target) ** 2).sum()
    at_once = dict(solver=hmx.Euler(1.0)) # a step goes all the way
    find = lambda ham, m: hmx.gradient(
        ham, loss, ham.init_states(), targets=jnp.ones(3), method=m, **at_once
    )
    ours, theirs = jax.jit(lambda ham: [find(ham, m) for m in (Differences(), "implicit")])(ham)
    np.testing.assert_allclose(
        ours.grads.hypersynapses[0].b, theirs.grads.hypersynapses[0].b, rtol=1e-2, atol=1e-3
    )
    optax = pytest.importorskip("optax")
    rows = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    settings = dict(steps=3, batch_size=4, key=jr.key(0), progress=False)
    assert hmx.fit(ham, Farthest(), rows, optax.sgd(0.1), **settings).ok
    prepare = lambda ham, batch, key: ({0: batch}, batch)
    recall = hmx.RecallLoss(prepare, loss, method=Differences(), **at_once)
    assert hmx.fit(ham, recall, rows, optax.sgd(0.1), **settings).steps == 3 or warnings


def test_the_sentence_of_every_code():
    "One enumeration: whoever recalls has a sentence for each code that it can end with"
    results = importlib.import_module("hamux.dynamics.results")
    for kind, sentences in results.SENTENCES.items():
        assert all(
            re.search(r"\{\w+", s) and s.endswith((".", ".{advice}")) for s in sentences.values()
        ), kind
