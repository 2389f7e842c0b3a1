"""The exceptions Tensorwright raises. Each message says what was given, what was expected, where, and what to do."""

from __future__ import annotations


class TensorwrightError(Exception):
    """Base of every error that Tensorwright raises on purpose."""


class ShapeError(TensorwrightError, ValueError):
    """Operands whose shapes do not fit the op they were given to."""


class DTypeError(TensorwrightError, TypeError):
    """A dtype that the op, or this version of the compiler, does not take."""


class AttributeValueError(TensorwrightError, ValueError):
    """An op attribute that is missing, unknown, or outside its domain."""


class TraceError(TensorwrightError):
    """A Python function that cannot be traced, such as one that branches on the value of a Tensor."""


class ParseError(TensorwrightError, ValueError):
    """Text (graph, loop IR, dimension) that does not follow its grammar; the message holds line and column."""


class VerifyError(TensorwrightError):
    """A graph or loop nest that breaks an invariant; the message shows the neighbourhood of the bad node."""


class ValidationError(TensorwrightError):
    """A pass changed what a graph computes; the message names the pass, the rewrite and the node."""


class CompileError(TensorwrightError):
    """A graph for which no code can be generated on the given target."""


class GradientError(TensorwrightError):
    """A gradient was asked for through something that has none."""


class InputError(TensorwrightError, ValueError):
    """An argument of a running executable that does not match what it was compiled for."""


class StepLimitError(TensorwrightError):
    """The interpreter was given a greatest number of steps of loops, and a loop went beyond it."""


class ArtifactError(TensorwrightError, ValueError):
    """A saved model that is cut off, damaged, of another version, or that lies about its contents."""


class OnnxError(TensorwrightError, ValueError):
    """An ONNX model that is damaged, contradicts itself, or asks for what is not supported; the message names the nodes."""


class RuntimeUnavailableError(TensorwrightError):
    """Something the machine would need (an OpenMP runtime, a CUDA driver) is missing."""


class PtxError(TensorwrightError, ValueError):
    """PTX that is no PTX, or that holds what the interpreter does not support; the message names line and opcode."""


class DeviceError(TensorwrightError):
    """A device could not do what it was asked for."""


class DeviceMemoryError(DeviceError, MemoryError):
    """A device has not enough memory left."""


class LaunchError(DeviceError):
    """A kernel could not be launched, or failed while it ran."""


class KernelFaultError(LaunchError):
    """The emulator found a mistake in a running kernel. `kind` names it; the message names threads, instruction and line."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


class DeviceLostError(DeviceError):
    """A device's context is gone: after a failed launch nothing on it can be used any more."""
