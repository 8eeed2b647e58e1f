"""skopeo (ocicrypt in Go) reads what we encrypt, and we read what it encrypts."""

import base64
import gzip
import hashlib
import io
import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import PrivateFormat

from snapshotter import labels
from snapshotter.config import Limits
from snapshotter.errors import KeyDenied
from snapshotter.keys import ocicrypt
from snapshotter.keys.provider import FileKeys
from tests.unit.keys.conftest import Pair, write_pair

pytestmark = pytest.mark.real
RECIPIENTS = pytest.mark.parametrize(
    "kinds",
    [["rsa-2048"], ["rsa-4096"], ["p-256"], ["p-384"], ["p-521"], ["rsa-2048", "p-384", "p-256"]],
    ids="+".join,
)


class Layout:
    """An OCI image layout directory with one image of one layer, tagged `t`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, layer: bytes, diff_id: str, **descriptor: Any) -> "Layout":
        layout = cls(path)
        (path / "blobs/sha256").mkdir(parents=True)
        (path / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
        config = {
            "architecture": "amd64",
            "os": "linux",
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": [diff_id]},
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": labels.MEDIA_OCI_MANIFEST,
            "config": layout.add(json.dumps(config).encode(), labels.MEDIA_OCI_CONFIG),
            "layers": [layout.add(layer, labels.MEDIA_LAYER_GZIP) | descriptor],
        }
        entry = layout.add(json.dumps(manifest).encode(), labels.MEDIA_OCI_MANIFEST)
        entry["annotations"] = {"org.opencontainers.image.ref.name": "t"}
        (path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
        return layout

    def add(self, content: bytes, media_type: str) -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        (self.path / "blobs/sha256" / digest).write_bytes(content)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(content)}

    def blob(self, digest: str) -> bytes:
        return (self.path / "blobs/sha256" / digest.removeprefix("sha256:")).read_bytes()

    def layer(self) -> tuple[dict[str, Any], bytes]:
        index = json.loads((self.path / "index.json").read_bytes())
        descriptor: dict[str, Any] = json.loads(self.blob(index["manifests"][0]["digest"]))["layers"][0]
        return descriptor, self.blob(descriptor["digest"])


def skopeo(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = ["skopeo", "--insecure-policy", "copy", "--quiet", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        content = b"hello\n" * 20_000
        entry = tarfile.TarInfo("hello")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return out.getvalue()


@pytest.fixture(scope="module")
def plain(tar: bytes) -> bytes:
    return gzip.compress(tar, mtime=0)


@pytest.fixture
def source(tmp_path: Path, tar: bytes, plain: bytes) -> Layout:
    return Layout.create(tmp_path / "plain", plain, "sha256:" + hashlib.sha256(tar).hexdigest())


@RECIPIENTS
async def test_we_open_what_skopeo_encrypted(
    tmp_path: Path, pairs: dict[str, Pair], source: Layout, plain: bytes, kinds: list[str]
) -> None:
    recipients = [option for kind in kinds for option in ("--encryption-key", f"jwe:{pairs[kind].public}")]
    result = skopeo(*recipients, f"oci:{source.path}:t", f"oci:{tmp_path / 'encrypted'}:t")
    assert result.returncode == 0, result.stderr
    descriptor, cipher = Layout(tmp_path / "encrypted").layer()
    assert descriptor["mediaType"] == labels.MEDIA_LAYER_GZIP_ENCRYPTED
    for kind in kinds:
        provider = FileKeys([pairs["stranger"].private, pairs[kind].private])
        assert await ocicrypt.decrypt_layer(cipher, descriptor["annotations"], provider, Limits()) == plain
    strangers = FileKeys([pairs["stranger"].private, pairs["rsa-stranger"].private])
    with pytest.raises(KeyDenied):
        await ocicrypt.decrypt_layer(cipher, descriptor["annotations"], strangers, Limits())


@RECIPIENTS
def test_skopeo_opens_what_we_encrypted(
    tmp_path: Path, pairs: dict[str, Pair], tar: bytes, plain: bytes, kinds: list[str]
) -> None:
    cipher, annotations = ocicrypt.encrypt_layer(plain, [pairs[kind].spki for kind in kinds])
    ours = Layout.create(
        tmp_path / "ours",
        cipher,
        "sha256:" + hashlib.sha256(tar).hexdigest(),
        mediaType=labels.MEDIA_LAYER_GZIP_ENCRYPTED,
        annotations=annotations,
    )
    for kind in kinds:
        target = tmp_path / f"opened-{kind}"
        result = skopeo("--decryption-key", pairs[kind].private, f"oci:{ours.path}:t", f"oci:{target}:t")
        assert result.returncode == 0, result.stderr
        descriptor, opened = Layout(target).layer()
        assert descriptor["mediaType"] == labels.MEDIA_LAYER_GZIP
        assert descriptor["digest"] == "sha256:" + hashlib.sha256(plain).hexdigest()
        assert opened == plain
    stranger = skopeo("--decryption-key", pairs["stranger"].private, f"oci:{ours.path}:t", f"oci:{tmp_path / 'no'}:t")
    assert stranger.returncode != 0


def test_our_packets_look_like_those_of_skopeo(
    tmp_path: Path, pairs: dict[str, Pair], source: Layout, plain: bytes
) -> None:
    """Same members in the same order everywhere, so that no reader can tell them apart."""

    def shape(value: Any) -> Any:
        if isinstance(value, dict):
            return [
                (name, shape(json.loads(_b64u(entry))) if name == "protected" else shape(entry))
                for name, entry in value.items()
            ]
        return [shape(entry) for entry in value] if isinstance(value, list) else type(value)

    def _b64u(text: str) -> bytes:
        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))

    for kinds in (["rsa-2048"], ["p-521"], ["rsa-2048", "p-256", "p-384"]):
        target = tmp_path / "+".join(kinds)
        options = [option for kind in kinds for option in ("--encryption-key", f"jwe:{pairs[kind].public}")]
        assert skopeo(*options, f"oci:{source.path}:t", f"oci:{target}:t").returncode == 0
        theirs = Layout(target).layer()[0]["annotations"]
        _, ours = ocicrypt.encrypt_layer(plain, [pairs[kind].spki for kind in kinds])
        assert set(ours) == set(theirs)
        for name in ours:
            assert shape(json.loads(base64.b64decode(ours[name]))) == shape(json.loads(base64.b64decode(theirs[name])))


@pytest.mark.parametrize("kind", ["rsa-2048", "p-384"])
async def test_traditional_key_files_are_read(
    tmp_path: Path, pairs: dict[str, Pair], source: Layout, plain: bytes, kind: str
) -> None:
    """PKCS#1 and SEC1, as older `openssl` commands write them (skopeo 1.9 itself does not read SEC1)."""
    pair = write_pair(tmp_path, kind, pairs[kind].key, PrivateFormat.TraditionalOpenSSL)
    result = skopeo("--encryption-key", f"jwe:{pair.public}", f"oci:{source.path}:t", f"oci:{tmp_path}/e:t")
    assert result.returncode == 0, result.stderr
    descriptor, cipher = Layout(tmp_path / "e").layer()
    assert await ocicrypt.decrypt_layer(cipher, descriptor["annotations"], FileKeys([pair.private]), Limits()) == plain
