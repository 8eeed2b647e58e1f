"""Which cached documents the images of a node still need."""

import hashlib
import json
from pathlib import Path
from typing import Any

from snapshotter.config import Limits
from snapshotter.image.documents import needed


def keep(directory: Path, document: Any) -> str:
    """Store a document under its digest; returns the file's name."""
    raw = document if isinstance(document, bytes) else json.dumps(document).encode()
    name = hashlib.sha256(raw).hexdigest()
    (directory / name).write_bytes(raw)
    return name


def test_manifest_config_and_index_of_an_image_are_needed(tmp_path: Path) -> None:
    config, other_config = keep(tmp_path, {"os": "linux"}), keep(tmp_path, {"os": "plan9"})
    manifest = keep(tmp_path, {"config": {"digest": f"sha256:{config}"}})
    other = keep(tmp_path, {"config": {"digest": f"sha256:{other_config}"}})
    index = keep(tmp_path, {"manifests": [{"digest": f"sha256:{'0' * 64}"}, {"digest": f"sha256:{manifest}"}]})
    keep(tmp_path, {"manifests": [{"digest": f"sha256:{other}"}]})
    signatures = {f"{name}.signatures" for name in (manifest, config, index)}
    assert needed(tmp_path, {f"sha256:{manifest}"}, Limits()) == {manifest, config, index} | signatures
    assert needed(tmp_path, set(), Limits()) == set()
    assert needed(tmp_path / "absent", {f"sha256:{manifest}"}, Limits()) == {f"{manifest}.signatures"}


def test_what_somebody_else_put_there_is_not_needed_and_does_no_harm(tmp_path: Path) -> None:
    manifest = keep(tmp_path, {"config": ["digest"]})
    for strange in (b"", b"[" * 100_000, b"\xff", b"[]", b'{"manifests": {}}', b'{"manifests": [1, {"digest": []}]}'):
        keep(tmp_path, strange)
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to("/etc/passwd")
    assert manifest in needed(tmp_path, {f"sha256:{manifest}"}, Limits())
    kept = needed(tmp_path, {f"sha256:{manifest}"}, Limits())
    assert len([name for name in kept if not name.endswith(".signatures")]) <= 2
