"""Whole channels, heads or layers out of a model: which of them, and the model without them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from ..frontend.module import Module
from ..frontend.nn.layers import ConvTranspose1d, ConvTranspose2d
from ..frontend.tracing import trace_model
from ..ir.errors import InputError, TensorwrightError
from ..ir.graph import Graph, Node, postorder
from ..ir.graphs import rebuild
from .channels import Family, Tracks, families_of, follow, shrunk, unit_scores
from .masks import best, checked_ratio, scores_of
from .options import Options

Array = np.ndarray[Any, Any]
Row = tuple[str, str, str, int, int]
STRUCTURES: Final = ("channels", "heads", "layers")
_COUNTS: Final = frozenset({"in_features", "out_features", "in_channels", "out_channels", "num_features", "groups"})


def shrink_graph(graph: Graph, weights: Mapping[str, Array], structure: str, options: Options) -> tuple[Graph, list[Row]]:
    """The graph without the share of channels, heads or layers that counts least, and (name, choice, reason, total, kept) of each
    family of them. Raises InputError where there is nothing to prune."""
    if structure == "layers":
        return _without_layers(graph, weights, options)
    tracks = follow(graph)
    gone, rows = chosen(graph, tracks, weights, structure, options)
    return shrunk(graph, tracks, gone, weights), rows


def chosen(
    graph: Graph, tracks: Tracks, weights: Mapping[str, Array], structure: str, options: Options
) -> tuple[list[int], list[Row]]:
    """The units that go, and what is said of each family."""
    every = families_of(graph, tracks)
    families = {f.name: f for f in every if f.heads == (structure == "heads")}
    if not families:
        stays = "none of them can go: they are the model's data or results, or an op mixes them in a way that is not followed"
        raise InputError(f"{graph.name} has no {structure} to prune; {stays}")
    names = options.chosen(list(families))
    ratios = options.ratios(names)
    rng = np.random.default_rng(options.seed)
    scores = {n: _scores(n, w, options, rng) for n, w in weights.items() if np.ndim(w) >= 2}
    each = {n: unit_scores(families[n], scores) for n in ratios}
    if options.scope == "global":
        keep = _together(each, checked_ratio(options.ratio))
    else:
        keep = {n: best(s, ratios[n]) for n, s in each.items()}
    gone: list[int] = []
    rows: list[Row] = []
    for n, f in families.items():
        total = len(f.units)
        if n not in keep:
            rows.append((n, "whole", "left out" if n not in names else "it has no ratio", total, total))
            continue
        gone += [u for u, k in zip(f.units, keep[n], strict=True) if not k]
        rows.append((n, structure, _touches(f), total, int(keep[n].sum())))
    return gone, rows


def _scores(name: str, w: Array, options: Options, rng: np.random.Generator) -> Array:
    try:
        return scores_of(np.asarray(w), options.criterion, options.gradients.get(name), rng)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def _together(scores: Mapping[str, Array], ratio: float) -> dict[str, Array]:
    """What stays where all families compete; one unit of each at least."""
    kept = best(np.concatenate(list(scores.values())), ratio)
    found: dict[str, Array] = {}
    at = 0
    for n, s in scores.items():
        own = kept[at : at + len(s)]
        at += len(s)
        found[n] = own if own.any() else best(s, 1.0)
    return found


def _touches(family: Family) -> str:
    names = list(dict.fromkeys(n for n, _ in family.members))
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"from {shown}"


def shrink_module(module: Module, specs: Sequence[Any], structure: str, options: Options) -> list[Row]:
    """The Module with smaller parameters and buffers, in place, so that it can be trained on.

    Raises InputError where its own code counts channels (an attention that splits its width into heads): it stays as it was then.
    """
    if structure != "channels":
        raise InputError(f"a Module's own code counts its {structure}: prune a Graph of it, tw.prune(tw.trace(model, ...))")
    traced = trace_model(module, *specs)
    before = traced.graph
    weights = {n: p.data for n, p in traced.parameters.items()}
    tracks = follow(before)
    gone, rows = chosen(before, tracks, weights, structure, options)
    after = shrunk(before, tracks, gone, weights)
    held = [(p, p.data, p.mask) for p in traced.parameters.values()]
    counts = [(m, {k: v for k, v in vars(m).items() if k in _COUNTS}) for m in module.modules()]
    try:
        for n, p in traced.parameters.items():
            p.resize(after.weights[n])
        for m, _ in counts:
            _recount(m)
        again = trace_model(module, *specs).graph
        if again.outputs[0].shape != before.outputs[0].shape:
            raise InputError(f"the result became {again.outputs[0].type}")
    except TensorwrightError as error:
        for p, data, mask in held:
            p.resize(data)
            p.mask = mask
        for m, old in counts:
            vars(m).update(old)
        raise InputError(
            f"{type(module).__name__} cannot lose channels, as its own code counts them ({error}); leave such layers out with "
            "exclude=, or prune a Graph of it"
        ) from error
    return rows


def _recount(layer: Module) -> None:
    """Says in a layer's own attributes how many channels its arrays have now."""
    own = vars(layer)
    held = next((p for k in ("weight", "running_mean", "bias") if (p := own.get(k)) is not None), None)
    if held is None:
        return
    if own.get("groups", 1) > 1 and own["groups"] == own.get("in_channels") == own.get("out_channels"):
        own["groups"] = held.shape[0]
    found = {"num_features": held.shape[0], "out_features": held.shape[0], "out_channels": held.shape[0]}
    if len(held.shape) > 1:
        found |= {"in_features": held.shape[1], "in_channels": held.shape[1] * own.get("groups", 1)}
    if isinstance(layer, ConvTranspose1d | ConvTranspose2d):
        found |= {"in_channels": held.shape[0], "out_channels": held.shape[1] * own.get("groups", 1)}
    own.update({k: v for k, v in found.items() if k in own})


