"""Batches: from arrays by seeded shuffling, or from the caller's own iterable; weights, augmentation, checks.

The order of an epoch depends on the seed and the epoch's number alone, so a run that stops and goes on needs no state of a
generator. It is made from raw Philox numbers, which numpy promises never to change.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from ..frontend import tree
from ..frontend.specs import Spec
from ..ir.dims import symbol
from ..ir.dtypes import as_dtype
from ..ir.errors import DTypeError, InputError
from ..runtime.buffers import Array
from .prefetch import Prefetch

Arrays = tuple[Array, ...]
Batch = tuple[int, Arrays]  # how many examples, and the leaves: of x, then y, then (f32) weights if there are any
Augment = Callable[[Any, Any, np.random.Generator], tuple[Any, Any]]
ClassWeight = Mapping[int, float] | Sequence[float]


class Source(Protocol):
    """Where batches come from."""

    @property
    def structures(self) -> tuple[tree.Structure, tree.Structure] | None:
        """How x and y are nested; None before the first batch of an iterable."""
        ...

    @property
    def count(self) -> int | None:
        """Examples in an epoch; None where that is not known."""
        ...

    @property
    def batches(self) -> int | None:
        """Batches in an epoch; None where that is not known."""
        ...

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch (counted from 0), those before `start` left out. A batch is valid until the next."""
        ...

    def examples(self, number: int, batch: int, size: int) -> Array | None:
        """Which examples of the data that batch holds, where they have numbers."""
        ...


class ArraySource:
    """Batches cut from arrays whose first axis counts examples.

    Shuffled batches are gathered into arrays that are used again; batches in order are views of the data.
    """

    def __init__(
        self,
        x: Any,
        y: Any,
        size: int,
        *,
        weight: Array | None = None,
        seed: int = 0,
        shuffle: bool = False,
        drop_last: bool = False,
        augment: Augment | None = None,
    ) -> None:
        inputs, targets = arrays_of(x, "x"), arrays_of(y, "y") if y is not None else ()
        self.structures: tuple[tree.Structure, tree.Structure] = (tree.flatten(x)[1], tree.flatten(y)[1])
        self.split = len(inputs)
        self.arrays = (*inputs, *targets, *(() if weight is None else (weight,)))
        self.total = total = count_of(self.arrays)
        self.count: int | None = total
        self.size, self.seed, self.shuffle, self.augment = size, seed, shuffle, augment
        self.end = total - total % size if drop_last else total
        if not self.end:
            raise InputError(f"drop_last leaves no batch: there are {total} examples, and batch_size is {size}")
        self.rooms = 1  # batches that are in use at one time
        self._room: dict[tuple[int, int], Arrays] = {}

    @property
    def batches(self) -> int:
        return -(-self.end // self.size)

    def _order(self, epoch: int) -> Array | None:
        return permutation(self.total, self.seed, epoch) if self.shuffle else None

    def examples(self, number: int, batch: int, size: int) -> Array:
        start = batch * self.size
        order = self._order(number)
        return np.arange(start, start + size) if order is None else order[start : start + size]

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        order = self._order(number)
        for batch in range(start, self.batches):
            first = batch * self.size
            last = min(first + self.size, self.end)
            if order is None and self.augment is None:
                yield last - first, tuple(a[first:last] for a in self.arrays)
                continue
            room = self._gathered(batch, slice(first, last) if order is None else order[first:last], last - first)
            if self.augment is None:
                yield last - first, room
            else:
                yield last - first, self._augmented(room, number, batch)

    def _gathered(self, batch: int, which: Any, size: int) -> Arrays:
        place = (batch % self.rooms, size)
        room = self._room.get(place)
        if room is None:
            room = self._room[place] = tuple(np.empty((size, *a.shape[1:]), a.dtype) for a in self.arrays)
        for a, into in zip(self.arrays, room, strict=True):
            if isinstance(which, slice):
                np.copyto(into, a[which])
            else:
                np.take(a, which, axis=0, out=into, mode="clip")
        return room

    def _augmented(self, room: Arrays, epoch: int, batch: int) -> Arrays:
        assert self.augment is not None
        targets = len(self.arrays) - self.split
        weight = room[self.split + self.structures[1].leaves :]
        x = tree.unflatten(self.structures[0], room[: self.split])
        y = tree.unflatten(self.structures[1], room[self.split : self.split + targets])
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, epoch, batch])))
        result = self.augment(x, y, rng)
        if not (isinstance(result, tuple) and len(result) == 2):
            raise InputError(f"augment(x, y, rng) returns (x, y), not {type(result).__name__}")
        new: list[Array] = []
        for value, structure, name in zip(result, self.structures, "xy", strict=True):
            leaves, found = tree.flatten(value)
            if found != structure:
                raise InputError(f"augment returned {name} nested as {found}; it was given {structure}")
            new += [np.asarray(leaf) for leaf in leaves]
        for given, made in zip(room, new, strict=False):
            if made.dtype != given.dtype or len(made) != len(given):
                raise InputError(
                    f"augment was given {given.dtype}{list(given.shape)} and returned {made.dtype}{list(made.shape)}: dtype and "
                    "number of examples stay; convert with x.astype(...)"
                )
        return (*new, *weight)


