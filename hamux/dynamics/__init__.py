"""How a network moves: problems, solvers, adjoints, `descend` and `flow`."""

from .inputs import *
from .problem import *
from .solver import *
from .programs import *
from .euler import *
from .backtracking import *
from .adaptive import *
from .relaxation import *
from .langevin import *
from .loop import *
from .adjoints import *
from .descent import *
from .continuous import *
from .corners import *
from .sampling import *
from .gibbs import *
from .metropolis import *
from .replicas import *
