"""The table of supported ops in the documentation, from the registry and the standard's own list.

python -m tensorwright.frontend.onnx.table [--write docs/onnx.md]
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from .reader import require_onnx
from .registry import registered

BEGIN: Final = "<!-- ops: begin -->"
END: Final = "<!-- ops: end -->"
REASONS: Final[dict[str, str]] = {
    "strings": "RegexFullMatch StringConcat StringNormalizer StringSplit TfIdfVectorizer",
    "optionals": "Optional OptionalGetElement OptionalHasElement",
    "random draws, whose numbers the standard leaves open": (
        "Bernoulli Multinomial RandomNormal RandomNormalLike RandomUniform RandomUniformLike"
    ),
    "image files": "ImageDecoder",
    "RoiAlign has taken its place": "MaxRoiPool",
}
DOMAINS: Final = {
    "ai.onnx.ml": "decision trees, encoders and maps: not tensor programs",
    "ai.onnx.preview.training": "training steps are made by `tw.training`, not by a graph's own gradient ops",
}


def sections() -> dict[str, dict[str, str]]:
    """What there is: by domain, {'converted' | 'by definition' | a reason for which it is not there: names of ops}.

    A name is followed by the opset from which on it is converted, where the standard has older forms that are not.
    """
    onnx = require_onnx()
    first: dict[tuple[str, str], int] = {}
    newest: dict[tuple[str, str], Any] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        key = (schema.domain, schema.name)
        first[key] = min(first.get(key, schema.since_version), schema.since_version)
        if key not in newest or newest[key].since_version < schema.since_version:
            newest[key] = schema
    own = registered()
    why = {name: reason for reason, names in REASONS.items() for name in names.split()}
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for domain, name in sorted(first.keys() | own.keys()):
        key, shown = (domain, name), domain or "ai.onnx"
        since = own.get(key)
        if since is not None:
            later = key in first and since[0] > first[key]
            found[shown]["converted"].append(f"{name} ({since[0]}+)" if later else name)
        elif domain in DOMAINS:
            found[shown][DOMAINS[domain]].append(name)
        elif not domain and name in why:
            found[shown][why[name]].append(name)
        else:
            schema = newest[key]
            defined = schema.has_function or schema.has_context_dependent_function
            found[shown]["by definition" if defined else "not done"].append(name)
    return {d: {how: ", ".join(names) for how, names in kinds.items()} for d, kinds in found.items()}


def text() -> str:
    """The table in Markdown."""
    lines = ["| domain | | ops |", "|---|---|---|"]
    for domain, kinds in sections().items():
        for how in sorted(kinds, key=lambda k: (k != "converted", k != "by definition", k)):
            said = {"converted": "converted", "by definition": "by the standard's definition"}.get(how, f"not there: {how}")
            count = kinds[how].count(",") + 1
            lines.append(f"| {domain} | {said} ({count}) | {kinds[how]} |")
    return "\n".join(lines)


def written(page: str) -> str:
    """A page with the table put between its marks. Raises ValueError where there are none."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no place for the table: {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{text()}\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into this page, between its marks")
    args = parser.parse_args(argv)
    if args.write is None:
        print(text())
    else:
        args.write.write_text(written(args.write.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
