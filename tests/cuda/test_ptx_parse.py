"""PTX's grammar: what the parser makes of it, and what it says to text that is none."""

from __future__ import annotations

import numpy as np
import pytest
from tensorwright.ir.errors import LaunchError, PtxError
from tensorwright.runtime.cuda.device import pack_arguments, signatures
from tensorwright.runtime.cuda.ptx_parse import Address, Immediate, Register, Symbol, Vector, number, parse_ptx

from .ptx_support import HEAD

TEXT = (
    HEAD
    + """
/* a comment
   of two lines */
.extern .shared .align 16 .b8 dynamic[];
.const .align 4 .f32 table[3] = {0f3F800000, 0f40000000, 0fC0400000};
.visible .entry first(
	.param .u64 .ptr .global .align 16 a, // a pointer
	.param .f32 b,
	.param .u8 c,
	.param .align 8 .b8 d[24]
)
.maxntid 64, 2, 1
.minnctapersm 2
{
	.reg .b32 	%r<3>;
	.reg .pred %p1;
	@!%p1 bra $L1;
	{ .reg .b16 lo, hi; mov.b32 {lo, hi}, %r1; }
	{ .reg .b32 lo; mov.b32 lo, -5; }
$L1:
	ld.global.v2.b32 {%r1, %r2}, [a+-8];
	mov.b32 %r0, table+4;
	setp.lt.and.f32 %p1|_, 0f7F800000, 0d3FF0000000000000, !%p1;
	ret;
}
.entry second() .reqntid 32 { ret; }
"""
)


def test_a_module_and_its_kernels() -> None:
    m = parse_ptx(TEXT)
    assert (m.version, m.target, list(m.kernels)) == ("8.0", "sm_90", ["first", "second"])
    assert [(v.name, v.space, v.size, v.extern) for v in m.variables] == [
        ("dynamic", "shared", 0, True),
        ("table", "const", 12, False),
    ]
    assert np.frombuffer(m.variables[1].data or b"", "f4").tolist() == [1, 2, -3]
    k = m.kernels["first"]
    assert [(p.name, p.size, p.align) for p in k.params] == [("a", 8, 8), ("b", 4, 4), ("c", 1, 1), ("d", 24, 8)]
    assert (k.param_offsets(), k.param_bytes) == ([0, 8, 12, 16], 40)
    assert (k.max_threads, m.kernels["second"].required_threads) == (128, (32,))
    assert k.labels == {"$L1": 3}


def test_operands_and_scopes() -> None:
    k = parse_ptx(TEXT).kernels["first"]
    bra, unpack, inner, load, address, compare, _ = k.code
    assert bra.guard == Register("%p1", True)
    assert bra.operands == (Symbol("$L1"),)
    assert isinstance(unpack.operands[0], Vector)
    lo = unpack.operands[0].items[0]
    assert isinstance(lo, Register)
    assert isinstance(inner.operands[0], Register)
    assert lo.name != inner.operands[0].name  # two scopes, two registers
    assert (k.registers[lo.name], k.registers[inner.operands[0].name]) == ("b16", "b32")
    assert inner.operands[1] == Immediate(-5)
    assert load.operands[1] == Address(Symbol("a"), -8)
    assert address.operands[1] == Symbol("table", 4)
    assert compare.operands[1:] == (Immediate(float("inf"), 32), Immediate(1.0, 64), Register("%p1", True))
    assert load.line == TEXT.splitlines().index("\tld.global.v2.b32 {%r1, %r2}, [a+-8];") + 1
    assert load.where.endswith("ld.global.v2.b32 {%r1, %r2}, [a+-8]")


def test_numbers() -> None:
    assert [number(t).value for t in ("17", "0x1F", "3U", "0f40490fdb", "0D4000000000000000")] == [
        17,
        31,
        3,
        float(np.float32(np.pi)),
        2.0,
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no .target"),
        ("#include <x>", "line 1: unexpected character '#'"),
        (HEAD + ".func f() { ret; }", "line 4: device functions"),
        (HEAD + ".entry k() { bra $no; }", "PTX line 4: bra .no: there is no such label"),
        (HEAD + ".entry k() { add.s32 %r1", "ends in the middle"),
        (HEAD + ".entry k()\n{ $a: ret; $a: ret; }", "line 5: the label .a stands twice"),
        (HEAD + ".entry k() { .reg .q7 %r; }", "unknown type .q7"),
        (HEAD + ".entry k() { @%p1 ret; }", "no predicate register"),
        (HEAD + ".wrong 3;", "unknown statement '.wrong'"),
        (HEAD.replace("64", "32"), "only 64-bit addresses"),
        (b"\xff\xfe", "not PTX text"),
    ],
)
def test_what_is_no_ptx_is_refused_with_its_line(text: str | bytes, says: str) -> None:
    with pytest.raises(PtxError, match=says):
        parse_ptx(text)


def test_signatures_are_found_without_parsing_and_arguments_packed() -> None:
    found = signatures(TEXT.replace("\t.param .u8 c,\n\t.param .align 8 .b8 d[24]", "\t.param .s16 c"))
    first = found["first"]
    assert first.params == (("u64", 8), ("f32", 4), ("s16", 2))
    assert pack_arguments(first, [2, 1.5, -1]).hex() == "02000000000000000000c03fffff"
    assert found["second"].params == ()
    with pytest.raises(LaunchError, match="takes a structure"):
        signatures(TEXT)
    for arguments, says in (
        ([1, 2.0], r"first takes 3 arguments \(.u64, .f32, .s16\), got 2"),
        ([1, np.float64(2), 3], "argument 1 is a float64 of 8 bytes, the parameter .f32 has 4"),
        ([1.5, 2.0, 3], "argument 0 is the float 1.5, the parameter is .u64"),
        ([1, 2.0, 40_000], "first takes"),
        ([np.int32(1), 2.0, 3], "argument 0 is a int32 of 4 bytes"),
    ):
        with pytest.raises(LaunchError, match=says):
            pack_arguments(first, arguments)
