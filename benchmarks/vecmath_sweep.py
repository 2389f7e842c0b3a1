"""The error of our vector math over all 2^32 floats: `python -m tensorwright.benchmarks.vecmath_sweep [op ...]`.

Prints the greatest error of each function in units of the last place against numpy's longdouble (scipy's f64 for erf and
sigmoid) and where it is. Takes some minutes a function; --stride 16 looks at every sixteenth float.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from scipy import special

from ..codegen.llvm import emit
from ..codegen.loop_ir import Buffer, For, Kernel, Module, Store
from ..codegen.plan import EntryPlan, Step
from ..codegen.vectorize import vectorize_loop
from ..ir.dtypes import f32
from ..ir.expr import const, load, unary, var
from ..ir.target import row

Array = np.ndarray[Any, Any]
CHUNK = 1 << 20
ORACLES: dict[str, Callable[[Array], Array]] = {
    "exp": np.exp, "log": np.log, "log1p": np.log1p, "expm1": np.expm1, "sin": np.sin, "cos": np.cos, "tanh": np.tanh,
    "erf": lambda x: special.erf(x.astype(np.float64)), "sigmoid": lambda x: special.expit(x.astype(np.float64)),
}  # fmt: skip


def compiled(op: str, target: str) -> Callable[[Array, Array], None]:
    """The function over CHUNK floats: f(x, y)."""
    x, y, i = Buffer("x", f32, (CHUNK,)), Buffer("y", f32, (CHUNK,)), var("i")
    loop = For(i, const(0), const(CHUNK), (Store(y, (i,), unary(op, load(x, (i,), f32))),), "vector")
    module = Module((Kernel("k", (x, y), vectorize_loop(loop, 16)),))
    emitted = emit(module, EntryPlan("main", (Step("k", ((0, 0), (1, 0))),)), row(target))
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), llvm.Target.from_default_triple().create_target_machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(emitted.object_code))
    engine.finalize_object()
    run = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)(
        engine.get_function_address("main_run")
    )
    context = (ctypes.c_uint64 * 4)(1, 0, 0, 0)

    def call(a: Array, b: Array) -> None:
        buffers = (ctypes.c_void_p * 2)(a.ctypes.data, b.ctypes.data)
        assert engine is not None
        run(ctypes.addressof(buffers), None, ctypes.addressof(context))

    return call


def ulps(got: Array, exact: Array) -> Array:
    """Errors in units of the last place; infinite where NaN, infinity or the sign of a zero is wrong."""
    want = exact.astype(np.float32)
    unit = np.maximum(np.spacing(np.minimum(np.abs(want), np.finfo(np.float32).max)).astype(np.float64), 2.0**-149)
    distance = np.abs(got.astype(np.float64) - exact.astype(np.float64)) / unit
    alike = (np.isnan(got) & np.isnan(want)) | ((got == want) & (np.signbit(got) == np.signbit(want)))
    finite = np.isfinite(got) & np.isfinite(want) & ~((got == 0) & (want == 0))
    return np.where(finite, distance, np.where(alike, 0, np.inf))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="*", default=list(ORACLES), help="which functions (all)")
    parser.add_argument("--target", default="x86-64-v4", help="the target row")
    parser.add_argument("--stride", type=int, default=1, help="look at every n-th float")
    arguments = parser.parse_args()
    np.seterr(all="ignore")
    y = np.zeros(CHUNK, np.float32)
    for op in arguments.ops:
        f, worst, where = compiled(op, arguments.target), 0.0, 0.0
        for first in range(0, 1 << 32, CHUNK * arguments.stride):
            x = (first + np.arange(CHUNK, dtype=np.uint64) * arguments.stride).astype(np.uint32).view(np.float32)
            f(x, y)
            e = ulps(y, ORACLES[op](x.astype(np.longdouble)))
            k = int(e.argmax())
            if e[k] > worst:
                worst, where = float(e[k]), float(x[k])
        print(f"{op:8s} {arguments.target}: {worst:.3f} ulp at {where!r}", flush=True)


if __name__ == "__main__":
    main()