# --- layers -------------------------------------------------------------------------------------------------------------


def _without_layers(graph: Graph, weights: Mapping[str, Array], options: Options) -> tuple[Graph, list[Row]]:
    """Branches x + f(x) of a residual stream become x, the least of them first."""
    branches = _branches(graph)
    if not branches:
        raise InputError(f"{graph.name} has no layers to prune: no sum x + f(x) of a residual stream")
    names = options.chosen(list(branches))
    if isinstance(options.ratio, Mapping):
        raise InputError("with pattern='layers', ratio is the share of layers that goes: one number")
    ratio = checked_ratio(options.ratio)
    rng = np.random.default_rng(options.seed)
    scores = {}
    for n in names:
        _, _, own = branches[n]
        parts = [_scores(w, weights[w], options, rng) for w in own if np.ndim(weights[w]) >= 2]
        scores[n] = sum(float(p.sum()) for p in parts) / max(1, sum(p.size for p in parts))
    kept = best(np.array([scores[n] for n in names]), ratio)
    table = {branches[n][0]: branches[n][1] for n, k in zip(names, kept, strict=True) if not k}
    outputs = graph.outputs
    for node in sorted(
        table, key=graph.nodes().index, reverse=True
    ):  # from the end: each is replaced by a node that comes before it
        outputs = rebuild(outputs, {node: table[node]}) if node in set(postorder(outputs)) else outputs
    used = set(postorder(outputs))
    inputs = tuple(i for i in graph.inputs if i in used or i.attrs["role"] == "data")
    left = {str(i.attrs["name"]) for i in inputs}
    values = {n: np.asarray(w) for n, w in weights.items() if n in left}
    rows = [
        (n, "layers", f"a branch of {len(branches[n][2])} weights", 1, int(kept[names.index(n)]) if n in names else 1)
        for n in branches
    ]
    return Graph(inputs, outputs, graph.output_names, graph.name, (), graph.labels, values), rows


def _branches(graph: Graph) -> dict[str, tuple[Node, Node, list[str]]]:
    """(sum, stream, weights of the branch alone) by the branch's first weight."""
    users = graph.users()
    found: dict[str, tuple[Node, Node, list[str]]] = {}
    order = {n: k for k, n in enumerate(graph.nodes())}
    for node in order:
        if node.op.name != "add" or any(u.op is node.op for u in users[node]):
            continue  # no sum, or part of one
        terms, sums = _terms(node, users)
        for stream in sorted(terms, key=order.__getitem__):
            others = [x for x in terms if x is not stream]
            given = stream.inputs or stream.attrs.get("role") == "data"
            inside = _between(others, stream) if others and given else None
            if inside is None:
                continue
            moving = {stream}
            for n in sorted(inside, key=order.__getitem__):
                if any(i in moving for i in n.inputs):
                    moving.add(n)
            if any(u not in inside and u not in sums for n in moving - {stream} for u in users[n]):
                continue  # something else reads what the branch computes
            own = [str(n.attrs["name"]) for n in sorted(inside, key=order.__getitem__) if n.attrs.get("role") == "parameter"]
            if own and stream.shape == node.shape:
                heavy = [n for n in own if n.endswith("weight")] or own
                found.setdefault(heavy[0].removesuffix(".weight"), (node, stream, own))
                break
    return found


def _terms(node: Node, users: Mapping[Node, list[Node]]) -> tuple[list[Node], set[Node]]:
    """What a sum adds up, through sums that nothing else reads; and those sums."""
    terms, sums, stack = list[Node](), {node}, list(node.inputs)
    while stack:
        n = stack.pop()
        if n.op is node.op and len(users[n]) == 1:
            sums.add(n)
            stack += n.inputs
        else:
            terms.append(n)
    return terms, sums


def _between(branch: Sequence[Node], stream: Node) -> set[Node] | None:
    """What a branch computes from the stream and weights alone; None where it reads other data, or not the stream."""
    seen: set[Node] = set()
    stack = list(branch)
    met = False
    while stack:
        n = stack.pop()
        if n is stream:
            met = True
        elif n not in seen:
            if n.attrs.get("role") == "data":
                return None
            seen.add(n)
            stack += n.inputs
    return seen if met else None
