"""Tensorwright: a deep-learning compiler. A model in Python becomes one native program, forward and training.

    import tensorwright as tw
    from tensorwright import nn

    exe = tw.compile(nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10)), tw.spec(1, 784))
    y = exe(x)

Names are imported when first used, so that `import tensorwright` stays fast.
"""

from __future__ import annotations

from importlib import import_module as _import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .ir.errors import TensorwrightError as TensorwrightError

__version__ = "0.1.0"

# public name -> the module that defines it; a name that is itself a module maps to that module with a trailing dot.
_WHERE = {
    "Graph": "ir.graph",
    "TensorwrightError": "ir.errors",
    "nn": "frontend.nn.",
    "losses": "frontend.losses.",
    "optim": "frontend.optim.",
    "errors": "ir.errors.",
}


def __getattr__(name: str) -> Any:
    where = _WHERE.get(name)
    if where is None:
        raise AttributeError(f"module 'tensorwright' has no attribute {name!r}")
    if where.endswith("."):
        value = _import_module("." + where[:-1], __name__)
    else:
        value = getattr(_import_module("." + where, __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
