"""From arrays to answers."""

from .arrays import *
from .bank import *
from .candidates import *
from .frames import *
from .looking import *
from .novelty import *
from .reading import *
from .spread import *
from .temperature import *
from .two_layers import *
