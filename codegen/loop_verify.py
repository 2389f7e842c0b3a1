"""Checks the rules of the loop IR: types, scopes, register indices, parallel loops, and ranges where they are decidable."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final, NoReturn

from ..ir.dtypes import bool_, f32, i32, i64
from ..ir.errors import DTypeError, VerifyError
from ..ir.expr import BINARY, COMPARE, INTEGER_FACTORS, MATH, REDUCE, UNARY, Expr, picks, postorder, var
from .linear import Linear, free_variables, linear
from .loop_ir import (
    KINDS,
    SCOPES,
    WARP_OPS,
    Alloc,
    Barrier,
    Buffer,
    Call,
    For,
    If,
    Kernel,
    Let,
    Module,
    Prefetch,
    Stmt,
    Store,
    Warp,
    expressions,
    statements,
)
from .loop_text import statement_lines

TID: Final = var("tid")
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*$")


@dataclass
class _Scope:
    """What is visible at a place. `ranges` holds (first, last) of loop variables whose bounds are constant."""

    variables: set[Expr]
    buffers: dict[str, Buffer]
    fixed: frozenset[Expr] = frozenset()  # variables that are constants once loops are unrolled
    ranges: dict[Expr, tuple[int, int]] = field(default_factory=dict)
    certain: bool = True  # no condition stands around: a range that leaves a buffer is an error
    parallel: bool = False

    def inner(self) -> _Scope:
        return _Scope(set(self.variables), dict(self.buffers), self.fixed, dict(self.ranges), self.certain, self.parallel)


class _Verifier:
    def __init__(self, module: Module) -> None:
        self.module = module
        self.kernels: dict[str, Kernel] = {}
        self.kernel = Kernel("", (), ())
        self.statement: Stmt | None = None
        self.typed: set[Expr] = set()
        self.free: dict[Expr, frozenset[Expr]] = {}
        self.forms: dict[Expr, Linear] = {}
        self.allocated: dict[str, Buffer] = {}

    def fail(self, message: str) -> NoReturn:
        where = f", in\n    {statement_lines(self.statement)[0]}" if self.statement is not None else ""
        raise VerifyError(f"kernel {self.kernel.name}: {message}{where}")

    # -- expressions --------------------------------------------------------------------------------------------------

    def expression(self, root: Expr, scope: _Scope) -> None:
        for v in free_variables(root, self.free):
            if v not in scope.variables and not (v is TID and scope.parallel):
                self.fail(f"variable {v.attr} ({v.dtype}, {v.lanes} lanes) is not visible")
        for e in postorder([root]):
            if e.op == "load":
                b = e.attr[0]
                if not isinstance(b, Buffer):
                    self.fail(f"a load reads {b!r}, which is not a buffer")
                self.visible(b, scope)
            elif e.op == "to_line":
                if not isinstance(e.attr, Buffer) or e.attr.scope != "global" or e.dtype is not i64 or e.lanes != 1:
                    self.fail(f"to_line takes a global buffer to an i64, not {e.attr!r} to {e.dtype}")
                self.visible(e.attr, scope)
            if e not in self.typed:
                self.types(e)
                self.typed.add(e)
            if e.op == "load":
                self.place(e.attr[0], e.args[: e.attr[1]], e.lanes, len(e.args) > e.attr[1], scope)

    def types(self, e: Expr) -> None:
        op, args = e.op, e.args
        lanes, dtypes = {a.lanes for a in args}, {a.dtype for a in args}
        if e.lanes < 1:
            self.fail(f"{op} has {e.lanes} lanes")
        if op in ("const", "var", "to_line"):
            return
        if op == "load":
            b, rank = e.attr
            if rank != len(b.shape) or not rank <= len(args) <= rank + 1:
                self.fail(f"{b.name} has {len(b.shape)} dimensions, a load gives it {rank} indices and {len(args) - rank} masks")
            if b.dtype is not e.dtype:
                self.fail(f"a load of {e.dtype} from {b.name}, which holds {b.dtype}")
            self.indices(b, args[:rank], args[rank] if len(args) > rank else None, e.lanes)
            return
        if op in REDUCE:
            if len(args) != 1 or e.lanes != 1 or args[0].lanes & (args[0].lanes - 1) or dtypes != {e.dtype}:
                self.fail(
                    f"{op} takes a vector of 2^k lanes to a scalar of its dtype; it got {args[0].lanes} lanes of {args[0].dtype}"
                )
        elif op in ("ramp", "broadcast"):
            if len(args) != 1 or lanes != {1} or dtypes != {e.dtype}:
                self.fail(f"{op} takes a scalar of its dtype")
        elif op == "shuffle":
            try:
                fits = len(args) == 2 and lanes == {e.lanes} and dtypes == {e.dtype} and len(picks(e.attr, e.lanes)) == e.lanes
            except DTypeError:
                fits = False
            if not fits:
                self.fail(f"shuffle.{e.attr} -> {e.dtype} of {e.lanes} lanes from {[(a.dtype.name, a.lanes) for a in args]}")
        elif op == "select":
            if (
                len(args) != 3
                or args[0].dtype is not bool_
                or args[1].dtype is not e.dtype
                or args[2].dtype is not e.dtype
                or lanes != {e.lanes}
            ):
                self.fail(
                    f"select takes a bool and two {e.dtype} of {e.lanes} lanes, got {[(a.dtype.name, a.lanes) for a in args]}"
                )
        elif op == "lane_xor":
            if len(args) != 1 or lanes != {1} or e.lanes != 1 or dtypes != {e.dtype} or e.attr not in (1, 2, 4, 8, 16):
                self.fail(f"lane_xor.{e.attr} takes a scalar of its dtype and a distance of 1, 2, 4, 8 or 16")
        elif op == "four_bits":
            if len(args) != 1 or lanes != {e.lanes} or dtypes != {i32} or e.dtype is not f32:
                self.fail(f"four_bits takes an i32 and gives f32, not {e.dtype} from {[(a.dtype.name, a.lanes) for a in args]}")
        elif op == "lookup":
            kinds = [(a.dtype, a.lanes) for a in args]
            if e.dtype is not f32 or kinds != [(f32, 16), (i32, e.lanes)]:
                self.fail(f"lookup takes sixteen f32 and an i32, and gives f32, not {e.dtype} from {kinds}")
        elif op in ("cast", "bitcast"):
            if len(args) != 1 or lanes != {e.lanes} or (op == "bitcast" and args[0].dtype.itemsize != e.dtype.itemsize):
                self.fail(f"{op} to {e.dtype} of {[(a.dtype.name, a.lanes) for a in args]}")
        else:
            count = 3 if op == "fma" else 2 if op in BINARY or op in COMPARE else 1 if op in UNARY else 0
            result = bool_ if op in COMPARE else next(iter(dtypes), None)
            if len(args) != count or len(dtypes) != 1 or lanes != {e.lanes} or result is not e.dtype:
                self.fail(f"{op} -> {e.dtype} of {e.lanes} lanes from {[(a.dtype.name, a.lanes) for a in args]}")
            if op == "fma" and e.attr in INTEGER_FACTORS:
                if e.dtype is not i32:
                    self.fail(f"fma.{e.attr} of {e.dtype}; it takes i32, four bytes or two i16 in each")
            elif (op in MATH or op in ("div", "fma", "pow", "sqrt")) and not args[0].dtype.is_float:
                self.fail(f"{op} of {args[0].dtype}; it takes floats")

    def indices(self, b: Buffer, index: tuple[Expr, ...], mask: Expr | None, lanes: int) -> None:
        for i in index:
            if i.dtype is not i64 or i.lanes not in (1, lanes):
                self.fail(f"an index of {b.name} is {i.dtype} with {i.lanes} lanes; expected i64 with 1 or {lanes}")
        if mask is not None and (mask.dtype is not bool_ or mask.lanes not in (1, lanes)):
            self.fail(
                f"the mask of an access to {b.name} is {mask.dtype} with {mask.lanes} lanes; expected bool with 1 or {lanes}"
            )

    def visible(self, b: Buffer, scope: _Scope) -> None:
        if scope.buffers.get(b.name) != b:
            known = (
                "another buffer has its name" if b.name in scope.buffers else f"visible are {', '.join(scope.buffers) or 'none'}"
            )
            self.fail(f"buffer {b.name} is not visible: {known}")

    def constant(self, e: Expr, scope: _Scope) -> bool:
        """Whether a value is a constant once loops are unrolled."""
        return free_variables(e, self.free) <= scope.fixed and not any(x.op == "load" for x in postorder([e]))

    def place(self, b: Buffer, index: tuple[Expr, ...], lanes: int, masked: bool, scope: _Scope) -> None:
        """Register indices must be constant; an unmasked index whose whole range is known must stay inside."""
        if b.scope == "register":
            for i in index:
                if i.lanes != 1 or not self.constant(i, scope):
                    self.fail(f"the index {i} of register buffer {b.name} varies once loops are unrolled; use scope 'local'")
        if masked or not scope.certain:
            return
        for dimension, (i, size) in enumerate(zip(index, b.shape, strict=True)):
            if i.lanes != 1:
                continue
            form = linear(i, self.forms)
            if any(a not in scope.ranges for a, _ in form.terms):
                continue
            low = form.constant + sum(min(c * scope.ranges[a][0], c * scope.ranges[a][1]) for a, c in form.terms)
            high = form.constant + sum(max(c * scope.ranges[a][0], c * scope.ranges[a][1]) for a, c in form.terms)
            if dimension == len(index) - 1 and all(k.lanes == 1 for k in index):
                high += lanes - 1
            if low < 0 or high >= size:
                self.fail(f"index {i} of {b.name} runs from {low} to {high}, outside dimension {dimension} of size {size}")

    # -- statements ---------------------------------------------------------------------------------------------------

    def block(self, body: tuple[Stmt, ...], scope: _Scope) -> None:
        for s in body:
            self.statement = s
            for e in expressions(s):
                self.expression(e, scope)
            match s:
                case For():
                    self.loop(s, scope)
                case Store():
                    self.visible(s.buffer, scope)
                    if len(s.index) != len(s.buffer.shape):
                        self.fail(
                            f"{s.buffer.name} has {len(s.buffer.shape)} dimensions, the store gives it {len(s.index)} indices"
                        )
                    if s.value.dtype is not s.buffer.dtype:
                        self.fail(f"a {s.value.dtype} is stored to {s.buffer.name}, which holds {s.buffer.dtype}")
                    if not s.buffer.writable:
                        self.fail(f"buffer {s.buffer.name} is read-only")
                    self.indices(s.buffer, s.index, s.mask, s.value.lanes)
                    self.place(s.buffer, s.index, s.value.lanes, s.mask is not None, scope)
                case Let():
                    if s.var.op != "var" or s.var.dtype is not s.value.dtype or s.var.lanes != s.value.lanes:
                        self.fail(f"let {s.var.attr} ({s.var.dtype} x {s.var.lanes}) binds {s.value.dtype} x {s.value.lanes}")
                    self.bind(s.var, scope)
                    if self.constant(s.value, scope):
                        scope.fixed |= {s.var}
                case If():
                    if s.condition.dtype is not bool_ or s.condition.lanes != 1:
                        self.fail(f"an if needs one bool, got {s.condition.dtype} with {s.condition.lanes} lanes")
                    for branch in (s.then, s.otherwise):
                        inner = scope.inner()
                        inner.certain = False
                        self.block(branch, inner)
                case Alloc():
                    self.alloc(s.buffer, scope)
                case Call():
                    self.call(s, scope)
                case Prefetch():
                    self.visible(s.buffer, scope)
                    if s.buffer.scope != "global" or s.level not in (1, 2):
                        self.fail(f"prefetch of {s.buffer.scope} {s.buffer.name} to level {s.level}; expected global, 1 or 2")
                    if len(s.index) != len(s.buffer.shape):
                        self.fail(f"{s.buffer.name} has {len(s.buffer.shape)} dimensions, the prefetch names {len(s.index)}")
                    self.indices(s.buffer, s.index, None, 1)
                case Barrier():
                    pass
                case Warp():
                    self.warp(s, scope)
                case _:
                    self.fail(f"unknown statement {type(s).__name__}")

    def bind(self, v: Expr, scope: _Scope) -> None:
        if any(x.attr == v.attr for x in scope.variables) or v.attr == "tid":
            self.fail(f"the name {v.attr} is taken by a visible variable")
        scope.variables.add(v)

    def loop(self, s: For, scope: _Scope) -> None:
        if s.kind not in KINDS:
            self.fail(f"loop kind {s.kind!r}; expected one of {', '.join(KINDS)}")
        if s.step < 1:
            self.fail(f"the step of loop {s.var.attr} is {s.step}; expected at least 1")
        for e in (s.var, s.start, s.stop):
            if e.dtype is not i64 or e.lanes != 1:
                self.fail(f"the variable and bounds of loop {s.var.attr} must be scalar i64")
        inner = scope.inner()
        self.bind(s.var, inner)
        if s.kind == "unrolled":
            if not (self.constant(s.start, scope) and self.constant(s.stop, scope)):
                self.fail(f"the bounds of unrolled loop {s.var.attr} are not constant")
            inner.fixed |= {s.var}
        if s.kind == "parallel":
            if scope.parallel:
                self.fail(f"parallel loop {s.var.attr} stands inside another one")
            inner.parallel = True
            inner.buffers = {n: b for n, b in inner.buffers.items() if b.scope != "register"}
        if s.start.is_const and s.stop.is_const:
            first, stop = int(s.start.attr), int(s.stop.attr)
            if first >= stop:
                inner.certain = False  # never runs
            else:
                last = first + (stop - first - 1) // s.step * s.step
                inner.ranges[s.var] = (first, last)
                if first == last:
                    inner.fixed |= {s.var}
        else:
            inner.certain = inner.certain and s.kind == "parallel"
        self.block(s.body, inner)

    def warp(self, s: Warp, scope: _Scope) -> None:
        if s.op not in WARP_OPS:
            self.fail(f"warp operation {s.op!r}; expected one of {', '.join(WARP_OPS)}")
        wanted, values = WARP_OPS[s.op]
        if len(s.places) != len(wanted) or len(s.values) != values or any(v.dtype is not i64 or v.lanes != 1 for v in s.values):
            self.fail(f"{s.op} takes {len(wanted)} places and {values} i64 values, got {len(s.places)} and {len(s.values)}")
        for (b, index), (where, dtypes, count) in zip(s.places, wanted, strict=True):
            self.visible(b, scope)
            if b.scope != where or (dtypes and b.dtype.name not in dtypes) or len(index) != len(b.shape):
                self.fail(f"{s.op} takes {where} {' or '.join(dtypes)}, not {b.name}: {b.scope} {b.dtype}{list(b.shape)}")
            self.indices(b, index, None, 1)
            lanes = count if b.scope == "register" else 1
            self.place(b, index, lanes, bool(s.values), scope)  # a copy of no bytes may name any place

    def alloc(self, b: Buffer, scope: _Scope) -> None:
        if b.scope not in ("register", "local", "shared"):
            self.fail(f"alloc of {b.name} with scope {b.scope!r}; expected register, local or shared")
        if b.name in scope.buffers or self.allocated.setdefault(b.name, b) != b:
            self.fail(f"the name {b.name} is taken by another buffer of this kernel")
        if not b.writable:
            self.fail(f"alloc of a read-only buffer {b.name}")
        self.buffer(b)
        scope.buffers[b.name] = b

    def buffer(self, b: Buffer) -> None:
        if not _NAME.match(b.name) or b.scope not in SCOPES:
            self.fail(f"buffer name {b.name!r} (letters, digits, '_', '.') or scope {b.scope!r} is not allowed")
        if len(b.shape) != len(b.strides) or any(n < 0 for n in b.shape) or any(n < 0 for n in b.strides):
            self.fail(f"buffer {b.name} has shape {b.shape} and strides {b.strides}; expected as many, none negative")
        if b.align < 1 or b.align & (b.align - 1):
            self.fail(f"buffer {b.name} is aligned to {b.align} bytes; expected a power of two")

    def call(self, s: Call, scope: _Scope) -> None:
        callee = self.kernels.get(s.kernel)
        if callee is None:
            self.fail(f"{s.kernel} is not a kernel that comes before this one")
        if len(s.views) != len(callee.buffers) or len(s.scalars) != len(callee.scalars):
            self.fail(
                f"{s.kernel} takes {len(callee.buffers)} buffers and {len(callee.scalars)} scalars, "
                f"got {len(s.views)} and {len(s.scalars)}"
            )
        if any(isinstance(t, For) and t.kind == "parallel" for t in statements(callee.body)):
            self.fail(f"{s.kernel} has a parallel loop: only the program may call it")
        for (b, offset), p in zip(s.views, callee.buffers, strict=True):
            self.visible(b, scope)
            if b.scope == "register" or b.dtype is not p.dtype:
                self.fail(f"{b.scope} buffer {b.name} of {b.dtype} cannot be passed as {p.name} of {p.dtype}")
            if offset.dtype is not i64 or offset.lanes != 1:
                self.fail(f"the offset of {b.name} must be a scalar i64")
            if b.span < p.span:
                self.fail(f"{b.name} spans {b.span} elements, {p.name} of {s.kernel} needs {p.span}")
        if any(x.dtype is not i64 or x.lanes != 1 for x in s.scalars):
            self.fail("scalar arguments are i64")

    def run(self) -> None:
        for k in self.module.kernels:
            self.kernel, self.statement, self.allocated = k, None, {}
            if k.name in self.kernels or not _NAME.match(k.name) or k.name.startswith("tw."):
                self.fail("the name is taken, or not made of letters, digits, '_' and '.', or starts with 'tw.'")
            names = [b.name for b in k.buffers] + [v.attr for v in k.scalars]
            if len(set(names)) != len(names):
                self.fail(f"two parameters have one name: {', '.join(names)}")
            for b in k.buffers:
                if b.scope != "global":
                    self.fail(f"parameter {b.name} has scope {b.scope!r}; expected global")
                self.buffer(b)
            if any(v.op != "var" or v.dtype is not i64 or v.lanes != 1 for v in k.scalars):
                self.fail("scalar parameters are i64 variables")
            self.block(k.body, _Scope(set(k.scalars), {b.name: b for b in k.buffers}))
            self.kernels[k.name] = k


def verify(module: Module) -> None:
    """Raises VerifyError at the first broken rule, with the kernel and the statement."""
    _Verifier(module).run()
