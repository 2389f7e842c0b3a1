"""Instructions that the lanes of a warp execute together: shuffles, votes, matches, reductions, warp barriers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from .decode import Decoder, Step, WarpStep, opcode
from .ptx_parse import Instruction
from .ptx_types import TYPES, WARP
from .state import Array, Batch


def warps_of(b: Batch, masks: Any) -> tuple[Array, Array]:
    """(position, group) of the active threads: threads of one warp with one member mask form a group 0, 1, ..."""
    key = b.warp_of[b.act] << np.int64(32) | np.broadcast_to(masks, b.act.shape).astype(np.int64)
    _, group = np.unique(key, return_inverse=True)
    return np.arange(len(b.act)), group


@opcode("shfl")
def _shfl(d: Decoder, i: Instruction) -> Step:
    """d = the value of lane j: lane + b (down), lane - b (up), lane ^ b (bfly), b (idx), within segments that c describes."""
    d.modifiers(i, ("sync", "up", "down", "bfly", "idx"))
    if "sync" not in i.parts:
        d.refuse(i, "shuffles without .sync are gone from PTX")
    o = d.operands(i, 5)
    mode = i.parts[2]
    u = TYPES["u32"]
    first, second = d.result_and_predicate(i, o[0])
    w = d.result(i, first)
    w2 = d.result(i, second) if second is not None else None
    value, by, clamp, members = (d.wanted(i, p, u) for p in o[1:])

    def step(b: Batch) -> None:
        lane = b.lane[b.act]
        n, c = by(b).astype(np.int64), clamp(b).astype(np.int64)
        segment = (c >> 8) & 31
        bound = (lane & segment) | (c & 31 & ~segment)
        j = {
            "up": lambda: lane - (n & 31),
            "down": lambda: lane + (n & 31),
            "bfly": lambda: lane ^ (n & 31),
            "idx": lambda: (lane & segment) | (n & 31 & ~segment),
        }[mode]()
        ok = j >= bound if mode == "up" else j <= bound
        j = np.where(ok, j, lane)
        source = b.act - lane + j
        slot = np.full(b.threads + WARP, -1)
        slot[b.act] = np.arange(len(b.act))
        at = slot[source]
        wrong = (j >= WARP) | (at < 0) | (source >= b.threads)
        wrong |= b.warp_of[np.minimum(source, b.threads - 1)] != b.warp_of[b.act]
        mask = np.broadcast_to(members(b), lane.shape)
        wrong |= ((mask >> j.astype(np.uint32)) & 1) == 0
        if wrong.any():
            k = int(np.flatnonzero(wrong)[0])
            what = f"lane {int(lane[k])} reads lane {int(j[k])}, which does not take part"
            b.fault("shuffle from an inactive lane", what, b.act[wrong])
        v = value(b)
        w(b, v[at] if v.ndim else np.array(v))
        if w2 is not None:
            w2(b, ok)

    return WarpStep(step, d.wanted(i, o[4], u))


@opcode("activemask")
def _activemask(d: Decoder, i: Instruction) -> Step:
    w = d.result(i, d.operands(i, 1)[0])

    def step(b: Batch) -> None:
        bits = np.zeros(b.n_blocks * b.warps_per_block, np.uint64)
        np.bitwise_or.at(bits, b.warp_of[b.act], np.uint64(1) << b.lane[b.act].astype(np.uint64))
        w(b, bits[b.warp_of[b.act]].astype(np.uint32))

    return step


@opcode("vote")
def _vote(d: Decoder, i: Instruction) -> Step:
    d.modifiers(i, ("sync", "all", "any", "uni", "ballot"))
    if "sync" not in i.parts:
        d.refuse(i, "votes without .sync are gone from PTX")
    o = d.operands(i, 3)
    w, p, members = d.result(i, o[0]), d.wanted(i, o[1], TYPES["pred"]), d.wanted(i, o[2], TYPES["u32"])
    mode = i.parts[2]

    def step(b: Batch) -> None:
        v = np.broadcast_to(p(b), b.act.shape)
        _, group = warps_of(b, members(b))
        bits = np.uint64(1) << b.lane[b.act].astype(np.uint64)
        yes = np.zeros(group.max() + 1, np.uint64)
        here = yes.copy()
        np.bitwise_or.at(yes, group, np.where(v, bits, np.uint64(0)))
        np.bitwise_or.at(here, group, bits)
        if mode == "ballot":
            w(b, yes[group].astype(np.uint32))
        elif mode == "all":
            w(b, (yes == here)[group])
        elif mode == "any":
            w(b, (yes != 0)[group])
        else:
            w(b, ((yes == here) | (yes == 0))[group])

    return WarpStep(step, members)


@opcode("match")
def _match(d: Decoder, i: Instruction) -> Step:
    t = d.type_of(i)
    d.modifiers(i, ("sync", "any", "all"))
    o = d.operands(i, 3)
    first, second = d.result_and_predicate(i, o[0])
    w = d.result(i, first)
    w2 = d.result(i, second) if second is not None else None
    x, members = d.wanted(i, o[1], t), d.wanted(i, o[2], TYPES["u32"])

    def step(b: Batch) -> None:
        v = np.broadcast_to(x(b), b.act.shape)
        _, group = warps_of(b, members(b))
        bits = np.uint64(1) << b.lane[b.act].astype(np.uint64)
        _, same = np.unique(np.stack([group.astype(np.uint64), v.astype(np.uint64)]), axis=1, return_inverse=True)
        same = same.reshape(-1)
        mine = np.zeros(same.max() + 1, np.uint64)
        np.bitwise_or.at(mine, same, bits)
        if "any" in i.parts:
            w(b, mine[same].astype(np.uint32))
            return
        here = np.zeros(group.max() + 1, np.uint64)
        np.bitwise_or.at(here, group, bits)
        agree = mine[same] == here[group]
        w(b, np.where(agree, here[group], np.uint64(0)).astype(np.uint32))
        if w2 is not None:
            w2(b, agree)

    return WarpStep(step, members)


_REDUCE: Final[dict[str, tuple[Callable[..., Any], int]]] = {
    "add": (np.add, 0), "and": (np.bitwise_and, -1), "or": (np.bitwise_or, 0), "xor": (np.bitwise_xor, 0),
    "min": (np.minimum, 0), "max": (np.maximum, 0),
}  # fmt: skip


@opcode("redux")
def _redux(d: Decoder, i: Instruction) -> Step:
    t = d.type_of(i)
    d.modifiers(i, ("sync", *_REDUCE))
    name = i.parts[2]
    if name not in _REDUCE or t.size != 4 or t.kind == "f":
        d.refuse(i)
    o = d.operands(i, 3)
    w, x, members = d.result(i, o[0]), d.wanted(i, o[1], t), d.wanted(i, o[2], TYPES["u32"])
    f, start = _REDUCE[name]
    if name in ("min", "max"):
        start = int(np.iinfo(t.dtype).max if name == "min" else np.iinfo(t.dtype).min)
    neutral = np.array(start, np.int64).astype(t.dtype)

    def step(b: Batch) -> None:
        v = np.broadcast_to(x(b), b.act.shape)
        _, group = warps_of(b, members(b))
        r = np.full(group.max() + 1, neutral)
        f.at(r, group, v)  # type: ignore[attr-defined]  # the table holds ufuncs
        w(b, r[group])

    return WarpStep(step, members)


def bar_warp(d: Decoder, i: Instruction) -> Step:
    """bar.warp.sync: the members wait for each other, and what they wrote before is seen after it."""
    members = d.wanted(i, d.operands(i, 1)[0], TYPES["u32"])
    return WarpStep(lambda b: b.advance_warps(np.unique(b.warp_of[b.act])), members)
