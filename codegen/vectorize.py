"""Scalar loops to vector code: expressions widened over the innermost variable, and whole loops with a masked tail."""

from __future__ import annotations

from ..ir.dtypes import bool_
from ..ir.errors import CompileError
from ..ir.expr import REDUCE, Expr, binary, broadcast, load, postorder, ramp, rebuild
from .linear import free_variables, linear
from .loop_ir import Buffer, For, If, Let, Stmt, Store, vector_variable


def vectorize(
    e: Expr,
    v: Expr,
    lanes: int,
    mask: Expr | None = None,
    bound: dict[Expr, Expr] | None = None,
    memo: dict[Expr, Expr] | None = None,
) -> Expr:
    """The expression for v, v + 1, ... v + lanes - 1 at once; scalar where it does not depend on v.

    A load whose last index is v + something, with last stride 1 and nothing else that depends on v, becomes a vector
    load; another dependent load becomes a gather. `mask` (lanes of bool) switches dependent loads off lane by lane.
    `bound` maps scalar variables to the vectors that hold their lanes. `memo` keeps what was done, for further expressions
    that are widened in the same way.
    """
    if lanes == 1 and mask is None and not bound:
        return e
    done = {} if memo is None else memo
    free: dict[Expr, frozenset[Expr]] = {}
    wide = {v, *(bound or {})}
    for x in postorder([e], done):
        if not (free_variables(x, free) & wide):
            done[x] = x
        elif x is v:
            done[x] = ramp(v, lanes)
        elif x.op == "var":
            assert bound is not None
            done[x] = bound[x]
        elif x.lanes != 1 or x.op in REDUCE or x.op in ("ramp", "broadcast"):
            raise CompileError(f"cannot vectorise {x}: it is a vector already")
        elif x.op == "load":
            done[x] = _load(x, v, mask, done, free, wide=wide, lanes=lanes)
        else:
            args = tuple(done[a] for a in x.args)
            n = max(a.lanes for a in args)
            args = tuple(broadcast(a, n) for a in args)
            done[x] = _widened(x, args, n)
    return done[e]


def _widened(x: Expr, args: tuple[Expr, ...], n: int) -> Expr:
    if x.op in ("fma", "neg", "abs", "bitcast") or x.attr is not None:
        return Expr(x.op, args, x.dtype, n, x.attr)
    y = rebuild(x, args)
    return y if y.lanes == n else Expr(x.op, args, x.dtype, n, x.attr)


def _load(
    x: Expr, v: Expr, mask: Expr | None, done: dict[Expr, Expr], free: dict[Expr, frozenset[Expr]], *, wide: set[Expr], lanes: int
) -> Expr:
    buffer, rank = x.attr
    if not isinstance(buffer, Buffer):
        raise CompileError(f"cannot vectorise a load of {buffer!r}: it is not a loop-IR buffer")
    index = x.args[:rank]
    own = broadcast(done[x.args[rank]], lanes) if len(x.args) > rank else None
    both = own if mask is None else mask if own is None else binary("and", mask, own)
    dependent = [bool(free_variables(i, free) & wide) for i in index]
    if buffer.scope == "register" and not any(dependent):
        return x
    if rank and not any(dependent[:-1]) and dependent[-1] and buffer.strides[-1] == 1:
        f = linear(index[-1])
        rest = [a for a, _ in f.terms if a is not v]
        if f.coefficient(v) == 1 and not any(free_variables(a, free) & wide for a in rest):
            return load(buffer, index, x.dtype, both, lanes)
    if any(dependent):
        return load(buffer, [done[i] for i in index], x.dtype, both, lanes)
    # Only the mask depends on v: every lane reads the same element.
    return load(buffer, [broadcast(i, lanes) for i in index], x.dtype, both, lanes)


