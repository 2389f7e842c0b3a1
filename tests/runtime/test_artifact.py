from __future__ import annotations

import json
import random
import time
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
import tensorwright.ir.ops  # noqa: F401 (registers the records)
from tensorwright.ir.build import constant, input_node
from tensorwright.ir.errors import ArtifactError
from tensorwright.ir.graph import Graph
from tensorwright.ir.op import make
from tensorwright.ir.text import print_graph
from tensorwright.ir.types import tensor
from tensorwright.runtime import artifact
from tensorwright.runtime.container import pack, unpack

RNG = np.random.default_rng(0)
W = RNG.random((3, 4), dtype=np.float32)
TABLE = RNG.random((2, 4), dtype=np.float32) * 100


def small() -> Graph:
    x = input_node("x", tensor("f32", (2, 3)))
    w = input_node("w", tensor("f32", (3, 4)), "parameter")
    b = input_node("b", tensor("bf16", (2, 4)), "parameter")
    y = make("add", make("matmul", x, w), make("cast", b, dtype=tensor("f32", ()).dtype))
    return Graph((x, w, b), (make("mul", y, constant(TABLE)),), name="small")


def weights() -> dict[str, np.ndarray]:
    return {"w": W, "b": np.arange(8).reshape(2, 4).astype(ml_dtypes.bfloat16)}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "net.tw"
    artifact.save(path, small(), weights(), {"note": "a remark"})
    return path


def rewritten(data: bytes, meta=None, **parts: bytes) -> bytes:
    """The file with other contents and a right checksum."""
    old_meta, old = unpack(artifact.MAGIC, data)
    return pack(artifact.MAGIC, old_meta if meta is None else meta, {**{k: bytes(v) for k, v in old.items()}, **parts})


def test_what_is_saved_comes_back(saved):
    found = artifact.load(saved)
    assert found.graph == small()
    assert found.remarks == {"note": "a remark"}
    for name, array in weights().items():
        assert found.parameters[name].dtype == array.dtype
        assert np.array_equal(found.parameters[name], array)


def test_strided_weights_are_saved_by_value(tmp_path):
    wide = np.zeros((3, 8), np.float32)
    wide[:, ::2] = W
    artifact.save(tmp_path / "a.tw", small(), {**weights(), "w": wide[:, ::2]})
    assert np.array_equal(artifact.load(tmp_path / "a.tw").parameters["w"], W)


def test_weights_that_do_not_fit_are_not_saved(tmp_path):
    with pytest.raises(ArtifactError, match=r"weight 'w' is f32\[4, 3\] where the graph says f32\[3, 4\]"):
        artifact.save(tmp_path / "a.tw", small(), {**weights(), "w": np.ascontiguousarray(W.T)})
    with pytest.raises(ArtifactError, match="weight 'v' is no input"):
        artifact.save(tmp_path / "a.tw", small(), {"v": W})
    assert not list(tmp_path.iterdir())


def test_a_file_cut_anywhere_is_our_error(saved):
    data = saved.read_bytes()
    for size in [*range(0, 64), *range(64, len(data), 37)]:
        with pytest.raises(ArtifactError):
            artifact.loads(data[:size])


def test_files_that_are_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.tw", "w") as z:
        z.writestr("../../evil", b"0" * 1000)
    for data in (b"", b"TWMODEL1", b"\x80\x04K\x01.", (tmp_path / "a.tw").read_bytes(), bytes(10_000)):
        with pytest.raises(ArtifactError, match=r"not a sound \.tw file"):
            artifact.loads(data)


def test_lies_with_a_right_checksum(saved):
    data = saved.read_bytes()
    meta, parts = unpack(artifact.MAGIC, data)
    graph = bytes(parts["graph"]).decode()
    tensors = bytes(parts["weights"])
    header_size = int.from_bytes(tensors[:8], "little")
    header = json.loads(tensors[8 : 8 + header_size])

    def weights_with(**changes) -> bytes:
        new = json.dumps({**header, "w": {**header["w"], **changes}}).encode()
        return len(new).to_bytes(8, "little") + new + tensors[8 + header_size :]

    lies = {
        "another format": rewritten(data, {**meta, "format": 2}),
        "no format": rewritten(data, {"parameters": [], "remarks": {}}),
        "no list": rewritten(data, {**meta, "parameters": "wb"}),
        "unknown weight": rewritten(data, {**meta, "parameters": ["w", "b", "c"]}),
        "fewer weights": rewritten(data, {**meta, "parameters": ["w"]}),
        "odd remarks": rewritten(data, {**meta, "remarks": {"a": 1}}),
        "extra part": rewritten(data, None, code=b"\xcc"),
        "shape of weight": rewritten(data, None, weights=weights_with(shape=[4, 3])),
        "size of weight": rewritten(data, None, weights=weights_with(shape=[3, 1 << 40])),
        "negative": rewritten(data, None, weights=weights_with(shape=[-3, -4])),
        "dtype of weight": rewritten(data, None, weights=weights_with(dtype="I32")),
        "unknown dtype": rewritten(data, None, weights=weights_with(dtype="PICKLE")),
        "offsets": rewritten(data, None, weights=weights_with(data_offsets=[0, 1 << 50])),
        "header of weights": rewritten(data, None, weights=(1 << 60).to_bytes(8, "little") + tensors[8:]),
        "no weights": rewritten(data, None, weights=b""),
        "not text": rewritten(data, None, graph=b"\xff\xfe"),
        "type of input": rewritten(data, None, graph=graph.replace("f32[3, 4]", "f32[3, 5]").encode()),
        "size of input": rewritten(data, None, graph=graph.replace("f32[3, 4]", "f32[3, 99999999999]").encode()),
        "unknown op": rewritten(data, None, graph=graph.replace("matmul", "system").encode()),
        "cut graph": rewritten(data, None, graph=graph[: len(graph) // 2].encode()),
        "nesting": rewritten(data, None, graph=b"(" * 1_000_000),
    }
    tracemalloc.start()
    try:
        for what, lie in lies.items():
            start = time.process_time()
            with pytest.raises(ArtifactError):
                artifact.loads(lie)
                pytest.fail(f"accepted: {what}")
            assert time.process_time() - start < 5, what
        assert tracemalloc.get_traced_memory()[1] < 200e6
    finally:
        tracemalloc.stop()


def test_mutated_contents_with_a_right_checksum_never_end_in_another_error(saved):
    data = saved.read_bytes()
    _, parts = unpack(artifact.MAGIC, data)
    rng = random.Random(5)
    refused = 0
    for _ in range(250):
        part = rng.choice(["graph", "weights"])
        new = bytearray(parts[part])
        kind = rng.random()
        if kind < 0.2:
            del new[rng.randrange(len(new)) :]
        elif kind < 0.4:
            at = rng.randrange(len(new))
            new[at:at] = new[: rng.randrange(1, 40)]
        else:
            for _ in range(rng.randint(1, 3)):
                new[rng.randrange(len(new))] = rng.choice([rng.randrange(256), *b"0123456789()[]{},%= "])
        try:
            artifact.loads(rewritten(data, None, **{part: bytes(new)}))
        except ArtifactError:
            refused += 1
    assert refused > 100


def test_large_constants_travel_in_the_file(tmp_path):
    table = RNG.random((50, 3), dtype=np.float32)
    x = input_node("x", tensor("f32", (50, 3)))
    graph = Graph((x,), (make("mul", x, constant(table)),))
    assert "@sha256:" in print_graph(graph)
    artifact.save(tmp_path / "a.tw", graph, {})
    assert artifact.load(tmp_path / "a.tw").graph == graph
