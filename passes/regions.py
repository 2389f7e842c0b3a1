"""The nodes of a graph as fusion sees them, and the graph with the chosen regions as `fused` nodes.

Nodes are numbered in topological order. A *free* node is no work (a broadcast, a plain slice, an index range, a scalar
constant under movement, and cheap functions of these alone; a cheap function of one tensor that is stored anyway, read by
several): readers look through it to its *sources*, and every region that needs it gets a copy. The others are *real*.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..ir.build import fused, get, input_node
from ..ir.graph import Graph, Label, Node
from ..ir.lowering import Reduce
from ..ir.op import Trait
from ..ir.ops.structural import CONSTANT
from ..ir.types import TupleType
from .facts import Facts, IndexMap, Read, compose, derived, weights
from .labels import finish
from .partition import Partition

MAX_CLONED = 4  # ops that a region may compute again from a stored tensor
SMALL_CONSTANT = 16  # elements: such a constant stands inside the bodies that read it


@dataclass
class Region:
    """What becomes one kernel: its kind and its real nodes, by number."""

    kind: str
    members: set[int] = field(default_factory=set)


class Regions:
    """The numbered nodes with what fusion asks of them, and the regions chosen so far."""

    def __init__(self, graph: Graph, facts: Facts, prepare: bool) -> None:
        self.graph, self.facts = graph, facts
        self.nodes = graph.nodes()
        self.number = {n: i for i, n in enumerate(self.nodes)}
        self.form = [facts.kind(n) for n in self.nodes]
        fixed = derived(self.nodes, weights(graph)) if prepare else {}
        self._readers = graph.users()
        self._ends = set(graph.outputs)
        self._depth: dict[int, int] = {}
        self._fixed = fixed
        self.real: list[bool] = []
        self.sources: list[tuple[int, ...]] = []
        self._through: list[dict[int, list[IndexMap | None]]] = []
        for i, n in enumerate(self.nodes):
            self._look(i, n)
        self.fixed = {i for i, n in enumerate(self.nodes) if n in fixed and self.real[i] and n.inputs}
        ends = [self.number[o] for o in graph.outputs]
        self.results = {s for o in ends for s in ((o,) if self.real[o] else self.sources[o])}
        users: list[set[int]] = [set() for _ in self.nodes]
        for i in range(len(self.nodes)):
            if self.real[i]:
                for s in self.sources[i]:
                    users[s].add(i)
        # A free node that something outside every region reads is stored, and is then an output of what it reads.
        self.partition = Partition(users)
        self.chosen: list[Region] = []

    def _look(self, i: int, n: Node) -> None:
        """Finds whether a node is free, and which real nodes it reads, how: None is 'at the same index'."""
        through: dict[int, list[IndexMap | None]] = {}
        for k, operand in enumerate(n.inputs):
            j = self.number[operand]
            read = self.facts.read(n)
            own = read.index if read is not None and read.operand == k else None
            if self.real[j]:
                through.setdefault(j, []).append(own)
                continue
            for s, maps in self._through[j].items():
                for m in maps:
                    if own is not None and m is not None:
                        through.setdefault(s, []).append(compose(own, m))
                    else:
                        through.setdefault(s, []).append(m if own is None else own)
        self._through.append({s: _unique(maps) for s, maps in through.items()})
        self.real.append(not self._is_free(i, n))
        self.sources.append(tuple(sorted(s for s in through if not self._is_scalar(s))))

    def _is_free(self, i: int, n: Node) -> bool:
        facts = self.facts
        if n.op is CONSTANT:
            return False
        if self.form[i] not in ("map", "view") or isinstance(n.type, TupleType) or n.op.has(Trait.BARRIER):
            return False
        if facts.uniform(n) is not None:
            return True
        if not n.inputs:
            return n.op.has(Trait.CHEAP)
        read = facts.read(n)
        if read is not None:
            return facts.replicates(n) or _in_order(n, read)
        inner = [self.number[o] for o in n.inputs]
        if not facts.elementwise(n) or not n.op.has(Trait.CHEAP):
            return False
        if all(not self.real[j] and all(self._is_scalar(s) for s in self._through[j]) for j in inner):
            return True
        return self._cheap_again(i, n, inner)

    def _cheap_again(self, i: int, n: Node, inner: list[int]) -> bool:
        """Whether computing n again in each reader beats storing it: it is a few cheap ops on one tensor that is stored
        anyway, with small operands otherwise, and all its readers are regions."""
        readers = self._readers[n]
        if n in self._fixed or n in self._ends or len(readers) < 2 or not all(self._can_inline(r) for r in readers):
            return False
        depth = 1 + max((self._depth.get(j, 0) for j in inner), default=0)
        through = {s for j in inner for s in ([j] if self.real[j] else self._through[j])}
        large = [s for s in through if not self._much_smaller(self.nodes[s], n)]
        if depth > MAX_CLONED or len(large) != 1:
            return False
        (source,) = (self.nodes[s] for s in large)
        if not _same_elements(source, n) or not (self.form[large[0]] == "leaf" or self._stored_anyway(source, n)):
            return False
        self._depth[i] = depth
        return True

    def _can_inline(self, reader: Node) -> bool:
        if isinstance(reader.type, TupleType) or reader.op.has(Trait.BARRIER):
            return False
        low = self.facts.lowering(reader)
        return self.facts.elementwise(reader) or (isinstance(low, Reduce) and low.axes is not None)

    def _stored_anyway(self, source: Node, n: Node) -> bool:
        """Whether something other than n, and not cheap itself, reads the tensor too."""
        if source in self._ends:
            return True
        others = [r for r in self._readers[source] if r is not n]
        return any(not r.op.has(Trait.CHEAP) or not self.facts.elementwise(r) for r in others)

    def _much_smaller(self, a: Node, b: Node) -> bool:
        x, y = a.tensor.size, b.tensor.size
        return isinstance(x, int) and isinstance(y, int) and 4 * x <= y

    def _is_scalar(self, source: int) -> bool:
        return self.nodes[source].op is CONSTANT and self.nodes[source].tensor.size == 1

    def reads(self, reader: int, source: int) -> list[IndexMap | None]:
        """How a real node reads another: None where it is at the index of the operand itself, else the map (of that index)."""
        return self._through[reader].get(source, [])

    def _cores(self, region: Region) -> set[int]:
        core = ("contract", "reduce") if region.kind == "window" else ("contract", "sparse")
        return {m for m in region.members if self.form[m] in core}

    def in_memory(self, region: Region) -> set[int]:
        """What the region's contraction or window reads, however cheap or small it is."""
        return {self.number[i] for m in self._cores(region) for i in self.nodes[m].inputs}

    def clones(self, region: Region) -> list[int]:
        """The free nodes that the region's members read, directly or through one another. The operands of a contraction or
        window are not among them: these read memory."""
        found: set[int] = set()
        cores = self._cores(region)
        memory = self.in_memory(region)
        stack = [self.number[i] for m in region.members - cores for i in self.nodes[m].inputs]
        while stack:
            j = stack.pop()
            if not self.real[j] and j not in found and j not in memory:
                found.add(j)
                stack += [self.number[i] for i in self.nodes[j].inputs]
        return sorted(found)


