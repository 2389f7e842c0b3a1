"""The table of supported ops in the documentation is the one that the command makes."""

from __future__ import annotations

from pathlib import Path

import pytest

onnx = pytest.importorskip("onnx", reason="the onnx extra")
from tensorwright.frontend.onnx import table  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs" / "onnx.md"


def test_the_page_has_the_table_of_now() -> None:
    page = PAGE.read_text()
    if not onnx.__version__.startswith("1.23"):
        pytest.skip(f"the page was made with onnx 1.23, whose list of ops is not that of {onnx.__version__}")
    assert table.written(page) == page, "python -m tensorwright.frontend.onnx.table --write docs/onnx.md"


def test_every_op_is_there_or_has_a_reason() -> None:
    kinds = {how for found in table.sections().values() for how in found}
    assert "not done" not in kinds


def test_a_page_without_marks_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="no place for the table"):
        table.main(["--write", str(page)])
    page.write_text(f"{table.BEGIN}{table.END}")
    assert table.main(["--write", str(page)]) == 0 and "| ai.onnx | converted" in page.read_text()
