"""Energy-based associative memories: neuron layers joined by hypersynapses under one energy."""

__version__ = "0.3.0"

import importlib as _importlib
import sys as _sys
import types as _types
import warnings as _warnings

# What people write in a notebook, by the wing that it is in, in the order in which the pages
# explain it. A wing is imported when one of its names is asked for. The rest is in the wings.
_WINGS = {
    "lagrangians": """
        lagr_identity lagr_repu lagr_relu lagr_exp lagr_rexp lagr_tanh lagr_sigmoid lagr_softmax
        lagr_ghostmax ghostmax lagr_layernorm lagr_spherical_norm lagr_sparsemax lagr_entmax
        lagr_normmax lagr_ksubsets log_sum_relu Facts with_facts check_lagrangian
    """,
    "network": """
        NeuronLayer legendre_transform IdentityLayer ReluLayer RepuLayer ExpLayer RexpLayer
        TanhLayer SigmoidLayer SoftmaxLayer GhostmaxLayer LayerNormLayer SphericalNormLayer
        SparsemaxLayer EntmaxLayer NormmaxLayer KSubsetsLayer HAM VectorizedHAM Lazy build
    """,
    "synapses": """
        LinearSynapse LinearSynapseWithBias BiasSynapse DenseSynapse ConvSynapse PoolSynapse
        AttentionSynapse MemorySynapse RandomFeatureMemory
    """,
    "dynamics": """
        descend Descent Trace with_beta flow Flow compiled_programs AbstractSolver Move Point
        Problem Euler Backtracking Adaptive Relaxation Langevin AbstractAdjoint UnrolledAdjoint
        CheckpointedAdjoint ImplicitAdjoint OneStepAdjoint sample Samples Gibbs MetropolisLangevin
        tempering
    """,
    "display": "plot_energy plot_recall plot_lagrangian plot_attractors draw describe",
    "learning": """
        gradient Gradient AbstractMethod EquilibriumPropagation ContrastiveHebbian RecallLoss
        denoising_loss completion_loss classification_loss squared_error cross_entropy
        hide_pixels hide_half hide_rectangle fit Fit batches unit_norm fit_memory
        contrastive_divergence pseudo_likelihood score_matching
    """,
    "memories": "recall Memory Recalled memory_ham",
    "analysis": """
        which_memory stability Stability basin_size flip_signs add_noise erase cover
        find_attractors Landscape composition AbstractDiscreteMemory DiscreteHopfield
        DiscreteMemory hebbian pseudo_inverse recall_bits flip_together effective_sample_size r_hat
        free_energy log_partition SequenceMemory
    """,
    "storage": "save load to_config from_config FileProblem",
}
_WING = {name: wing for wing, names in _WINGS.items() for name in names.split()}

__all__ = [*_WING]

# Modules of 0.3, and where what they held is now.
_MOVED = {
    "adaptive": "dynamics.adaptive", "adjoints": "dynamics.adjoints",
    "attention": "synapses.attention", "attractors": "analysis.attractors",
    "build": "network.sizing network.recipe",
    "config": "storage.config storage.names storage.descriptions",
    "derivatives": "numerics.derivatives", "discrete": "analysis.discrete",
    "drawing": "display.drawing", "files": "storage.files storage.formats storage.problems",
    "flow": "dynamics.continuous",
    "grids": "synapses.grids", "hypergraph": "network.hypergraph", "langevin": "dynamics.langevin",
    "loop": "dynamics.loop dynamics.results", "losses": "learning.losses learning.corruption",
    "memory_synapse": "synapses.memory lagrangians.separation", "neurons": "network.neurons",
    "parameters": "network.parameters", "plots": "display.plots",
    "random_features": "synapses.random_features", "relaxation": "dynamics.relaxation",
    "saving": "storage.saving",
    "solvers": "dynamics.solver dynamics.problem dynamics.euler dynamics.backtracking",
    "streaming": "numerics.streaming", "tables": "display.tables",
    "training": "learning.training learning.run learning.trainable",
}


class _Moved(_types.ModuleType):
    "A module under its old name; what it held is looked for when it is asked for."

    def __getattr__(self, name):
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        old = self.__name__.rpartition(".")[2]
        parts = [_importlib.import_module(f"hamux.{part}") for part in _MOVED[old].split()]
        if name == "__all__": return [n for part in parts for n in part.__all__]
        for part in parts:
            if name in vars(part): return vars(part)[name]
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


for _old in _MOVED:
    _sys.modules[f"hamux.{_old}"] = _Moved(f"hamux.{_old}", f"Moved: hamux.{_MOVED[_old]}.")

# Names that left this face. They go on working here for now.
_LEFT = {
    "square_norm": "network", "Site": "network", "Nudge": "learning", "nudged": "learning",
    "wilson": "analysis", "Reached": "analysis", "BasinSize": "analysis", "BitRecall": "analysis",
    "near_distance2": "memories", "choose_beta": "memories", "choose_similarity": "memories",
    "recall_states": "memories", "LAGRANGIANS": "storage", "SYNAPSES": "storage",
    "ALIASES": "storage",
}


def __getattr__(name):
    if name in _WING:
        value = getattr(_importlib.import_module(f"hamux.{_WING[name]}"), name)
        globals()[name] = value
        return value
    if name in _LEFT:
        wing = f"hamux.{_LEFT[name]}"
        said = f"hamux.{name} has moved: write {wing}.{name}."
        _warnings.warn(said, DeprecationWarning, stacklevel=2)
        return getattr(_importlib.import_module(wing), name)
    if name in _MOVED: return _sys.modules[f"hamux.{name}"]
    if name in _WINGS or name == "numerics": return _importlib.import_module(f"hamux.{name}")
    raise AttributeError(f"module 'hamux' has no attribute {name!r}")


def __dir__(): return sorted({*globals(), *__all__, *_WINGS, "numerics"})
