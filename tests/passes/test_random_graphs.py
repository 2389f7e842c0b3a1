"""Random graphs through the whole pipeline, every pass verified and validated; the split gives the same results."""

from __future__ import annotations

import pytest
from tensorwright.passes.pipeline import inference, training
from tensorwright.passes.prepare import split
from tensorwright.passes.validate import validate_split


@pytest.mark.parametrize("seed", range(60))
def test_inference(seed, random_graph, checked):
    graph = random_graph(seed, 14)
    after = checked(graph, *inference())
    validate_split(after, *split(after))


@pytest.mark.parametrize("seed", range(100, 120))
def test_training_prepares_nothing(seed, random_graph, checked):
    graph = random_graph(seed, 14, roles=("data", "state"))
    after = checked(graph, *training())
    assert {i.attrs["name"] for i in after.inputs} == {i.attrs["name"] for i in graph.inputs}
