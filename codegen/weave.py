"""Two microkernels as one, their loops woven: what waits for memory runs beside what waits for the multiply-adds.

A recurrent step of one row reads every weight for one multiply-add: at the speed of L2 half of the multiply-adds are idle. The
projection of later steps, a tile of several rows, reads little. Statement by statement side by side, both are in flight at once.

The order in which each adds up its sums stays what it was, and so do the bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from ..ir.expr import Expr, const, rewrite, substitute, var
from .contraction.microkernel import fingerprint
from .contraction.root import PANEL
from .loop_ir import Alloc, Buffer, Call, For, If, Kernel, Let, Prefetch, Stmt, Store, statements

MARK: Final = "w_"  # before the names of the second kernel's variables and buffers
MOST: Final = 8  # iterations of one loop beside one of the other: more code gains nothing


def sums_of(kernel: Kernel, lanes: int) -> int:
    """How many vectors of sums a microkernel holds in registers."""
    return sum(s.buffer.span // lanes for s in kernel.body if isinstance(s, Alloc) and s.buffer.scope == "register")


def panels_of(root: Kernel) -> list[int] | None:
    """The panels of a root kernel that has one call in serial loops, in the order of the calls; None for any other root."""
    calls = [s for s in statements(root.body) if isinstance(s, Call)]
    if len(calls) != 1 or any(not isinstance(s, For | Let | Call) for s in statements(root.body)):
        return None
    found: list[int] = []
    panel = var(PANEL)

    def run(body: Sequence[Stmt], known: dict[Expr, Expr]) -> bool:
        for s in body:
            if isinstance(s, Let):
                known = {**known, s.var: substitute(s.value, known)}
            elif isinstance(s, For):
                start, stop = substitute(s.start, known), substitute(s.stop, known)
                if s.kind != "serial" or not start.is_const or not stop.is_const:
                    return False
                for n in range(int(start.attr), int(stop.attr), s.step):
                    if not run(s.body, {**known, s.var: const(n)}):
                        return False
            elif panel in known and known[panel].is_const:
                found.append(int(known[panel].attr))
            else:
                return False
        return True

    return found if run(root.body, {}) else None


def offsets(root: Kernel, panel: int) -> list[tuple[str, int]]:
    """Where each view that such a root kernel's call of a panel has of a buffer starts, in elements."""
    return [(b.name, int(at.attr)) for b, at in one_call(root.body, const(panel)).views]


def one_call(body: Sequence[Stmt], panel: Expr) -> Call:
    """The call of one panel, with what its views need put into them."""
    known: dict[Expr, Expr] = {}
    block = list(body)
    while True:
        following: tuple[Stmt, ...] = ()
        for s in block:
            if isinstance(s, Let):
                known[s.var] = substitute(s.value, known)
            elif isinstance(s, For):
                known[s.var] = panel if s.var == var(PANEL) else substitute(s.start, known)
                following = s.body
            elif isinstance(s, Call):
                views = tuple((b, substitute(at, known)) for b, at in s.views)
                return Call(s.kernel, views, tuple(substitute(x, known) for x in s.scalars))
        block = list(following)


def renamed(body: Sequence[Stmt], mark: str, buffers: dict[Buffer, Buffer]) -> tuple[Stmt, ...]:
    """The statements with `mark` before the names of their variables, and buffers in place of others (their own are renamed)."""
    done: dict[Expr, Expr] = {}
    names = dict(buffers)

    def rule(e: Expr, args: tuple[Expr, ...]) -> Expr | None:
        if e.op == "var":
            return Expr("var", (), e.dtype, e.lanes, f"{mark}{e.attr}")
        if e.op == "load":
            return Expr("load", args, e.dtype, e.lanes, (names[e.attr[0]], *e.attr[1:]))
        return None

    def put(e: Expr) -> Expr:
        return rewrite(e, rule, done)

    def all_of(index: Sequence[Expr]) -> tuple[Expr, ...]:
        return tuple(put(i) for i in index)

    def block(body: Sequence[Stmt]) -> tuple[Stmt, ...]:
        out: list[Stmt] = []
        for s in body:
            match s:
                case For():
                    out.append(For(put(s.var), put(s.start), put(s.stop), block(s.body), s.kind, s.step))
                case Store():
                    mask = None if s.mask is None else put(s.mask)
                    out.append(Store(names[s.buffer], all_of(s.index), put(s.value), mask, s.nontemporal))
                case Let():
                    out.append(Let(put(s.var), put(s.value)))
                case Prefetch():
                    out.append(Prefetch(names[s.buffer], all_of(s.index), s.level))
                case If():
                    out.append(If(put(s.condition), block(s.then), block(s.otherwise)))
                case Alloc():
                    names[s.buffer] = replace(s.buffer, name=f"{mark}{s.buffer.name}")
                    out.append(Alloc(names[s.buffer]))
                case Call():
                    views = tuple((names[b], put(at)) for b, at in s.views)
                    out.append(Call(s.kernel, views, all_of(s.scalars)))
                case _:
                    raise AssertionError(f"{type(s).__name__} in a kernel of a processor")
        return tuple(out)

    return block(body)


