"""Updates of state in one launch: which launches are joined, that results are the same bits, and that a wrong one is caught."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import driver, nn
from tensorwright.benchmarks.models import DemoCNN
from tensorwright.codegen.cuda import together
from tensorwright.codegen.cuda.grid import over
from tensorwright.codegen.loop_ir import Buffer, Kernel, Store
from tensorwright.codegen.nests import Axis
from tensorwright.frontend.training import training_step
from tensorwright.ir.cuda_program import Branch, CudaProgram, Launch, Loop, Node, Step, While
from tensorwright.ir.dtypes import f32
from tensorwright.ir.errors import KernelFaultError
from tensorwright.ir.expr import Expr, binary, const, lane_xor, load, var
from tensorwright.ir.places import Pointer, View
from tensorwright.ir.program import KernelInfo
from tensorwright.runtime.cuda.tools import assemble

pytestmark = pytest.mark.unvalidated("the passes are those of other tests: this is about launches")
RATE = np.array(0.05, np.float32)
OPTIMISERS: dict[str, Callable[[], Any]] = {
    "adam": lambda: tw.optim.Adam(0.05),
    "momentum": lambda: tw.optim.SGD(0.05, momentum=0.9),
}


def mlp(*sizes: int) -> Any:
    layers: list[Any] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), tw.relu]
    return nn.Sequential(*layers[:-1])


def step_of(model: Any, optimiser: str, shape: tuple[int, ...], target: str = "cuda-emulator") -> Any:
    tw.seed(0)
    types = tw.spec(*shape), tw.spec(shape[0], dtype="i64")
    traced = training_step(model(), tw.losses.cross_entropy, OPTIMISERS[optimiser](), *types)
    with tw.config(cache="off"):  # what is patched is no part of its key
        return driver.build(traced.graph, traced.state, purpose="training", target=target)


def program(exe: Any) -> CudaProgram:
    found = exe.compiled.run
    assert isinstance(found, CudaProgram)
    return found


def updates(made: CudaProgram) -> list[Launch]:
    """The launches that write the new value of a tensor that the step is given; counters and what is computed from them aside."""
    state = state_of(made)
    wrote = [{at[0] for at, p in zip(x.pointers, x.kernel.parameters, strict=True) if p.written} for x in made.launches()]
    return [x for x, slots in zip(made.launches(), wrote, strict=True) if slots & state]


def apart(plan: Any, *_: Any) -> Any:
    """In place of `joined_updates`: every launch where it was."""
    return list(plan), []


def after(exe: Any, shape: tuple[int, ...], steps: int = 2) -> list[np.ndarray]:
    """Losses and state after some steps."""
    rng = np.random.default_rng(1)
    losses = [exe(RATE, rng.random(shape, np.float32), rng.integers(0, 3, shape[0])) for _ in range(steps)]
    return [*map(np.asarray, losses), *(np.array(v) for v in exe.parameters.values())]


def state_of(made: CudaProgram) -> set[int]:
    return {i for _, i in made.aliases if made.inputs[i].type.shape}


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_the_demo_has_one_launch_for_all_updates(optimiser: str) -> None:
    """The last one; no copy is left, and what it writes are all tensors of the state, each once."""
    made = program(step_of(lambda: DemoCNN(5), optimiser, (3, 1, 8, 8), "cuda-sm_80"))
    (one,) = updates(made)
    assert one == list(made.launches())[-1]
    wrote = [at for at, p in zip(one.pointers, one.kernel.parameters, strict=True) if p.written]
    assert sorted(wrote) == [(slot, 0) for slot in sorted(state_of(made))]
    assert not any(k.name.startswith("copy") for k in made.kernels)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("most", [together.MOST_ARGUMENTS, 9])
def test_the_same_bits_as_launches_of_their_own(optimiser: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged weights of several blocks, biases of a part of a warp; and more arguments than a launch takes."""
    shape = (5, 37)

    def model() -> Any:
        return mlp(37, 45, 7, 3)

    monkeypatch.setattr(together, "MOST_ARGUMENTS", most)
    exe = step_of(model, optimiser, shape)
    found = updates(program(exe))
    assert len({x.kernel.block[0] for x in found}) == 1 if most > 9 else len(found) > 2
    assert all(len(x.pointers) <= most for x in found)
    monkeypatch.setattr("tensorwright.codegen.cuda.generate.joined_updates", apart)
    plain = step_of(model, optimiser, shape)
    before = len(updates(program(plain)))
    assert before >= 6
    assert len(list(program(plain).launches())) - len(list(program(exe).launches())) == before - len(found)
    for a, b in zip(after(exe, shape), after(plain, shape), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("sm", [75, 80, 90])
def test_joined_launches_assemble_without_spills(sm: int) -> None:
    assert not assemble(program(step_of(lambda: mlp(37, 45, 7, 3), "adam", (5, 37), f"cuda-sm_{sm}")).ptx, sm).wrong


@pytest.mark.parametrize("wrong", [-1, 1])
def test_a_wrong_block_is_caught(wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two weights of two whole blocks each: one block on, a launch leaves its arrays."""
    right = together._own_block

    def planted(first: int, blocks: int, total: int) -> Expr:
        found = right(first, blocks, total)
        return binary("add", found, const(wrong)) if first and blocks > 1 else found

    monkeypatch.setattr(together, "_own_block", planted)
    exe = step_of(lambda: mlp(32, 64, 32), "momentum", (2, 32))
    with pytest.raises(KernelFaultError, match=r"out of bounds: kernel together_0"):
        after(exe, (2, 32), 1)


# --- the rule --------------------------------------------------------------------------------------------------------

N = 40
STATE, OTHER, OUT, ARENA = (0, 1, 2), 3, 4, 5  # slots


def kernel(name: str, *, to: int, reads: int, lanes: bool = False) -> Kernel:
    """`to` buffers become the sum of `reads` others and, in place, themselves."""
    outs = [Buffer(f"y{k}", f32, (N,), align=16) for k in range(to)]
    ins = [Buffer(f"x{k}", f32, (N,), align=16) for k in range(reads)]
    at = var("i")
    total: Expr = const(1.0, f32)
    for b in ins:
        total = binary("add", total, load(b, (at,), f32))
    if lanes:
        total = lane_xor(total, 1)
    body = [Store(b, (at,), binary("add", load(b, (at,), f32), total)) for b in outs]
    return Kernel(name, (*outs, *ins), (over([Axis(at, N)], body),), noalias=True)


ADD, COPY, LANES = kernel("add", to=1, reads=1), kernel("one", to=1, reads=0), kernel("lanes", to=1, reads=1, lanes=True)
KERNELS = {k.name: k for k in (ADD, COPY, LANES)}


def add(to: View, source: View, name: str = "add") -> Step:
    return Step(name, (to, source), 0)


def joined(*plan: Node) -> tuple[list[Node], dict[str, Kernel]]:
    done, made = together.joined_updates(plan, KERNELS, STATE, [KernelInfo("k", 0, 0)], lambda stem: f"{stem}_0")
    return done, {k.name: k for k in made}


def loop(*nodes: Node, count: int = 3, pointers: tuple[Pointer, ...] = ()) -> Loop:
    return Loop(count, nodes, False, pointers)


SIZE = 4 * N
FIRST, SECOND = add((0, 0), (ARENA, 0)), add((1, 0), (ARENA, 0))
BETWEEN: dict[str, tuple[Node, bool]] = {  # what stands behind the first update, and whether that may pass it
    "elsewhere in the arena": (add((ARENA, 4 * SIZE), (OTHER, 0)), True),
    "reads what it reads": (add((OUT, 0), (ARENA, 0)), True),
    "reads what it writes": (add((OUT, 0), (0, 0)), False),
    "takes the memory that it reads": (add((ARENA, 0), (OTHER, 0)), False),
    "takes a part of it": (add((ARENA, SIZE - 4), (OTHER, 0)), False),
    "begins where it ends": (add((ARENA, SIZE), (OTHER, 0)), True),
    "a loop elsewhere": (loop(add((ARENA, SIZE, SIZE), (OTHER, 0))), True),
    "a loop that comes there": (loop(add((ARENA, 2 * SIZE, -SIZE), (OTHER, 0))), False),
    "a pointer elsewhere": (loop(add((-1, 0), (OTHER, 0)), pointers=(Pointer(-1, ((ARENA, SIZE), (ARENA, 2 * SIZE))),)), True),
    "a pointer that comes there": (loop(add((-1, 0), (OTHER, 0)), pointers=(Pointer(-1, ((ARENA, SIZE), (ARENA, 0))),)), False),
    "a branch on another byte": (Branch((OTHER, 0), (add((OUT, 0), (ARENA, 0)),), ()), True),
    "a branch on it": (Branch((0, 3), (), ()), False),
    "a branch that reads it": (Branch((OTHER, 0), (), (add((OUT, 0), (0, 0)),)), False),
    "a while that takes what it reads": (While((Step("one", ((ARENA, 0),)),), (OTHER, 0), ()), False),
}


@pytest.mark.parametrize("what", BETWEEN)
def test_a_launch_moves_past_what_does_not_depend_on_it(what: str) -> None:
    between, passes = BETWEEN[what]
    done, made = joined(FIRST, between, SECOND, add((2, 0), (OTHER, 0)))
    last = done[-1]
    assert isinstance(last, Step) and last.kernel == "together_0"
    assert done[:-1] == ([between] if passes else [FIRST, between])
    views = last.views
    assert len(views) == (5 if passes else 4), "what two read is one argument"
    assert len(made["together_0"].buffers) == len(views)


def test_what_is_not_joined() -> None:
    """Results that are no state, threads that work together, updates of one thing, and one alone."""
    for plan in (
        [FIRST, add((OUT, 0), (ARENA, 0))],
        [FIRST, add((1, 0), (ARENA, 0), "lanes")],
        [FIRST, add((0, 0), (OTHER, 0))],
        [FIRST, loop(add((1, 0), (OTHER, 0)))],
        [FIRST],
    ):
        assert joined(*plan) == (plan, {})
