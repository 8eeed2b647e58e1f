"""Documents name what exists."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_every_test_that_the_guarantees_name_exists() -> None:
    text = (ROOT / "docs/security.md").read_text()
    named = set(re.findall(r"tests/[a-z0-9_/]+\.py", text))
    assert len(named) > 20
    assert not {name for name in named if not (ROOT / name).is_file()}
    functions = re.findall(r"`(test_\w+\.py)::(test_\w+)(…?)", text)
    assert functions
    for file, function, cut in functions:
        found = [path.read_text() for path in (ROOT / "tests").rglob(file)]
        pattern = rf"def {function}{'' if cut else r'[(]'}"
        assert any(re.search(pattern, content) for content in found), f"{file}::{function}"


def test_every_page_that_a_page_links_to_exists() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
