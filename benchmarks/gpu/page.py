"""Draws the GPU section of benchmarks/README.md from what `benchmarks.gpu` wrote.

python -m benchmarks.gpu.page DIR
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- what follows is drawn by benchmarks.gpu.page -->", "<!-- until here -->"
NOTHING = """No GPU was at hand yet: nothing is measured on one.
`python -m benchmarks.gpu --out DIR` measures it all in eight minutes, and
`python -m benchmarks.gpu.page DIR` writes it here."""


def main() -> None:
    file = Path(sys.argv[1], "results.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page = "\n".join([BEGIN, "", *section(lines), "", END])
    README.write_text(before + page + after)


def section(lines: list[dict[str, Any]]) -> Iterator[str]:
    """Of each card, the last line of each section that found something there at full size."""
    measured = [
        line
        for line in lines
        if line.get("found") and not line["tiny"] and not line["device"].startswith("cpu")
    ]
    if not measured:
        yield NOTHING
    for card in dict.fromkeys(line["device"] for line in measured):
        latest = {line["section"]: line for line in measured if line["device"] == card}
        days = " and ".join(sorted({line["day"] for line in latest.values()}))
        yield f"On one {card}, {days}, by `python -m benchmarks.gpu`. Seconds unless it is said.\n"
        for name, line in latest.items():
            state = "" if line["ok"] else f": not whole, {line['error']}"
            yield f"**{name}**{state}\n"
            yield from table(line["found"])


def table(found: dict[str, Any]) -> Iterator[str]:
    """A row a finding, a column a figure."""
    rows = {key: value if isinstance(value, dict) else {"": value} for key, value in found.items()}
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    if not rows:
        return
    yield f"| | {' | '.join(columns)} |"
    yield "|---" * (len(columns) + 1) + "|"
    for key, row in rows.items():
        yield f"| {key} | {' | '.join(shown(row.get(name, '')) for name in columns)} |"
    yield ""


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "/")


if __name__ == "__main__":
    main()