def _same_elements(source: Node, reader: Node) -> bool:
    """Whether the shapes are the same but for dimensions of one element, as what a loop over single images returns has them."""
    return [d for d in source.shape if d != 1] == [d for d in reader.shape if d != 1]


def _unique(maps: list[IndexMap | None]) -> list[IndexMap | None]:
    return list(dict.fromkeys(maps))


def _in_order(node: Node, read: Read) -> bool:
    """A slice or reshape whose last dimension is read in steps of one and whose dimensions keep their order."""
    used = [t for t in read.index if t.axis is not None]
    axes = [t.axis for t in used]
    if axes != sorted(axes, key=lambda a: a or 0) or any(t.coefficient < 0 for t in used):
        return False
    return not used or used[-1].coefficient == 1


def build(graph: Graph, regions: Regions, facts: Facts) -> Graph:
    """The graph with the chosen regions as fused nodes; the graph itself if there are none."""
    if not regions.chosen:
        return graph
    return _Builder(graph, regions).run()


class _Builder:
    def __init__(self, graph: Graph, regions: Regions) -> None:
        self.graph, self.regions = graph, regions
        self.nodes = regions.nodes
        self.where = {m: r for r in regions.chosen for m in r.members}
        self.done: dict[Node, Node] = {i: i for i in graph.inputs}
        self.labels: dict[Node, Label] = dict(graph.labels)
        self.stored = self._stored()

    def _stored(self) -> set[int]:
        """Members of regions that something outside their region reads, and outputs of the graph."""
        number, stored = self.regions.number, set[int]()
        for i, n in enumerate(self.nodes):
            region = self.where.get(i)
            if not self.regions.real[i]:
                continue  # read through: its readers are asked
            sources = self.regions.sources[i] if region is not None else [number[x] for x in n.inputs]
            stack = list(sources)
            while stack:
                s = stack.pop()
                if not self.regions.real[s]:
                    stack += [number[x] for x in self.nodes[s].inputs]
                elif s in self.where and self.where[s] is not region:
                    stored.add(s)
        stack = [number[o] for o in self.graph.outputs]
        while stack:
            s = stack.pop()
            if not self.regions.real[s]:
                stack += [number[x] for x in self.nodes[s].inputs]
            elif s in self.where:
                stored.add(s)
        return stored

    def run(self) -> Graph:
        stack = [*reversed(self.graph.outputs)]
        while stack:
            node = stack[-1]
            if node in self.done:
                stack.pop()
                continue
            region = self.where.get(self.regions.number[node])
            needs = self._operands(region) if region is not None else list(node.inputs)
            missing = [n for n in needs if n not in self.done]
            if missing:
                stack += missing
                continue
            if region is not None:
                self._emit(region, needs)
            else:
                new = node.replace(tuple(self.done[i] for i in node.inputs))
                self._set(node, new)
            stack.pop()
        return finish(self.graph, [self.done[o] for o in self.graph.outputs], self.labels)

    def _set(self, old: Node, new: Node) -> None:
        self.done[old] = new
        if old in self.graph.labels:
            self.labels.setdefault(new, self.graph.labels[old])

    def _inside(self, region: Region) -> list[int]:
        return sorted([*region.members, *self.regions.clones(region)])

    def _operands(self, region: Region) -> list[Node]:
        """What the region reads, the operands of a contraction first, then in order of use."""
        inside = self._inside(region)
        member = set(inside)
        order = sorted(inside, key=lambda i: (self.regions.form[i] != "contract", i)) if region.kind == "contraction" else inside
        memory = self.regions.in_memory(region)
        found: dict[Node, None] = {}
        for i in order:
            for x in self.nodes[i].inputs:
                j = self.regions.number[x]
                if j not in member and (j in memory or not (x.op is CONSTANT and _small(x))):
                    found.setdefault(x)
        return list(found)

    def _emit(self, region: Region, operands: list[Node]) -> None:
        inner: dict[Node, Node] = {x: input_node(f"p{k}", x.tensor) for k, x in enumerate(operands)}
        arguments = tuple(inner.values())
        for i in self._inside(region):
            n = self.nodes[i]
            inner[n] = n.replace(tuple(inner.get(x, x) for x in n.inputs))
        outputs = [i for i in sorted(region.members) if i in self.stored]
        body = Graph(arguments, tuple(inner[self.nodes[i]] for i in outputs), name=region.kind)
        node = fused(body, [self.done[x] for x in operands], region.kind)
        label = self.graph.labels.get(self.nodes[outputs[-1]])
        if label is not None:
            self.labels.setdefault(node, label)
        for k, i in enumerate(outputs):
            self._set(self.nodes[i], node if len(outputs) == 1 else get(node, k))


def _small(node: Node) -> bool:
    return isinstance(node.tensor.size, int) and node.tensor.size <= SMALL_CONSTANT
