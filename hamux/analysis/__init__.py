"""What the landscape holds, and memories of binary neurons."""

from .attractors import *
from .landscape import *
from .joining import *
from .discrete import *
from .convergence import *
from .likelihood import *
from .sequences import *
