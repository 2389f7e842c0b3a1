"""What the tests of passes share: random graphs, and running a pass with every check on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from tensorwright.ir.build import constant, input_node
from tensorwright.ir.graph import Graph, Node
from tensorwright.ir.op import make
from tensorwright.ir.target import row
from tensorwright.ir.types import tensor
from tensorwright.passes.contract import Context, Pass
from tensorwright.passes.manager import Hooks, run_pipeline
from tensorwright.passes.validate import Validator

UNARY = ("neg", "abs", "exp", "tanh", "sigmoid", "sqrt", "log1p", "floor", "sign", "sin", "erf", "rsqrt")
BINARY = ("add", "sub", "mul", "div", "maximum", "minimum")
CONSTANTS = (0.0, -0.0, 1.0, -1.0, 2.0, 0.5, 3.0, -4.0, 1e-3)


def context(panel: int = 8) -> Context:
    """A context with a target and panels of a fixed width."""
    return Context(target=row("x86-64-v3"), preferred_panel=lambda spec, target, dtype: panel)


class RandomGraphs:
    """Random graphs over small tensors, with constants and repeated structure that rules match."""

    def __init__(self, seed: int, roles: Sequence[str] = ("data", "data", "parameter")) -> None:
        self.rng = np.random.default_rng(seed)
        self.roles = roles
        self.inputs: list[Node] = []
        self.pool: list[Node] = []

    def pick(self, options: Sequence[object]) -> object:
        return options[int(self.rng.integers(len(options)))]

    def fresh(self, shape: tuple[int, ...]) -> Node:
        node = input_node(f"x{len(self.inputs)}", tensor("f32", shape), str(self.pick(self.roles)))
        self.inputs.append(node)
        self.pool.append(node)
        return node

    def of_shape(self, shape: tuple[int, ...]) -> Node:
        found = [n for n in self.pool if n.shape == shape]
        r = self.rng.random()
        if r < 0.2:
            scalar = constant(float(self.pick(CONSTANTS)), "f32")  # type: ignore[arg-type]
            return make("broadcast_to", scalar, shape=shape) if shape else scalar
        if r < 0.35 and shape:
            vector = self.of_shape(shape[-1:]) if len(shape) > 1 else self.of_shape(())
            return make("broadcast_to", vector, shape=shape)
        if found and r < 0.97:
            return found[int(self.rng.integers(len(found)))]
        return self.fresh(shape)

    def some(self) -> Node:
        return self.pool[-1 - int(min(self.rng.geometric(0.3) - 1, len(self.pool) - 1))]

    def grow(self) -> Node:
        x = self.some()
        kind = self.rng.integers(14)
        rank = len(x.shape)
        if kind < 3:
            new = make(str(self.pick(UNARY)), x)
        elif kind < 7:
            new = make(str(self.pick(BINARY)), *self.shuffled(x, self.of_shape(x.shape)))
        elif kind == 7 and rank >= 2:
            new = make("transpose", x, perm=tuple(map(int, self.rng.permutation(rank))))
        elif kind == 8:
            flat = (int(np.prod(x.shape)),)
            new = make("reshape", x, shape=self.pick([flat, (1, *x.shape), (*x.shape, 1)]))
        elif kind == 9 and rank:
            axes = (rank - 1,) if self.rng.random() < 0.6 else (0,)
            new = make(str(self.pick(["sum", "max", "mean"])), x, axes=axes, keepdims=bool(self.rng.integers(2)))
        elif kind == 10 and rank:
            axes = tuple(range(int(self.rng.integers(rank)), rank))
            m = make("max", x, axes=axes, keepdims=True)
            e = make("exp", make("sub", x, make("broadcast_to", m, shape=x.shape)))
            new = make("div", e, make("broadcast_to", make("sum", e, axes=axes, keepdims=True), shape=x.shape))
        elif kind == 11 and rank == 2:
            w = self.of_shape((x.shape[1], 4)) if self.rng.random() < 0.5 else self.fresh((x.shape[1], 4))
            new = make("matmul", x, w)
        elif kind == 12:
            y = self.of_shape(x.shape)
            new = make("where", make("less", x, y), *self.shuffled(x, y))
        elif kind == 13 and rank and x.shape[0] > 1:
            n = x.shape[0]
            zeros = (0,) * (rank - 1)
            new = make("slice", x, starts=(1, *zeros), stops=(n, *x.shape[1:]), steps=(1,) * rank)
        else:
            new = make("cast", make("cast", x, dtype=tensor("f64", ()).dtype), dtype=x.dtype)
        self.pool.append(new)
        return new

    def shuffled(self, a: Node, b: Node) -> tuple[Node, Node]:
        return (a, b) if self.rng.random() < 0.5 else (b, a)

    def graph(self, size: int) -> Graph:
        for _ in range(2):
            self.fresh(self.pick([(3, 4), (2, 3, 4), (4, 4), (5,)]))  # type: ignore[arg-type]
        for _ in range(size):
            self.grow()
        used = {i for n in self.pool for i in n.inputs}
        outputs = [n for n in self.pool if n not in used and n.inputs][-3:] or [self.pool[-1]]
        return Graph(tuple(self.inputs), tuple(dict.fromkeys(outputs)))


@pytest.fixture(name="random_graph")
def random_graph_fixture() -> Callable[..., Graph]:
    """random_graph(seed, size) -> Graph."""
    return lambda seed, size=12, roles=("data", "data", "parameter"): RandomGraphs(seed, roles).graph(size)


@pytest.fixture(name="checked")
def checked_fixture(tmp_path: object) -> Callable[..., Graph]:
    """checked(graph, *passes) -> the graph after them, verified and validated after each."""

    def checked(graph: Graph, *passes: Pass, ctx: Context | None = None) -> Graph:
        hooks = Hooks(validate=Validator(folder=tmp_path))  # type: ignore[arg-type]
        return run_pipeline(graph, passes, ctx or context(), hooks)

    return checked


@pytest.fixture(name="context")
def context_fixture() -> Callable[..., Context]:
    """context(panel) -> Context with a target."""
    return context
