"""Energy-based associative memories: neuron layers joined by hypersynapses under one energy."""

__version__ = "0.3.0"

from . import (
    attention,
    config,
    drawing,
    dynamics,
    grids,
    hypergraph,
    lagrangians,
    memories,
    memory_synapse,
    neurons,
    plots,
    random_features,
    saving,
    synapses,
    tables,
)
from . import build as _build # the function takes the name below
from .attention import *
from .build import *
from .config import *
from .drawing import *
from .dynamics import *
from .grids import *
from .hypergraph import *
from .lagrangians import *
from .memories import *
from .memory_synapse import *
from .neurons import *
from .plots import *
from .random_features import *
from .saving import *
from .synapses import *
from .tables import *

_modules = (
    lagrangians, neurons, synapses, memory_synapse, attention, grids, random_features, hypergraph, _build,
    dynamics, memories, config, saving, plots, tables, drawing,
)
__all__ = list(dict.fromkeys(name for module in _modules for name in module.__all__))
