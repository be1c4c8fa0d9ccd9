"""Tables, drawings and plots."""

from .plots import *
from .tables import *
from .drawing import *
