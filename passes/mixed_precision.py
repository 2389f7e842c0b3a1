"""Matrix products and convolutions of bf16 numbers, added up in f32; everything else stays in f32.

    contract(a, b) -> contract_f32(cast{bf16}(a), cast{bf16}(b))

It runs where every contraction has its one form, and so finds all of them: of a linear layer, a convolution, attention,
and of their gradients. What that leaves in f32 is what mixed precision leaves in f32 (Micikevicius et al. 2018, "Mixed
Precision Training"): parameters, which are the master weights, their gradients and the optimiser; losses, softmax, norms
and all sums. bf16 has the exponents of f32, so that no loss is scaled (Kalamkar et al. 2019, "A Study of BFLOAT16").

A cast is a node like any other: a weight that several contractions read, in the forward and the backward pass, is cast
once a step, and in inference once per set of weights; an activation that only contractions read is stored in bf16. A cast
stands before what it may change places with, movements and the maximum of a window, so that these move half the bytes.

In inference an activation that a contraction reads and others as well, such as the two ends of a residual block, is
rounded for all of them (`activations`): it is then stored once, in two bytes an element, and read back into f32. That is
done where contractions do little with an element, as 1x1 convolutions do, and would wait for memory; a transformer's
residuals stay in f32, where they cost next to nothing and keep the error four times smaller.

The instruction that multiplies bf16 takes pairs of steps. Where the reduction has no axis of even extent, one is made even
by zeros at its end (the 3 channels of a picture). What stays in f32: what cannot be paired; what has nothing to gain (a
depthwise convolution); and 3x3 convolutions that Winograd's method does in less time than half of that of a direct sum
(`winograd`), which needs f32, since its transforms would enlarge the error of rounded products.

Attention that is one op (its target has a kernel for it) becomes one of rounded q, k and v, and so does its way back; their
kernels round what is multiplied by these: the probabilities, as they are made, and on the way back what comes in.

On a target without the instruction the operands are rounded all the same, and multiplied and added in f32. That is slower
than plain f32, but gives the numbers of the other machine, up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Final

from ..ir.contraction import Affine, Axis, Contraction
from ..ir.dims import as_int, product
from ..ir.dtypes import bf16, f32
from ..ir.expr import postorder, var
from ..ir.graph import Graph, Node
from ..ir.lowering import Attention, Contract, Reduce
from ..ir.op import Trait, make
from ..ir.target import Target
from ..ir.types import TupleType
from .bodies import map_bodies
from .contract import Context, Pass
from .facts import Facts, derived, index_variables
from .labels import finish
from .winograd import GAIN, LEAST, choose, convolution_of

LITTLE: Final = 2048  # operations on an element that take as long, a hundred times over, as storing it in f32 as well
PAIRED: Final = 2.2  # how much faster than in f32 Winograd's method must be: pairs are twice as fast, and the model errs
QKV: Final = 3  # operands of attention before its mask
PAD_FROM: Final = 3  # an axis of this many steps is worth a step of zeros


@dataclass(frozen=True)
class MixedPrecision(Pass):
    """Rounds the operands of f32 contractions to bf16.

    min_flops    contractions of less arithmetic stay in f32: casting costs more than it saves
    activations  whether what else reads such an operand reads it rounded, too: for inference
    winograd     whether 3x3 convolutions may be left in f32 for the pass of that name, which comes after
    """

    kind: ClassVar[str] = "lossy"
    requires: ClassVar[frozenset[str]] = frozenset({"no_gradient", "decomposed"})
    min_flops: int = 0
    activations: bool = False
    winograd: bool = False

    def run(self, graph: Graph, ctx: Context) -> Graph:
        """The graph with contractions of bf16; counts them in `ctx.notes`."""
        wide = ctx.target is not None and not ctx.target.bf16
        work = _Rounding(self, graph, ctx, lambda node: ctx.spend("mixed_precision", node), wide)
        result = work.run()
        ctx.notes[self.name] = int(str(ctx.notes.get(self.name, 0))) + work.count
        return result

    def reference(self, graph: Graph, ctx: Context) -> Graph:
        """The graph in f32 throughout, bodies of loops too, with operands that were rounded to bf16 and back."""
        graph = map_bodies(graph, lambda body, _: self.reference(body, ctx))
        return _Rounding(self, graph, ctx, lambda _: True, wide=True).run()


class _Rounding:
    """One run of the pass. `wide`: rounded operands go back to f32, and the contraction is one of f32."""

    def __init__(self, options: MixedPrecision, graph: Graph, ctx: Context, spend: Callable[[Node], bool], wide: bool) -> None:
        self.graph, self.facts, self.wide, self.count = graph, ctx.facts, wide, 0
        nodes = graph.nodes()
        users = graph.users()
        self.chosen: dict[Node, Contraction] = {}
        fixed = derived(nodes, ctx.weights(graph))
        for n in nodes:
            spec = chosen(n, ctx.facts, options.min_flops)
            if spec is not None and options.winograd and tiled(spec, ctx.target, n.inputs[1] in fixed):
                continue
            if spec is not None and spend(n):
                self.chosen[n] = spec
        # attention in one piece: its operands, but for a mask, are those of products
        self.whole = {n for n in nodes if attends(n, ctx.facts, options.min_flops) and spend(n)}
        results = set(graph.outputs)
        # what is needed in bf16 alone, and can be: movements of contractions' operands, behind which the cast goes
        self.only: set[Node] = set()
        for n in reversed(nodes):
            alone = n not in results and all(u in self.chosen or u in self.only or self._multiplies(u, n) for u in users[n])
            if alone and users[n] and self._commutes(n):
                self.only.add(n)
        self.kept: set[Node] = set()
        if options.activations:
            done: dict[Node, int] = {}  # operations of contractions on what is computed
            for n in reversed(nodes):
                work = self.chosen[n].flops if n in self.chosen else done.get(n, 0) if n in self.only else 0
                for i in n.inputs if work else ():
                    if i.inputs and i not in fixed:
                        done[i] = done.get(i, 0) + work
            self.kept = {n for n, work in done.items() if n not in self.only and work <= LITTLE * as_int(n.tensor.size)}
        self.narrow: dict[Node, Node] = {}  # a node of the new graph -> the same rounded to bf16
        self.moved: dict[Node, Node] = {}  # a node of the new graph in `only` -> its bf16 form

    def _multiplies(self, user: Node, node: Node) -> bool:
        """Whether a user is attention that reads a node as query, key or value alone."""
        return user in self.whole and node not in user.inputs[QKV:]

    def _commutes(self, node: Node) -> bool:
        """Whether rounding a node's operands gives the same as rounding its result."""
        if not node.inputs or any(isinstance(i.type, TupleType) or i.dtype is not f32 for i in (node, *node.inputs)):
            return False
        if node.op.has(Trait.BARRIER) or node.op.has(Trait.CONTROL) or node.op.has(Trait.STRUCTURAL):
            return False
        if node.op.has(Trait.VIEW):
            return True
        if node.op.has(Trait.MOVEMENT):
            return all(v == 0 for v in node.attrs.values() if isinstance(v, float))
        low = self.facts.lowering(node)
        if not isinstance(low, Reduce) or low.kind not in ("max", "min"):
            return False
        steps = tuple(var(f"r{k}") for k in range(len(low.extents)))
        read = low.value(index_variables(len(node.shape)), steps, lambda k, index, mask=None: var("element", f32))
        return all(e.op in ("var", "const", "select") for e in postorder([read]) if e.dtype is f32)

    def run(self) -> Graph:
        """The graph after the pass."""
        made = self.graph.map_nodes(self._rule)
        return finish(self.graph, made.outputs, dict(made.labels))

    def _rule(self, node: Node, inputs: tuple[Node, ...]) -> Node:
        spec = self.chosen.get(node)
        if spec is not None:
            self.count += 1
            a, b = (self._rounded(x) for x in inputs)
            spec, a, b = evened(spec, a, b)
            if self.wide:
                return make("contract", *(make("cast", x, dtype=f32) for x in (a, b)), spec=spec)
            return make("contract_f32", a, b, spec=spec)
        if node in self.whole:
            self.count += 1
            narrow = [self._rounded(x) for x in inputs[:QKV]]
            rest = [self._read(old, new) for old, new in zip(node.inputs[QKV:], inputs[QKV:], strict=True)]
            if self.wide:
                return node.replace((*(make("cast", x, dtype=f32) for x in narrow), *rest))
            return make("attention_grad_f32" if "side" in node.attrs else "attention_f32", *narrow, *rest, **node.attrs)
        if node in self.only:
            new = node.replace(inputs)
            self.moved[new] = node.replace(tuple(self._rounded(x) for x in inputs))
            return new
        return node.replace(tuple(self._read(old, new) for old, new in zip(node.inputs, inputs, strict=True)))

    def _rounded(self, new: Node) -> Node:
        """The bf16 form of a node of the new graph."""
        found = self.moved.get(new) or self.narrow.get(new)
        if found is None:
            found = self.narrow[new] = make("cast", new, dtype=bf16)
        return found

    def _read(self, old: Node, new: Node) -> Node:
        """What a node other than a contraction reads for an operand."""
        return make("cast", self._rounded(new), dtype=f32) if old in self.kept else new