def _around_loop(kernel: Kernel) -> tuple[tuple[Stmt, ...], For, tuple[Stmt, ...]] | None:
    """What comes before the one loop of a microkernel, the loop, and what comes after it."""
    loops = [(k, s) for k, s in enumerate(kernel.body) if isinstance(s, For)]
    if len(loops) != 1:
        return None
    ((k, loop),) = loops
    if any(isinstance(s, For) for s in statements(loop.body)):
        return None
    if not (loop.start.is_const and loop.stop.is_const and int(loop.start.attr) == 0):
        return None
    return kernel.body[:k], loop, kernel.body[k + 1 :]


def _moved(body: Sequence[Stmt], variable: Expr, value: Expr, tag: str) -> list[Stmt]:
    """A loop's body for a value of its variable, the names it binds made its own by `tag`."""
    names: dict[Expr, Expr] = {variable: value}
    names |= {s.var: Expr("var", (), s.var.dtype, s.var.lanes, f"{s.var.attr}{tag}") for s in body if isinstance(s, Let)}
    done: dict[Expr, Expr] = {}

    def put(e: Expr) -> Expr:
        return substitute(e, names, done)

    out: list[Stmt] = []
    for s in body:
        match s:
            case Let():
                out.append(Let(names[s.var], put(s.value)))
            case Store():
                mask = None if s.mask is None else put(s.mask)
                out.append(Store(s.buffer, tuple(put(i) for i in s.index), put(s.value), mask, s.nontemporal))
            case Prefetch():
                out.append(Prefetch(s.buffer, tuple(put(i) for i in s.index), s.level))
            case _:
                raise AssertionError(f"{type(s).__name__} in the innermost loop of a microkernel")
    return out


def _side_by_side(a: Sequence[Stmt], b: Sequence[Stmt]) -> list[Stmt]:
    """Both lists in their own order, at each place as large a share of one as of the other."""
    out: list[Stmt] = []
    taken = 0
    for k, s in enumerate(a, 1):
        out.append(s)
        upto = k * len(b) // len(a)
        out += b[taken:upto]
        taken = upto
    return out


def woven(a: Kernel, b: Kernel) -> Kernel | None:
    """One kernel that does what two microkernels do, with the buffers of `a`, then those of `b` under other names. None where
    one of them is not a loop with something around it, or they have scalars."""
    mine = _around_loop(a)
    if mine is None or a.scalars or b.scalars:
        return None
    buffers = {x: replace(x, name=f"{MARK}{x.name}") for x in b.buffers}
    other = _around_loop(replace(b, body=renamed(b.body, MARK, buffers)))
    if other is None:
        return None
    (before, x, after), (before_b, y, after_b) = mine, other
    turns, turns_b = (-(-int(s.stop.attr) // s.step) for s in (x, y))
    ratio = (min(MOST, max(1, turns // turns_b)), min(MOST, max(1, turns_b // turns)))
    count = min(turns // ratio[0], turns_b // ratio[1])
    k = var("k")
    parts: list[list[Stmt]] = []
    for loop, times in zip((x, y), ratio, strict=True):
        part: list[Stmt] = []
        for n in range(times):
            part += _moved(loop.body, loop.var, k * (times * loop.step) + n * loop.step, f"_{n}")
        parts.append(part)
    body: list[Stmt] = [*before, *before_b, For(k, const(0), const(count), tuple(_side_by_side(*parts)))]
    for loop, times in zip((x, y), ratio, strict=True):
        if count * times * loop.step < int(loop.stop.attr):
            body.append(For(loop.var, const(count * times * loop.step), loop.stop, loop.body, step=loop.step))
    body += [*after_b, *after]
    both = (*a.buffers, *buffers.values())
    return Kernel(f"{a.name}_with_{fingerprint(body, both)}", both, tuple(body), doc=f"{a.doc}; beside it {b.doc}", noinline=True)


def woven_root(root: Kernel, beside: Kernel, both: Kernel, name: str) -> Kernel:
    """The root kernel `root` calling `both` in place of its microkernel, for each panel with the same one of `beside`."""
    call = one_call(beside.body, var(PANEL))
    buffers = {x: replace(x, name=f"{MARK}{x.name}") for x in beside.buffers}
    views = tuple((buffers[b], at) for b, at in call.views)

    def block(body: Sequence[Stmt]) -> tuple[Stmt, ...]:
        out: list[Stmt] = []
        for s in body:
            if isinstance(s, For):
                out.append(For(s.var, s.start, s.stop, block(s.body), s.kind, s.step))
            elif isinstance(s, Call):
                out.append(Call(both.name, s.views + views, s.scalars))
            else:
                out.append(s)
        return tuple(out)

    return replace(root, name=name, buffers=(*root.buffers, *buffers.values()), body=block(root.body), noalias=False)
