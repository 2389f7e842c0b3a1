"""Groups nodes into regions that become one kernel each, from what their records say of their lowering.

    contraction   one contraction and the elementwise chain on its result (bias, residual, activation); a padding behind it
    sparse        likewise one product with a sparse matrix
    window        likewise one reduction over windows (pooling, depthwise convolution)
    rows          reductions over trailing axes, with the maps around them over the same rows (softmax, norms, gradients)
    reduce        other reductions over the same axes, with the maps that feed them and those on their results
    map           everything elementwise that is left, with several outputs where they have one shape

What a region may not do: wait for itself through another region (checked against the reachability between groups);
recompute anything that is not cheap; read, at other places than its own index, a value that is computed in the region
(only rows may read their reductions back). Broadcasts, plain slices and index ranges are no work: every region that
reads them has its own copy, and nobody stores them. What weights alone determine never joins what data determine, so
that the split into prepare and run graph finds it whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, Final

from ..ir.dims import Dim, as_int, product
from ..ir.graph import Graph, Node
from ..ir.lowering import Contract, Reduce, Sparse
from ..ir.op import Trait
from ..ir.padding import padding_of
from ..ir.types import TupleType
from .column_groups import group_of
from .contract import Context, Pass
from .contract_form import spec_of
from .facts import Facts, IndexMap, Term
from .partition import Partition
from .regions import Region, Regions, build

MOST_RESULTS: Final = 8  # of a contraction whose epilogue joins groups of its columns
MOST_BORDER: Final = 3  # times the elements of a contraction's result that a padded one may have for it to write that


@dataclass(frozen=True)
class Fuse(Pass):
    """Options: which kinds of region to make, how large they may become, and whether weights stay apart from data.

    max_nodes    ops in a region                     max_operands   tensors that a region reads
    max_columns  longest row of a 'rows' region      prepare        False for training, where weights change
    borders      whether a contraction may write into a padded array (on processors)
    """

    kind: ClassVar[str] = "exact"
    requires: ClassVar[frozenset[str]] = frozenset({"no_gradient", "decomposed"})
    ensures: ClassVar[frozenset[str]] = frozenset({"fused"})
    kinds: tuple[str, ...] = ("contraction", "sparse", "window", "rows", "reduce", "map")
    max_nodes: int = 96
    max_operands: int = 24
    max_columns: int = 32768
    prepare: bool = True
    borders: bool = True

    def run(self, graph: Graph, ctx: Context) -> Graph:
        """The graph with regions as `fused` nodes; nodes in no region stay as they are."""
        return build(graph, _Grower(self, graph, ctx).grow(), ctx.facts)


class _Grower:
    """Grows regions greedily, kind by kind; each join of nodes was checked to close no circle."""

    def __init__(self, options: Fuse, graph: Graph, ctx: Context) -> None:
        self.options, self.ctx = options, ctx
        self.facts: Facts = ctx.facts
        self.regions = Regions(graph, ctx.facts, options.prepare)
        self.nodes = self.regions.nodes
        self.partition: Partition = self.regions.partition
        self.taken: set[int] = set()

    def grow(self) -> Regions:
        """All regions of the graph."""
        steps = {
            "contraction": lambda: self._chains("contraction", self._contraction),
            "sparse": lambda: self._chains("sparse", self._sparse),
            "window": lambda: self._chains("window", self._window),
            "rows": self._rows,
            "reduce": self._reduces,
            "map": self._maps,
        }
        for kind, step in steps.items():
            if kind in self.options.kinds:
                step()
        return self.regions

    # Common to all kinds.

    def _start(self, kind: str, nodes: Iterable[int]) -> Region:
        region = Region(kind, set(nodes))
        self.taken |= region.members
        return region

    def _free(self, i: int) -> bool:
        """Whether a node may still join a region: it has code, and is in none."""
        return i not in self.taken and self.regions.real[i] and self.regions.form[i] in ("map", "reduce", "contract")

    def _fits(self, region: Region, extra: set[int]) -> bool:
        """Limits, and weights apart from data."""
        members = region.members | extra
        if len(members) > self.options.max_nodes:
            return False
        fixed = self.regions.fixed
        if len({m in fixed for m in members}) > 1:
            return False
        operands = {s for m in members for s in self.regions.sources[m]} - members
        return len(operands) <= self.options.max_operands

    def _join(self, region: Region, extra: int) -> bool:
        """Adds a node to a region if no circle comes of it."""
        p = self.partition
        first = p.group[next(iter(region.members))]
        if not p.can_merge(first, p.group[extra]):
            return False
        p.merge(first, p.group[extra])
        region.members.add(extra)
        self.taken.add(extra)
        return True

    def _finish(self, region: Region) -> None:
        """Keeps a region that is more than one plain node; takes one unit of fuel."""
        root = max(region.members)
        if len(region.members) == 1 and not self.regions.clones(region):
            return
        if self.ctx.spend(f"fuse_{region.kind}", self.nodes[root]):
            self.regions.chosen.append(region)

    def _elementwise(self, i: int) -> bool:
        return self.regions.form[i] == "map" and self.facts.elementwise(self.nodes[i])

    def _plain(self, reader: int, source: int) -> bool:
        """Whether `reader` reads `source` at its own index exactly."""
        node = self.nodes[reader]
        return self.facts.elementwise(node) and self.regions.reads(reader, source) == [None]

    # contraction, window

    def _contraction(self, node: Node) -> bool:
        return isinstance(self.facts.lowering(node), Contract)

    def _sparse(self, node: Node) -> bool:
        return isinstance(self.facts.lowering(node), Sparse)

    def _window(self, node: Node) -> bool:
        low = self.facts.lowering(node)
        return isinstance(low, Reduce) and low.axes is None and low.kind not in ("argmax", "argmin")

    def _chains(self, kind: str, is_core: Callable[[Node], bool]) -> None:
        """Regions of one node that `is_core` and the elementwise chain on its result."""
        for i, node in enumerate(self.nodes):
            if self.regions.real[i] and i not in self.taken and not isinstance(node.type, TupleType) and is_core(node):
                chain = self._joining(i)
                shape = self.nodes[max(chain)].shape if chain else node.shape
                chain = chain or self._epilogue(i)
                padded = self._padding_behind(max(chain, default=i), i) if kind == "contraction" else None
                if not chain and padded is None:
                    continue
                region = self._start(kind, [i])
                for j in sorted(chain, reverse=True):
                    # in reverse order: each one feeds nothing but the ones after it
                    region.members.add(j)
                    self.taken.add(j)
                if padded is not None:
                    region.members.add(padded)
                    self.taken.add(padded)
                last = max(region.members)
                for j in sorted(region.members - {last}, reverse=True):
                    self.partition.merge(self.partition.group[last], self.partition.group[j])
                self._side_inputs(region, shape, i)
                self._finish(region)

    def _padding_behind(self, last: int, core: int) -> int | None:
        """The padding that alone reads the result of a contraction with its epilogue, if the kernel may write into its inside:
        what reads the padding reads memory anyway, and vectors lie as they did."""
        users, node = self.partition.users[last], self.nodes[last]
        if not self.options.borders or self.ctx.target is None or self.ctx.target.is_cuda or len(users) != 1:
            return None
        (j,) = users
        padding = padding_of(self.nodes[j])
        if padding is None or last in self.regions.results or node.shape != self.nodes[core].shape or not self._free(j):
            return None
        if self.nodes[j].inputs[0] is not node or padding.low[-1] or padding.high[-1]:
            return None
        if as_int(self.nodes[j].tensor.size) > MOST_BORDER * as_int(node.tensor.size):
            return None
        readers = self.partition.users[j]
        return j if readers and all(self.regions.form[u] == "contract" or self._is_window(u) for u in readers) else None

    def _side_inputs(self, region: Region, shape: tuple[Dim, ...], core: int) -> None:
        """Takes in elementwise work of the region's shape that only the region needs, such as a gradient's other factor."""
        progress = True
        while progress:
            progress = False
            outside = {s for m in region.members if m != core for s in self.regions.sources[m]} - region.members
            for j in sorted(outside, reverse=True):
                if not self._free(j) or not self._elementwise(j) or self.nodes[j].shape != shape or j in self.regions.results:
                    continue
                users = self.partition.users[j]
                if any(self.regions.form[s] == "contract" and self.partition.users[s] == {j} for s in self.regions.sources[j]):
                    continue  # the start of that contraction's own epilogue
                if self._narrows(j):
                    continue  # better stored as it is than what it is made from
                if users <= region.members and core not in users and all(self._plain(u, j) for u in users):
                    progress |= self._fits(region, {j}) and self._join(region, j)

    def _narrows(self, i: int) -> bool:
        """Whether a node's elements are smaller than those of what it is computed from, as those of bytes made of floats are."""
        sources = [self.nodes[s] for s in self.regions.sources[i]]
        bits = [s.dtype.bits for s in sources if not isinstance(s.type, TupleType) and s.shape == self.nodes[i].shape]
        return bool(bits) and self.nodes[i].dtype.bits < min(bits)

    def _epilogue(self, core: int) -> set[int]:
        """The largest set of elementwise nodes on the result whose values leave it through its last node alone."""
        regions, shape = self.regions, self.nodes[core].shape
        region, best = {core}, {core}
        heads = sorted(self.partition.users[core])
        seen = set(heads)
        while heads:
            j = heads.pop(0)
            inside = [s for s in regions.sources[j] if s in region]
            if not (
                self._free(j)
                and self._elementwise(j)
                and self.nodes[j].shape == shape
                and all(self._plain(j, s) for s in inside)
                and self._fits(Region("contraction", set(region)), {j})
            ):
                continue
            region = region | {j}
            leaving = {m for m in region if m in regions.results or not self.partition.users[m] <= region}
            if leaving == {j}:
                best = set(region)
            for u in sorted(self.partition.users[j]):
                if u not in seen:
                    seen.add(u)
                    heads.append(u)
            heads.sort()
        return best - {core}

    def _joining(self, core: int) -> set[int]:
        """Of a contraction whose columns come in groups: all elementwise work on its result and on whole groups of it, if what
        leaves that set has the columns of one group."""
        node = self.nodes[core]
        spec = spec_of(node, self.facts)
        if spec is None or not spec.panel or not spec.groups:
            return set()
        width = as_int(node.shape[-1]) // spec.groups
        small = (*node.shape[:-1], width)
        region, heads, seen = {core}, sorted(self.partition.users[core]), set[int]()
        while heads:
            j = heads.pop(0)
            inside = [s for s in self.regions.sources[j] if s in region]
            if j in seen or not (self._free(j) and self._elementwise(j)):
                continue
            if not all(self._joins(j, s, small) for s in inside) or not self._fits(Region("contraction", region), {j}):
                continue
            seen.add(j)
            region = region | {j}
            heads = sorted({*heads, *self.partition.users[j]})
        leaving = {m for m in region if m in self.regions.results or not self.partition.users[m] <= region}
        if not leaving or len(leaving) > MOST_RESULTS or any(self.nodes[m].shape != small for m in leaving):
            return set()
        p = self.partition
        own = {p.group[m] for m in region}
        outside = {p.group[u] for m in leaving for u in p.users[m]} - own
        return set() if any(p.reaches(g, h) for g in outside for h in own) else region - {core}

    def _joins(self, reader: int, source: int, small: tuple[Dim, ...]) -> bool:
        """Whether one member of a joining epilogue may read another: at its own index, or of all groups its own columns."""
        a, b = self.nodes[reader], self.nodes[source]
        reads = self.regions.reads(reader, source)
        if a.shape == b.shape:
            return a.shape in (small, (*small[:-1], b.shape[-1])) and reads == [None]
        return a.shape == small and all(r is not None and group_of(r, small) is not None for r in reads)

    # rows

    def _rows(self) -> None:
        for i, node in enumerate(self.nodes):
            if not self._free(i) or self.regions.form[i] != "reduce":
                continue
            low = self.facts.lowering(node)
            full = node.inputs[0].shape
            if not isinstance(low, Reduce) or not low.axes or low.axes != tuple(range(len(full) - len(low.axes), len(full))):
                continue
            columns = product(full[low.axes[0] :])
            rows = product(full[: low.axes[0]])
            if not isinstance(columns, int) or columns > self.options.max_columns or columns == 0 or rows == 0:
                continue
            space = _Space(full, len(low.axes))
            region = self._start("rows", [i])
            self._grow_rows(region, space)
            single = space.lead == 0 and not any(self.nodes[m].shape == full and m != i for m in region.members)
            if single and self._all_reduced(region):
                region.kind = "reduce"
            self._finish(region)

    def _all_reduced(self, region: Region) -> bool:
        """Whether every value that leaves the region is computed from its reductions, and none of these from another, as a
        'reduce' region demands."""
        reduced: set[int] = set()
        for m in sorted(region.members):  # operands come before their users
            after = not reduced.isdisjoint(self.regions.sources[m])
            if after and self.regions.form[m] == "reduce":
                return False
            if after or self.regions.form[m] == "reduce":
                reduced.add(m)
        others = region.members - reduced
        return not any(m in self.regions.results or self.partition.users[m] - region.members for m in others)

    def _grow_rows(self, region: Region, space: _Space) -> None:
        regions = self.regions
        rejected: set[int] = set()
        progress = True
        while progress:
            progress = False
            around = {s for m in region.members for s in regions.sources[m]} | {
                u for m in region.members for u in self.partition.users[m]
            }
            for j in sorted(around - region.members - rejected, reverse=True):
                if not self._free(j) or not self._row_member(j, region, space) or not self._fits(region, {j}):
                    continue
                if self._join(region, j):
                    progress = True

    def _row_member(self, j: int, region: Region, space: _Space) -> bool:
        """Whether a node may stand in the region: its shape, its form, and how it and the members read each other."""
        node, form, members = self.nodes[j], self.regions.form[j], region.members
        if form == "reduce":
            low = self.facts.lowering(node)
            if not isinstance(low, Reduce) or node.inputs[0].shape != space.full or low.axes != space.axes:
                return False
        elif form != "map" or node.shape not in space.shapes:
            return False
        elif not self.facts.elementwise(node) and (node.shape != space.full or not members.isdisjoint(self.regions.sources[j])):
            return False  # a gather, a pad, ...: may only read what is not in the region
        for s in self.regions.sources[j]:
            if s in region.members and not all(self._row_read(j, s, r, space) for r in self.regions.reads(j, s)):
                return False
        for m in region.members & self.partition.users[j]:
            if not self.facts.elementwise(self.nodes[m]) and self.regions.form[m] != "reduce":
                return False
            if not all(self._row_read(m, j, r, space) for r in self.regions.reads(m, j)):
                return False
        return True

    def _row_read(self, reader: int, source: int, read: IndexMap | None, space: _Space) -> bool:
        """Whether `reader` reads `source` in its own row only, and at its own column if the source has columns."""
        target = self.nodes[source]
        if self.regions.form[reader] == "reduce":
            return read is None and target.shape == space.full
        if read is None:
            return target.shape == self.nodes[reader].shape
        shape = self.nodes[reader].shape
        if space.full == target.shape:
            return False
        if shape == space.full:
            wanted = [Term(None, 0, 0) if size == 1 else Term(k) for k, size in enumerate(target.shape)]
            return target.shape in space.shapes and list(read) == wanted
        # Row values, with or without the axes of size 1.
        kept = [t for t, size in zip(read, target.shape, strict=True) if size != 1]
        return kept == [Term(k) for k, size in enumerate(shape) if size != 1]

    # reduce

    def _reduces(self) -> None:
        for i, node in enumerate(self.nodes):
            if not self._free(i) or self.regions.form[i] != "reduce":
                continue
            low = self.facts.lowering(node)
            if not isinstance(low, Reduce) or low.axes is None:
                continue
            region = self._start("reduce", [i])
            full = node.inputs[0].shape
            self._prologue(region, full)
            for j in range(i + 1, len(self.nodes)):
                other = self.nodes[j]
                if not self._free(j) or self.regions.form[j] != "reduce" or other.inputs[0].shape != full:
                    continue
                low_j = self.facts.lowering(other)
                if not isinstance(low_j, Reduce) or low_j.axes != low.axes:
                    continue
                related = self._shares(region, j) and self._independent(region, j)
                if related and self._fits(region, {j}) and self._join(region, j):
                    self._prologue(region, full)
            reduces = {m for m in region.members if self.regions.form[m] == "reduce"}
            self._after_reduce(region, reduces)
            self._reduced_side(region, reduces)
            self._finish(region)

    def _shares(self, region: Region, j: int) -> bool:
        """Whether a reduction reads, at most two steps up, something that the region reads or computes."""
        mine = region.members | {s for m in region.members for s in self.regions.sources[m]}
        theirs = set(self.regions.sources[j])
        theirs |= {s for t in theirs for s in self.regions.sources[t]}
        return bool(mine & theirs)

    def _independent(self, region: Region, j: int) -> bool:
        """Whether no reduction of the region feeds the other one."""
        p = self.partition
        return not p.reaches(p.group[next(iter(region.members))], p.group[j])

    def _prologue(self, region: Region, full: tuple[object, ...]) -> None:
        """Takes in the maps over the whole space that nothing else needs."""
        progress = True
        while progress:
            progress = False
            for j in sorted({s for m in region.members for s in self.regions.sources[m]} - region.members, reverse=True):
                if not self._free(j) or self.regions.form[j] != "map" or self.nodes[j].shape != full:
                    continue
                if j in self.regions.results:
                    continue
                users = self.partition.users[j]
                plain = all(
                    u in region.members
                    and self.regions.reads(u, j) == [None]
                    and (self.regions.form[u] == "reduce" or self.facts.elementwise(self.nodes[u]))
                    for u in users
                )
                if plain and self._fits(region, {j}) and self._join(region, j):
                    progress = True

    def _after_reduce(self, region: Region, reduces: set[int]) -> None:
        """Takes in elementwise work on the reduced values."""
        reduced, shape = set(reduces), self.nodes[next(iter(reduces))].shape
        progress = True
        while progress:
            progress = False
            for j in sorted({u for m in reduced for u in self.partition.users[m]} - region.members):
                if not self._free(j) or not self._elementwise(j) or self.nodes[j].shape != shape:
                    continue
                inside = [s for s in self.regions.sources[j] if s in region.members]
                if not all(s in reduced and self._plain(j, s) for s in inside):
                    continue
                if self._fits(region, {j}) and self._join(region, j):
                    reduced.add(j)
                    progress = True

    def _reduced_side(self, region: Region, reduces: set[int]) -> None:
        """Takes in elementwise work that only the work on reduced values needs."""
        shape = self.nodes[next(iter(reduces))].shape
        progress = True
        while progress:
            progress = False
            readers = {m for m in region.members - reduces if self.nodes[m].shape == shape}
            for j in sorted({s for m in readers for s in self.regions.sources[m]} - region.members, reverse=True):
                if not self._free(j) or not self._elementwise(j) or self.nodes[j].shape != shape or j in self.regions.results:
                    continue
                users = self.partition.users[j]
                if users <= readers and all(self._plain(u, j) for u in users):
                    progress |= self._fits(region, {j}) and self._join(region, j)

    # map

    def _maps(self) -> None:
        grown: list[Region] = []
        for i in range(len(self.nodes) - 1, -1, -1):
            if not self._free(i) or self.regions.form[i] != "map":
                continue
            region = self._start("map", [i])
            progress = True
            while progress:
                progress = False
                for j in sorted({s for m in region.members for s in self.regions.sources[m]} - region.members, reverse=True):
                    if self._free(j) and self._map_member(j, region, i) and self._fits(region, {j}) and self._join(region, j):
                        progress = True
            grown.append(region)
        self._updates(grown)
        for region in grown:
            self._finish(region)

    def _updates(self, grown: list[Region]) -> None:
        """Joins maps of one shape that share a tensor of that shape, where results of the graph leave each, and nothing else but
        what other maps of that shape read.

        Such are the new values of a parameter and of the states beside it: together they read the gradient once. Nothing lives
        longer for it, as a result has memory of its own.
        """
        home = {m: region for region in grown for m in region.members}
        for region in grown:
            if not region.members:
                continue  # it went into another
            shape = self.nodes[max(region.members)].shape
            progress = True
            while progress:
                progress = False
                around = {s for m in region.members for s in self.regions.sources[m] if self.nodes[s].shape == shape}
                near = around | {u for s in around | region.members for u in self.partition.users[s]}
                others = {id(home[j]): home[j] for j in sorted(near) if j in home and home[j] is not region}
                for other in others.values():
                    if self._together(region, other, home):
                        home.update(dict.fromkeys(other.members, region))
                        region.members |= other.members
                        other.members.clear()
                        progress = True
        grown[:] = [region for region in grown if region.members]

    def _together(self, a: Region, b: Region, home: dict[int, Region]) -> bool:
        """Merges the groups of two map regions where `_updates` may join them; whether it did."""
        shape = self.nodes[max(a.members)].shape
        results, users, both = self.regions.results, self.partition.users, a.members | b.members
        if results.isdisjoint(a.members) or results.isdisjoint(b.members) or not self._fits(a, b.members):
            return False
        outside = {u for m in both - results for u in users[m]} - both
        shapes = {self.nodes[max(home[u].members)].shape if u in home else None for u in outside}
        if not shapes | {self.nodes[max(b.members)].shape} <= {shape}:
            return False
        for one, two in ((a.members, b.members), (b.members, a.members)):
            for m in one:
                if not all(self.nodes[s].shape == shape and self._plain(m, s) for s in two.intersection(self.regions.sources[m])):
                    return False
        p = self.partition
        first, second = p.group[next(iter(a.members))], p.group[next(iter(b.members))]
        if not p.can_merge(first, second):
            return False
        p.merge(first, second)
        return True

    def _is_window(self, i: int) -> bool:
        """Whether a map computes with several elements of an operand for one of its own."""
        node = self.nodes[i]
        return self.regions.form[i] == "map" and not self.facts.elementwise(node) and not node.op.has(Trait.MOVEMENT)

    def _map_member(self, j: int, region: Region, root: int) -> bool:
        """Whether a producer may join: computed once per element, or cheap; stored as well if others need it."""
        if self.regions.form[j] != "map":
            return False
        node, users = self.nodes[j], self.partition.users[j]
        inside = users & region.members
        outside = bool(users - region.members) or j in self.regions.results
        if not self.facts.elementwise(node) and any(s in region.members for s in self.regions.sources[j]):
            return False
        if all(self._plain(u, j) for u in inside) and node.shape == self.nodes[root].shape:
            return True
        # Read elsewhere than at the own index (by a broadcast, a pad, ...): computed again for each reader, so it must be cheap
        # or mere movement, needed by nobody else, and must not itself read what is computed here.
        if self.facts.read(node) is None and any(self._is_window(u) for u in inside):
            return False  # the cases of a pad or a concatenation, times the elements of a window, are too much code
        cheap = self.facts.is_cheap(node) if self.facts.elementwise(node) else node.op.has(Trait.MOVEMENT)
        return cheap and not outside and inside == users and len(self.regions.sources[j]) <= 2


@dataclass(frozen=True)
class _Space:
    """The rows and columns that a 'rows' region runs over: `full` shape, of which the last `columns` dimensions are reduced."""

    full: tuple[Dim, ...]
    columns: int

    @property
    def lead(self) -> int:
        return len(self.full) - self.columns

    @property
    def axes(self) -> tuple[int, ...]:
        return tuple(range(self.lead, len(self.full)))

    @property
    def shapes(self) -> tuple[tuple[Dim, ...], ...]:
        rows = self.full[: self.lead]
        return (self.full, rows, rows + (1,) * self.columns)
