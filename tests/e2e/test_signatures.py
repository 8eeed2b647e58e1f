"""Signatures made and verified by the real cosign, and simple signatures made by the real skopeo and GnuPG."""

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.clients import CLIENTS
from tests.e2e.conftest import Image, Images, NodeMaker
from tests.e2e.test_images import READ_ALL, expected
from tests.harness import serve
from tests.harness.machine import Work

pytestmark = [pytest.mark.root, pytest.mark.real]


@pytest.fixture
def cosign(work: Work) -> "Cosign":
    if not CLIENTS["cosign"].built:
        pytest.skip("no cosign: python3 -m tests.clients builds it")
    return Cosign(work)


class Cosign:
    """The program with a key pair of its own."""

    def __init__(self, work: Work) -> None:
        self._home = work.directory("cosign")
        self._environment = work.environment | {"COSIGN_PASSWORD": "", "HOME": str(self._home)}
        # It would ask its vendor for one, which keys of our own do not need.
        self._root = self._home / "root.json"
        self._root.write_text('{"mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1"}')
        self.run("generate-key-pair")
        self.public = self._home / "cosign.pub"

    def run(self, *arguments: str | Path) -> str:
        command = [str(CLIENTS["cosign"].program()), *map(str, arguments)]
        result = subprocess.run(
            command, cwd=self._home, env=self._environment, capture_output=True, text=True, check=False, timeout=100
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    def sign(self, image: str) -> None:
        self.run("sign", "--key", "cosign.key", "--tlog-upload=false", "--yes", image)

    def verify(self, image: str, key: Path) -> str:
        return self.run("verify", "--key", key, "--insecure-ignore-tlog", "--trusted-root", self._root, image)


def trusting(work: Work, images: Images, *requirements: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a node that runs nothing but images of our repository that satisfy `requirements`."""
    path = work.path / "policy.json"
    scope = f"{images.registry.address}/{images.repository}"
    document = {"default": [{"type": "reject"}], "transports": {"docker": {scope: requirements}}}
    path.write_text(json.dumps(document))
    return {"policy": {"file": str(path)}}


def refusal(node: Any, image: Image) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        node.containerd.cri.pull(image.by_tag)
    return str(caught.value.details())


def test_an_image_signed_by_cosign_runs_by_its_tag(node: NodeMaker, images: Images, work: Work, cosign: Cosign) -> None:
    """An unsigned one beside it does not."""
    signed, unsigned = images.sealed(1, label="for-cosign"), images.sealed(2, label="for-nobody")
    cosign.sign(signed.by_digest)
    rule = {
        "type": "sigstoreSigned", "keyPath": str(cosign.public), "signedIdentity": {"type": "matchRepository"},
    }  # fmt: skip
    guest = node(mode="confidential", **trusting(work, images, rule))
    guest.containerd.cri.pull(signed.by_tag)
    assert guest.shell(signed.by_tag, READ_ALL) == expected()
    assert "reason=unauthentic-image" in refusal(guest, unsigned)
    [admitted] = [event for event in guest.daemon.events() if event["event"] == "image admitted"]
    assert admitted["rule"].startswith("signed: sigstoreSigned, scope docker:")


def test_cosign_verifies_what_convert_has_signed(images: Images, work: Work, cosign: Cosign) -> None:
    private, public = serve.key_pair(work.path, "author")
    image = images.sealed(1, "--sign-key", private, label="own-signature")
    [verified] = json.loads(cosign.verify(image.by_digest, public))
    assert verified["critical"]["image"]["docker-manifest-digest"] == image.digest
    cosign.sign(image.by_digest)
    assert len(json.loads(cosign.verify(image.by_digest, public))) == 1, "both signatures are there, each by its key"
    with pytest.raises(AssertionError, match="no signatures found"):
        cosign.verify(images.sealed(1, label="for-nobody").by_digest, public)


def test_a_simple_signature_of_skopeo_and_gnupg(node: NodeMaker, images: Images, work: Work) -> None:
    home = work.directory("gnupg")
    home.chmod(0o700)
    environment = os.environ | {"GNUPGHOME": str(home)}

    def run(*command: str | Path) -> str:
        return subprocess.run(
            list(map(str, command)), env=environment, check=True, capture_output=True, text=True
        ).stdout

    run("gpg", "--batch", "--passphrase", "", "--quick-generate-key", "author@example.org", "rsa2048", "sign", "never")
    listed = run("gpg", "--batch", "--with-colons", "--fingerprint").splitlines()
    fingerprint = next(line.split(":")[9] for line in listed if line.startswith("fpr"))
    key = work.path / "author.asc"
    key.write_text(run("gpg", "--batch", "--armor", "--export", fingerprint))
    image, other = images.sealed(1, label="for-gpg"), images.sealed(2, label="for-nobody")
    manifest = work.path / "manifest.json"
    manifest.write_bytes(images.registry.get_manifest(images.repository, image.digest)[0])
    store = work.path / "lookaside" / f"{images.repository}@sha256={image.digest[7:]}"
    store.mkdir(parents=True)
    run("skopeo", "standalone-sign", manifest, image.by_tag, fingerprint, "-o", store / "signature-1")
    run("gpgconf", "--kill", "gpg-agent")
    rule = {"type": "signedBy", "keyType": "GPGKeys", "keyPath": str(key)}
    settings = trusting(work, images, rule)
    settings["policy"]["lookaside"] = f"file://{work.path}/lookaside"
    guest = node(mode="confidential", **settings)
    guest.containerd.cri.pull(image.by_tag)
    assert guest.shell(image.by_tag, READ_ALL) == expected()
    # A signature moved to another image, and one that was changed, are none.
    moved = store.with_name(f"{images.repository.rpartition('/')[2]}@sha256={other.digest[7:]}")
    store.rename(moved)
    assert "a signature is for another manifest" in refusal(guest, other)
    message = bytearray((moved / "signature-1").read_bytes())
    message[-10] ^= 1
    (moved / "signature-1").write_bytes(message)
    assert "a signature is not by a trusted key" in refusal(guest, other)
