"""Every Lagrangian, and what the rest of the library may know of each."""

from .facts import *
from .arguments import *
from .elementwise import *
from .competitions import *
from .norms import *
from .sparse import *
from .separation import *
from .conjugates import *
from .measure import *
from .declared import *
from .check import *
