"""From arrays to answers."""

from .arrays import *
