"""A keyed digest of memory at the speed at which memory is read: NH, the universal hash of UMAC (RFC 4418; Black, Halevi,
Krawczyk, Krovetz, Rogaway 1999), over each block of `ir.program.DIGEST_BLOCK` bytes.

With words m and key words k of 32 bits, a block's digest is   sum over pairs of (m[2i] + k[2i]) * (m[2i+1] + k[2i+1])   mod
2^64, the inner sums mod 2^32; taken four times, each with the key one step of 64 bytes further on. For a random key, two
different blocks agree in all four with a probability of at most 2^-128: in each pass the last pair in which they differ meets
key words that no other term of this pass or of those before it has seen.

    entry(table, -, -):  table = [address of the key, number of rows, rows of (address, number of blocks, address of the result)]
"""

from __future__ import annotations

from typing import Final

from ...ir.program import DIGEST, DIGEST_BLOCK, DIGEST_PASSES, DIGEST_STEP
from ...ir.target import Target
from .compile import data_layout, object_code

_TEXT: Final = """target datalayout = "{layout}"
target triple = "{triple}"

declare i64 @llvm.vector.reduce.add.v{pairs}i64({wide})

define i32 @{entry}(ptr %table, ptr %unused, ptr %context) nounwind {{
entry:
  %key = load ptr, ptr %table
  %rows.at = getelementptr i64, ptr %table, i64 1
  %rows = load i64, ptr %rows.at
  %first = getelementptr i64, ptr %table, i64 2
  br label %row
row:
  %r = phi i64 [0, %entry], [%r.next, %row.done]
  %left = icmp slt i64 %r, %rows
  br i1 %left, label %row.start, label %done
row.start:
  %r.offset = mul i64 %r, 3
  %data.at = getelementptr i64, ptr %first, i64 %r.offset
  %data = load ptr, ptr %data.at
  %blocks.at = getelementptr i64, ptr %data.at, i64 1
  %blocks = load i64, ptr %blocks.at
  %out.at = getelementptr i64, ptr %data.at, i64 2
  %out = load ptr, ptr %out.at
  br label %block
block:
  %b = phi i64 [0, %row.start], [%b.next, %store]
  %more = icmp slt i64 %b, %blocks
  br i1 %more, label %start, label %row.done
start:
  %block.offset = mul i64 %b, {block}
  %from = getelementptr i8, ptr %data, i64 %block.offset
  %out.offset = mul i64 %b, {result}
  %to = getelementptr i8, ptr %out, i64 %out.offset
  br label %step
step:
  %at = phi i64 [0, %start], [%at.next, %step]
{sums}
  %m.at = getelementptr i8, ptr %from, i64 %at
  %m = load {words}, ptr %m.at, align 1
  %key.from = getelementptr i8, ptr %key, i64 %at
{passes}
  %at.next = add i64 %at, {step}
  %again = icmp slt i64 %at.next, {block}
  br i1 %again, label %step, label %store
store:
{stores}
  %b.next = add i64 %b, 1
  br label %block
row.done:
  %r.next = add i64 %r, 1
  br label %row
done:
  ret i32 0
}}
"""

_PASS: Final = """  %k{p}.at = getelementptr i8, ptr %key.from, i64 {offset}
  %k{p} = load {words}, ptr %k{p}.at, align 1
  %t{p} = add {words} %m, %k{p}
  %w{p} = bitcast {words} %t{p} to {wide}
  %high{p} = lshr {wide} %w{p}, splat (i64 32)
  %low{p} = and {wide} %w{p}, splat (i64 4294967295)
  %product{p} = mul {wide} %high{p}, %low{p}
  %sum{p}.next = add {wide} %sum{p}, %product{p}"""

_STORE: Final = """  %total{p} = call i64 @llvm.vector.reduce.add.v{pairs}i64({wide} %sum{p}.next)
  %total{p}.at = getelementptr i64, ptr %to, i64 {p}
  store i64 %total{p}, ptr %total{p}.at, align 8"""


def digest(target: Target) -> bytes:
    """Object code of the function DIGEST. Words are read as the target orders their bytes."""
    pairs = DIGEST_STEP // 8
    types = {"words": f"<{2 * pairs} x i32>", "wide": f"<{pairs} x i64>", "pairs": pairs}
    passes = range(DIGEST_PASSES)
    sums = [f"  %sum{p} = phi {types['wide']} [zeroinitializer, %start], [%sum{p}.next, %step]" for p in passes]
    text = _TEXT.format(
        layout=data_layout(target),
        triple=target.triple,
        entry=DIGEST,
        block=DIGEST_BLOCK,
        step=DIGEST_STEP,
        result=8 * DIGEST_PASSES,
        sums="\n".join(sums),
        passes="\n".join(_PASS.format(p=p, offset=p * DIGEST_STEP, **types) for p in passes),
        stores="\n".join(_STORE.format(p=p, **types) for p in passes),
        **types,
    )
    return object_code(text, target)