def chosen(node: Node, facts: Facts, min_flops: int) -> Contraction | None:
    """The contraction that a node is, if it is one of f32, large enough, and can be made of pairs with a gain."""
    form = facts.lowering(node) if node.op.has(Trait.CONTRACTION) else None
    if not isinstance(form, Contract) or form.spec.panel or any(i.dtype is not f32 for i in node.inputs):
        return None
    spec = form.spec
    if min_flops and spec.flops < min_flops:
        return None
    if spec.of_kind("batch") and 1 in (spec.size("n"), spec.size("m")) and spec.size("batch") != 1:
        return None  # nothing is read twice: the products are no matter
    even = any(isinstance(x.extent, int) and x.extent % 2 == 0 for x in spec.of_kind("k"))
    return spec if even or _odd(spec) is not None else None


def attends(node: Node, facts: Facts, min_flops: int) -> bool:
    """Whether a node is attention of f32 in one piece, and large enough."""
    form = facts.lowering(node) if len(node.inputs) >= QKV else None
    if not isinstance(form, Attention) or node.inputs[0].dtype is not f32:
        return False
    d, (s, e) = node.inputs[0].shape[-1], node.inputs[2].shape[-2:]
    return 2 * as_int(product(node.shape[:-1])) * as_int(s) * (as_int(d) + as_int(e)) >= min_flops


