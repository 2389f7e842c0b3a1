"""The pipelines: what is done to a graph, in which order, and why there."""

from __future__ import annotations

from typing import Final

from ..ir.errors import AttributeValueError
from ..ir.target import Target
from .contract import Pass
from .contract_form import ContractForm
from .decompose import Decompose
from .drop_marks import DropMarks
from .fold_affine import FoldAffine
from .fuse import Fuse
from .gradient import Gradient
from .layout import Layout
from .pack_weights import PackWeights
from .simplify import Simplify
from .strength import Strength


def inference(target: Target | None = None) -> tuple[Pass, ...]:
    """From a traced graph to fused regions; weights do not change between runs. `prepare.split` comes after it."""
    return (
        Gradient(),  # a function may contain gradients; after it: ordinary ops only
        DropMarks(),  # marks were for gradients; after it: no identities
        Simplify(),  # the rules are cheapest, and see most, on the ops that the user wrote
        Layout(),  # while convolutions are whole: their padding then is made channels last as well
        Decompose(),  # after it: only ops that have code of their own
        Strength(),  # divisions and powers that decomposition made are in the graph now
        Simplify(),  # ... and so are their identities and constants
        ContractForm(),  # one form for matmul and convolution, transposes inside index maps
        Simplify(),  # what those movements leave behind
        FoldAffine(),  # scales by weights into weights: batch norm and its shift are gone where a convolution is before them
        Simplify(),  # the weights' own arithmetic; after it nothing changes values any more
        PackWeights(),  # panels as the code generator wants them; after the last change of weights
        Fuse(),  # last: every pass above sees ops, not regions; after it: each node is one kernel, or none
    )


def training(target: Target | None = None) -> tuple[Pass, ...]:
    """As inference, for a step that updates its parameters: nothing is prepared from them."""
    return tuple(Fuse(prepare=False) if isinstance(p, Fuse) else p for p in inference(target))


PASSES: Final[dict[str, type[Pass]]] = {
    p().name: p for p in (Gradient, DropMarks, Simplify, Layout, Decompose, Strength, ContractForm, FoldAffine, PackWeights, Fuse)
}


def parse(names: str) -> tuple[Pass, ...]:
    """Passes by name, separated by commas, such as 'simplify,fuse'. Raises AttributeValueError for an unknown name."""
    import difflib

    result: list[Pass] = []
    for name in filter(None, (n.strip() for n in names.split(","))):
        if name not in PASSES:
            near = ", ".join(difflib.get_close_matches(name, PASSES) or PASSES)
            raise AttributeValueError(f"there is no pass {name!r}; did you mean: {near}?")
        result.append(PASSES[name]())
    return tuple(result)
