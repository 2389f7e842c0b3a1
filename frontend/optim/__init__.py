"""Optimisers, parameter groups, clipping and weight averaging: `tw.optim`. See `base` for what an optimiser is."""

from .adam import LAMB, Adam, AdamW
from .adaptive import Adadelta, AdaGrad, Lion, RMSprop
from .average import EMA
from .base import Optimizer, PerParameter
from .clipping import clip_by_global_norm, clip_by_norm, clip_by_value, global_norm
from .groups import FROZEN, Group, Groups
from .sgd import SGD, GradientDescent

__all__ = [
    "EMA", "FROZEN", "LAMB", "SGD", "AdaGrad", "Adadelta", "Adam", "AdamW", "GradientDescent", "Group", "Groups", "Lion",
    "Optimizer", "PerParameter", "RMSprop", "clip_by_global_norm", "clip_by_norm", "clip_by_value", "global_norm",
]  # fmt: skip
