"""CUDA programs as JSON and bytes: what the compile cache and exported folders keep. Decoding believes nothing.

Every dataclass of a program is an object with its fields; a plan's nodes name their class. What does not fit the declared types,
names a kernel or a slot that is not there, or points outside its memory is a DamagedError.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Final, Union, get_args, get_origin, get_type_hints

import numpy as np

from ...ir import cuda_program as cuda
from ...ir.dtypes import as_dtype
from ...ir.errors import LaunchError, TensorwrightError
from ...ir.places import Pointer
from ...ir.target import Target
from ...ir.types import TensorType, tensor
from ..container import DamagedError
from .device import signatures

_PLAIN: Final = {int: (int,), str: (str,), bool: (bool,), float: (int, float)}
_LAUNCHES: Final = 10_000_000
_NODES: Final = {c.__name__: c for c in get_args(cuda.Node)}
_APART: Final = ("constants", "ptx", "texts", "target")  # fields of a program that are not in its JSON as they are


def encode(value: Any) -> Any:
    """A dataclass, tuple, number or text as JSON holds it."""
    if isinstance(value, TensorType):
        return [value.dtype.name, list(value.static_shape)]
    if is_dataclass(value):
        about = {"is": type(value).__name__} if type(value).__name__ in _NODES else {}
        return about | {f.name: encode(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple | list):
        return [encode(v) for v in value]
    return value.item() if isinstance(value, np.generic) else value


@cache
def _hints(kind: Any) -> dict[str, Any]:
    # names that the modules of these classes import only for type checkers
    names = {"View": tuple[int, ...], "Pointer": Pointer, "Node": cuda.Node, "TensorType": TensorType}
    return get_type_hints(kind, localns=names)


def decode(kind: Any, value: Any) -> Any:
    """The value of a declared type. Raises DamagedError for anything else."""
    if kind in _PLAIN:
        if not isinstance(value, _PLAIN[kind]) or isinstance(value, bool) != (kind is bool):
            raise DamagedError(f"expected {kind.__name__}, found {value!r:.60}")
        return value
    if kind is TensorType:
        dtype, shape = decode(tuple[str, tuple[int, ...]], value)
        return tensor(dtype, shape)
    origin, args = get_origin(kind), get_args(kind)
    if origin is tuple:
        if not isinstance(value, list):
            raise DamagedError(f"expected a list, found {value!r:.60}")
        inner = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(inner) != len(value):
            raise DamagedError(f"expected {len(inner)} elements, found {len(value)}")
        return tuple(decode(k, v) for k, v in zip(inner, value, strict=True))
    if origin in (Union, types.UnionType):
        if type(None) in args:
            return None if value is None else decode(next(a for a in args if a is not type(None)), value)
        if not isinstance(value, dict) or value.get("is") not in _NODES:
            raise DamagedError(f"expected a node of a plan, found {value!r:.60}")
        return _object(_NODES[value["is"]], {k: v for k, v in value.items() if k != "is"})
    if is_dataclass(kind):
        return _object(kind, value)
    raise DamagedError(f"nothing is known of {kind}")


def _object(kind: Any, value: Any) -> Any:
    hints = _hints(kind)
    if not isinstance(value, dict) or value.keys() != {f.name for f in fields(kind)}:
        raise DamagedError(f"expected the fields of {kind.__name__}, found {value!r:.60}")
    return kind(**{n: decode(hints[n], v) for n, v in value.items()})


def encode_program(program: cuda.CudaProgram, prefix: str, parts: dict[str, bytes]) -> dict[str, Any]:
    """JSON of a program; its PTX and its constants go to `parts` under names that start with `prefix`."""
    parts[f"{prefix}/ptx"] = program.ptx.encode()
    for k, constant in enumerate(program.constants):
        parts[f"{prefix}/constant{k}"] = np.ascontiguousarray(constant).tobytes()
    meta = {f.name: encode(getattr(program, f.name)) for f in fields(program) if f.name not in _APART}
    meta["target"] = encode(program.target)
    meta["constants"] = [[as_dtype(c.dtype).name, list(c.shape)] for c in program.constants]
    return meta


def decode_program(meta: Mapping[str, Any], prefix: str, parts: Mapping[str, bytes | memoryview]) -> cuda.CudaProgram:
    """The program; its text of loops is that of its kernels. Raises DamagedError."""
    try:
        constants = []
        for k, (dtype, shape) in enumerate(decode(tuple[tuple[str, tuple[int, ...]], ...], meta["constants"])):
            constants.append(np.frombuffer(parts[f"{prefix}/constant{k}"], as_dtype(dtype).numpy).reshape(shape))
        ptx = bytes(parts[f"{prefix}/ptx"]).decode()
        hints = _hints(cuda.CudaProgram)
        plain = {f.name: decode(hints[f.name], meta[f.name]) for f in fields(cuda.CudaProgram) if f.name not in _APART}
        program = cuda.CudaProgram(**plain, target=decode(Target, meta["target"]), constants=tuple(constants), ptx=ptx, texts={})
    except DamagedError:
        raise
    except (KeyError, TypeError, ValueError, RecursionError, OverflowError, TensorwrightError) as error:
        raise DamagedError(f"a program cannot be read: {error!r:.200}") from error
    check(program)
    loops = "\n\n".join(k.source for k in program.kernels)
    texts = {"ptx": ptx, "loops": loops + "\n" if loops else ""}
    return cuda.CudaProgram(**{f.name: getattr(program, f.name) for f in fields(program) if f.name != "texts"}, texts=texts)


def check(program: cuda.CudaProgram) -> None:
    """Raises DamagedError where a plan launches what is not there, or reaches outside its memory."""
    sizes = [a.type.nbytes for a in (*program.inputs, *program.outputs)] + [c.nbytes for c in program.constants]
    sizes.append(program.arena_bytes)
    kernels = {k.name: k for k in program.kernels}
    entries = signatures(program.ptx)
    if len(kernels) != len(program.kernels):
        raise DamagedError("two kernels have one name")
    for k in program.kernels:
        if k.name not in entries or len(entries[k.name].params) != len(k.parameters):
            raise DamagedError(f"the PTX has no kernel {k.name} of {len(k.parameters)} parameters")
        if min(*k.grid, *k.block) < 1 or k.dynamic_shared < 0:
            raise DamagedError(f"kernel {k.name} has a grid of {k.grid} blocks of {k.block} threads")
    for o, i in program.aliases:
        if not (0 <= o < len(program.outputs) and 0 <= i < len(program.inputs)):
            raise DamagedError(f"output {o} cannot be input {i}")

    def read(place: cuda.Place) -> int:
        if not 0 <= place[0] < len(sizes) or not 0 <= place[1] < sizes[place[0]]:
            raise DamagedError(f"a branch reads a byte outside slot {place[0]}")
        return 0

    try:
        for number, launch in enumerate(program.launches(read)):
            if number == _LAUNCHES:
                raise DamagedError(f"a run takes more than {_LAUNCHES:,} launches")
            for (slot, offset), p in zip(launch.pointers, launch.kernel.parameters, strict=True):
                if not 0 <= slot < len(sizes) or offset < 0 or offset + p.nbytes > sizes[slot]:
                    raise DamagedError(f"kernel {launch.kernel.name}: {p.name} lies outside slot {slot}")
        for n in cuda.walk(program.plan):
            if isinstance(n, cuda.Step) and len(n.views) != len(kernels[n.kernel].parameters):
                raise DamagedError(f"kernel {n.kernel} is launched with {len(n.views)} places")
    except (KeyError, ValueError, IndexError, LaunchError) as error:
        raise DamagedError(f"the plan makes no sense: {error!r:.200}") from error


__all__ = ["check", "decode", "decode_program", "encode", "encode_program"]