def tiled(spec: Contraction, target: Target | None, fixed: bool) -> bool:
    """Whether Winograd's method in f32 is faster than a direct sum of bf16, or on targets without pairs than one of f32."""
    conv = convolution_of(spec)
    if conv is None or target is None or conv.flops < LEAST:
        return False
    choice = choose(conv, target, fixed)
    return choice is not None and choice.gain >= (PAIRED if target.bf16 else GAIN)


def evened(spec: Contraction, a: Node, b: Node, ways: int = 2) -> tuple[Contraction, Node, Node]:
    """The contraction with an axis of even extent, by a step of zeros if need be; or of one that is a multiple of `ways`."""
    inner = next((x for x in spec.of_kind("k") if spec.a and spec.a[-1].terms == ((x.name, 1),)), None)
    if inner is not None:  # the last one is that whose pairs stand in panels: the one along which A lies
        spec = replace(spec, axes=(*(x for x in spec.axes if x is not inner), inner))
    axis = _odd(spec, ways)
    if axis is None:
        return spec, a, b
    more = -as_int(axis.extent) % ways
    axes = tuple(replace(x, extent=x.extent + more) if x == axis else x for x in spec.axes)
    a, b = _longer(a, spec.a, axis, more), _longer(b, spec.b, axis, more)
    place = spec.a.index(Affine(((axis.name, 1),)))
    if len(spec.a[-1].terms) > 1 and place != len(spec.a) - 1:
        # the columns of a window: its elements are read more than once, so that pairs are best brought together before
        perm = (*(d for d in range(len(spec.a)) if d != place), place)
        a = make("transpose", a, perm=perm)
        spec = replace(spec, a=tuple(spec.a[d] for d in perm))
    if inner is None:
        axes = (*(x for x in axes if x.name != axis.name), replace(axis, extent=axis.extent + more))
    return replace(spec, axes=axes), a, b


def _longer(x: Node, index: tuple[Affine, ...], axis: Axis, more: int) -> Node:
    """x with some more elements along an axis, zero."""
    place = index.index(Affine(((axis.name, 1),)))
    zeros = (0,) * len(x.shape)
    if x.shape[place] != axis.extent:
        stops = tuple(axis.extent if d == place else n for d, n in enumerate(x.shape))
        x = make("slice", x, starts=zeros, stops=stops, steps=(1,) * len(zeros))
    high = tuple(more * (d == place) for d in range(len(zeros)))
    return make("pad", x, low=zeros, high=high, interior=zeros, value=0.0)


def _odd(spec: Contraction, ways: int = 2) -> Axis | None:
    """The k axis that a step of zeros makes even, so that pairs lie side by side in A; None if there is nothing to do, or nothing
    that can be done: only an axis that has a dimension of A and one of B to itself is made longer."""

    def alone(index: tuple[Affine, ...], x: Axis) -> bool:
        uses = [affine for affine in index if any(name == x.name for name, _ in affine.terms)]
        return uses == [Affine(((x.name, 1),))]

    inner = spec.a[-1].terms if spec.a else ()
    pairs = [x for x in spec.of_kind("k") if as_int(x.extent) > 1]
    side = next((x for x in pairs if inner == ((x.name, 1),)), None)
    if side is not None and as_int(side.extent) % ways == 0:
        return None
    longer = [x for x in pairs if as_int(x.extent) >= PAD_FROM and as_int(x.extent) % ways]
    longer = [x for x in longer if alone(spec.a, x) and alone(spec.b, x)]
    if side in longer:
        return side
    if any(as_int(x.extent) % ways == 0 for x in pairs):
        return None
    return max(longer, key=lambda x: as_int(x.extent), default=None)
