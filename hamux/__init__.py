"""Energy-based associative memories: neuron layers joined by hypersynapses under one energy."""

__version__ = "0.3.0"

from . import attention, drawing, dynamics, hypergraph, lagrangians, memories, neurons, plots, synapses, tables
from .attention import *
from .drawing import *
from .dynamics import *
from .hypergraph import *
from .lagrangians import *
from .memories import *
from .neurons import *
from .plots import *
from .synapses import *
from .tables import *

__all__ = [name for module in (lagrangians, neurons, synapses, attention, hypergraph, dynamics, memories, plots, tables, drawing) for name in module.__all__]
