"""Recipients added and removed on a registry: read by the real skopeo, run by nodes; no blob is fetched or written."""

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from snapshotter.digest import Digest
from snapshotter.image.claim import hint_tag
from tests.e2e.conftest import Image, Images, NodeMaker
from tests.e2e.test_encrypted_layers import encrypted
from tests.e2e.test_images import READ_ALL, expected
from tests.e2e.test_refusals import refused
from tests.e2e.test_signatures import trusting
from tests.harness import serve
from tests.harness.machine import Work

pytestmark = [pytest.mark.root, pytest.mark.real]


def recipients(work: Work, action: str, image: Image, *options: str | Path) -> Image:
    """Change the recipients of an image's tag; the image that it names now."""
    mark = image.registry.mark()
    result = serve.program(work, "recipients", action, f"docker://{image.by_tag}", *options)
    assert result.returncode == 0, result.stderr
    last = result.stdout.splitlines()[-1]
    assert last.startswith(f"docker://{image.by_tag}@sha256:")
    changed = Image(image.registry, image.repository, image.tag, last.rpartition("@")[2])
    assert json.loads(image.registry.get_manifest(image.repository, image.tag)[0]) == changed.manifest
    assert (changed.layers, changed.manifest["config"]) == (image.layers, image.manifest["config"])
    if "--sign-key" not in options:
        assert not image.registry.since(mark).of(set(image.layers))
    if action == "remove":
        assert "revokes nothing" in result.stderr
    return changed


def listed(work: Work, image: Image) -> list[list[tuple[str, str]]]:
    shown = serve.program(work, "recipients", "list", f"docker://{image.by_digest}", "--json")
    assert shown.returncode == 0, shown.stderr
    document = json.loads(shown.stdout)
    assert document["manifest"] == image.digest
    for layer in document["layers"]:
        assert [entry["number"] for entry in layer["recipients"]] == list(range(1, 1 + len(layer["recipients"])))
    return [[(entry["cipher"], entry["recipient"]) for entry in layer["recipients"]] for layer in document["layers"]]


def skopeo_opens(image: Image, key: Path, target: Path) -> bool:
    command = ["skopeo", "--insecure-policy", "copy", "-q", "--src-tls-verify=false", "--decryption-key", str(key)]
    source = f"docker://{image.by_digest}"
    return subprocess.run([*command, source, f"oci:{target}:t"], capture_output=True, timeout=60).returncode == 0


def test_skopeo_opens_with_an_added_key_and_not_with_a_removed_one(images: Images, work: Work) -> None:
    third, third_public = serve.key_pair(work.path, "third")
    both = [
        option for public in (images.public, images.other_public) for option in ("--encryption-key", f"jwe:{public}")
    ]
    image = encrypted(images, work, "gzip", *both)
    jwe = ("ECDH-ES+A256KW", "")
    assert listed(work, image) == [[jwe, jwe]] * 3
    more = recipients(work, "add", image, "--recipient", f"jwe:{third_public}", "--key", images.other_key)
    assert listed(work, more) == [[jwe, jwe, jwe]] * 3
    fewer = recipients(work, "remove", more, "--number", "2")
    assert listed(work, fewer) == [[jwe, jwe]] * 3
    for name, key, opens in (("first", images.key, True), ("other", images.other_key, False), ("third", third, True)):
        assert skopeo_opens(fewer, key, work.path / name) == opens
    assert skopeo_opens(more, images.other_key, work.path / "old"), "what was removed opens the manifest of before"
    # Text for people, and the layers of skopeo are opened by keys of ours as before.
    shown = serve.program(work, "recipients", "list", f"docker://{fewer.by_tag}")
    assert shown.stdout.splitlines()[0].split() == ["LAYER", "NUMBER", "SCHEME", "CIPHER", "RECIPIENT"]
    assert serve.program(work, "check", f"docker://{fewer.by_digest}", "--key", third).returncode == 0


def test_a_node_with_an_added_key_shares_the_cache(node: NodeMaker, images: Images, work: Work) -> None:
    image = images.sealed(1, label="rewrapped")
    guest = node(mode="confidential")
    assert guest.shell(guest.pull(image), READ_ALL) == expected()
    author, author_public = serve.key_pair(work.path, "author")
    added: list[str | Path] = ["--recipient", f"jwe:{images.other_public}", "--key", images.key]
    more = recipients(work, "add", image, *added)
    changed = recipients(work, "remove", more, "--number", "1", "--sign-key", author)
    hinted, _ = images.registry.get_manifest(images.repository, hint_tag(Digest(image.layers[-1])))
    assert "sha256:" + hashlib.sha256(hinted).hexdigest() == changed.digest
    assert guest.shell(image.by_digest, READ_ALL) == expected(), "what was pulled before still runs"
    guest.containerd.remove_image(image.by_digest)
    guest.containerd.wait_for_no_snapshots()
    assert refused(guest, changed) == "no-key"
    # The same node with the other key, trusting the author's signatures.
    rule = {"type": "sigstoreSigned", "keyPath": str(author_public), "signedIdentity": {"type": "matchRepository"}}
    table: dict[str, Any] = {"mode": "confidential", "keys": {"files": [str(images.other_key)]}}
    assert guest.daemon.terminate() == 0
    base = {"root": str(guest.daemon.root), "cache_dir": str(guest.daemon.cache), "address": str(guest.daemon.address)}
    guest.daemon.config.write_text(serve.toml(base | table | trusting(work, images, rule)))
    guest.daemon.start()
    guest.containerd.wait_connected()
    mark = images.registry.mark()
    assert guest.shell(guest.pull(changed, "tag"), READ_ALL) == expected()
    assert not images.registry.since(mark).of(set(image.layers)), "all of its blobs were in the cache"
