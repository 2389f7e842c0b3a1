"""Launches that update state, run as one launch at the end of the program ("multi-tensor apply").

    for b in 0 .. blocks of all:  for t in 0 .. threads:  if b < first of the later half { ... } else { ... }

An optimiser has an update for each parameter: a launch each, most of them smaller than what it takes to start one. The grid of
the joined launch is all their blocks, one after the other; a tree of conditions on the block's number, the same for all its
threads, picks the update; each one's buffers are parameters of their own, what several read is one.

**Which launches.** A launch is moved to the end if

- it is a plain step of the program, in no loop or branch;
- its threads do not work together: no barrier, no shared memory, no exchange of lanes, and one loop over blocks;
- all it writes is state: donated inputs, whose new values stay on the device and nobody waits for;
- no launch after it, in the order of the memory plan, touches a byte that it writes, or writes one that it reads.

The last rule is about bytes, so results that are read again, memory of the arena that is used again, and copies are all the same
to it. Launches that it keeps apart are independent of each other too, and so may be one. So that it keeps few apart,
`kept_for_updates` tells the memory plan, before there is one, what such launches read: it stays there until the end.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from ...ir import cuda_program as cuda
from ...ir.expr import Expr, binary, const, postorder, var
from ...ir.places import View
from ...ir.program import KernelInfo
from ..assembly import Group
from ..control import Control
from ..groups import share_buffers
from ..llvm.kernel import written_buffers
from ..loop_ir import Buffer, For, If, Kernel, Let, Stmt, Store, expressions, statements
from ..memory_plan import Problem
from .grid import BX, TX, launch
from .shape import launches_of, shape_of

MOST_ARGUMENTS: Final = 500  # 4,000 bytes of pointers: a launch takes 4,096 of parameters
LARGE: Final = 2 << 20  # bytes of a value that are not kept to the end: its update takes longer than a launch takes to start
_ALL: Final = var("block")  # of the joined grid

Region = tuple[int, int, int, bool]  # slot, first byte, end, whether it is written


def thread_body(kernel: Kernel) -> tuple[Stmt, ...] | None:
    """What a thread of a launch does, if it can stand in a joined one; None where threads work together, or loops are nested."""
    (outer,) = kernel.body
    if not isinstance(outer, For) or outer.var is not BX or len(outer.body) != 1 or kernel.scalars:
        return None
    (inner,) = outer.body
    if not isinstance(inner, For) or inner.kind != "thread" or inner.var is not TX:
        return None
    for s in statements(inner.body):
        if not isinstance(s, Let | Store | If) or any(e.op == "lane_xor" for e in postorder(expressions(s))):
            return None
    return inner.body


# --- before there is a memory plan -----------------------------------------------------------------------------------


def kept_for_updates(problem: Problem, groups: Sequence[Group]) -> Problem:
    """The problem with what launches that only write state read, kept to the end of the program: see `Task.keeps`."""
    read = {v for t in problem.tasks for v in (*t.reads, *t.after)}
    state = {problem.outputs[k] for k, _ in problem.aliases} - read
    tasks = []
    for task, group in zip(problem.tasks, groups, strict=True):
        keeps: set[int] = set()
        workspace = False
        low = group.lowered
        if isinstance(low, Control) or state.isdisjoint(task.writes):
            tasks.append(task)
            continue
        for kernel, places in launches_of(low.root):
            written = written_buffers(kernel, {})
            roles = [low.arguments[p] for p in places]
            made = [role for role, b in zip(roles, kernel.buffers, strict=True) if b.name in written]
            if thread_body(kernel) is None or any(kind != "output" or task.writes[k] not in state for kind, k in made):
                continue
            values = {task.reads[k] for kind, k in roles if kind == "operand"}
            if all(problem.sizes[v] <= LARGE for v in values):
                keeps |= values
                workspace |= task.workspace <= LARGE and any(kind == "workspace" for kind, _ in roles)
        tasks.append(replace(task, keeps=tuple(sorted(keeps)), keeps_workspace=workspace))
    return replace(problem, tasks=tuple(tasks))


# --- which bytes a node of the plan touches --------------------------------------------------------------------------


@dataclass
class _Around:
    """The passes of the loops around a node, and where their pointers may point to: (slot, lowest byte, highest byte)."""

    counts: tuple[int, ...] = ()
    pointers: dict[int, list[tuple[int, int, int]]] = field(default_factory=dict)

    def spots(self, v: View) -> list[tuple[int, int, int]]:
        """Where a view may begin: (slot, lowest, highest)."""
        ends = [s * (n - 1) for s, n in zip(v[2:], self.counts, strict=False)]
        low, high = v[1] + sum(min(e, 0) for e in ends), v[1] + sum(max(e, 0) for e in ends)
        return [(slot, a + low, b + high) for slot, a, b in (self.pointers[v[0]] if v[0] < 0 else [(v[0], 0, 0)])]


def regions(nodes: Sequence[cuda.Node], kernels: Mapping[str, Kernel], around: _Around | None = None) -> list[Region]:
    """The bytes that nodes may touch; in a loop those of all its passes."""
    here = around or _Around()
    found: list[Region] = []
    for n in nodes:
        match n:
            case cuda.Step(name, views):
                kernel = kernels[name]
                written = written_buffers(kernel, {})
                for b, v in zip(kernel.buffers, views, strict=True):
                    size = b.span * b.dtype.itemsize
                    found += [(slot, low, high + size, b.name in written) for slot, low, high in here.spots(v)]
            case cuda.Loop():
                inner = _Around((*here.counts, n.count), dict(here.pointers))
                for p in n.pointers:
                    inner.pointers[p.slot] = [x for v in (*p.cycle, p.first, p.last) if v is not None for x in inner.spots(v)]
                found += regions(n.nodes, kernels, inner)
            case cuda.Branch(predicate, then, orelse):
                found += [(slot, low, high + 1, False) for slot, low, high in here.spots(predicate)]
                found += regions((*then, *orelse), kernels, here)
            case cuda.While(test, predicate, body):
                found += [(slot, low, high + 1, False) for slot, low, high in here.spots(predicate)]
                found += regions((*test, *body), kernels, here)
    return found


class _Later:
    """The bytes that later nodes touch."""

    def __init__(self) -> None:
        self._of: dict[int, list[tuple[int, int, bool]]] = {}

    def add(self, found: Sequence[Region]) -> None:
        for slot, low, high, written in found:
            self._of.setdefault(slot, []).append((low, high, written))

    def meets(self, found: Sequence[Region]) -> bool:
        """Whether one of them touches what these write, or writes what these touch."""
        return any(
            low < b and a < high and (written or theirs)
            for slot, low, high, written in found
            for a, b, theirs in self._of.get(slot, ())
        )


# --- joining ---------------------------------------------------------------------------------------------------------


def joined_updates(
    plan: Sequence[cuda.Node],
    kernels: Mapping[str, Kernel],
    state: Collection[int],
    infos: list[KernelInfo],
    fresh: Callable[[str], str],
) -> tuple[list[cuda.Node], list[Kernel]]:
    """The plan with its updates of state as few launches at the end, and the kernels of these. `state` are the slots of donated
    inputs; rows of the new kernels are added to `infos`; `fresh` makes names."""
    later = _Later()
    taken: list[cuda.Step] = []
    kept: list[cuda.Node] = []
    for n in reversed(plan):
        found = regions([n], kernels)
        if (
            isinstance(n, cuda.Step)
            and all(slot in state for slot, _, _, written in found if written)
            and thread_body(kernels[n.kernel]) is not None
            and not later.meets(found)
        ):
            taken.append(n)
        else:
            kept.append(n)
        later.add(found)
    if len(taken) < 2:
        return list(plan), []
    done, made = kept[::-1], []
    for part in _parts(taken[::-1], kernels):
        if len(part) == 1:
            done += part
            continue
        kernel, views = together(part, kernels, fresh("together"))
        made.append(kernel)
        done.append(cuda.Step(kernel.name, views, len(infos)))
        rows = [infos[s.info] for s in part]
        nodes = tuple(dict.fromkeys(op for r in rows for op in r.nodes))
        note = f"{len(part)} launches in one; what they do is in rows of their own"
        infos.append(KernelInfo(kernel.name, 0, 0, nodes, True, note))
    return done, made


def _key(b: Buffer, view: View) -> tuple[View, Buffer]:
    return view, replace(b, name="")


def _parts(steps: Sequence[cuda.Step], kernels: Mapping[str, Kernel]) -> list[list[cuda.Step]]:
    """The steps in runs that one launch takes the arguments of."""
    done: list[list[cuda.Step]] = []
    known: set[tuple[View, Buffer]] = set()
    for s in steps:
        mine = {_key(b, v) for b, v in zip(kernels[s.kernel].buffers, s.views, strict=True)}
        if not done or len(known | mine) > MOST_ARGUMENTS:
            done.append([])
            known = set()
        known |= mine
        done[-1].append(s)
    return done


def together(steps: Sequence[cuda.Step], kernels: Mapping[str, Kernel], name: str) -> tuple[Kernel, tuple[View, ...]]:
    """One kernel for independent launches of which `thread_body` has the bodies, and its views."""
    arguments: dict[tuple[View, Buffer], Buffer] = {}
    views: list[View] = []
    bodies: list[tuple[Stmt, ...]] = []
    shapes = [shape_of(kernels[s.kernel]) for s in steps]
    firsts = [0]
    for (x, _, _), _ in shapes:
        firsts.append(firsts[-1] + x)
    threads = max(n for _, n in shapes)
    for s, first, ((blocks, _, _), own) in zip(steps, firsts, shapes, strict=False):
        kernel = kernels[s.kernel]
        mine: list[Buffer] = []
        for b, v in zip(kernel.buffers, s.views, strict=True):
            if _key(b, v) not in arguments:
                arguments[_key(b, v)] = replace(b, name=f"a{len(views)}")
                views.append(v)
            mine.append(arguments[_key(b, v)])
        count = len(mine)
        both = replace(kernel, buffers=(*kernel.buffers, *mine))
        body = thread_body(share_buffers(both, {k: count + k for k in range(count)}))
        assert body is not None, kernel.name
        if own < threads:
            body = (If(binary("lt", TX, const(own)), body),)
        bodies.append((Let(BX, _own_block(first, blocks, firsts[-1])), *body))

    def pick(low: int, high: int) -> tuple[Stmt, ...]:
        if high - low == 1:
            return bodies[low]
        middle = (low + high) // 2
        return (If(binary("lt", _ALL, const(firsts[middle])), pick(low, middle), pick(middle, high)),)

    made = launch(firsts[-1], threads, pick(0, len(bodies)), (_ALL,))
    doc = f"{len(steps)} launches in one"
    promise = all(kernels[s.kernel].noalias for s in steps)
    return Kernel(name, tuple(arguments.values()), (made,), doc=doc, noalias=promise), tuple(views)


def _own_block(first: int, blocks: int, total: int) -> Expr:
    """The number of the block among those of its launch, which begin at `first`."""
    if blocks == 1:
        return const(0)
    if not first:
        return _ALL
    # block - first; but sums and remainders of numbers that are not negative, as here, are known to have no sign and few bits,
    # and divisions of them are short (emit.py: bound)
    power = 1 << total.bit_length()
    return binary("mod", binary("add", _ALL, const(power - first)), const(power))


__all__ = ["LARGE", "MOST_ARGUMENTS", "joined_updates", "kept_for_updates", "regions", "thread_body", "together"]
