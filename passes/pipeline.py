"""The pipelines: what is done to a graph, in which order, and why there."""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, Final

from ..ir.errors import AttributeValueError
from ..ir.target import Target
from .bytes_by_four import BytesByFour
from .coded_weights import CodedWeights
from .contract import Pass
from .contract_form import ContractForm
from .control import Control
from .crop import Crop
from .decompose import Decompose
from .depthwise import Depthwise
from .drop_marks import DropMarks
from .fold_affine import FoldAffine
from .fuse import Fuse
from .gradient import Gradient
from .hoist import Hoist
from .integers import Integers
from .layout import Layout
from .mixed_precision import MixedPrecision
from .pack_weights import PackWeights
from .rematerialise import Rematerialise
from .rounded_products import RoundedProducts
from .simplify import Simplify
from .sink import Sink
from .slices import Slices
from .strength import Strength
from .tensor_float import TensorFloat
from .weight_order import WeightOrder
from .widen import Widen
from .winograd import Winograd


def inference(target: Target | None = None, precision: str = "f32", winograd: bool = True) -> tuple[Pass, ...]:
    """From a traced graph to fused regions; weights do not change between runs. `prepare.split` comes after it.

    `precision` is 'f32', or 'bf16' or 'tf32' for contractions of such numbers; `winograd` says whether 3x3 convolutions may err
    more to be faster.
    """
    tiled = (Winograd(),) if winograd else ()
    half: tuple[Pass, ...] = (MixedPrecision(activations=True, winograd=winograd),) if precision == "bf16" else ()
    if precision == "tf32":
        half = (TensorFloat(),)
    return (
        Gradient(),  # a function may contain gradients; after it: ordinary ops only
        Control(),  # gradients leave each loop twice, and results nobody uses; before rules make the two differ
        DropMarks(),  # marks were for gradients; after it: no identities
        Widen(),  # while ops are whole: each has one rounding to 16 bits; after it, arithmetic is in f32 and f64
        Simplify(),  # the rules are cheapest, and see most, on the ops that the user wrote
        Hoist(motion=False),  # products over all steps at once, while ops are whole; after it: a loop's body needs its carries
        Layout(),  # while convolutions are whole: their padding then is made channels last as well
        Decompose(),  # after it: only ops that have code of their own
        Strength(),  # divisions and powers that decomposition made are in the graph now
        Simplify(),  # ... and so are their identities and constants
        ContractForm(),  # one form for matmul and convolution, transposes inside index maps
        Simplify(),  # what those movements leave behind
        Integers(),  # products have their one form, with no scales folded into weights that are integers
        CodedWeights(),  # likewise; after it, these are no contractions any more
        FoldAffine(),  # scales by weights into weights: batch norm and its shift are gone where a convolution is before them
        Simplify(),  # the weights' own arithmetic; after it nothing changes values any more
        Crop(),  # scales and shifts are gone, and padding is where it will stay; before passes that look at sizes
        Sink(),  # products are in their one form, and packing, which follows, sees the longer ones
        BytesByFour(),  # when contractions have their one form, as the next one
        RoundedProducts(),  # likewise; before all others are rounded too
        *half,  # when contractions have their one form, and folding was done in f32
        Slices(),  # when layers are what they will be; before passes that suit them to their sizes
        *tiled,  # when folding has changed weights for the last time; after it, nothing looks for convolutions
        Depthwise(),  # likewise; after it, these are no contractions any more
        PackWeights(),  # panels as the code generator wants them; after the last change of weights
        Hoist(batch=False),  # the packing of weights out of loops; after it: a body holds what differs from step to step
        Control(),  # operands that folding and packing left without use
        Fuse(),  # last: every pass above sees ops, not regions; after it: each node is one kernel, or none
    )


