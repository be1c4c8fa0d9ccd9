"""What the landscape holds, and memories of binary neurons."""

from .attractors import *
from .discrete import *
from .sequences import *
