"""What a program runs: a tree of kernel calls, loops and branches, and which bytes each buffer of a call stands for.

    entry   := node*
    node    := Step | Block(node*) | Loop(count, node*) | Branch(view, node*, node*) | While(node*, view, node*) | Section(node*)
    view    := (slot, byte offset, stride*)

`slot` indexes the `buffers` array that a run is given (inputs, outputs, constants, arena: see ir/program.py); negative ones
are pointers that the loops around the view keep. Each enclosing Loop has a counter; a view's strides are bytes per unit of
each, the outermost first, zeros at the end left out. So the slice of a sequence that a step works on is read, and written,
where it lies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..ir.places import Pointer, View


@dataclass(frozen=True)
class Step:
    """One call of a root kernel. `views[i]` is the place of its i-th buffer parameter."""

    kernel: str
    views: tuple[View, ...]


@dataclass(frozen=True)
class Block:
    """Nodes that run one after the other and count as one step of the program."""

    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Regions:
    """Private memory of the threads of a parallel loop: thread k has `view`, moved on by k * `stride`; there are `count`."""

    slot: int
    view: View
    stride: int
    count: int


@dataclass(frozen=True)
class Loop:
    """`count` (>= 1) passes of `nodes`. The counter runs up from 0, with `reverse` down to 0; n numbers passes from 0.

    With `regions`, passes are independent and run on at most as many threads as there are regions, kernels serial inside.
    """

    count: int
    nodes: tuple[Node, ...]
    reverse: bool = False
    pointers: tuple[Pointer, ...] = ()
    regions: Regions | None = None


@dataclass(frozen=True)
class Branch:
    """`then` if the byte at `predicate` is not 0, else `orelse`."""

    predicate: View
    then: tuple[Node, ...]
    orelse: tuple[Node, ...]


@dataclass(frozen=True)
class While:
    """Runs `test`, and as long as it leaves a byte other than 0 at `predicate`, `nodes` and `test` again."""

    test: tuple[Node, ...]
    predicate: View
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Section:
    """Nodes that do not depend on each other and may run at the same time, each on one thread, kernels serial inside."""

    nodes: tuple[Node, ...]


Node = Step | Block | Loop | Branch | While | Section


@dataclass(frozen=True)
class EntryPlan:
    """The entry point `NAME_run` and what it runs, in order. Time is taken before each of `steps` and after the last."""

    name: str
    steps: tuple[Node, ...]


def children(node: Node) -> tuple[Node, ...]:
    """The nodes directly inside a node."""
    match node:
        case Block(nodes) | Section(nodes):
            return nodes
        case Loop():
            return node.nodes
        case Branch(_, then, orelse):
            return then + orelse
        case While(test, _, nodes):
            return test + nodes
    return ()


def walk(nodes: Iterable[Node]) -> Iterator[Node]:
    """All nodes of a tree, outer ones first."""
    for node in nodes:
        yield node
        yield from walk(children(node))


def views(node: Node) -> tuple[View, ...]:
    """The views that a node itself names (not those of nodes inside it)."""
    match node:
        case Step(_, found):
            return found
        case Branch(predicate, _, _) | While(_, predicate, _):
            return (predicate,)
        case Loop():
            moving = (v for p in node.pointers for v in (*p.cycle, p.first, p.last) if v is not None)
            return (*moving, *(() if node.regions is None else (node.regions.view,)))
    return ()


def calls(
    nodes: Sequence[Node],
    truth: Callable[[int, int], bool],
    counters: tuple[int, ...] = (),
    pointers: dict[int, View] | None = None,
) -> Iterator[tuple[str, tuple[tuple[int, int], ...]]]:
    """Every kernel call of a run on one thread, in order, as (kernel, ((slot, byte offset) of each buffer)).

    `truth(slot, offset)` is asked for a predicate when the calls before it have been carried out.
    """
    known = pointers or {}

    def place(v: View, here: tuple[int, ...] = counters) -> tuple[int, int]:
        slot, offset = v[0], v[1] + sum(s * c for s, c in zip(v[2:], here, strict=False))
        return (slot, offset) if slot >= 0 else (known[slot][0], known[slot][1] + offset)

    for node in nodes:
        match node:
            case Step(kernel, views):
                yield kernel, tuple(place(v) for v in views)
            case Block(inner) | Section(inner):
                yield from calls(inner, truth, counters, known)
            case Loop():
                for n in range(node.count):
                    inside = (*counters, node.count - 1 - n if node.reverse else n)
                    moved = {p.slot: place(p.at(n, node.count), inside) for p in node.pointers}
                    if node.regions is not None:
                        moved[node.regions.slot] = place(node.regions.view)
                    yield from calls(node.nodes, truth, inside, {**known, **moved})
            case Branch(predicate, then, orelse):
                yield from calls(then if truth(*place(predicate)) else orelse, truth, counters, known)
            case While(test, predicate, body):
                yield from calls(test, truth, counters, known)
                while truth(*place(predicate)):
                    yield from calls(body, truth, counters, known)
                    yield from calls(test, truth, counters, known)


def print_plan(entry: EntryPlan) -> str:
    """The tree as text: `sK` is slot K, `pK` a pointer, `tK` the counter of the K-th loop around, outermost first."""
    lines: list[str] = [f"entry {entry.name}"]

    def place(v: View) -> str:
        terms = [f"s{v[0]}" if v[0] >= 0 else f"p{-v[0]}", *([str(v[1])] if v[1] else [])]
        return " + ".join([*terms, *(f"{s} * t{k}" for k, s in enumerate(v[2:]) if s)])

    def pointer(p: Pointer) -> str:
        ends = [f"{word} {place(v)}" for word, v in (("first", p.first), ("last", p.last)) if v is not None]
        return f"p{-p.slot} = " + "; ".join([" | ".join(map(place, p.cycle)), *ends])

    def show(nodes: Sequence[Node], indent: str) -> None:
        for node in nodes:
            match node:
                case Step(kernel, found):
                    lines.append(f"{indent}{kernel}({', '.join(map(place, found))})")
                case Block(inner):
                    show(inner, indent)
                case Section(inner):
                    for k, one in enumerate(inner):
                        lines.append(indent + ("at the same time" if k == 0 else "and"))
                        show((one,), indent + "  ")
                case Branch(predicate, then, orelse):
                    lines.append(f"{indent}if {place(predicate)}")
                    show(then, indent + "  ")
                    lines.append(f"{indent}else")
                    show(orelse, indent + "  ")
                case While(test, predicate, body):
                    lines.append(f"{indent}while {place(predicate)} after")
                    show(test, indent + "  ")
                    lines.append(f"{indent}do")
                    show(body, indent + "  ")
                case Loop():
                    r = node.regions
                    private = f", p{-r.slot} = {place(r.view)} + {r.stride} * thread, up to {r.count} threads" if r else ""
                    lines.append(f"{indent}loop {node.count}{' reverse' if node.reverse else ''}{private}")
                    lines.extend(f"{indent}  {pointer(p)}" for p in node.pointers)
                    show(node.nodes, indent + "  ")

    show(entry.steps, "  ")
    return "\n".join(lines)
