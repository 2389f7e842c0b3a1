"""A loop that computes the projection of later steps while it runs: a chain of both, in blocks of steps.

The product of all steps before a recurrence waits for the multiply-adds, the recurrence of one row for its weights. So only the
rows of the first steps are computed before the loop; each block of R steps after that computes the next R rows, a part of their
columns in each step, by microkernels in which both products are woven (`weave.py`).

    project rows 0 .. lead + R;  steps 0 .. lead
    for blocks of R steps: in step r, columns of part r of the R rows after the block's
    the last R steps
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Final

from ..ir.graph import Graph
from ..ir.lowering import Contract
from ..ir.op import Trait
from ..ir.places import Pointer, View
from . import plan as tree
from .contraction.types import NoPartError, Part
from .contractions import lower_contraction
from .control import placed
from .control_chain import ChainControl
from .control_loop import LoopControl
from .groups import Lowered
from .loop_ir import Call, Kernel, statements
from .memory_plan import PlannedStep
from .weave import offsets, panels_of, sums_of, woven, woven_root

if TYPE_CHECKING:
    from .assembly import Builder, Group

SHARE: Final = 0.8  # of L2 that the weights of a step and of the projection may take
SPARE: Final = 3  # registers besides the sums
FEWEST: Final = 4  # rows of a block: each weight of the projection is read once for so many

Bind = Callable[["Group", Lowered, PlannedStep], tuple[Kernel, tuple[tuple[int, int], ...]]]


@dataclass(frozen=True)
class Weaving:
    """How a loop and its projection are woven.

    rows     R: of the projection in a block, and steps of it;  lead: steps before the first block;  blocks: how many there are
    root     the kernel of a step with a part of them beside it;  projection: which part of the chain that is
    inside   steps of a block that follow each other in one panel of the projection's weights
    moves    per argument of the projection: bytes from one row to the next, from `inside` steps of a block to the next so many,
             and from one of them to the next
    """

    rows: int
    lead: int
    blocks: int
    root: str
    projection: int
    inside: int
    moves: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class WovenControl(ChainControl):
    """A projection and its loop, woven. `binder` gives the call of the kernel of the first rows for the projection's places."""

    weaving: Weaving
    binder: Callable[[PlannedStep], tuple[Kernel, tuple[tuple[int, int], ...]]]

    @property
    def loop(self) -> LoopControl:
        found = self.parts[-1]
        assert isinstance(found, LoopControl)
        return found

    def bind(self, step: PlannedStep) -> tree.Node:
        w, loop = self.weaving, self.loop
        steps = self._steps(step)
        projection, recurrence = steps[w.projection], steps[-1]
        others = [p.bind(s) for k, (p, s) in enumerate(zip(self.parts[:-1], steps, strict=False)) if k != w.projection]
        made = loop.layout(recurrence, loop.count)
        (call,) = placed(loop.body.nodes, made.slots, counter=True)
        assert isinstance(call, tree.Step)
        back = loop.form.reverse
        ahead = w.lead + w.rows  # rows before the loop

        def counted(start: int, length: int) -> int:
            """The counter that the first of some passes in the order of memory has."""
            return loop.count - start - length if back else start

        def at(v: View, start: int, length: int, *inside: int) -> View:
            """A view of the loop in passes start, start + 1, ...; with `inside`, in loops of so many passes in each of theirs."""
            if len(v) < 3:
                return v
            return (v[0], v[1] + v[2] * counted(start, length), *(v[2] * n for n in (*inside, 1)))

        def pointers(start: int, length: int, *inside: int) -> tuple[Pointer, ...]:
            found = []
            for p in made.pointers:
                turned = p.cycle[start % len(p.cycle) :] + p.cycle[: start % len(p.cycle)]
                first = None if start or p.first is None else at(p.first, start, length)
                found.append(Pointer(p.slot, tuple(at(v, start, length, *inside) for v in turned), first))
            return tuple(found)

        def passes(start: int, length: int) -> tree.Loop:
            views = tuple(at(v, start, length) for v in call.views)
            return tree.Loop(length, (tree.Step(call.kernel, views),), back, pointers(start, length))

        kernel, views = self.binder(projection)
        row = counted(0, ahead)
        first = tree.Step(kernel.name, tuple((s, o + row * m) for (s, o), (m, _, _) in zip(views, w.moves, strict=True)))
        woven = w.blocks * w.rows
        row, groups = counted(ahead, woven), w.rows // w.inside
        ends = (groups - 1, w.inside - 1) if back else (0, 0)  # where the parts of a block begin: counters run down to 0
        way = -1 if back else 1
        inside = (w.rows, w.inside)[: 2 if w.inside > 1 else 1]
        beside = tuple(
            _without_zeros((s, o + row * m + far * ends[0] + near * ends[1], m * w.rows, way * far, way * near))
            for (s, o), (m, far, near) in zip(views, w.moves, strict=True)
        )
        mine = tuple(at(v, w.lead, woven, *inside) for v in call.views)
        own = pointers(w.lead, woven, *inside)
        block = tree.Loop(inside[-1], (tree.Step(w.root, mine + beside),), back, own)
        if w.inside > 1:
            block = tree.Loop(groups, (block,), back)
        block = tree.Loop(w.blocks, (block,), back)
        loops = (passes(0, w.lead), block, passes(w.lead + woven, w.rows))
        copies = [tree.Step(k, (source, to)) for k, source, to, _ in made.before]
        after = [tree.Step(k, (source, to)) for k, source, to, _ in made.after]
        return tree.Block((*others, first, *copies, *loops, *after))


