"""Callbacks: `tw.callbacks`. What happens between steps and epochs; a class of your own derives from `Callback`."""

from .base import Callback
from .checkpoint import Checkpoint
from .logs import CSVLog, Progress
from .mlflow import MLflow
from .rate import LearningRate, ReduceOnPlateau
from .stopping import EarlyStopping
from .tensorboard import TensorBoard

__all__ = [
    "CSVLog",
    "Callback",
    "Checkpoint",
    "EarlyStopping",
    "LearningRate",
    "MLflow",
    "Progress",
    "ReduceOnPlateau",
    "TensorBoard",
]