class IterableSource:
    """Batches from the caller: an iterable that can be iterated again each epoch, or a function that returns an iterator.

    Each item is (x, y) or (x, y, sample_weight), x alone for predictions. The function is called with the epoch's number if
    it takes an argument. To resume within an epoch, the same epoch has to give the same batches again.
    """

    count: int | None = None

    def __init__(self, data: Any, *, class_weight: ClassWeight | None = None, augment: Augment | None = None) -> None:
        if augment is not None:
            raise InputError("augment goes with arrays; an iterable of batches augments them itself")
        if isinstance(data, Iterator):
            raise InputError(
                f"x is {type(data).__name__}, which can be iterated only once; give a list of batches, an object with __iter__, "
                "or a function that returns a new iterator for each epoch"
            )
        self.data, self.class_weight = data, class_weight
        self.structures: tuple[tree.Structure, tree.Structure] | None = None
        self._numbered = callable(data) and _takes_argument(data)

    @property
    def batches(self) -> int | None:
        try:
            return len(self.data)
        except TypeError:
            return None

    def examples(self, number: int, batch: int, size: int) -> None:
        return None

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        items = (self.data(number) if self._numbered else self.data()) if callable(self.data) else self.data
        k = -1
        for k, item in enumerate(items):
            if k >= start:
                yield self._batch(k, item)
        if k < 0:
            raise InputError(f"the iterable x gave no batch in epoch {number + 1}")
        if k + 1 < start:
            raise InputError(f"epoch {number + 1} has {k + 1} batches; the run had done {start} of them: these are other data")

    def _batch(self, k: int, item: Any) -> Batch:
        parts = item if isinstance(item, tuple) else (item,)
        if not 1 <= len(parts) <= 3:
            raise InputError(f"batch {k} of the iterable is a tuple of {len(parts)}; expected (x, y) or (x, y, sample_weight)")
        x, y = parts[0], parts[1] if len(parts) > 1 else None
        inputs = arrays_of(x, f"x of batch {k}")
        targets = arrays_of(y, f"y of batch {k}") if y is not None else ()
        size = count_of((*inputs, *targets), f"batch {k}")
        structures = (tree.flatten(x)[1], tree.flatten(y)[1])
        if self.structures is None:
            self.structures = structures
        elif self.structures != structures:
            raise InputError(f"batch {k} is nested otherwise than the first: {structures}, not {self.structures}")
        given = parts[2] if len(parts) == 3 else None
        if given is None and self.class_weight is None:
            return size, (*inputs, *targets)
        return size, (*inputs, *targets, weights_of(targets, given, self.class_weight, size, f"batch {k}"))


def is_array_like(x: Any) -> bool:
    """Whether x is data itself (arrays, nested), and not something that gives batches one after the other."""
    if callable(x) or isinstance(x, Iterator):
        return False
    leaves = tree.flatten(x)[0]
    plain = all(isinstance(leaf, (np.ndarray, np.generic, int, float)) or hasattr(leaf, "__array__") for leaf in leaves)
    # a list of (x, y) pairs is a list of batches: a nest of arrays is an array, a tuple or a dict
    return plain and not isinstance(x, list)


@contextmanager
def prefetched(source: Source, epoch: int, start: int, ahead: int) -> Iterator[Iterator[Batch]]:
    """The batches of an epoch, made on a thread `ahead` of their use (0: made when asked for)."""
    if not ahead:
        yield source.epoch(epoch, start)
        return
    with Prefetch(lambda: source.epoch(epoch, start), ahead) as batches:
        yield iter(batches)


def pays_to_prefetch(source: Source) -> bool:
    """Whether handing batches from thread to thread costs less than making them where they are used.

    It does for augmentation and for whatever the caller's iterable does. It does not for gathering: two cores copy from the same
    memory that the step reads, and the step has use for both (batches of 0.2 to 8 MB were no faster ahead).
    """
    if isinstance(source, ArraySource):
        return source.augment is not None
    return not isinstance(source.data, list) if isinstance(source, IterableSource) else True


def permutation(count: int, seed: int, epoch: int) -> Array:
    """The order of an epoch's examples: the same for the same numbers on every machine and numpy version."""
    raw = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(count)
    return np.argsort(raw, kind="stable")


def arrays_of(value: Any, name: str) -> Arrays:
    """An array, or a nest of arrays, as a tuple. Raises InputError for what is not numeric, or f64 (not converted silently)."""
    found = []
    for k, leaf in enumerate(tree.flatten(value)[0]):
        where = name if not isinstance(value, (tuple, list, dict)) else f"{name}[{k}]"
        array = leaf if isinstance(leaf, np.ndarray) else np.asarray(leaf)
        if array.dtype == np.float64:
            raise InputError(f"{where} is float64; models compute in float32: pass {where}.astype(np.float32)")
        try:
            as_dtype(array.dtype)
        except DTypeError as error:
            raise InputError(f"{where} is an array of {array.dtype}: {error}") from None
        if array.ndim == 0:
            raise InputError(f"{where} has no axis of examples: it is a scalar")
        found.append(array)
    if not found:
        raise InputError(f"{name} holds no array")
    return tuple(found)


