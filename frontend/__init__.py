"""What a user types: Tensor and its functions, tracing, nn, losses, optimisers. It makes Graphs."""

from . import losses, metrics, nn, optim, random, regularizers, schedules
from .functional import Tensor
from .gradients import functional_call, grad, jvp, value_and_grad, vjp
from .nn.init import seed
from .specs import Spec, spec
from .tracing import Traced, trace, trace_model
from .training import TracedStep, evaluation_step, training_step

__all__ = [
    "Spec", "Tensor", "Traced", "TracedStep", "evaluation_step", "functional_call", "grad", "jvp", "losses", "metrics", "nn",
    "optim", "random", "regularizers", "schedules", "seed", "spec", "trace", "trace_model", "training_step", "value_and_grad",
    "vjp",
]  # fmt: skip
