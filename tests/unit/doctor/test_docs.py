"""docs/troubleshooting.md explains every check and every reason that the program can give."""

import re
from pathlib import Path

from snapshotter.cli.doctor import command

CHECKOUT = Path(__file__).parents[3]
TEXT = (CHECKOUT / "docs" / "troubleshooting.md").read_text()


def test_every_check_has_its_row_and_anchor() -> None:
    rows = re.findall(r'^\| <a id="([a-z-]+)"></a>`([a-z-]+)` \|', TEXT, re.MULTILINE)
    assert [anchor for anchor, _ in rows] == [name for _, name in rows] == [check.id for check in command.checks()]


def test_every_reason_has_its_row() -> None:
    section = TEXT.partition("## 3. Reasons")[2]
    first_cells = " ".join(re.findall(r"^\|([^|]*)\|", section, re.MULTILINE))
    explained = set(re.findall(r"`([a-z-]+)`", first_cells))
    given = set()
    for path in (CHECKOUT / "snapshotter").rglob("*.py"):
        given |= set(re.findall(r'reason(?:: ClassVar\[str\])?(?: = |=|": |", )"([a-z-]+)"', path.read_text()))
    assert {"no-key", "mount-namespace", "chunk-tag"} <= given, "the pattern finds them"
    assert given - explained == set()