def count_of(arrays: Sequence[Array], where: str = "") -> int:
    """The number of examples. Raises InputError where arrays differ in it, or there are none."""
    counts = {a.shape[0] for a in arrays}
    of = f"{where}: " if where else ""
    if len(counts) > 1:
        raise InputError(f"{of}the arrays have different numbers of examples: {[a.shape[0] for a in arrays]}")
    if not counts or 0 in counts:
        raise InputError(f"{of}there are no examples")
    return int(counts.pop())


def weights_of(
    targets: Arrays, sample_weight: Any, class_weight: ClassWeight | None, count: int, where: str = "sample_weight"
) -> Array:
    """The weight of each example, f32[count]: sample_weight times the weight of its class.

    A class weight needs one target: class numbers, or one score per class. Raises InputError for weights that do not fit,
    are negative or not finite, or are all zero.
    """
    weight = np.ones(count, np.float32)
    if sample_weight is not None:
        weight = np.array(sample_weight, np.float32)
        if weight.shape != (count,):
            raise InputError(f"{where}: sample_weight has shape {list(weight.shape)}; expected one weight per example, [{count}]")
    if class_weight is not None:
        if len(targets) != 1 or targets[0].ndim == 0:
            raise InputError("class_weight needs one target of class numbers or of one score per class; give sample_weight")
        target = targets[0]
        if target.ndim > 1 and target.dtype.kind == "f":
            target = target.argmax(-1)
        if target.ndim != 1 or target.dtype.kind not in "iu":
            raise InputError(
                f"class_weight needs class numbers, one per example; the target is {target.dtype}{list(target.shape)}"
            )
        table = dict(class_weight.items() if isinstance(class_weight, Mapping) else enumerate(class_weight))
        classes, places = np.unique(target, return_inverse=True)
        missing = [int(c) for c in classes if int(c) not in table]
        if missing:
            raise InputError(f"class_weight has no weight for the classes {missing[:10]}")
        weight *= np.array([table[int(c)] for c in classes], np.float32)[places]
    if not np.isfinite(weight).all() or (weight < 0).any() or not weight.any():
        raise InputError(f"{where}: weights are finite, not negative, and not all zero")
    return weight


def split_off(x: Any, y: Any, weight: Any, share: float) -> tuple[tuple[Any, Any, Any], tuple[Any, ...]]:
    """((x, y, weight) to train on, (x, y) or (x, y, weight) to validate on): the last share of the examples."""
    if not is_array_like(x) or y is None:
        raise InputError("validation_split goes with arrays x and y; pass validation_data beside an iterable of batches")
    inputs, targets = arrays_of(x, "x"), arrays_of(y, "y")
    count = count_of((*inputs, *targets))
    kept = count - round(count * share)
    if not kept:
        raise InputError(f"validation_split={share} leaves no example to train on")
    if kept == count:
        raise InputError(f"validation_split={share} of {count} examples leaves none to validate on")

    def cut(value: Any, leaves: Arrays, which: slice) -> Any:
        return tree.unflatten(tree.flatten(value)[1], [a[which] for a in leaves])

    first, last = slice(None, kept), slice(kept, None)
    train, held = (cut(x, inputs, first), cut(y, targets, first)), (cut(x, inputs, last), cut(y, targets, last))
    if weight is None:
        return (*train, None), held
    weight = np.asarray(weight)
    if weight.shape != (count,):
        raise InputError(f"sample_weight has shape {list(weight.shape)}; expected one weight per example, [{count}]")
    return (*train, weight[first]), (*held, weight[last])


def described(source: Source, shuffle: bool, augment: Any, drop_last: bool) -> dict[str, Any]:
    """What has to be the same for a run to go on within an epoch."""
    if not isinstance(source, ArraySource):
        return {"batches of": "an iterable"}
    types = ", ".join(f"{a.dtype}{list(a.shape[1:])}" for a in source.arrays)
    return {
        "examples": source.total,
        "types": types,
        "batch_size": source.size,
        "shuffle": shuffle,
        "drop_last": drop_last,
        "augment": augment is not None,
    }


def batch_specs(arrays: Sequence[Array], *, size: int | None = None, exact: bool = False) -> tuple[Spec, ...]:
    """Types of a batch; the number of examples is symbolic unless given (or `exact`: that of the arrays)."""
    specs = []
    for a in arrays:
        first = a.shape[0] if exact else symbol("batch") if size is None else size
        specs.append(Spec((first, *a.shape[1:]), as_dtype(a.dtype)))
    return tuple(specs)


def _takes_argument(fn: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty for p in parameters)
