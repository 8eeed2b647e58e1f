"""Rows of the benchmark table: what was measured, against what, in the same run, and whether the target is met."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One measurement. `ratio` is to the compared figure of the same run; `met` is None where nothing is promised."""

    group: str
    name: str
    measured: str
    compared: str = ""
    ratio: float | None = None
    target: str = ""
    met: bool | None = None

    def cells(self) -> list[str]:
        verdict = {None: "", True: "met", False: "NOT MET"}[self.met]
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}"
        return [self.group, self.name, self.measured, self.compared, ratio, self.target, verdict]

    def document(self) -> dict[str, Any]:
        return asdict(self)


Say = Callable[[str], None]


def show(rows: Iterable[Row]) -> str:
    """The table as text, Markdown-compatible."""
    heads = ["group", "what", "measured", "compared with", "ratio", "target", ""]
    lines = [heads, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text)
