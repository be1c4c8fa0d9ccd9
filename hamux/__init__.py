"""Energy-based associative memories: neuron layers joined by hypersynapses under one energy."""

__version__ = "0.3.0"

from . import (
    adaptive,
    adjoints,
    attention,
    attractors,
    config,
    discrete,
    drawing,
    dynamics,
    grids,
    hypergraph,
    lagrangians,
    langevin,
    learning,
    loop,
    losses,
    memories,
    memory_synapse,
    neurons,
    plots,
    random_features,
    relaxation,
    saving,
    solvers,
    synapses,
    tables,
    training,
)
from . import build as _build # the function takes the name below
from . import flow as _flow # and here too
from .adaptive import *
from .adjoints import *
from .attention import *
from .attractors import *
from .build import *
from .config import *
from .discrete import *
from .drawing import *
from .dynamics import *
from .flow import *
from .grids import *
from .hypergraph import *
from .lagrangians import *
from .langevin import *
from .learning import *
from .losses import *
from .memories import *
from .memory_synapse import *
from .neurons import *
from .plots import *
from .random_features import *
from .relaxation import *
from .saving import *
from .synapses import *
from .tables import *
from .training import *

_modules = (
    lagrangians, neurons, synapses, memory_synapse, attention, grids, random_features, hypergraph, _build,
    adaptive, adjoints, dynamics, relaxation, langevin, _flow, discrete, attractors, learning, losses, training, memories, config, saving, plots, tables, drawing,
)
__all__ = list(dict.fromkeys(name for module in _modules for name in module.__all__))