def vectorize_loop(loop: For, lanes: int) -> tuple[Stmt, ...]:
    """A loop of scalar stores, in vectors, with one masked iteration for what is left over (never a scalar tail).

    Before:                              After:
        for i in a .. b vector {             for i in a .. a + (b - a) // L * L step L serial {
          let t = f(x[i])                      let t = f(x[i:L])
          store y[i] = t                       store y[i:L] = t
        }                                    }
                                             if a + (b - a) // L * L < b {
                                               let i = a + (b - a) // L * L
                                               let m = ramp(i) < b
                                               let t = f(x[i:L] if m)
                                               store y[i:L] = t if m
                                             }

    The body may hold lets, stores and ifs whose condition does not depend on i. Iterations must be independent.
    Raises CompileError for other statements, and for a store whose index does not depend on i.
    """
    if loop.step != 1:
        raise CompileError(f"cannot vectorise loop {loop.var.attr}: its step is {loop.step}")
    if lanes == 1:
        return (For(loop.var, loop.start, loop.stop, loop.body, "serial", 1),)
    i, extent = loop.var, binary("sub", loop.stop, loop.start)
    split = binary("add", loop.start, binary("mul", binary("floordiv", extent, lanes), lanes))
    out: list[Stmt] = []
    if not (extent.is_const and extent.attr < lanes):
        out.append(For(i, loop.start, split, _block(loop.body, i, lanes, None, {}), "serial", lanes))
    if extent.is_const and extent.attr % lanes == 0:
        return tuple(out)
    m = vector_variable(f"{i.attr}.mask", bool_, lanes)
    tail: list[Stmt] = [
        Let(m, binary("lt", ramp(i, lanes), broadcast(loop.stop, lanes))),
        *_block(loop.body, i, lanes, m, {}),
    ]
    # A loop of one iteration: binds i, and is no loop where the bounds are constant.
    out.append(For(i, split, loop.stop, tuple(tail), "serial", lanes))
    return tuple(out)


def _block(body: tuple[Stmt, ...], i: Expr, lanes: int, mask: Expr | None, bound: dict[Expr, Expr]) -> tuple[Stmt, ...]:
    bound = dict(bound)
    out: list[Stmt] = []
    for s in body:
        match s:
            case Let():
                value = vectorize(s.value, i, lanes, mask, bound)
                if value.lanes == 1:
                    out.append(Let(s.var, value))
                else:
                    bound[s.var] = vector_variable(s.var.attr, s.var.dtype, lanes)
                    out.append(Let(bound[s.var], value))
            case Store():
                out.append(_store(s, i, lanes, mask, bound))
            case If():
                condition = vectorize(s.condition, i, lanes, mask, bound)
                if condition.lanes != 1:
                    raise CompileError(f"cannot vectorise an if on {s.condition}, which depends on {i.attr}: select instead")
                out.append(If(condition, _block(s.then, i, lanes, mask, bound), _block(s.otherwise, i, lanes, mask, bound)))
            case _:
                raise CompileError(f"cannot vectorise a {type(s).__name__} statement inside loop {i.attr}")
    return tuple(out)


def _store(s: Store, i: Expr, lanes: int, mask: Expr | None, bound: dict[Expr, Expr]) -> Store:
    free: dict[Expr, frozenset[Expr]] = {}
    wide = {i, *bound}
    dependent = [bool(free_variables(x, free) & wide) for x in s.index]
    if not any(dependent):
        raise CompileError(
            f"cannot vectorise a store to {s.buffer.name}[{', '.join(map(repr, s.index))}]: it does not depend on {i.attr}"
        )
    own = None if s.mask is None else broadcast(vectorize(s.mask, i, lanes, mask, bound), lanes)
    both = own if mask is None else mask if own is None else binary("and", mask, own)
    value = broadcast(vectorize(s.value, i, lanes, mask, bound), lanes)
    index = s.index
    f = linear(index[-1])
    others = [a for a, _ in f.terms if a is not i]
    straight = f.coefficient(i) == 1 and not any(free_variables(a, free) & wide for a in others)
    if any(dependent[:-1]) or not straight or s.buffer.strides[-1] != 1:
        index = tuple(vectorize(x, i, lanes, mask, bound) for x in index)
    return Store(s.buffer, index, value, both, s.nontemporal)
