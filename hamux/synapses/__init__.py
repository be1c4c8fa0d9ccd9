"""The hypersynapses: what joins layers."""

from .linear import *
from .grids import *
from .attention import *
from .memory import *
from .similarities import *
from .sharding import *
from .random_features import *
