"""Operations on values: how each operation of `ir.expr` is written in LLVM, with the semantics stated there.

No fast-math flag is ever set and a multiply-add is fused only where the expression says `fma`.
"""

from __future__ import annotations

from collections.abc import Callable

from ...ir.dtypes import DType, bool_, f16, f32, f64, i32
from ...ir.errors import CompileError
from .builder import FunctionText
from .types import NARROW, element, literal, suffix, vector

_FLOAT = {"add": "fadd", "sub": "fsub", "mul": "fmul", "div": "fdiv"}
_INTEGER = {"add": "add", "sub": "sub", "mul": "mul", "and": "and", "or": "or", "xor": "xor"}
_MADD = {4: "sse2.pmadd.wd", 8: "avx2.pmadd.wd", 16: "avx512.pmaddw.d.512"}  # by lanes of the result
_ROUNDING = {"floor": "floor", "ceil": "ceil", "round": "roundeven", "trunc": "trunc"}


class Arithmetic(FunctionText):
    """Scalar and vector operations. `d` is the operands' dtype, `n` their lanes."""

    def splat(self, x: str, kind: str, n: int) -> str:
        if n == 1:
            return x
        v = vector(kind, n)
        first = self.t(f"insertelement {v} poison, {kind} {x}, i64 0")
        return self.t(f"shufflevector {v} {first}, {v} poison, <{n} x i32> zeroinitializer")

    def compare(self, predicate: str, kind: str, n: int, a: str, b: str) -> str:
        return self.t(f"{predicate} {vector(kind, n)} {a}, {b}")

    def choose(self, condition: str, kind: str, n: int, a: str, b: str) -> str:
        v = vector(kind, n)
        return self.t(f"select {vector('i1', n)} {condition}, {v} {a}, {v} {b}")

    def _constant(self, value: int | float, kind: str, n: int) -> str:
        text = str(value)
        return text if n == 1 else f"splat ({kind} {text})"

    def _words(self, n: int) -> Callable[[int], str]:
        """Literals of n lanes of i32."""
        return lambda value: self._constant(value, "i32", n)

    # -- narrow floats ------------------------------------------------------------------------------------------------

    def _f16_bits(self, x: str, n: int) -> str:
        """float -> i16 bits of the nearest half, ties to even (for targets without an instruction)."""
        i, fl, c = vector("i32", n), vector("float", n), self._words(n)
        u = self.t(f"bitcast {fl} {x} to {i}")
        sign = self.t(f"and {i} {u}, {c(-0x80000000)}")
        u = self.t(f"xor {i} {u}, {sign}")
        nan = self.compare("icmp ugt", "i32", n, u, c(0x7F800000))
        big = self.choose(nan, "i32", n, c(0x7E00), c(0x7C00))
        # Adding 0.5 to a number under 2^-14 leaves the denormal half's bits, rounded, at the bottom of the mantissa.
        f = self.t(f"fadd {fl} {self.t(f'bitcast {i} {u} to {fl}')}, {literal(0.5, f32, n)}")
        small = self.t(f"sub {i} {self.t(f'bitcast {fl} {f} to {i}')}, {c(0x3F000000)}")
        odd = self.t(f"and {i} {self.t(f'lshr {i} {u}, {c(13)}')}, {c(1)}")
        normal = self.t(f"add {i} {self.t(f'add {i} {u}, {c(((15 - 127) << 23) + 0xFFF)}')}, {odd}")
        normal = self.t(f"lshr {i} {normal}, {c(13)}")
        bits = self.choose(self.compare("icmp ult", "i32", n, u, c(0x38800000)), "i32", n, small, normal)
        bits = self.choose(self.compare("icmp uge", "i32", n, u, c(0x47800000)), "i32", n, big, bits)
        bits = self.t(f"or {i} {bits}, {self.t(f'lshr {i} {sign}, {c(16)}')}")
        return self.t(f"trunc {i} {bits} to {vector('i16', n)}")

    def _f16_value(self, x: str, n: int) -> str:
        """i16 bits of a half -> float, exactly."""
        i, fl, c = vector("i32", n), vector("float", n), self._words(n)
        h = self.t(f"zext {vector('i16', n)} {x} to {i}")
        o = self.t(f"shl {i} {self.t(f'and {i} {h}, {c(0x7FFF)}')}, {c(13)}")
        exponent = self.t(f"and {i} {o}, {c(0x0F800000)}")
        o = self.t(f"add {i} {o}, {c((127 - 15) << 23)}")
        special = self.t(f"add {i} {o}, {c((128 - 16) << 23)}")
        raised = self.t(f"bitcast {i} {self.t(f'add {i} {o}, {c(1 << 23)}')} to {fl}")
        denormal = self.t(f"bitcast {fl} {self.t(f'fsub {fl} {raised}, {literal(2.0**-14, f32, n)}')} to {i}")
        o = self.choose(self.compare("icmp eq", "i32", n, exponent, c(0x0F800000)), "i32", n, special, o)
        o = self.choose(self.compare("icmp eq", "i32", n, exponent, c(0)), "i32", n, denormal, o)
        sign = self.t(f"shl {i} {self.t(f'and {i} {h}, {c(0x8000)}')}, {c(16)}")
        return self.t(f"bitcast {i} {self.t(f'or {i} {o}, {sign}')} to {fl}")

    def to_bits(self, d: DType, x: str, n: int) -> str:
        """The i16 bits of a float, rounded to f16 or bf16; a NaN stays a NaN."""
        fl, h, short = vector("float", n), vector("half", n), vector("i16", n)
        if d is f16:
            if self.module.target.fma:  # every row with FMA converts halves in hardware (F16C, NEON)
                return self.t(f"bitcast {h} {self.t(f'fptrunc {fl} {x} to {h}')} to {short}")
            return self._f16_bits(x, n)
        if self.module.is_x86 and self.module.target.bf16 and n in (8, 16):
            return self._native_bf16(x, n)
        return self._bf16_bits(x, n)

    def _native_bf16(self, x: str, n: int) -> str:
        """float -> i16 bits of the nearest bf16 by the instruction, which takes denormals for zero: vectors that hold one, rare
        as they are, are rounded in steps behind a branch."""
        fl, short, flag = vector("float", n), vector("i16", n), vector("i1", n)
        found = self.call(f"llvm.x86.avx512bf16.cvtneps2bf16.{32 * n}", vector("bfloat", n), [(fl, x)])
        usual = self.t(f"bitcast {vector('bfloat', n)} {found} to {short}")
        tiny = self.call(f"llvm.x86.avx512.fpclass.ps.{32 * n}", flag, [(fl, x), ("i32", "32")], f"{fl}, i32 immarg")
        some = self.call(f"llvm.vector.reduce.or.v{n}i1", "i1", [(flag, tiny)])
        rare, join, before = self.fresh("rare"), self.fresh("join"), self.block
        self.line(f'br i1 {some}, label %{rare}, label %{join}, !prof !{{!"branch_weights", i32 1, i32 100000}}')
        self.label(rare)
        stepwise = self._bf16_bits(x, n)
        self.line(f"br label %{join}")
        self.label(join)
        return self.t(f"phi {short} [{usual}, %{before}], [{stepwise}, %{rare}]")

    def _bf16_bits(self, x: str, n: int) -> str:
        """float -> i16 bits of the nearest bf16, ties to even; a NaN stays a NaN."""
        fl, i, short, c = vector("float", n), vector("i32", n), vector("i16", n), self._words(n)
        u = self.t(f"bitcast {fl} {x} to {i}")
        odd = self.t(f"and {i} {self.t(f'lshr {i} {u}, {c(16)}')}, {c(1)}")
        rounded = self.t(f"add {i} {self.t(f'add {i} {u}, {c(0x7FFF)}')}, {odd}")
        quiet = self.t(f"or {i} {u}, {c(0x400000)}")
        nan = self.compare("fcmp uno", "float", n, x, x)
        bits = self.choose(nan, "i32", n, quiet, rounded)
        return self.t(f"trunc {i} {self.t(f'lshr {i} {bits}, {c(16)}')} to {short}")

    def from_bits(self, d: DType, x: str, n: int) -> str:
        """The float that i16 bits of f16 or bf16 stand for."""
        fl, i, h, short = vector("float", n), vector("i32", n), vector("half", n), vector("i16", n)
        if d is f16:
            if self.module.target.fma:
                return self.t(f"fpext {h} {self.t(f'bitcast {short} {x} to {h}')} to {fl}")
            return self._f16_value(x, n)
        wide = self.t(f"shl {i} {self.t(f'zext {short} {x} to {i}')}, {self._constant(16, 'i32', n)}")
        return self.t(f"bitcast {i} {wide} to {fl}")

    def rounded(self, d: DType, x: str, n: int) -> str:
        """A float register value rounded to what dtype d can hold."""
        if d not in NARROW:
            return x
        bits = self.to_bits(d, x, n)
        value = self.from_bits(d, bits, n)
        self.known_bits[value] = bits
        return value

    def held_bits(self, d: DType, x: str, n: int) -> str:
        """The i16 bits of a float that f16 or bf16 can hold: nothing is rounded any more."""
        known = self.known_bits.get(x)
        if known is not None or d is f16:
            return known if known is not None else self.to_bits(d, x, n)
        i, short = vector("i32", n), vector("i16", n)
        u = self.t(f"bitcast {vector('float', n)} {x} to {i}")
        high = self.t(f"lshr {i} {u}, {self._constant(16, 'i32', n)}")
        return self.t(f"trunc {i} {high} to {short}")

    def _odd(self, kind: str, n: int, value: str, up: str, inexact: str) -> str:
        """Rounding to odd: where inexact and the last bit is 0, the neighbour further from zero if `up`, else nearer."""
        i = "i64" if kind == "double" else "i32"
        iv = vector(i, n)
        bits = self.t(f"bitcast {vector(kind, n)} {value} to {iv}")
        even = self.compare("icmp eq", i, n, self.t(f"and {iv} {bits}, {self._constant(1, i, n)}"), self._constant(0, i, n))
        move = self.choose(up, i, n, self._constant(1, i, n), self._constant(-1, i, n))
        both = self.t(f"and {vector('i1', n)} {even}, {inexact}")
        moved = self.t(f"add {iv} {bits}, {self.choose(both, i, n, move, self._constant(0, i, n))}")
        return self.t(f"bitcast {iv} {moved} to {vector(kind, n)}")

    def _same_sign(self, kind: str, n: int, a: str, b: str) -> str:
        i = "i64" if kind == "double" else "i32"
        iv, v = vector(i, n), vector(kind, n)
        x = self.t(f"xor {iv} {self.t(f'bitcast {v} {a} to {iv}')}, {self.t(f'bitcast {v} {b} to {iv}')}")
        return self.compare("icmp sge", i, n, x, self._constant(0, i, n))

    def narrow_odd(self, x: str, n: int) -> str:
        """double -> float rounded to odd, so that a second rounding to f16 or bf16 is as good as one."""
        f = self.t(f"fptrunc {vector('double', n)} {x} to {vector('float', n)}")
        back = self.t(f"fpext {vector('float', n)} {f} to {vector('double', n)}")
        error = self.t(f"fsub {vector('double', n)} {x}, {back}")
        inexact = self.compare("fcmp one", "double", n, error, literal(0.0, f64, n))
        return self._odd("float", n, f, self._same_sign("double", n, error, x), inexact)

    # -- fused multiply-add -------------------------------------------------------------------------------------------

    def fma(self, d: DType, n: int, a: str, b: str, c: str) -> str:
        """a * b + c rounded once (f16 and bf16: once in f32, then to the dtype)."""
        kind = element(d)
        v = vector(kind, n)
        if self.module.target.fma:
            return self.rounded(d, self.call(f"llvm.fma.{suffix(kind, n)}", v, [(v, a), (v, b), (v, c)]), n)
        if d is f64:
            raise CompileError(
                f"an f64 fused multiply-add cannot be emulated on {self.module.target.name}; compile for a row with FMA "
                "(x86-64-v3 or newer), or in f32"
            )
        # The product of two floats is exact in double. Rounding the sum to odd (53 bits, 29 more than float has) makes the
        # rounding to float the only one that counts (Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums").
        w = vector("double", n)
        x, y, z = (self.t(f"fpext {v} {q} to {w}") for q in (a, b, c))
        p = self.t(f"fmul {w} {x}, {y}")
        s = self.t(f"fadd {w} {p}, {z}")
        t = self.t(f"fsub {w} {s}, {p}")
        low = self.t(f"fsub {w} {p}, {self.t(f'fsub {w} {s}, {t}')}")
        e = self.t(f"fadd {w} {low}, {self.t(f'fsub {w} {z}, {t}')}")
        inexact = self.compare("fcmp one", "double", n, e, literal(0.0, f64, n))
        s = self._odd("double", n, s, self._same_sign("double", n, e, s), inexact)
        return self.rounded(d, self.t(f"fptrunc {w} {s} to {v}"), n)

    def fma_bf16(self, n: int, a: str, b: str, c: str) -> str:
        """c + a1 * b1 + a0 * b0 where a lane of a and b holds two bf16."""
        if not self.module.target.bf16 or n not in (4, 8, 16):
            raise CompileError(f"fma.bf16 of {n} lanes needs AVX512_BF16, which {self.module.target.name} is not known to have")
        v, w = vector("float", n), f"<{2 * n} x bfloat>"
        x, y = (self.t(f"bitcast {v} {q} to {w}") for q in (a, b))
        return self.call(f"llvm.x86.avx512bf16.dpbf16ps.{32 * n}", v, [(v, c), (w, x), (w, y)])

    def fma_integers(self, factors: str, n: int, a: str, b: str, c: str) -> str:
        """c + a0 * b0 + a1 * b1 + ... modulo 2^32, where a lane of a and b holds two i16 or four bytes, signed as `factors` says.

        x86 without VNNI multiplies them as words, the even ones and the odd ones apart, whose products added in twos are exact
        (vpmaddubsw, which takes bytes, saturates). What is made of an operand alone LLVM makes once for all its products.
        """
        left, right = factors[:2], factors[2:]
        x86 = self.module.is_x86 and n in (4, 8, 16) and 32 * n <= self.module.target.vector_bits
        v = vector("i32", n)
        if x86 and self.module.target.vnni and factors != "i16" and left != right:
            octets = f"<{4 * n} x i8>"
            x, y = (self.t(f"bitcast {v} {q} to {octets}") for q in ((a, b) if left == "u8" else (b, a)))
            return self.call(f"llvm.x86.avx512.vpdpbusd.{32 * n}", v, [(v, c), (octets, x), (octets, y)])
        words = f"<{2 * n} x i16>"
        if x86 and factors == "i16":
            x, y = (self.t(f"bitcast {v} {q} to {words}") for q in (a, b))
            if self.module.target.vnni:
                return self.call(f"llvm.x86.avx512.vpdpwssd.{32 * n}", v, [(v, c), (words, x), (words, y)])
            return self._kept(v, self.t(f"add {v} {c}, {self.call(f'llvm.x86.{_MADD[n]}', v, [(words, x), (words, y)])}"))
        if factors == "i16":
            for k in range(2):
                x, y = self._part(a, n, k, 16, "i16"), self._part(b, n, k, 16, "i16")
                c = self.t(f"add {v} {c}, {self.t(f'mul {v} {x}, {y}')}")
            return c
        if not x86:
            for k in range(4):
                x, y = self._part(a, n, k, 8, left), self._part(b, n, k, 8, right)
                c = self.t(f"add {v} {c}, {self.t(f'mul {v} {x}, {y}')}")
            return c
        x, y = (self.t(f"bitcast {v} {q} to {words}") for q in (a, b))
        for odd in (False, True):
            parts = [(words, self._half_words(q, n, odd, kind)) for q, kind in ((x, left), (y, right))]
            c = self.t(f"add {v} {c}, {self.call(f'llvm.x86.{_MADD[n]}', v, parts)}")
        return self._kept(v, c)

    def _kept(self, v: str, x: str) -> str:
        """x, as a value that LLVM knows nothing of: it would else add the products of several steps first, as it may with
        integers, and have no registers for all of them."""
        return self.t(f'call {v} asm sideeffect "", "=v,0"({v} {x})')

    def _part(self, x: str, n: int, k: int, bits: int, kind: str) -> str:
        """Part k, of so many bits, of each i32, as an i32."""
        v, c = vector("i32", n), self._words(n)
        above = 32 - bits * (k + 1)
        top = self.t(f"shl {v} {x}, {c(above)}") if above else x
        return self.t(f"{'lshr' if kind == 'u8' else 'ashr'} {v} {top}, {c(32 - bits)}")

    def _half_words(self, x: str, n: int, odd: bool, kind: str) -> str:
        """The odd or the even bytes of words, as words."""
        v = f"<{2 * n} x i16>"
        if not odd and kind == "u8":
            return self.t(f"and {v} {x}, splat (i16 255)")
        top = x if odd else self.t(f"shl {v} {x}, splat (i16 8)")
        return self.t(f"{'ashr' if kind == 'i8' else 'lshr'} {v} {top}, splat (i16 8)")

    # -- the operations -----------------------------------------------------------------------------------------------

    def binary(
        self, op: str, d: DType, n: int, a: str, b: str, *, first_const: bool = False, second_const: int | None = None
    ) -> str:
        """`second_const` is b's value where it is an integer literal; `first_const` says that a is a literal."""
        kind = element(d)
        v = vector(kind, n)
        if d.is_float:
            if op in _FLOAT:
                return self.rounded(d, self.t(f"{_FLOAT[op]} {v} {a}, {b}"), n)
            if op in ("max", "min"):
                # x86's maxps is a > b ? a : b, which gives b where either is NaN: right unless a alone is NaN.
                best = None if first_const else self._native_extreme(op, d, n, a, b)
                if best is None:
                    best = self.choose(self.compare("fcmp ogt" if op == "max" else "fcmp olt", kind, n, a, b), kind, n, a, b)
                return best if first_const else self.choose(self.compare("fcmp uno", kind, n, a, a), kind, n, a, best)
        elif op in _INTEGER:
            return self.t(f"{_INTEGER[op]} {v} {a}, {b}")
        elif op in ("max", "min"):
            if d is bool_:
                return self.t(f"{'or' if op == 'max' else 'and'} {v} {a}, {b}")
            name = f"llvm.{'s' if d.kind == 'int' else 'u'}{op}.{suffix(kind, n)}"
            return self.call(name, v, [(v, a), (v, b)])
        elif op in ("shl", "shr") and d is not bool_:
            word = "shl" if op == "shl" else "ashr" if d.kind == "int" else "lshr"
            if second_const is not None:
                return self.t(f"{word} {v} {a}, {b}") if 0 <= second_const < d.bits else literal(0, d, n)
            inside = self.compare("icmp ult", kind, n, b, literal(d.bits, d, n))
            return self.choose(inside, kind, n, self.t(f"{word} {v} {a}, {b}"), literal(0, d, n))
        elif op in ("floordiv", "mod") and d is not bool_:
            return self._divide(op, d, n, a, b, known=second_const)
        raise CompileError(f"{op} is not defined on {d} values")

    def _native_extreme(self, op: str, d: DType, n: int, a: str, b: str) -> str | None:
        """x86's maxps or minps of one register, else None. By name: LLVM folds a compare and select into that of the NaN test."""
        name = {
            (f32, 4): f"sse.{op}.ps",
            (f64, 2): f"sse2.{op}.pd",
            (f32, 8): f"avx.{op}.ps.256",
            (f64, 4): f"avx.{op}.pd.256",
            (f32, 16): f"avx512.{op}.ps.512",
            (f64, 8): f"avx512.{op}.pd.512",
        }.get((d, n))
        if name is None or not self.module.is_x86 or n * d.bits > self.module.target.vector_bits:
            return None
        v = vector(element(d), n)
        rounding = [("i32", "4")] if n * d.bits == 512 else []  # the mode of this thread
        return self.call(f"llvm.x86.{name}", v, [(v, a), (v, b), *rounding], f"{v}, {v}, i32 immarg" if rounding else None)

    def _divide(self, op: str, d: DType, n: int, a: str, b: str, *, known: int | None) -> str:
        kind = element(d)
        v, zero, one = vector(kind, n), literal(0, d, n), literal(1, d, n)
        if known == 0:
            return zero
        if d.kind == "uint":
            if known is not None:
                return self.t(f"{'udiv' if op == 'floordiv' else 'urem'} {v} {a}, {b}")
            none = self.compare("icmp eq", kind, n, b, zero)
            safe = self.choose(none, kind, n, one, b)
            return self.choose(none, kind, n, zero, self.t(f"{'udiv' if op == 'floordiv' else 'urem'} {v} {a}, {safe}"))
        if known is not None and known > 0 and known & (known - 1) == 0:
            if op == "floordiv":
                return self.t(f"ashr {v} {a}, {literal(known.bit_length() - 1, d, n)}")
            return self.t(f"and {v} {a}, {literal(known - 1, d, n)}")
        if known == -1:
            return self.t(f"sub {v} {zero}, {a}") if op == "floordiv" else zero
        empty = minus = None
        if known is not None:
            safe = b
        else:
            empty = self.compare("icmp eq", kind, n, b, zero)
            minus = self.compare("icmp eq", kind, n, b, literal(-1, d, n))
            safe = self.choose(self.t(f"or {vector('i1', n)} {empty}, {minus}"), kind, n, one, b)
        q = self.t(f"sdiv {v} {a}, {safe}")
        r = self.t(f"sub {v} {a}, {self.t(f'mul {v} {q}, {safe}')}")
        unlike = self.compare("icmp slt", kind, n, self.t(f"xor {v} {r}, {safe}"), zero)
        fix = self.t(f"and {vector('i1', n)} {unlike}, {self.compare('icmp ne', kind, n, r, zero)}")
        if op == "floordiv":
            result = self.t(f"sub {v} {q}, {self.choose(fix, kind, n, one, zero)}")
            if minus is not None:
                result = self.choose(minus, kind, n, self.t(f"sub {v} {zero}, {a}"), result)
        else:
            result = self.t(f"add {v} {r}, {self.choose(fix, kind, n, safe, zero)}")
        return result if empty is None else self.choose(empty, kind, n, zero, result)

    def comparison(self, op: str, d: DType, n: int, a: str, b: str) -> str:
        kind = element(d)
        if d.is_float:
            word = {"lt": "fcmp olt", "le": "fcmp ole", "eq": "fcmp oeq", "ne": "fcmp une"}[op]
        else:
            sign = "s" if d.kind == "int" else "u"
            word = {"lt": f"icmp {sign}lt", "le": f"icmp {sign}le", "eq": "icmp eq", "ne": "icmp ne"}[op]
        return self.compare(word, kind, n, a, b)

    def unary(self, op: str, d: DType, n: int, a: str) -> str:
        kind = element(d)
        v, name = vector(kind, n), suffix(kind, n)
        if op == "not" and not d.is_float:
            return self.t(f"xor {v} {a}, {literal(True, d, n) if d is bool_ else literal(-1, d, n)}")
        if d.is_float:
            if op == "neg":
                return self.t(f"fneg {v} {a}")
            if op == "abs":
                return self.call(f"llvm.fabs.{name}", v, [(v, a)])
            if op == "sqrt":
                return self.rounded(d, self.call(f"llvm.sqrt.{name}", v, [(v, a)]), n)
            if op in _ROUNDING:
                return self.call(f"llvm.{_ROUNDING[op]}.{name}", v, [(v, a)])
        elif d is not bool_:
            if op == "neg":
                return self.t(f"sub {v} {literal(0, d, n)}, {a}")
            if op == "abs":
                return a if d.kind == "uint" else self.call(f"llvm.abs.{name}", v, [(v, a), ("i1", "false")], f"{v}, i1 immarg")
            if op in _ROUNDING:
                return a
        elif op == "abs":
            return a
        raise CompileError(f"{op} is not defined on {d} values")

    def cast(self, source: DType, to: DType, n: int, a: str) -> str:
        """`a` as another dtype; see `ir.expr` for saturation and wrapping."""
        if source is to:
            return a
        here, there = element(source), element(to)
        v, w = vector(here, n), vector(there, n)
        if to is bool_:
            if source.is_float:
                return self.compare("fcmp une", here, n, a, literal(0.0, source, n))
            return self.compare("icmp ne", here, n, a, literal(0, source, n))
        if source.is_float and to.is_float:
            if to in NARROW:
                return self.rounded(to, self.narrow_odd(a, n) if source is f64 else a, n)
            if there == here:
                return a
            return self.t(f"{'fpext' if to is f64 else 'fptrunc'} {v} {a} to {w}")
        if source.is_float and to.bits < 32 and n > 1 and source not in NARROW:
            return self._narrow_integer(source, to, n, a)
        if source.is_float:
            name = f"llvm.fpto{'s' if to.kind == 'int' else 'u'}i.sat.{suffix(there, n)}.{suffix(here, n)}"
            return self.call(name, w, [(v, a)])
        if to.is_float:
            word = "sitofp" if source.kind == "int" else "uitofp"
            # A 64-bit integer is rounded to f64 on its way to f16 or bf16; all others are rounded once.
            if to in NARROW and source.bits > 16:
                wide = self.t(f"{word} {v} {a} to {vector('double', n)}")
                return self.rounded(to, self.narrow_odd(wide, n), n)
            return self.rounded(to, self.t(f"{word} {v} {a} to {w}"), n)
        if source is bool_:
            return self.t(f"zext {v} {a} to {w}")
        if to.bits == source.bits:
            return a
        word = "trunc" if to.bits < source.bits else "sext" if source.kind == "int" else "zext"
        return self.t(f"{word} {v} {a} to {w}")

    def _narrow_integer(self, source: DType, to: DType, n: int, a: str) -> str:
        """f32 or f64 to an integer of 8 or 16 bits, by way of i32: LLVM would take the saturating conversion lane by lane."""
        here = element(source)
        v, w = vector(here, n), vector("i32", n)
        whole = self.t(f"fptosi {v} {self._within(source, to, n, a)} to {w}")
        if to.kind == "int":
            whole = self.choose(self.compare("fcmp uno", here, n, a, a), "i32", n, literal(0, i32, n), whole)
        return self.t(f"trunc {w} {whole} to {vector(element(to), n)}")

    def _within(self, source: DType, to: DType, n: int, a: str) -> str:
        """A float no less than the least integer of a dtype, nor more than the largest; a NaN becomes the least."""
        here = element(source)
        low, high = (-(1 << (to.bits - 1)), (1 << (to.bits - 1)) - 1) if to.kind == "int" else (0, (1 << to.bits) - 1)
        least, most = (literal(float(x), source, n) for x in (low, high))
        x = self.choose(self.compare("fcmp ogt", here, n, a, least), here, n, a, least)
        return self.choose(self.compare("fcmp olt", here, n, x, most), here, n, x, most)

    def round_to_integer(self, source: DType, to: DType, n: int, a: str) -> str:
        """cast{to}(round(a)) of f32 for integers of 8 or 16 bits: the conversion itself rounds half to even, and rounding changes
        no order, so that what is within the limits may be rounded last."""
        v, w = vector(element(source), n), vector("i32", n)
        name = f"llvm.lrint.{suffix('i32', n)}.{suffix(element(source), n)}"
        whole = self.call(name, w, [(v, self._within(source, to, n, a))])
        if to.kind == "int":
            whole = self.choose(self.compare("fcmp uno", element(source), n, a, a), "i32", n, literal(0, i32, n), whole)
        return self.t(f"trunc {w} {whole} to {vector(element(to), n)}")

    def through_bytes(self, source: DType, to: DType, n: int, a: str, whole: bool) -> str:
        """cast{source}(cast{to}(a)) for an unsigned `to` of 8 or 16 bits: what is left of a, as a float. `whole`: a is rounded
        already."""
        v, x = vector(element(source), n), self._within(source, to, n, a)
        return x if whole else self.call(f"llvm.trunc.{suffix(element(source), n)}", v, [(v, x)])

    def bitcast(self, source: DType, to: DType, n: int, a: str) -> str:
        bits = self.held_bits(source, a, n) if source in NARROW else a
        here = "i16" if source in NARROW else element(source)
        there = "i16" if to in NARROW else element(to)
        if bool_ in (source, to):
            raise CompileError("bitcast of bool: cast it instead")
        if here != there:
            bits = self.t(f"bitcast {vector(here, n)} {bits} to {vector(there, n)}")
        return self.from_bits(to, bits, n) if to in NARROW else bits

    def ramp(self, d: DType, n: int, base: str) -> str:
        kind = element(d)
        steps = ", ".join(f"{kind} {literal(i, d)}" for i in range(n))
        word = "fadd" if d.is_float else "add"
        return self.t(f"{word} {vector(kind, n)} {self.splat(base, kind, n)}, <{steps}>")

    def reduce(self, op: str, d: DType, n: int, a: str, *, forgets: bool = False) -> str:
        """Lane i with lane i + n/2, until one is left. `forgets`: a maximum or minimum may be any number if a lane is NaN."""
        kind = element(d)
        if n & (n - 1):
            raise CompileError(f"reduce_{op} of {n} lanes: the number of lanes must be a power of two")
        while n > 1:
            v, half = vector(kind, n), n // 2
            parts = []
            for first in (0, half):
                picks = ", ".join(f"i32 {first + i}" for i in range(half))
                if half == 1:
                    parts.append(self.t(f"extractelement {v} {a}, i64 {first}"))
                else:
                    parts.append(self.t(f"shufflevector {v} {a}, {v} poison, <{half} x i32> <{picks}>"))
            a = self.binary(op, d, half, parts[0], parts[1], first_const=forgets)
            n = half
        return a

    def zero(self, d: DType, n: int) -> str:
        return literal(0.0 if d.is_float else 0, d, n)
