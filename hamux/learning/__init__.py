"""Gradients of what is recalled, losses, and training."""

from .corruption import *
from .gradients import *
from .losses import *
from .training import *