def training(target: Target | None = None, precision: str = "f32", winograd: bool = True) -> tuple[Pass, ...]:
    """As inference, for a step that updates its parameters: nothing is prepared from them."""
    passes = inference(target, precision, winograd)
    passes = tuple(replace(p, activations=False, winograd=False) if isinstance(p, MixedPrecision) else p for p in passes)
    passes = unsliced(passes)  # the way back reads what all layers made
    return tuple(replace(p, prepare=False) if isinstance(p, Fuse | Winograd) else p for p in passes)


def unsliced(passes: Sequence[Pass]) -> tuple[Pass, ...]:
    """The passes without slices of a batch: rematerialisation does not reach into a loop."""
    return tuple(p for p in passes if not isinstance(p, Slices))


def cuda(passes: Sequence[Pass]) -> tuple[Pass, ...]:
    """The passes without those that suit layers to the registers and caches of a processor; weights are put in order in the
    place of panels, attention stays whole (it has a kernel), and so do bytes of few channels."""
    changed: dict[type[Pass], Pass] = {
        PackWeights: WeightOrder(),
        Decompose: Decompose(attention=False),
        Integers: Integers(narrow=True),
    }
    chosen = [changed.get(type(p), p) for p in passes]
    return tuple(p for p in chosen if not isinstance(p, BytesByFour | Slices | Winograd | Depthwise))


def within(memory_budget: int) -> tuple[Pass, ...]:
    """What follows on the run graph, once what weights alone determine is split off: its memory is known only then."""
    return (Rematerialise(memory_budget),) if memory_budget else ()


PASSES: Final[dict[str, type[Pass]]] = {
    p().name: p
    for p in (
        BytesByFour,
        CodedWeights,
        Gradient,
        Control,
        Crop,
        DropMarks,
        Simplify,
        Sink,
        Slices,
        Hoist,
        Integers,
        Layout,
        Decompose,
        Depthwise,
        Strength,
        ContractForm,
        FoldAffine,
        PackWeights,
        Fuse,
        MixedPrecision,
        Rematerialise,
        RoundedProducts,
        TensorFloat,
        WeightOrder,
        Widen,
        Winograd,
    )
}


_ITEM: Final = re.compile(r"\s*([A-Za-z_]\w*)\s*(?:\{([^{}]*)\})?\s*(?:,|$)")


def parse(text: str) -> tuple[Pass, ...]:
    """Passes as `str` prints them, separated by commas: 'simplify, fuse{max_nodes=8}'.

    Raises AttributeValueError for an unknown pass or option, or a value of another type than the option's.
    """
    result: list[Pass] = []
    at = 0
    while text[at:].strip():
        match = _ITEM.match(text, at)
        if match is None:
            raise AttributeValueError(f"passes are written 'name, name{{option=value, ...}}', not {text[at:]!r}")
        name, options, at = match.group(1), match.group(2) or "", match.end()
        if name not in PASSES:
            near = ", ".join(difflib.get_close_matches(name, PASSES) or PASSES)
            raise AttributeValueError(f"there is no pass {name!r}; did you mean: {near}?")
        result.append(PASSES[name](**_options(name, options)))
    return tuple(result)


def _options(name: str, text: str) -> dict[str, Any]:
    """The options of a pass from 'a=1, b=(1, 2)'."""
    if not text.strip():
        return {}
    known = {f.name: f for f in fields(PASSES[name])}
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        given = {k.arg or "**": ast.literal_eval(k.value) for k in call.keywords} if isinstance(call, ast.Call) else {}
    except (SyntaxError, ValueError):
        raise AttributeValueError(f"options of pass {name} are written option=value, ..., not {text!r}") from None
    for key, value in given.items():
        if key not in known:
            raise AttributeValueError(f"pass {name} has no option {key!r}; it has {', '.join(known) or 'none'}")
        default = known[key].default
        if type(value) is not type(default):
            raise AttributeValueError(f"option {key} of pass {name} is like {default!r}, not {value!r}")
    if not given:
        raise AttributeValueError(f"options of pass {name} are written option=value, ..., not {text!r}")
    return given
