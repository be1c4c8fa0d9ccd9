"""Files: rows of arrays, descriptions of networks, saved networks."""

from .problems import *
from .formats import *
from .files import *
from .names import *
from .descriptions import *
from .config import *
from .saving import *
