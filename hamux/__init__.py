"""Energy-based associative memories: neuron layers joined by hypersynapses under one energy."""

__version__ = "0.3.0"

from .lagrangians import *
from .neurons import *
from .synapses import *
from .hypergraph import *
