"""Random graphs for tests and for validation: small, well-conditioned, and the same for the same seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from .build import full, input_node
from .dims import as_int
from .dtypes import bool_, f32, i64
from .graph import Graph, Node
from .op import Array, make
from .types import TensorType, tensor

_DIMS: Final = (1, 2, 3, 4, 5, 8, 17)
_LARGE: Final = 50.0  # a value that may be greater is squashed before it is used again
_CONTRACTIVE: Final = ("neg", "abs", "tanh", "sigmoid", "erf", "sin", "cos")


def random_graph(
    rng: np.random.Generator, nodes: int = 20, inputs: int = 4, matmul: bool = True, parameters: bool = True, loops: bool = False
) -> tuple[Graph, list[Array]]:
    """A graph of about `nodes` operations with arguments for it, in the order of its inputs.

    Elementwise, reducing, moving, gathering and multiplying ops on f32 (masks and indices are inputs of bool and i64).
    Every op is continuous in its floating operands and magnitudes stay below about 1e3, so that results in f32 and f64
    are near one another and a compiled graph can be held to a tight budget. With `loops`, there are scans and branches too.
    """
    grower = _Grower(rng, inputs, matmul, parameters, loops)
    while grower.made < nodes:
        grower.step()
    used = {i for n in grower.pool for i in n.inputs}
    sinks = [n for n in grower.pool if n not in used and n.inputs] or grower.pool[-1:]
    if len(sinks) > 4:
        sinks = [sinks[int(k)] for k in np.sort(rng.choice(len(sinks), 4, replace=False))]
    reached = {n for n in Graph((), tuple(sinks)).nodes() if not n.inputs}
    arguments = tuple(n for n in grower.arrays if n in reached)
    return Graph(arguments, tuple(sinks)), [grower.arrays[n] for n in arguments]


class _Grower:
    def __init__(self, rng: np.random.Generator, inputs: int, matmul: bool, parameters: bool, loops: bool = False) -> None:
        self.rng = rng
        self.arrays: dict[Node, Array] = {}
        self.pool: list[Node] = []
        self.bound: dict[Node, float] = {}
        self.made = 0
        self.parameters = parameters
        for _ in range(max(1, inputs)):
            rank = int(rng.integers(0, 4))
            self.argument(tuple(int(d) for d in rng.choice(_DIMS, rank)))
        self.steps: list[Callable[[], None]] = [
            self.unary, self.unary, self.guarded, self.binary, self.binary, self.binary, self.select,
            self.reduce, self.reduce, self.move, self.move, self.join, self.spread, self.scan, self.take,
        ]  # fmt: skip
        if matmul:
            self.steps += [self.matmul, self.matmul]
        if loops:
            self.steps += [self.loop, self.loop, self.branch]

    def step(self) -> None:
        self.steps[int(self.rng.integers(len(self.steps)))]()

    def argument(self, shape: tuple[int, ...], dtype: Any = f32, high: int = 1) -> Node:
        role = "parameter" if self.parameters and dtype is f32 and self.rng.random() < 0.3 else "data"
        node = input_node(f"x{len(self.arrays)}", tensor(dtype, shape), role)
        if dtype is f32:
            self.arrays[node] = self.rng.uniform(-2, 2, shape).astype(np.float32)
            self.pool.append(node)
            self.bound[node] = 2.0
        else:
            self.arrays[node] = self.rng.integers(0, 2 if dtype is bool_ else high, shape).astype(dtype.numpy)
        return node

    def pick(self, wanted: Callable[[Node], bool] = lambda n: True) -> Node:
        """One of the values, recent ones rather; a new argument where none will do."""
        fitting = [n for n in self.pool[-12:] if wanted(n)] or [n for n in self.pool if wanted(n)]
        if not fitting:
            shape = tuple(int(d) for d in self.rng.choice(_DIMS, 2))
            return self.argument(shape)
        return fitting[int(self.rng.integers(len(fitting)))]

    def keep(self, node: Node, bound: float) -> Node:
        self.made += 1
        if bound > _LARGE:
            node, bound = make("tanh", make("mul", node, full(1.0 / bound, node.tensor))), 1.0
        if as_int(node.tensor.size) <= 20_000:
            self.pool.append(node)
            self.bound[node] = bound
        return node

    def shape(self, node: Node) -> tuple[int, ...]:
        return node.tensor.static_shape

    def same(self, a: Node) -> Node:
        """Another value of a's shape."""
        alike = [n for n in self.pool if n.shape == a.shape]
        if len(alike) > 1 and self.rng.random() < 0.7:
            return alike[int(self.rng.integers(len(alike)))]
        if self.rng.random() < 0.5:
            value = float(np.float32(self.rng.uniform(-2, 2)))
            node = full(value, a.tensor)
            self.bound[node] = abs(value)
            return node
        return self.argument(self.shape(a))

    def unary(self) -> None:
        x = self.pick()
        op = str(self.rng.choice(_CONTRACTIVE))
        self.keep(make(op, x), max(1.0, self.bound[x]))

    def guarded(self) -> None:
        """Functions with a domain, on operands brought into it."""
        x = self.pick()
        positive = make("add", make("abs", x), full(0.5, x.tensor))
        capped = make("minimum", x, full(2.0, x.tensor))
        choices: dict[str, tuple[Node, float]] = {
            "exp": (capped, 8.0), "expm1": (capped, 8.0), "log": (positive, 5.0), "log1p": (positive, 5.0),
            "sqrt": (positive, 8.0), "rsqrt": (positive, 2.0),
        }  # fmt: skip
        op = str(self.rng.choice(sorted(choices)))
        operand, bound = choices[op]
        self.keep(make(op, operand), bound)

    def binary(self) -> None:
        a = self.pick()
        b = self.same(a)
        p, q = self.bound[a], self.bound[b]
        match str(self.rng.choice(["add", "sub", "mul", "div", "maximum", "minimum"])):
            case "mul":
                self.keep(make("mul", a, b), p * q)
            case "div":
                self.keep(make("div", a, make("add", make("abs", b), full(0.5, b.tensor))), 2 * p)
            case op:
                self.keep(make(op, a, b), p + q)

    def select(self) -> None:
        a = self.pick()
        b = self.same(a)
        mask = self.argument(self.shape(a), bool_)
        self.keep(make("where", mask, a, b), max(self.bound[a], self.bound[b]))

    def reduce(self) -> None:
        x = self.pick(lambda n: len(n.shape) > 0)
        rank = len(x.shape)
        axes = tuple(sorted(int(a) for a in self.rng.choice(rank, int(self.rng.integers(1, rank + 1)), replace=False)))
        count = int(np.prod([self.shape(x)[a] for a in axes]))
        op, grows = (("sum", count), ("max", 1), ("min", 1), ("mean", 1))[int(self.rng.integers(4))]
        self.keep(make(op, x, axes=axes, keepdims=bool(self.rng.integers(2))), self.bound[x] * grows)

    def move(self) -> None:
        x = self.pick(lambda n: len(n.shape) > 0)
        shape, rank = self.shape(x), len(x.shape)
        match int(self.rng.integers(5)):
            case 0:
                y = make("transpose", x, perm=tuple(int(p) for p in self.rng.permutation(rank)))
            case 1:
                flat = (int(np.prod(shape)),)
                y = make("reshape", x, shape=flat if rank > 1 else (1, *flat))
            case 2:
                y = make("reverse", x, axes=(int(self.rng.integers(rank)),))
            case 3:
                starts = tuple(int(self.rng.integers(0, d)) for d in shape)
                steps = tuple(int(self.rng.integers(1, 3)) for _ in shape)
                y = make("slice", x, starts=starts, stops=shape, steps=steps)
            case _:
                low, high, interior = (tuple(int(v) for v in self.rng.integers(0, 3, rank)) for _ in range(3))
                y = make("pad", x, low=low, high=high, interior=tuple(min(i, 1) for i in interior), value=0.5)
        self.keep(y, self.bound[x])

    def join(self) -> None:
        x = self.pick(lambda n: len(n.shape) > 0)
        y = self.same(x)
        self.keep(make("concat", x, y, axis=int(self.rng.integers(len(x.shape)))), max(self.bound[x], self.bound[y]))

    def spread(self) -> None:
        """A broadcast along a new or a size-1 dimension."""
        x = self.pick(lambda n: len(n.shape) < 3)
        shape = tuple(int(self.rng.choice(_DIMS)) if d == 1 else d for d in self.shape(x))
        self.keep(make("broadcast_to", x, shape=(int(self.rng.choice(_DIMS)), *shape)), self.bound[x])

    def scan(self) -> None:
        x = self.pick(lambda n: len(n.shape) > 0)
        axis = int(self.rng.integers(len(x.shape)))
        flags = {"exclusive": bool(self.rng.integers(2)), "reverse": bool(self.rng.integers(2))}
        self.keep(make("cumsum", x, axis=axis, **flags), self.bound[x] * max(1, self.shape(x)[axis]))

    def take(self) -> None:
        x = self.pick(lambda n: len(n.shape) > 0)
        axis = int(self.rng.integers(len(x.shape)))
        index = self.argument((int(self.rng.integers(1, 6)),), i64, self.shape(x)[axis])
        self.keep(make("gather", x, index, axis=axis), self.bound[x])

    def matmul(self) -> None:
        a = self.pick(lambda n: len(n.shape) >= 2)
        while len(a.shape) < 2:
            a = self.argument((3, 5))
        k, n = self.shape(a)[-1], int(self.rng.choice(_DIMS))
        fitting = [v for v in self.pool if len(v.shape) == 2 and v.shape[0] == k]
        b = fitting[int(self.rng.integers(len(fitting)))] if fitting else self.argument((k, n))
        self.keep(make("matmul", a, b), self.bound[a] * self.bound[b] * k)

    def loop(self) -> None:
        """A scan over the leading axis of a value: h' = tanh(f(h, x[t], w)), stacking f and perhaps h; f bounded by 5."""
        xs = self.pick(lambda n: len(n.shape) > 0 and n.shape[0] != 0)
        length, shape = self.shape(xs)[0], self.shape(xs)[1:]
        square = len(shape) == 2 and self.rng.random() < 0.6
        h, x, w, b = (
            make("input", name=f"p{k}", role="data", dtype=f32, shape=s)
            for k, s in enumerate((shape, shape, (shape[-1],) * 2 if square else shape, shape))
        )
        mixed = make("matmul", make("tanh", h), make("sin", w)) if square else make("mul", make("tanh", h), make("sin", w))
        f = make("add", mixed, make("mul", make("sigmoid", x), make("cos", b)))
        h2, big = make("tanh", f), float(shape[-1] if square else 1) + 1
        outs = [h2, f, *([make("mul", h2, make("abs", w))] if not square else [])]
        kept = [o for o in outs[1:] if self.rng.random() < 0.7]
        body = Graph((h, x, w, b), (h2, *kept), name="step")
        start = make("tanh", self.of_shape(shape))
        node = make(
            "scan", start, xs, self.of_shape(w.tensor.static_shape), self.of_shape(shape), body=body, length=length, carries=1,
            sequences=1, reverse=bool(self.rng.integers(2)),
        )  # fmt: skip
        for k, o in enumerate(body.outputs):
            if k == 0 or self.rng.random() < 0.7:
                self.keep(make("get", node, index=k), 1.0 if o is h2 else max(big, 60.0))

    def branch(self) -> None:
        """A branch on an input."""
        x = self.pick()
        y = self.same(x)
        a, b = (make("input", name=f"p{k}", role="data", dtype=f32, shape=x.shape) for k in range(2))
        then, orelse = Graph((a, b), (make("sin", a), make("add", a, b))), Graph((a, b), (make("cos", b), make("maximum", a, b)))
        node = make("cond", self.argument((), bool_), x, y, then=then, orelse=orelse)
        self.keep(make("get", node, index=0), 1.0)
        self.keep(make("get", node, index=1), self.bound[x] + self.bound.get(y, 2.0))

    def of_shape(self, shape: tuple[int, ...]) -> Node:
        """A value of that shape."""
        alike = [n for n in self.pool if n.shape == shape]
        return alike[int(self.rng.integers(len(alike)))] if alike and self.rng.random() < 0.6 else self.argument(shape)


def random_arrays(graph: Graph, rng: np.random.Generator, low: float = -2.0, high: float = 2.0) -> list[Array]:
    """One array per input of a graph with static shapes: floats uniform in [low, high), small integers, random bools."""
    return [_draw(i.tensor, rng, low, high) for i in graph.inputs]


def _draw(type: TensorType, rng: np.random.Generator, low: float, high: float) -> Array:
    shape = type.static_shape
    if type.dtype.is_float:
        return rng.uniform(low, high, shape).astype(type.dtype.numpy)
    return rng.integers(0, 2 if type.dtype is bool_ else 4, shape).astype(type.dtype.numpy)
