"""One generator for every multiply-and-sum: matrix products, convolutions, and their gradients."""

from .generator import preferred_panel, schedule
from .types import Epilogue, Operand, Scheduled

__all__ = ["Epilogue", "Operand", "Scheduled", "preferred_panel", "schedule"]
