"""Layers, the hypergraph that joins them, and how a network is built."""

from .parameters import *
from .rows import *
from .neurons import *
from .hypergraph import *
from .recipe import *
from .sizing import *
