"""Files: rows of arrays, descriptions of networks, saved networks."""

from .files import *
from .config import *
from .saving import *
