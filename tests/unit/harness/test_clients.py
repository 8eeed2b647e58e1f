"""What is built for the tests from other people's sources is what their go.mod says."""

import re
from pathlib import Path

import pytest

from tests.clients import CLIENTS, ROOT, Client


@pytest.mark.parametrize("name", CLIENTS)
def test_versions_are_pinned_with_sums_and_named_in_the_readme(name: str) -> None:
    client = CLIENTS[name]
    sums = (client.source / "go.sum").read_text()
    readme = (ROOT / "tests/clients/README.md").read_text()
    assert client.pins
    for module, version in client.pins.items():
        assert f"{module} {version} h1:" in sums
    rows = [row for row in readme.splitlines() if row.startswith(f"| `{client.source.name}` |")]
    assert any(version in row for row in rows for version in client.pins.values())


def test_a_changed_pin_or_sum_is_another_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COCO_CACHE", str(tmp_path))
    module = tmp_path / "module"
    module.mkdir()
    client = Client("x", str(module), ("x",))
    homes = set()
    for text in (
        "require example.org/a v1.0.0\n",
        "require example.org/a v1.0.1\n",
        "require (\n\texample.org/a v1.0.1\n)\n",
    ):
        (module / "go.mod").write_text(text)
        homes.add(client.home)
        assert client.pins == {"example.org/a": re.findall(r"v\S+", text)[0]}
    (module / "go.sum").write_text("other")
    homes.add(client.home)
    assert len(homes) == 4
    assert all(home.parent == tmp_path / "clients" for home in homes)
