"""A fork that keeps a program's workers off the core of the thread that calls them.

Two threads that a scheduler leaves on one core run one after the other, for tens of milliseconds, while another core idles: a
woken worker stays where it slept last, and the caller may have moved there. So at every fork where the caller is found on
another core than before, the workers are forbidden that core; they may run on all others that the caller may use.

The object's one visible function takes the addresses of what it calls (`ir.program.PLACEMENT_CALLS`) and gives the address of
`void fork(void (*body)(void *), void *data, int threads, int flags)`; a second call of it forgets all workers. Up to 16 threads
that call programs have a record each; a further one forks without any of this.
"""

from __future__ import annotations

from typing import Final

from ...ir.program import PLACEMENT
from ...ir.target import Target
from .compile import data_layout, object_code

_TEXT: Final = """target datalayout = "{layout}"
target triple = "{triple}"

; owner, core (-1: none yet) and threads, the cores that workers may use, the workers' ids
%team = type {{ ptr, i32, i32, [16 x i64], [64 x i32] }}
%part = type {{ ptr, ptr, ptr }}

@functions = internal global [6 x ptr] zeroinitializer
@teams = internal global [16 x %team] zeroinitializer, align 64

declare ptr @llvm.thread.pointer.p0()
declare i64 @llvm.ctpop.i64(i64)
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1 immarg)

define i32 @{entry}(ptr %given, ptr %fork, ptr %unused) nounwind {{
entry:
  %f = load [6 x ptr], ptr %given
  store [6 x ptr] %f, ptr @functions
  store ptr @fork, ptr %fork
  %end = getelementptr [16 x %team], ptr @teams, i64 1
  %bytes = ptrtoint ptr %end to i64
  %start = ptrtoint ptr @teams to i64
  %size = sub i64 %bytes, %start
  call void @llvm.memset.p0.i64(ptr align 64 @teams, i8 0, i64 %size, i1 false)
  ret i32 0
}}

define internal void @fork(ptr %body, ptr %data, i32 %threads, i32 %flags) nounwind {{
entry:
  %part = alloca %part
  %parallel = load ptr, ptr @functions
  %self = call ptr @llvm.thread.pointer.p0()
  %word = ptrtoint ptr %self to i64
  %page = lshr i64 %word, 12
  %high = lshr i64 %word, 18
  %mixed = xor i64 %page, %high
  %k = and i64 %mixed, 15
  %team = getelementptr [16 x %team], ptr @teams, i64 0, i64 %k
  %owner = load atomic ptr, ptr %team monotonic, align 8
  %known = icmp eq ptr %owner, %self
  br i1 %known, label %look, label %claim
claim:
  %pair = cmpxchg ptr %team, ptr null, ptr %self monotonic monotonic
  %got = extractvalue {{ ptr, i1 }} %pair, 1
  br i1 %got, label %claimed, label %plain
claimed:
  %first = getelementptr %team, ptr %team, i64 0, i32 1
  store i32 -1, ptr %first
  br label %look
plain:
  call void %parallel(ptr %body, ptr %data, i32 %threads, i32 %flags)
  ret void
look:
  %getcpu.at = getelementptr [6 x ptr], ptr @functions, i64 0, i64 2
  %getcpu = load ptr, ptr %getcpu.at
  %core = call i32 %getcpu()
  %core.at = getelementptr %team, ptr %team, i64 0, i32 1
  %before = load i32, ptr %core.at
  %threads.at = getelementptr %team, ptr %team, i64 0, i32 2
  %threads.before = load i32, ptr %threads.at
  %same.core = icmp eq i32 %core, %before
  %same.threads = icmp eq i32 %threads, %threads.before
  %same = and i1 %same.core, %same.threads
  br i1 %same, label %go, label %moved
moved:
  store i32 %core, ptr %core.at
  store i32 %threads, ptr %threads.at
  call void @separate(ptr %team, i32 %core, i32 %threads)
  br label %go
go:
  store ptr %body, ptr %part
  %data.at = getelementptr %part, ptr %part, i64 0, i32 1
  store ptr %data, ptr %data.at
  %team.at = getelementptr %part, ptr %part, i64 0, i32 2
  store ptr %team, ptr %team.at
  call void %parallel(ptr @part, ptr %part, i32 %threads, i32 %flags)
  ret void
}}

; what a thread of the region runs: a worker that is new to the team is told where it may run
define internal void @part(ptr %part) nounwind {{
entry:
  %number.at = getelementptr [6 x ptr], ptr @functions, i64 0, i64 1
  %number = load ptr, ptr %number.at
  %k = call i32 %number()
  %below = sub i32 %k, 1
  %worker = icmp ult i32 %below, 63
  br i1 %worker, label %look, label %run
look:
  %team.at = getelementptr %part, ptr %part, i64 0, i32 2
  %team = load ptr, ptr %team.at
  %id.at = getelementptr %team, ptr %team, i64 0, i32 4, i32 %k
  %id = load i32, ptr %id.at
  %new = icmp eq i32 %id, 0
  br i1 %new, label %join, label %run
join:
  %gettid.at = getelementptr [6 x ptr], ptr @functions, i64 0, i64 5
  %gettid = load ptr, ptr %gettid.at
  %own = call i32 %gettid()
  store i32 %own, ptr %id.at
  %set.at = getelementptr [6 x ptr], ptr @functions, i64 0, i64 3
  %set = load ptr, ptr %set.at
  %cores = getelementptr %team, ptr %team, i64 0, i32 3
  %refused = call i32 %set(i32 0, i64 128, ptr %cores)
  br label %run
run:
  %body = load ptr, ptr %part
  %data.at = getelementptr %part, ptr %part, i64 0, i32 1
  %data = load ptr, ptr %data.at
  call void %body(ptr %data)
  ret void
}}

; The cores that the caller may use, less its own, for its workers; all of them if there would be too few.
define internal void @separate(ptr %team, i32 %core, i32 %threads) noinline nounwind {{
entry:
  %cores = getelementptr %team, ptr %team, i64 0, i32 3
  %get.at = getelementptr [6 x ptr], ptr @functions, i64 0, i64 4
  %get = load ptr, ptr %get.at
  %r = call i32 %get(i32 0, i64 128, ptr %cores)
  %bad = icmp ne i32 %r, 0
  br i1 %bad, label %done, label %count
count:
  %w = phi i64 [ 0, %entry ], [ %w.next, %count ]
  %sum = phi i32 [ 0, %entry ], [ %sum.next, %count ]
  %word.at = getelementptr i64, ptr %cores, i64 %w
  %word = load i64, ptr %word.at
  %bits = call i64 @llvm.ctpop.i64(i64 %word)
  %bits32 = trunc i64 %bits to i32
  %sum.next = add i32 %sum, %bits32
  %w.next = add i64 %w, 1
  %more = icmp ult i64 %w.next, 16
  br i1 %more, label %count, label %counted
counted:
  %enough = icmp sle i32 %threads, %sum.next
  %low = icmp ult i32 %core, 1024
  %apart = and i1 %enough, %low
  br i1 %apart, label %clear, label %workers
clear:
  %core64 = zext i32 %core to i64
  %index = lshr i64 %core64, 6
  %shift = and i64 %core64, 63
  %bit = shl i64 1, %shift
  %others = xor i64 %bit, -1
  %own.at = getelementptr i64, ptr %cores, i64 %index
  %own = load i64, ptr %own.at
  %left = and i64 %own, %others
  store i64 %left, ptr %own.at
  br label %workers
workers:
  %set.at = getelementptr [6 x ptr], ptr @functions, i64 0, i64 3
  %set = load ptr, ptr %set.at
  br label %each
each:
  %k = phi i32 [ 1, %workers ], [ %k.next, %following ]
  %id.at = getelementptr %team, ptr %team, i64 0, i32 4, i32 %k
  %id = load i32, ptr %id.at
  %there = icmp ne i32 %id, 0
  br i1 %there, label %move, label %following
move:
  %refused = call i32 %set(i32 %id, i64 128, ptr %cores)
  br label %following
following:
  %k.next = add i32 %k, 1
  %rest = icmp ult i32 %k.next, 64
  br i1 %rest, label %each, label %done
done:
  ret void
}}
"""


def placement(target: Target) -> bytes:
    """Object code of the function PLACEMENT for 64-bit Linux."""
    return object_code(_TEXT.format(layout=data_layout(target), triple=target.triple, entry=PLACEMENT), target)
