"""Graph to Program: scheduling, loop IR, the contraction generator, the memory plan, and the emitters."""

from .generate import generate

__all__ = ["generate"]
