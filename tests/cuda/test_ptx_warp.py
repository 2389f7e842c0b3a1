"""Instructions of whole warps against their definition: shuffles, votes, reductions, matrices, atomics, asynchronous copies."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tensorwright.ir.errors import PtxError
from tensorwright.runtime.cuda.matrix import Shape
from tensorwright.runtime.cuda.state import Options

from .ptx_support import Out, kernel, run

R = np.random.default_rng(0)
OUT = "ld.param.u64 %d0, [p0]; mad.wide.u32 %d1, %t, 4, %d0;\n"
TWO = ".param .u64 p0, .param .u64 p1"


def on_threads(body: str, n: int = 64, **options: Any) -> np.ndarray[Any, Any]:
    """What each of n threads leaves in %r0."""
    got, _ = run(kernel(OUT + body + "\nst.global.u32 [%d1], %r0;"), "k", (1,), (n,), [Out(n, np.uint32)], **options)
    return got[0]


@pytest.mark.parametrize("width", [32, 8])
def test_shuffles(width: int) -> None:
    lane = np.arange(64) % 32
    first = lane // width * width
    base = np.arange(64) - lane
    c = (32 - width) << 8
    cases = {
        f"up.b32 %r0|%p0, %t, 3, {c:#x}": np.where(lane - 3 >= first, lane - 3, lane),
        f"down.b32 %r0|%p0, %t, 5, {c | 31:#x}": np.where(lane + 5 < first + width, lane + 5, lane),
        f"bfly.b32 %r0|%p0, %t, 4, {c | 31:#x}": lane ^ 4,
        f"idx.b32 %r0|%p0, %t, 2, {c | 31:#x}": first + 2,
    }
    for text, wanted in cases.items():
        got = on_threads(f"shfl.sync.{text}, -1; selp.b32 %r1, 1000, 0, %p0; add.u32 %r0, %r0, %r1;")
        inside = {"up": lane - 3 >= first, "down": lane + 5 < first + width}.get(text.split(".")[0], np.full(64, True))
        assert (got == base + wanted + 1000 * inside).all(), text


def test_votes_matches_and_reductions() -> None:
    t = np.arange(64)
    odd = sum(1 << k for k in range(1, 32, 2))
    pred = "and.b32 %r9, %t, 1; setp.eq.u32 %p0, %r9, 1;"
    assert (on_threads(pred + "vote.sync.ballot.b32 %r0, %p0, -1;") == odd).all()
    for mode, wanted in (("all", False), ("any", True), ("uni", False)):
        assert (on_threads(pred + f"vote.sync.{mode}.pred %p1, %p0, -1; selp.b32 %r0, 1, 0, %p1;") == wanted).all()
    got = on_threads("shr.u32 %r1, %t, 3; match.any.sync.b32 %r0, %r1, -1;")
    assert (got == np.uint64(0xFF) << (t % 32 // 8 * 8).astype(np.uint64)).all()
    got = on_threads("shr.u32 %r1, %t, 5; match.all.sync.b32 %r0|%p1, %r1, -1;")
    assert (got == 0xFFFFFFFF).all()
    half = "setp.lt.u32 %p2, %t, 32; selp.b32 %r2, 0x0000ffff, 0xffff0000, %p2; mov.u32 %r3, %laneid;"
    for op, wanted in (
        ("add.u32", 496 + 32 * 0),
        ("max.s32", 31),
        ("min.u32", 0),
        ("or.b32", 31),
        ("xor.b32", 0),
        ("and.b32", 0),
    ):
        assert (on_threads(half + f"redux.sync.{op} %r0, %r3, -1;") == wanted).all(), op
    assert (on_threads("activemask.b32 %r0;", 40) == np.where(np.arange(40) < 32, 0xFFFFFFFF, 0xFF)).all()


def test_lanes_that_come_by_different_ways_meet_at_a_shuffle() -> None:
    """Half the warp takes a loop first; the shuffle waits for it."""
    body = """
    mov.u32 %r5, 0; setp.lt.u32 %p0, %t, 16; @%p0 bra $go;
    $l: add.u32 %r5, %r5, 1; setp.lt.u32 %p1, %r5, 50; @%p1 bra $l;
    $go: add.u32 %r6, %t, 100; shfl.sync.bfly.b32 %r0, %r6, 16, 31, -1;
    """
    assert (on_threads(body, 32) == (np.arange(32) ^ 16) + 100).all()


def test_barriers_with_a_number_a_count_and_a_sum() -> None:
    body = """
    .shared .align 4 .b8 s[256]; mov.u64 %d2, s; mad.wide.u32 %d3, %t, 4, %d2; setp.ge.u32 %p0, %t, 32; @%p0 bra $other;
    st.shared.u32 [%d3], %t; bar.arrive 1, 64; mov.u32 %r0, 5; bra $end;
    $other: bar.sync 1, 64; sub.u32 %r1, %t, 32; mad.wide.u32 %d4, %r1, 4, %d2; ld.shared.u32 %r0, [%d4];
    $end: setp.lt.u32 %p1, %t, 10;
    barrier.cta.red.popc.aligned.u32 %r2, 0, %p1; mad.lo.u32 %r0, %r2, 1000, %r0;
    """
    got = on_threads(body)
    assert (got == 10_000 + np.where(np.arange(64) < 32, 5, np.arange(64) - 32)).all()


ATOMICS: list[tuple[str, Any]] = [
    ("add.u32", lambda v: v.sum(dtype="u4")),
    ("min.u32", lambda v: v.min()),
    ("max.s32", lambda v: v.view("i4").max().view("u4")),
    ("or.b32", np.bitwise_or.reduce),
    ("and.b32", lambda v: np.uint32(0)),
    ("xor.b32", np.bitwise_xor.reduce),
]


@pytest.mark.parametrize(("op", "f"), ATOMICS, ids=[a[0] for a in ATOMICS])
def test_atomics(op: str, f: Any) -> None:
    v = R.integers(0, 2**31, 128).astype("u4")
    start = np.zeros(4, "u4") if op != "min.u32" else np.full(4, 2**32 - 1, "u4")
    body = "ld.param.u64 %d0, [p0]; ld.param.u64 %d1, [p1]; mad.lo.u32 %r1, %b, 64, %t; mad.wide.u32 %d2, %r1, 4, %d0; "
    body += "ld.global.u32 %r2, [%d2];\n"
    got, _ = run(kernel(body + f"red.global.{op} [%d1+4], %r2;", TWO), "k", (2,), (64,), [v, start])
    assert got[1][1] == f(v)
    got, _ = run(kernel(body + f"atom.global.{op} %r3, [%d1+4], %r2;", TWO), "k", (2,), (64,), [v, start])
    assert got[1][1] == f(v)


def test_atomics_return_what_was_there() -> None:
    body = (
        OUT
        + """
    .shared .align 4 .b8 s[8]; setp.eq.u32 %p0, %t, 0; @%p0 st.shared.u32 [s], 0; @%p0 st.shared.f32 [s+4], 0f00000000;
    bar.sync 0;
    atom.shared.inc.u32 %r1, [s], 9; atom.shared.add.f32 %f0, [s+4], 0f3F800000; bar.sync 0;
    cvt.rzi.u32.f32 %r2, %f0; mad.lo.u32 %r0, %r2, 100, %r1; st.global.u32 [%d1], %r0;
    """
    )
    got, _ = run(kernel(body), "k", (1,), (64,), [Out(64, np.uint32)])
    assert sorted(got[0] // 100) == list(range(64))
    assert (got[0] % 100 == got[0] // 100 % 10).all()
    swap = OUT + "ld.param.u64 %d2, [p1]; atom.global.cas.b32 %r0, [%d2], 7, %t; st.global.u32 [%d1], %r0;"
    got, _ = run(kernel(swap, TWO), "k", (1,), (32,), [Out(32, np.uint32), np.full(1, 7, "u4")])
    assert got[0][0] == 7
    assert (got[0][1:] == got[1][0]).all()


# --- matrices --------------------------------------------------------------------------------------------------------


def test_ldmatrix_and_stmatrix() -> None:
    m = R.integers(0, 2**16, (32, 8)).astype("u2")
    load = """
    .shared .align 16 .b8 s[512]; .shared .align 16 .b8 z[512]; mov.u64 %d2, s; mad.wide.u32 %d2, %t, 16, %d2;
    mov.u64 %d8, z; mad.wide.u32 %d8, %t, 16, %d8;
    ld.param.u64 %d0, [p0]; ld.param.u64 %d1, [p1]; mad.wide.u32 %d3, %t, 16, %d0; mad.wide.u32 %d4, %t, 16, %d1;
    ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%d3]; st.shared.v4.b32 [%d2], {%r0, %r1, %r2, %r3}; bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x4@@.shared.b16 {%r0, %r1, %r2, %r3}, [%d2];
    """
    for trans in ("", ".trans"):
        text = load.replace("@@", trans) + "st.global.v4.b32 [%d4], {%r0, %r1, %r2, %r3};"
        got, _ = run(kernel(text, TWO), "k", (1,), (32,), [m, Out((32, 4, 2), np.uint16)])
        tiles = m.reshape(4, 8, 8)
        tiles = tiles.transpose(0, 2, 1) if trans else tiles
        assert (got[1] == tiles.reshape(4, 8, 4, 2).transpose(1, 2, 0, 3).reshape(32, 4, 2)).all()
        back = (
            load.replace("@@", trans)
            + f"stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%d8], {{%r0, %r1, %r2, %r3}}; bar.sync 0;"
        )
        back += "ld.shared.v4.b32 {%r0, %r1, %r2, %r3}, [%d8]; st.global.v4.b32 [%d4], {%r0, %r1, %r2, %r3};"
        got, _ = run(kernel(back, TWO), "k", (1,), (32,), [m, Out((32, 8), np.uint16)])
        assert (got[1] == m).all()


MMA = [
    ("m16n8k8", "f16", "f16", "f32"),
    ("m16n8k16", "f16", "f16", "f32"),
    ("m16n8k16", "f16", "f16", "f16"),
    ("m16n8k8", "bf16", "bf16", "f32"),
    ("m16n8k16", "bf16", "bf16", "f32"),
    ("m16n8k4", "tf32", "tf32", "f32"),
    ("m16n8k8", "tf32", "tf32", "f32"),
    ("m8n8k16", "s8", "s8", "s32"),
    ("m16n8k16", "u8", "s8", "s32"),
    ("m16n8k32", "s8", "s8", "s32"),
    ("m16n8k32", "u8", "u8", "s32"),
    ("m8n8k4", "f64", "f64", "f64"),
]
NUMPY: dict[str, Any] = {
    "f16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "tf32": np.float32,
    "s8": np.int8,
    "u8": np.uint8,
    "f32": np.float32,
    "s32": np.int32,
    "f64": np.float64,
}


@pytest.mark.parametrize(("shape", "a", "b", "c"), MMA, ids=["-".join(m) for m in MMA])
def test_mma(shape: str, a: str, b: str, c: str) -> None:
    """Fragments are built from PTX's tables of rows and columns here, independently of the interpreter's own formulas."""
    m, n, k = (int(x) for x in shape[1:].replace("n", " ").replace("k", " ").split())
    if c == "s32":
        x, y = (R.integers(-128 if t == "s8" else 0, 128, s).astype(NUMPY[t]) for t, s in ((a, (m, k)), (b, (k, n))))
        z = R.integers(-1000, 1000, (m, n)).astype(np.int32)
    else:
        x, y = R.standard_normal((m, k)).astype(NUMPY[a]), R.standard_normal((k, n)).astype(NUMPY[b])
        z = R.standard_normal((m, n)).astype(NUMPY[c])
    size = np.dtype(NUMPY[a]).itemsize
    word = 8 if a == "f64" else 4
    per = word // size
    g, q = np.arange(32) // 4, np.arange(32) % 4

    def words(v: Any) -> Any:
        return np.ascontiguousarray(v).view(f"u{word}")[..., 0]

    fa = [
        words(np.stack([x[g + 8 * h, per * q + j + 4 * per * s] for j in range(per)], -1))
        for s in range(k // (4 * per))
        for h in range(m // 8)
    ]
    fb = [words(np.stack([y[per * q + j + 4 * per * s, g] for j in range(per)], -1)) for s in range(k // (4 * per))]
    half = c == "f16"
    fc = [np.ascontiguousarray(np.stack([z[g + 8 * h, 2 * q], z[g + 8 * h, 2 * q + 1]], -1)) for h in range(m // 8)]
    kind = "b64" if a == "f64" else "b32"
    ckind = {"f32": "f32", "f16": "b32", "s32": "s32", "f64": "f64"}[c]
    regs = f".reg .{kind} %A<8>; .reg .{kind} %B<8>; .reg .{ckind} %C<8>; .reg .b64 %q0, %q1, %q2;\n"
    body = regs + "ld.param.u64 %q0, [p0]; ld.param.u64 %q1, [p1]; ld.param.u64 %q2, [p2];\n"
    na, nb, nc = len(fa), len(fb), len(fc) * (1 if half else 2)
    body += "".join(
        f"mad.wide.u32 %d{j}, %t, {size_}, %q{j};\n"
        for j, size_ in enumerate((na * word, nb * word, nc * (8 if c == "f64" else 4)))
    )
    body += "".join(f"ld.global.{kind} %A{j}, [%d0+{j * word}];\n" for j in range(na)) + "".join(
        f"ld.global.{kind} %B{j}, [%d1+{j * word}];\n" for j in range(nb)
    )
    step = 8 if c == "f64" else 4
    body += "".join(f"ld.global.{ckind} %C{j}, [%d2+{j * step}];\n" for j in range(nc))
    list_ = {s: ", ".join(f"%{s}{j}" for j in range(count)) for s, count in (("A", na), ("B", nb), ("C", nc))}
    operands = ", ".join(f"{{{list_[s]}}}" for s in "CABC")
    body += f"mma.sync.aligned.{shape}.row.col.{c}.{a}.{b}.{c} {operands};\n"
    body += "".join(f"st.global.{ckind} [%d2+{j * step}], %C{j};\n" for j in range(nc))
    text = kernel(body, ".param .u64 p0, .param .u64 p1, .param .u64 p2")
    cs = np.stack(fc, 1)
    got, _ = run(text, "k", (1,), (32,), [np.stack(fa, 1), np.stack(fb, 1), cs])
    d = np.zeros((m, n), NUMPY[c])
    for h in range(m // 8):
        for j in range(2):
            d[g + 8 * h, 2 * q + j] = got[2][:, h, j]
    if a == "tf32":
        x, y = ((v.view("u4") & np.uint32(0xFFFFE000)).view("f4") for v in (x, y))
    if c == "s32":
        assert (d == x.astype("i8") @ y.astype("i8") + z).all()
    else:
        exact = x.astype("f8") @ y.astype("f8") + z
        assert np.abs(d - exact).max() <= np.abs(exact).max() * np.finfo(NUMPY[c]).eps
    s = Shape(m, n, k, per)
    assert (len(s.a), len(s.b), len(s.c)) == (na, nb, m * n // 32)


def test_copies_in_stages_and_with_zero_fill() -> None:
    """Two stages in flight; the second copy of each reads only half its bytes, the rest is zero."""
    x = np.arange(4 * 64 * 4, dtype=np.uint32)
    body = """
    .shared .align 16 .b8 s[2048]; ld.param.u64 %d0, [p0]; ld.param.u64 %d1, [p1]; mov.u64 %d2, s;
    mad.wide.u32 %d3, %t, 16, %d2; mad.wide.u32 %d4, %t, 16, %d0; mad.wide.u32 %d5, %t, 32, %d1;
    cp.async.cg.shared.global [%d3], [%d4], 16; cp.async.commit_group;
    mov.u32 %r9, 8; cp.async.ca.shared.global [%d3+1024], [%d4+1024], 16, %r9; cp.async.commit_group;
    cp.async.wait_group 1; ld.shared.v4.u32 {%r0, %r1, %r2, %r3}, [%d3]; st.global.v4.u32 [%d5], {%r0, %r1, %r2, %r3};
    cp.async.wait_group 0; ld.shared.v4.u32 {%r0, %r1, %r2, %r3}, [%d3+1024]; st.global.v4.u32 [%d5+16], {%r0, %r1, %r2, %r3};
    """
    got, _ = run(kernel(body, TWO), "k", (1,), (64,), [x, Out((64, 2, 4), np.uint32)])
    second = x[256:512].reshape(64, 4).copy()
    second[:, 2:] = 0
    assert (got[1][:, 0] == x[:256].reshape(64, 4)).all()
    assert (got[1][:, 1] == second).all()


def test_counts_of_bank_conflicts_and_sectors() -> None:
    body = (
        OUT + ".shared .align 16 .b8 s[8192]; mov.u64 %d2, s; mad.wide.u32 %d3, %t, @@, %d2; st.shared.u32 [%d3], %t; "
        "mov.u32 %r0, 1; st.global.u32 [%d1], %r0;"
    )
    for stride, cycles in ((4, 1), (8, 2), (128, 32)):
        _, c = run(kernel(body.replace("@@", str(stride))), "k", (1,), (64,), [Out(64, np.uint32)], options=Options(count=True))
        assert (c.shared_phases, c.shared_cycles) == (2, 2 * cycles), stride
        assert (c.requests, c.sectors, c.bytes) == (2, 8, 256)
        assert c.opcodes["st.shared.u32"] == 2
    spread = OUT + "mad.wide.u32 %d4, %t, 32, %d0; st.global.u32 [%d4], %t;"
    _, c = run(kernel(spread), "k", (1,), (32,), [Out(256, np.uint32)], options=Options(count=True), partly=True)
    assert (c.requests, c.sectors, c.bytes) == (1, 32, 128)


def test_what_is_not_supported_is_refused_when_it_is_loaded() -> None:
    for body, says in (
        ("wgmma.fence.sync.aligned;", r"unknown opcode 'wgmma.fence.sync.aligned'"),
        ("add.f32.rn.weird %f0, %f1, %f2;", "unknown modifier .weird"),
        (
            "mma.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 {%r0,%r1,%r2,%r3}, {%r0,%r1,%r2,%r3}, {%r0,%r1}, {%r0,%r1,%r2,%r3};",
            "m16n8k64",
        ),
        ("add.u32 %r0, %d0, 1;", "is .b64, and is read as .u32"),
        ("call foo;", "'call' is not supported"),
        ("shfl.bfly.b32 %r0, %r1, 1, 31;", "without .sync"),
    ):
        with pytest.raises(PtxError, match=says) as caught:
            run(kernel(body), "k", (1,), (32,), [Out(1)])
        assert "PTX line" in str(caught.value)
