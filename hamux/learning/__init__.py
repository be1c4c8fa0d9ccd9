"""Gradients of what is recalled, losses, and training."""

from .corruption import *
from .gradients import *
from .generative import *
from .losses import *
from .memory_training import *
from .run import *
from .trainable import *
from .training import *
