"""Addresses, loads and stores: index expressions to pointers, with the alignment that can be proved."""

from __future__ import annotations

from math import gcd
from typing import Any

from ...ir.dtypes import DType, bool_, f32, f64, i64
from ...ir.errors import CompileError
from ...ir.expr import COMPARE, INTEGER_FACTORS, REDUCE, UNARY, Expr, picks
from ..linear import Linear, free_variables, linear
from ..loop_ir import LINE, Buffer
from ..vecmath import expand
from ..vecmath_parts import four_bits_steps, scale_steps
from .arithmetic import Arithmetic
from .builder import ModuleText
from .types import NARROW, element, literal, stored, suffix, vector

ZEROS = "@tw.zeros"  # what a masked-off scalar load reads instead
MOST_STEP = 4  # elements between lanes up to which whole vectors are loaded and shuffled


class Values(Arithmetic):
    """Evaluates expressions. What is known about a name lasts as long as the block that defines it (`scope`)."""

    def __init__(self, module: ModuleText, header: str, kernel: str) -> None:
        super().__init__(module, header)
        self.kernel = kernel
        self.memo: dict[Any, str] = {}  # expressions and address prefixes already computed
        self.constants: dict[Expr, int] = {}  # variables of unrolled loops
        self.depth: dict[Expr, int] = {}  # of the loop that binds a variable
        self.divisor: dict[Expr, int] = {}  # what divides a variable
        self.natural: set[Expr] = set()  # variables that are never negative
        self.line_starts: dict[Expr, Buffer] = {}  # variables that lead from a buffer's start to its first whole line
        self.level = 0
        self._log: list[tuple[dict[Any, Any] | set[Any], Any]] = []
        self._volatile: list[Any] = []
        self._impure: set[Expr] = set()
        self._linear: dict[Expr, Linear] = {}
        self._free: dict[Expr, frozenset[Expr]] = {}
        self._expanded: dict[Expr, Expr] = {}
        self.pointers: dict[str, str] = {}  # buffer name -> base pointer
        self.registers: dict[str, list[str]] = {}  # register buffer name -> its slots' values
        self.widths: dict[str, int] = {}  # register buffer name -> lanes of a slot
        self.context = "%ctx"

    # -- scopes -------------------------------------------------------------------------------------------------------

    def mark(self) -> int:
        return len(self._log)

    def release(self, mark: int) -> None:
        """Forgets what was learnt since `mark`: it does not hold outside the block."""
        while len(self._log) > mark:
            table, key = self._log.pop()
            if isinstance(table, dict):
                table.pop(key, None)
            else:
                table.discard(key)

    def keep(self, key: Any, value: str) -> str:
        self.memo[key] = value
        self._log.append((self.memo, key))
        return value

    def end_statement(self) -> None:
        """Memory may have changed: what was loaded must be loaded again."""
        for e in self._volatile:
            self.memo.pop(e, None)
        self._volatile.clear()

    def bind(self, v: Expr, value: str, *, known: int | None = None, divisor: int = 1, natural: bool = False) -> None:
        self.keep(v, value)
        tables: list[tuple[dict[Expr, int], int | None]] = [
            (self.constants, known), (self.depth, self.level), (self.divisor, divisor),
        ]  # fmt: skip
        for table, x in tables:
            if x is not None:
                table[v] = x
                self._log.append((table, v))
        if natural:
            self.natural.add(v)
            self._log.append((self.natural, v))

    # -- what is known ------------------------------------------------------------------------------------------------

    def known(self, e: Expr) -> int | None:
        """The value of an i64 or bool scalar that constants and unrolled variables fix, else None."""
        if e.is_const and e.lanes == 1:
            return None if e.dtype.is_float else int(e.attr)
        if e in self.constants:
            return self.constants[e]
        if e.lanes != 1 or (e.dtype is not i64 and e.dtype is not bool_) or e.op in ("var", "load", "cast") or not self.constants:
            return None
        if not all(v in self.constants for v in free_variables(e, self._free)):
            return None
        args = [self.known(a) for a in e.args]
        if any(a is None for a in args):
            return None
        a, *rest = [x for x in args if x is not None]
        b = rest[0] if rest else 0
        match e.op:
            case "add":
                return a + b
            case "sub":
                return a - b
            case "mul":
                return a * b
            case "floordiv":
                return a // b if b else 0
            case "mod":
                return a % b if b else 0
            case "max":
                return max(a, b)
            case "min":
                return min(a, b)
            case "neg":
                return -a
            case "lt":
                return int(a < b)
            case "le":
                return int(a <= b)
            case "eq":
                return int(a == b)
            case "ne":
                return int(a != b)
            case "and":
                return a & b
            case "or":
                return a | b
            case "not" if e.dtype is bool_:
                return 1 - a
            case "select":
                return b if a else rest[1]
        return None

    def form(self, e: Expr) -> Linear:
        """The linear form with the variables of unrolled loops put in."""
        raw = linear(e, self._linear)
        if not self.constants or not raw.terms:
            return raw
        constant, terms = raw.constant, []
        for atom, c in raw.terms:
            k = self.known(atom)
            if k is None:
                terms.append((atom, c))
            else:
                constant += k * c
        return Linear(constant, tuple(terms))

    def divides(self, e: Expr) -> int:
        """A positive number that divides the value of an i64 scalar (0 for zero itself)."""
        if e in self.divisor:
            return self.divisor[e]
        f = self.form(e)
        total = abs(f.constant)
        for atom, c in f.terms:
            d = self.divisor.get(atom, 1)
            if atom.op == "mul":
                d = self.divides(atom.args[0]) * self.divides(atom.args[1])
            total = gcd(total, abs(c) * d)
        return total

    def is_natural(self, e: Expr) -> bool:
        """Whether an i64 scalar is proved to be at least 0."""
        k = self.known(e)
        if k is not None:
            return k >= 0
        if e in self.natural or e.op == "to_line":
            return True
        if e.op in ("add", "mul", "floordiv", "min") and e.lanes == 1:
            return all(self.is_natural(a) for a in e.args)
        if e.op == "max":
            return any(self.is_natural(a) for a in e.args)
        if e.op == "mod":
            return self.is_natural(e.args[0]) or ((b := self.known(e.args[1])) is not None and b > 0)
        return e.op == "select" and all(self.is_natural(a) for a in e.args[1:])

    # -- expressions --------------------------------------------------------------------------------------------------

    def value(self, root: Expr) -> str:
        """The value of an expression; vector math is expanded first."""
        root = expand(root, self._expanded)
        memo, stack = self.memo, [root]
        while stack:
            e = stack[-1]
            if e in memo:
                stack.pop()
                continue
            if e.op == "select" and e.attr == "rare":
                waiting = [a for a in (e.args[0], e.args[2]) if a not in memo]
            elif e.op == "load":
                waiting = [a for a in e.args[e.attr[1] :] if a not in memo]
            else:
                waiting = [a for a in e.args if a not in memo]
            if waiting:
                stack += reversed(waiting)
                continue
            stack.pop()
            result = self._operation(e)
            if e.op == "load" or any(a in self._impure for a in e.args):
                self._impure.add(e)
                memo[e] = result
                self._volatile.append(e)
            else:
                self.keep(e, result)
        return memo[root]

    def _operation(self, e: Expr) -> str:
        d, n, op = e.dtype, e.lanes, e.op
        if op == "const":
            return literal(e.attr, d, n)
        if op == "var":
            raise CompileError(f"kernel {self.kernel}: variable {e.attr} ({d}, {n} lanes) is read where it is not bound")
        if op == "load":
            return self.load(e)
        if e.lanes == 1 and (d is i64 or d is bool_) and (k := self.known(e)) is not None:
            return literal(k, d)
        if op == "select" and e.attr == "rare":
            return self._rare(e)
        if op == "to_line":
            return self._to_line(e.attr)
        if op == "scale":
            return self._scale(e)
        if op == "table":
            return self._table(e)
        if op == "lookup":
            return self._lookup(e)
        if op == "four_bits":
            looked_up = self.module.is_x86 and self.module.target.vector_bits >= 512 and n % 16 == 0
            return self.value(four_bits_steps(e, looked_up=looked_up))
        args = [self.memo[a] for a in e.args]
        first = e.args[0]
        if op in COMPARE:
            return self.comparison(op, first.dtype, n, *args)
        if op in UNARY:
            return self.unary(op, d, n, *args)
        if op == "fma":
            if e.attr in INTEGER_FACTORS:
                return self.fma_integers(e.attr, n, *args)
            return self.fma_bf16(n, *args) if e.attr == "bf16" else self.fma(d, n, *args)
        if op == "select":
            return self.choose(args[0], element(d), n, args[1], args[2])
        if op == "cast":
            return self._narrowed(e) or self.cast(first.dtype, d, n, args[0])
        if op == "bitcast":
            return self.bitcast(first.dtype, d, n, args[0])
        if op == "ramp":
            return self.ramp(d, n, args[0])
        if op == "shuffle":
            v, lanes = vector(element(d), n), ", ".join(f"i32 {k}" for k in picks(e.attr, n))
            return self.t(f"shufflevector {v} {args[0]}, {v} {args[1]}, <{n} x i32> <{lanes}>")
        if op == "broadcast":
            return self.splat(args[0], element(d), n)
        if op in REDUCE:
            return self.reduce(op.removeprefix("reduce_"), d, first.lanes, args[0], forgets=e.attr == "forgets")
        second = e.args[1]
        fixed = int(second.attr) if second.is_const and not second.dtype.is_float else None
        if fixed is None and n == 1 and d is i64:
            fixed = self.known(second)
        if op in ("floordiv", "mod") and n == 1 and d is i64 and fixed is not None and fixed > 0 and self.is_natural(first):
            return self.t(f"{'udiv' if op == 'floordiv' else 'urem'} i64 {args[0]}, {fixed}")
        return self.binary(op, d, n, *args, first_const=first.is_const, second_const=fixed)

    def _narrowed(self, e: Expr) -> str:
        """A cast that is one with the operation under it: round and to bytes, or to bytes and back; "" for any other."""
        first, n = e.args[0], e.lanes
        inner = first.args[0] if first.args else first
        x = self.memo.get(inner)
        if n == 1 or x is None or inner.dtype is not f32 or self.module.target.sm:
            return ""
        if first.op == "round" and e.dtype.is_integer and e.dtype.bits in (8, 16):
            return self.round_to_integer(f32, e.dtype, n, x)
        if first.op == "cast" and e.dtype is f32 and first.dtype.kind == "uint" and first.dtype.bits in (8, 16):
            return self.through_bytes(f32, first.dtype, n, x, inner.op == "round")
        return ""

    def _to_line(self, b: Buffer) -> str:
        """How many elements lie before the first one whose address is a multiple of a line."""
        at = self.t(f"ptrtoint ptr {self.address(b, Linear(0))} to i64")
        before = self.t(f"and i64 {self.t(f'sub i64 0, {at}')}, {LINE - 1}")
        return self.t(f"lshr i64 {before}, {b.dtype.itemsize.bit_length() - 1}")

    def _scale(self, e: Expr) -> str:
        """x * 2^n: one instruction with AVX-512, else integer steps that give the same bits."""
        n = e.lanes
        if e.dtype is f64 or self.module.target.vector_bits < 512 or not self.module.is_x86 or n not in (16, 32, 64):
            return self.value(scale_steps(e))
        x, power = (self.memo[a] for a in e.args)
        v, parts = "<16 x float>", []
        self.module.declare("llvm.x86.avx512.mask.scalef.ps.512", v, f"{v}, {v}, {v}, i16, i32 immarg")
        for first in range(0, n, 16):
            a, b = (self._lanes("float", n, y, first, 16) for y in (x, power))
            call = f"call {v} @llvm.x86.avx512.mask.scalef.ps.512({v} {a}, {v} {b}, {v} zeroinitializer, i16 -1, i32 4)"
            parts.append(self.t(call))
        return self._joined("float", 16, parts)

    def _table(self, e: Expr) -> str:
        """One of a few constants: sixteen f32 by permuting registers with AVX-512 and AVX2, else a load.

        Vectors of less than a register of eight are looked up in one: a gather costs as much as the function around it.
        """
        index, n, kind, count = self.memo[e.args[0]], e.lanes, element(e.dtype), len(e.attr)
        entries = [f"{kind} {literal(c, e.dtype)}" for c in e.attr]
        wide = self.module.target.vector_bits if self.module.is_x86 else 128
        size = 16 if wide >= 512 and n % 16 == 0 else 8
        whole = n if n >= size else size
        if e.dtype is not f32 or count != 16 or wide < 256 or n == 1 or whole % size or (whole // size) & (whole // size - 1):
            name = self.module.constant(f"[{count} x {kind}] [{', '.join(entries)}]")
            low = self.t(f"and {vector('i32', n)} {index}, {self._constant(count - 1, 'i32', n)}")
            p = self.t(f"getelementptr {kind}, ptr {name}, {vector('i32', n)} {low}")
            if n == 1:
                return self.t(f"load {kind}, ptr {p}")
            v, ptrs, flag = vector(kind, n), f"<{n} x ptr>", vector("i1", n)
            gather = f"llvm.masked.gather.{suffix(kind, n)}.v{n}p0"
            self.module.declare(gather, v, f"{ptrs}, {flag}, {v}")
            align = e.dtype.itemsize
            return self.t(f"call {v} @{gather}({ptrs} align {align} {p}, {flag} {literal(True, bool_, n)}, {v} zeroinitializer)")
        parts, v, iv = [], vector("float", size), vector("i32", size)
        if whole > n:
            picks = ", ".join(f"i32 {k}" if k < n else "i32 poison" for k in range(size))
            index = self.t(f"shufflevector {vector('i32', n)} {index}, {vector('i32', n)} poison, <{size} x i32> <{picks}>")
        for first in range(0, whole, size):
            i = self._lanes("i32", whole, index, first, size)
            if size == 16:
                parts.append(self.call("llvm.x86.avx512.permvar.sf.512", v, [(v, f"<{', '.join(entries)}>"), (iv, i)]))
                continue
            if wide >= 512:
                low, high = (f"<{', '.join(h)}>" for h in (entries[:8], entries[8:]))
                parts.append(self.call("llvm.x86.avx512.vpermi2var.ps.256", v, [(v, low), (iv, i), (v, high)]))
                continue
            halves = [
                self.call("llvm.x86.avx2.permps", v, [(v, f"<{', '.join(h)}>"), (iv, i)]) for h in (entries[:8], entries[8:])
            ]
            high = self.compare(
                "icmp ne", "i32", size, self.t(f"and {iv} {i}, {self._constant(8, 'i32', size)}"), "zeroinitializer"
            )
            parts.append(self.choose(high, "float", size, halves[1], halves[0]))
        found = self._joined("float", size, parts)
        return self._lanes("float", whole, found, 0, n) if whole > n else found

    def _lookup(self, e: Expr) -> str:
        """Lanes of a vector of sixteen by permuting registers with AVX-512 and AVX2, one at a time elsewhere."""
        table, index, n = self.memo[e.args[0]], self.memo[e.args[1]], e.lanes
        wide = self.module.target.vector_bits if self.module.is_x86 else 128
        sixteen, parts = vector("float", 16), list[str]()
        if wide >= 512 and n % 16 == 0:
            for first in range(0, n, 16):
                i = self._lanes("i32", n, index, first, 16)
                parts.append(self.call("llvm.x86.avx512.permvar.sf.512", sixteen, [(sixteen, table), (vector("i32", 16), i)]))
            return self._joined("float", 16, parts)
        if wide >= 256 and n % 8 == 0:
            v, iv = vector("float", 8), vector("i32", 8)
            halves = [self._lanes("float", 16, table, first, 8) for first in (0, 8)]
            for first in range(0, n, 8):
                i = self._lanes("i32", n, index, first, 8)
                low, high = (self.call("llvm.x86.avx2.permps", v, [(v, h), (iv, i)]) for h in halves)
                upper = self.t(f"and {iv} {i}, {self._constant(8, 'i32', 8)}")
                parts.append(self.choose(self.compare("icmp ne", "i32", 8, upper, "zeroinitializer"), "float", 8, high, low))
            return self._joined("float", 8, parts)
        low = self.t(f"and {vector('i32', n)} {index}, {self._constant(15, 'i32', n)}")
        found = "poison"
        for k in range(n):
            i = low if n == 1 else self.t(f"extractelement {vector('i32', n)} {low}, i64 {k}")
            one = self.t(f"extractelement {sixteen} {table}, i32 {i}")
            found = one if n == 1 else self.t(f"insertelement {vector('float', n)} {found}, float {one}, i64 {k}")
        return found

    def _lanes(self, kind: str, n: int, x: str, first: int, count: int) -> str:
        """Some consecutive lanes of a vector."""
        if count == n:
            return x
        v = vector(kind, n)
        if count == 1:
            return self.t(f"extractelement {v} {x}, i64 {first}")
        picks = ", ".join(f"i32 {first + k}" for k in range(count))
        return self.t(f"shufflevector {v} {x}, {v} poison, <{count} x i32> <{picks}>")

    def _joined(self, kind: str, n: int, parts: list[str]) -> str:
        """Vectors of n lanes, a power of two of them, end to end."""
        while len(parts) > 1:
            picks, v = ", ".join(f"i32 {k}" for k in range(2 * n)), vector(kind, n)
            pairs = zip(parts[::2], parts[1::2], strict=True)
            parts = [self.t(f"shufflevector {v} {a}, {v} {b}, <{2 * n} x i32> <{picks}>") for a, b in pairs]
            n *= 2
        return parts[0]

    def _rare(self, e: Expr) -> str:
        """select(condition, a, b) with a computed only when some lane of the condition is true."""
        condition, usual, n, kind = self.memo[e.args[0]], self.memo[e.args[2]], e.lanes, element(e.dtype)
        some = condition
        if n > 1:
            some = self.call(f"llvm.vector.reduce.or.v{n}i1", "i1", [(vector("i1", n), condition)])
        rare, join, before = self.fresh("rare"), self.fresh("join"), self.block
        self.line(f"br i1 {some}, label %{rare}, label %{join}")
        mark, loaded = self.mark(), len(self._volatile)
        self.label(rare)
        mixed = self.choose(condition, kind, n, self.value(e.args[1]), usual)
        end = self.block
        self.line(f"br label %{join}")
        for x in self._volatile[loaded:]:
            self.memo.pop(x, None)
        del self._volatile[loaded:]
        self.release(mark)
        self.label(join)
        return self.t(f"phi {vector(kind, n)} [{usual}, %{before}], [{mixed}, %{end}]")

    # -- addresses ----------------------------------------------------------------------------------------------------

    def address(self, b: Buffer, offset: Linear) -> str:
        """A pointer to an element; terms are added outermost loop first, so that inner loops share the prefix."""
        size = b.dtype.itemsize
        p = self.pointers.get(b.name)
        if p is None:
            raise CompileError(f"kernel {self.kernel}: buffer {b.name} is neither a parameter nor allocated here")
        terms = sorted(offset.terms, key=lambda t: self._depth(t[0]))
        kind, impure = stored(b.dtype), False
        key: tuple[Any, ...] = (b.name,)
        for atom, c in terms:
            key = (*key, atom, c)
            found = self.memo.get(key)
            impure = impure or atom in self._impure
            if found is None:
                x = self.value(atom)
                impure = impure or atom in self._impure
                if c != 1:
                    x = self.t(f"mul nsw i64 {x}, {c}")
                found = self.t(f"getelementptr {kind}, ptr {p}, i64 {x}")
                if impure:
                    self._volatile.append(key)
                    self.memo[key] = found
                else:
                    self.keep(key, found)
            p = found
        if offset.constant == 0:
            return p
        key = (*key, offset.constant)
        found = self.memo.get(key)
        if found is None:
            found = self.t(f"getelementptr i8, ptr {p}, i64 {offset.constant * size}")
            if impure:
                self._volatile.append(key)
                self.memo[key] = found
            else:
                self.keep(key, found)
        return found

    def _depth(self, atom: Expr) -> int:
        return max((self.depth.get(v, 0) for v in free_variables(atom, self._free)), default=0)

    def alignment(self, b: Buffer, offset: Linear) -> int:
        """Bytes, a power of two."""
        size = b.dtype.itemsize
        from_line = any(c == 1 and self.line_starts.get(atom) == b for atom, c in offset.terms)
        total = gcd(LINE if from_line else max(b.align, size), abs(offset.constant) * size)
        for atom, c in offset.terms:
            if from_line and c == 1 and self.line_starts.get(atom) == b:
                from_line = False
                continue
            total = gcd(total, abs(c) * size * max(self.divides(atom), 1))
        return max(total & -total, size)

    def _split(self, b: Buffer, index: tuple[Expr, ...], lanes: int) -> tuple[Linear, str | None]:
        """Scalar offset, and the lanes' offsets from there (None: consecutive)."""
        if len(index) != len(b.shape):
            raise CompileError(f"kernel {self.kernel}: {b.name} has {len(b.shape)} dimensions, the index has {len(index)}")
        scalar = Linear(0)
        wide: list[tuple[Expr | None, int]] = []
        for i, s in zip(index, b.strides, strict=True):
            if i.lanes == 1:
                scalar = scalar + self.form(i).scaled(s)
            elif i.op == "ramp":
                scalar = scalar + self.form(i.args[0]).scaled(s)
                wide.append((None, s))
            elif i.op == "broadcast":
                scalar = scalar + self.form(i.args[0]).scaled(s)
            else:
                wide.append((i, s))
        if lanes == 1:
            return scalar, None
        if not wide:  # every lane the same element where an index is a broadcast, consecutive ones where all are scalars
            wide = [(None, 0 if any(i.lanes > 1 for i in index) else b.strides[-1])]
        if wide == [(None, 1)]:
            return scalar, None
        total, v = None, vector("i64", lanes)
        for lane, s in wide:
            if lane is None:
                x = "<" + ", ".join(f"i64 {k * s}" for k in range(lanes)) + ">"
            else:
                x = self.value(lane)
                if s != 1:
                    x = self.t(f"mul {v} {x}, {literal(s, i64, lanes)}")
            total = x if total is None else self.t(f"add {v} {total}, {x}")
        assert total is not None
        if b.span < 1 << 31 and any(i is not None for i, _ in wide):
            # In range, an offset fits 32 bits; said so, a gather takes half the index registers.
            half = self.t(f"trunc {v} {total} to {vector('i32', lanes)}")
            total = self.t(f"sext {vector('i32', lanes)} {half} to {v}")
        return scalar, total

    def check(self, what: str, b: Buffer, index: tuple[Expr, ...], lanes: int, mask: str | None) -> str:
        """In a checked program: the mask that leaves out lanes whose index is out of range, after reporting them."""
        bad: str | None = None
        flag = vector("i1", lanes)
        for dimension, (i, size) in enumerate(zip(index, b.shape, strict=True)):
            x, v = self.value(i), vector("i64", lanes)
            if i.lanes == 1 and lanes > 1:
                x = (
                    self.ramp(i64, lanes, x)
                    if dimension == len(b.shape) - 1 and all(k.lanes == 1 for k in index)
                    else self.splat(x, "i64", lanes)
                )
            out = self.t(f"icmp uge {v} {x}, {literal(size, i64, lanes)}")
            bad = out if bad is None else self.t(f"or {flag} {bad}, {out}")
        if bad is None:
            return mask if mask is not None else literal(True, bool_, lanes)
        wrong = bad if mask is None else self.t(f"and {flag} {bad}, {mask}")
        any_wrong = wrong if lanes == 1 else self.call(f"llvm.vector.reduce.or.v{lanes}i1", "i1", [(flag, wrong)])
        self.report(any_wrong, f"{self.kernel}: {what} of {b.name}[{', '.join(map(repr, index))}] leaves the shape {b.shape}")
        good = self.t(f"xor {flag} {bad}, {literal(True, bool_, lanes)}")
        return good if mask is None else self.t(f"and {flag} {good}, {mask}")

    def report(self, wrong: str, message: str) -> None:
        self.module.checks.append(message)
        self.line(f"call void @tw.report(ptr {self.context}, i1 {wrong}, i32 {len(self.module.checks)})")

    # -- loads --------------------------------------------------------------------------------------------------------

    def load(self, e: Expr) -> str:
        b, rank = e.attr
        if not isinstance(b, Buffer):
            raise CompileError(f"kernel {self.kernel}: a load reads {b!r}, which is not a loop-IR buffer")
        if b.dtype is not e.dtype:
            raise CompileError(f"kernel {self.kernel}: {b.name} holds {b.dtype}, the load is of {e.dtype}")
        index, n = e.args[:rank], e.lanes
        mask = None
        if len(e.args) > rank:
            m = e.args[rank]
            mask = self.memo[m] if m.lanes == n else self.splat(self.memo[m], "i1", n)
        if b.scope == "register":
            slot, first = self._slot(b, index, n)
            x = self._take(b, slot, first, n)
            return x if mask is None else self.choose(mask, element(b.dtype), n, x, self.zero(b.dtype, n))
        if self.module.checked:
            mask = self.check("load", b, index, n, mask)
        steps = None if mask is not None else self._steps(b, index, n)
        if steps is not None:
            return self.from_memory(b.dtype, self._strided(b, *steps, n), n)
        scalar, wide = self._split(b, index, n)
        p, kind = self.address(b, scalar), stored(b.dtype)
        align = self.alignment(b, scalar)
        v, flag = vector(kind, n), vector("i1", n)
        if wide is not None:
            size = b.dtype.itemsize
            q = self.t(f"getelementptr {kind}, ptr {p}, {vector('i64', n)} {wide}")
            m = mask if mask is not None else literal(True, bool_, n)
            name, args = f"llvm.masked.gather.{suffix(kind, n)}.v{n}p0", f"<{n} x ptr>, {flag}, {v}"
            self.module.declare(name, v, args)
            zero = "zeroinitializer"
            x = self.t(f"call {v} @{name}(<{n} x ptr> align {size} {q}, {flag} {m}, {v} {zero})")
        elif mask is None:
            x = self.t(f"load {v}, ptr {p}, align {align}")
        elif n == 1:
            p = self.t(f"select i1 {mask}, ptr {p}, ptr {ZEROS}")
            x = self.t(f"load {kind}, ptr {p}, align {b.dtype.itemsize}")
        else:
            name = f"llvm.masked.load.{suffix(kind, n)}.p0"
            self.module.declare(name, v, f"ptr, {flag}, {v}")
            x = self.t(f"call {v} @{name}(ptr align {align} {p}, {flag} {mask}, {v} zeroinitializer)")
        return self.from_memory(b.dtype, x, n)

    def _steps(self, b: Buffer, index: tuple[Expr, ...], n: int) -> tuple[Linear, int] | None:
        """The offset of the first lane and the small step from each lane to the next, if that is how an access runs."""
        if n < 4 or b.dtype.bits < 32:
            return None
        first, step = Linear(0), 0
        for i, s in zip(index, b.strides, strict=True):
            found = self._steady(i)
            if found is None:
                return None
            first, step = first + found[0].scaled(s), step + found[1] * s
        wide = any(i.lanes > 1 for i in index)
        return (first, step) if wide and 2 <= step <= MOST_STEP else None

    def _steady(self, i: Expr) -> tuple[Linear, int] | None:
        """An index as its first lane and the step between lanes; None where lanes do not follow in one step."""
        if i.lanes == 1:
            return self.form(i), 0
        match i.op:
            case "ramp":
                return self.form(i.args[0]), 1
            case "broadcast":
                return self.form(i.args[0]), 0
            case "const":
                return Linear(int(i.attr)), 0
            case "add" | "sub":
                a, b, sign = self._steady(i.args[0]), self._steady(i.args[1]), 1 if i.op == "add" else -1
                return None if a is None or b is None else (a[0] + b[0].scaled(sign), a[1] + sign * b[1])
            case "mul":
                a, b = self._steady(i.args[0]), self._steady(i.args[1])
                if a is None or b is None or b[0].terms or b[1]:
                    return None  # (a factor that comes first is not looked for: constants stand second)
                return a[0].scaled(b[0].constant), a[1] * b[0].constant
        return None

    def _strided(self, b: Buffer, first: Linear, step: int, n: int) -> str:
        """Every `step`-th element: vectors that hold them all, the last one ending at the last of them, and shuffles. A gather
        takes as long as one load for each lane."""
        kind, last = stored(b.dtype), (n - 1) * step
        v = vector(kind, n)
        starts = [*range(0, last + 1 - n, n), last + 1 - n]
        found = ""
        for k, start in enumerate(starts):
            offset = first + Linear(start)
            x = self.t(f"load {v}, ptr {self.address(b, offset)}, align {self.alignment(b, offset)}")
            # lanes that are not found yet come from this vector, as far as it reaches
            if k == 0:
                found, done = x, {j: j * step for j in range(n) if j * step < n}
                continue
            picks = [done.get(j, n + j * step - start if start <= j * step < start + n else -1) for j in range(n)]
            done = {j: j for j, pick in enumerate(picks) if pick >= 0}
            lanes = ", ".join(f"i32 {pick}" if pick >= 0 else "i32 poison" for pick in picks)
            found = self.t(f"shufflevector {v} {found}, {v} {x}, <{n} x i32> <{lanes}>")
        return found

    def from_memory(self, d: DType, x: str, n: int) -> str:
        if d is bool_:
            return self.compare("icmp ne", "i8", n, x, self._constant(0, "i8", n))
        return self.from_bits(d, x, n) if d in NARROW else x

    def to_memory(self, d: DType, x: str, n: int) -> str:
        if d is bool_:
            return self.t(f"zext {vector('i1', n)} {x} to {vector('i8', n)}")
        return self.held_bits(d, x, n) if d in NARROW else x

    # -- register buffers ---------------------------------------------------------------------------------------------

    def _slot(self, b: Buffer, index: tuple[Expr, ...], lanes: int) -> tuple[int, int]:
        """Which slot an access touches, and its first lane there."""
        if b.name not in self.registers:
            raise CompileError(f"kernel {self.kernel}: register buffer {b.name} is used where it is not allocated")
        fixed, flat = 0, Linear(0)
        for i, s in zip(index, b.strides, strict=True):
            if i.op == "const":  # the usual case: what was unrolled when the loops were written
                fixed += i.attr * s
            else:
                flat = flat + self.form(i).scaled(s)
        flat = Linear(flat.constant + fixed, flat.terms)
        if flat.terms:
            raise CompileError(
                f"kernel {self.kernel}: the index of register buffer {b.name}[{', '.join(map(repr, index))}] is not constant; "
                "unroll the loops it depends on, or allocate it with scope 'local'"
            )
        width = self.widths[b.name]
        slot, first = divmod(flat.constant, width)
        if not 0 <= flat.constant < b.span or first + lanes > width:
            raise CompileError(
                f"kernel {self.kernel}: {lanes} lanes of register buffer {b.name} at element {flat.constant} leave its slot of "
                f"{width} lanes (shape {b.shape})"
            )
        return slot, first

    def _take(self, b: Buffer, slot: int, first: int, n: int) -> str:
        x, width = self.registers[b.name][slot], self.widths[b.name]
        return self._lanes(element(b.dtype), width, x, first, n)

    def put(self, b: Buffer, index: tuple[Expr, ...], x: str, n: int, mask: str | None) -> None:
        """Stores into a register buffer: the slot's value is replaced."""
        slot, first = self._slot(b, index, n)
        kind, width = element(b.dtype), self.widths[b.name]
        if mask is not None:
            x = self.choose(mask, kind, n, x, self._take(b, slot, first, n))
        if n != width:
            old, v = self.registers[b.name][slot], vector(kind, width)
            if n == 1:
                x = self.t(f"insertelement {v} {old}, {kind} {x}, i64 {first}")
            else:
                grow = ", ".join(f"i32 {k}" if k < n else "i32 poison" for k in range(width))
                y = self.t(f"shufflevector {vector(kind, n)} {x}, {vector(kind, n)} poison, <{width} x i32> <{grow}>")
                picks = ", ".join(f"i32 {width + k - first if first <= k < first + n else k}" for k in range(width))
                x = self.t(f"shufflevector {v} {old}, {v} {y}, <{width} x i32> <{picks}>")
        self.registers[b.name][slot] = x