def _without_zeros(v: View) -> View:
    made = list(v)
    while len(made) > 2 and made[-1] == 0:
        made.pop()
    return tuple(made)


def weave(b: Builder, which: int, projection: Group, loop: Group, chained: ChainControl, bind: Bind) -> ChainControl | None:
    """The chain that ends with a loop, woven with part `which` of it, if that is the projection of a sequence; else None."""
    low, control = projection.lowered, loop.lowered
    if not isinstance(low, Lowered) or not isinstance(control, LoopControl) or not _is_contraction(b, projection.body):
        return None
    sequences = loop.operands[control.form.carries : control.form.carries + control.form.sequences]
    if [b.root(v) for v in sequences] != list(projection.results) or b.choices.get(projection.body.fingerprint()):
        return None  # a measured plan may add up in another order than the parts do
    step = _sole_step(b, control)
    if step is None or low.workspace:
        return None
    root, ukernel = step
    target, count = b.target, control.count
    lanes = target.lanes(root.buffers[0].dtype.bits)
    rows, panels = sums_of(ukernel, lanes), panels_of(root)
    ways = {c.how for c in control.carries}
    if panels is None or panels != list(range(len(panels))) or not FEWEST <= rows <= (target.registers - SPARE) // 2:
        return None
    if not ways <= {"keep", "swap", "stack", ""} or ("swap" in ways and rows % 2):
        return None
    lead = count % rows or rows
    blocks = (count - lead - rows) // rows
    if blocks < 1:
        return None
    weights = sum(x.span * x.dtype.itemsize for k in (root, low.root) for x in k.buffers[1:2])
    if weights > SHARE * target.l2 or low.root.buffers[2].span != count * len(panels) * rows * lanes:
        return None
    try:
        first, part = (_part(b, projection, low, p) for p in (Part(lead + rows), Part(rows, narrow=True)))
    except NoPartError:
        return None
    if any(p.workspace or p.arguments != low.arguments for p in (first, part)) or len(part.kernels) != 2:
        return None
    if panels_of(part.root) != list(range(len(panels) * rows)):
        return None
    moves = _moves(part, low, count, len(panels), rows)
    if moves is None or ("swap" in ways and moves[0] % 2 and moves[0] > 1):
        return None
    name = f"{root.name}_with_{part.root.name}"
    if name not in b.kernels:
        both = woven(ukernel, part.kernels[0])
        if both is None:
            return None
        b.kernels.setdefault(both.name, both)
        b.kernels[name] = woven_root(root, part.root, both, name)
    weaving = Weaving(rows, lead, blocks, name, which, *moves)
    values = {f.name: getattr(chained, f.name) for f in fields(ChainControl)}
    note = f"{chained.note}; {blocks * rows} steps woven with the projection of {rows} later ones"
    return WovenControl(**{**values, "note": note}, weaving=weaving, binder=partial(bind, projection, first))


def _is_contraction(b: Builder, body: Graph) -> bool:
    return any(n.inputs and not n.op.has(Trait.STRUCTURAL) and isinstance(b.form(n), Contract) for n in body.nodes())


def _part(b: Builder, projection: Group, low: Lowered, part: Part) -> Lowered:
    """The projection's kernels for some of its rows, made once for all groups of one body."""
    key = (projection.body, part)
    if key not in b.cache:
        name = b.fresh_name(f"{low.root.name}_rows")
        b.cache[key] = lower_contraction(projection.body, b.target, name, (), b.threads, part=part)
    return b.cache[key]


def _sole_step(b: Builder, loop: LoopControl) -> tuple[Kernel, Kernel] | None:
    """The root kernel and the microkernel of a loop whose pass is one call of one of them."""
    nodes = loop.body.nodes
    if len(nodes) != 1 or not isinstance(nodes[0], tree.Step):
        return None
    root = b.kernels[nodes[0].kernel]
    called = {s.kernel for s in statements(root.body) if isinstance(s, Call)}
    if len(called) != 1 or not root.buffers:
        return None
    return root, b.kernels[called.pop()]


def _moves(
    part: Lowered, whole: Lowered, rows: int, each: int, steps: int
) -> tuple[int, tuple[tuple[int, int, int], ...]] | None:
    """How many steps of `each` panels a panel of the packed weights has (1, or all that are wider), and of the arguments of a
    part: bytes from row to row of all `rows`, from one such group of steps to the next, and from step to step in it."""
    start = offsets(part.root, 0)
    places = [[at - first for (_, at), (_, first) in zip(offsets(part.root, n * each), start, strict=True)] for n in range(steps)]
    names = [name for name, _ in start]
    for inside in (n for n in range(1, steps + 1) if steps % n == 0):
        near = [places[1][v] if inside > 1 else 0 for v in range(len(names))]
        far = [places[inside][v] if inside < steps else 0 for v in range(len(names))]
        if all(places[n][v] == n // inside * far[v] + n % inside * near[v] for n in range(steps) for v in range(len(names))):
            break
    found: list[tuple[int, int, int]] = []
    for k, (x, full) in enumerate(zip(part.root.buffers, whole.root.buffers, strict=True)):
        mine = {(far[v], near[v]) for v, name in enumerate(names) if name == x.name}
        if len(mine) > 1:
            return None
        (outer, inner) = mine.pop() if mine else (0, 0)
        size = x.dtype.itemsize
        by_row = full.span * size // rows if k in (0, 2) else 0  # A and C
        found.append((by_row, outer * size, inner * size))
    return inside, tuple(found)
