"""A function that Python calls directly: it checks numpy arrays, takes their addresses and runs a program.

Checking an argument, taking its address, finding an idle output and calling through ctypes cost two microseconds in Python,
as much as a small model; here they cost a tenth of one. The function is `PyObject *(PyObject *self, PyObject *const *args,
Py_ssize_t n)`. What is not exactly as expected gets None, with nothing done: the way through Python then finds out why. One
function serves all programs: what it needs to know of one is in a table of words, laid out by `ir.program.CallTable`.

It reads the public fields of array objects (`PyArrayObject_fields`) and the reference counts of our own outputs.
"""

from __future__ import annotations

from ...ir.program import CALL_PATH, CallTable
from ...ir.target import Target
from .compile import data_layout, object_code

_TEXT = """target datalayout = "{layout}"
target triple = "{triple}"

define ptr @{entry}(ptr %self, ptr %args, i64 %count) nounwind {{
entry:
  %table.at = getelementptr i8, ptr %self, i64 16
  %table = load ptr, ptr %table.at
  %busy = load i64, ptr %table
  %idle = icmp eq i64 %busy, 0
{words}
  %n2 = add i64 %n, 2
  %plain = icmp eq i64 %count, %n
  %given = icmp eq i64 %count, %n2
  br i1 %idle, label %counted, label %none
counted:
  br i1 %plain, label %checks, label %marked
marked:
  br i1 %given, label %mark, label %none
mark:
  %last = add i64 %n, 1
  %mark.at = getelementptr ptr, ptr %args, i64 %last
  %mark.is = load ptr, ptr %mark.at
  %marks = icmp eq ptr %mark.is, %sentinel
  br i1 %marks, label %checks, label %none
checks:
  %total = select i1 %given, i64 %n1, i64 %n
  br label %argument

argument:
  %k = phi i64 [0, %checks], [%k.next, %stored]
  %more = icmp slt i64 %k, %total
  br i1 %more, label %look, label %ready
look:
  %x.at = getelementptr ptr, ptr %args, i64 %k
  %x = load ptr, ptr %x.at
  %d.offset = mul i64 %k, {stride}
  %d.first = add i64 %d.offset, {arguments}
  %d = getelementptr i64, ptr %table, i64 %d.first
  %type.at = getelementptr i8, ptr %x, i64 8
  %type = load ptr, ptr %type.at
  %type.ok = icmp eq ptr %type, %ndarray
  br i1 %type.ok, label %array, label %none
array:
  %descr.at = getelementptr i8, ptr %x, i64 56
  %descr = load ptr, ptr %descr.at
  %descr.wanted = load ptr, ptr %d
  %descr.ok = icmp eq ptr %descr, %descr.wanted
  %nd.at = getelementptr i8, ptr %x, i64 24
  %nd = load i32, ptr %nd.at
  %nd64 = sext i32 %nd to i64
  %nd.wanted.at = getelementptr i64, ptr %d, i64 1
  %nd.wanted = load i64, ptr %nd.wanted.at
  %nd.ok = icmp eq i64 %nd64, %nd.wanted
  %flags.at = getelementptr i8, ptr %x, i64 64
  %flags = load i32, ptr %flags.at
  %is.out = icmp eq i64 %k, %n
  %flags.wanted = select i1 %is.out, i32 1281, i32 257
  %flags.has = and i32 %flags, %flags.wanted
  %flags.ok = icmp eq i32 %flags.has, %flags.wanted
  %ok1 = and i1 %descr.ok, %nd.ok
  %ok2 = and i1 %ok1, %flags.ok
  br i1 %ok2, label %shape, label %none
shape:
  %dims.at = getelementptr i8, ptr %x, i64 32
  %dims = load ptr, ptr %dims.at
  br label %axis
axis:
  %a = phi i64 [0, %shape], [%a.next, %same]
  %a.more = icmp slt i64 %a, %nd64
  br i1 %a.more, label %dim, label %fits
dim:
  %dim.at = getelementptr i64, ptr %dims, i64 %a
  %dim.is = load i64, ptr %dim.at
  %a.place = add i64 %a, 4
  %dim.wanted.at = getelementptr i64, ptr %d, i64 %a.place
  %dim.wanted = load i64, ptr %dim.wanted.at
  %dim.ok = icmp eq i64 %dim.is, %dim.wanted
  br i1 %dim.ok, label %same, label %none
same:
  %a.next = add i64 %a, 1
  br label %axis
fits:
  %data.at = getelementptr i8, ptr %x, i64 16
  %data = load i64, ptr %data.at
  br i1 %is.out, label %apart.start, label %store

apart.start:
  %low = and i64 %data, %alignment
  %aligned = icmp eq i64 %low, 0
  %size.at = getelementptr i64, ptr %d, i64 3
  %size = load i64, ptr %size.at
  %end = add i64 %data, %size
  br i1 %aligned, label %apart, label %none
apart:
  %j = phi i64 [0, %apart.start], [%j.next, %apart.next]
  %j.more = icmp slt i64 %j, %n
  br i1 %j.more, label %apart.look, label %store
apart.look:
  %e.offset = mul i64 %j, {stride}
  %e.first = add i64 %e.offset, {arguments}
  %e = getelementptr i64, ptr %table, i64 %e.first
  %e.slot.at = getelementptr i64, ptr %e, i64 2
  %e.slot = load i64, ptr %e.slot.at
  %e.place = getelementptr i64, ptr %frame, i64 %e.slot
  %begin.j = load i64, ptr %e.place
  %e.size.at = getelementptr i64, ptr %e, i64 3
  %e.size = load i64, ptr %e.size.at
  %end.j = add i64 %begin.j, %e.size
  %before = icmp ule i64 %end, %begin.j
  %after = icmp ule i64 %end.j, %data
  %disjoint = or i1 %before, %after
  br i1 %disjoint, label %apart.next, label %none
apart.next:
  %j.next = add i64 %j, 1
  br label %apart

store:
  %slot.at = getelementptr i64, ptr %d, i64 2
  %slot = load i64, ptr %slot.at
  %place = getelementptr i64, ptr %frame, i64 %slot
  store i64 %data, ptr %place
  br label %stored
stored:
  %k.next = add i64 %k, 1
  br label %argument

ready:
  br i1 %given, label %own, label %ring
own:
  %own.at = getelementptr ptr, ptr %args, i64 %n
  %own.is = load ptr, ptr %own.at
  br label %go
ring:
  %r = phi i64 [0, %ready], [%r.next, %held]
  %r.more = icmp slt i64 %r, {ring_size}
  br i1 %r.more, label %entry.look, label %none
entry.look:
  %r.two = shl i64 %r, 1
  %r.first = add i64 %r.two, {ring}
  %r.at = getelementptr i64, ptr %table, i64 %r.first
  %r.object = load ptr, ptr %r.at
  %r.there = icmp ne ptr %r.object, null
  br i1 %r.there, label %counts, label %none
counts:
  %references = load i32, ptr %r.object
  %free = icmp eq i32 %references, 1
  br i1 %free, label %taken, label %held
held:
  %r.next = add i64 %r, 1
  br label %ring
taken:
  %r.data.at = getelementptr i64, ptr %r.at, i64 1
  %r.data = load i64, ptr %r.data.at
  %out.d.offset = mul i64 %n, {stride}
  %out.d.slot = add i64 %out.d.offset, {out_slot}
  %out.slot.at = getelementptr i64, ptr %table, i64 %out.d.slot
  %out.slot = load i64, ptr %out.slot.at
  %out.place = getelementptr i64, ptr %frame, i64 %out.slot
  store i64 %r.data, ptr %out.place
  br label %go

go:
  %result = phi ptr [%own.is, %own], [%r.object, %taken]
  call void %incref(ptr %result)
  store i64 1, ptr %table
  %thread = call ptr %save()
  %status = call i32 %run(ptr %frame, ptr null, ptr %context)
  call void %restore(ptr %thread)
  store i64 0, ptr %table
  %good = icmp eq i32 %status, 0
  br i1 %good, label %done, label %failed
done:
  ret ptr %result
failed:
  call void %decref(ptr %result)
  br label %none
none:
  call void %incref(ptr %nothing)
  ret ptr %nothing
}}
"""

_POINTERS = ("ndarray", "nothing", "sentinel", "incref", "decref", "save", "restore", "run", "frame", "context")


def call_path(target: Target) -> bytes:
    """Object code of the function CALL_PATH for a 64-bit target of little-endian byte order."""
    words = []
    for name, kind in (("n", "i64"), ("alignment", "i64"), *((p, "ptr") for p in _POINTERS)):
        at = CallTable.WORDS.index(name)
        words += [f"  %{name}.word = getelementptr i64, ptr %table, i64 {at}", f"  %{name} = load {kind}, ptr %{name}.word"]
    words.append("  %n1 = add i64 %n, 1")
    text = _TEXT.format(
        layout=data_layout(target),
        triple=target.triple,
        entry=CALL_PATH,
        words="\n".join(words),
        stride=CallTable.STRIDE,
        arguments=CallTable.ARGUMENTS,
        ring=CallTable.RING,
        ring_size=CallTable.RING_SIZE,
        out_slot=CallTable.ARGUMENTS + 2,
    )
    return object_code(text, target)
