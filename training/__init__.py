"""Training: loops around one compiled step, data, callbacks, checkpoints, search."""

from .callbacks import Callback, CSVLog, EarlyStopping, LearningRate, Progress, ReduceOnPlateau
from .errors import CheckpointError, CheckpointWarning, NonFiniteLossError
from .history import History
from .trainer import Trainer

__all__ = [
    "CSVLog",
    "Callback",
    "CheckpointError",
    "CheckpointWarning",
    "EarlyStopping",
    "History",
    "LearningRate",
    "NonFiniteLossError",
    "Progress",
    "ReduceOnPlateau",
    "Trainer",
]
