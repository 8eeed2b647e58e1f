"""Key providers with a real peer in both directions: skopeo of the pinned version, over gRPC and as a program."""

import asyncio
import gzip
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from snapshotter import labels
from snapshotter.config import Limits
from snapshotter.crypto.secret import SecretBytes
from snapshotter.keyprovider.answers import Answers
from snapshotter.keyprovider.server import KeyProviderServer
from snapshotter.keys import ocicrypt
from snapshotter.keys.packet import Kek, PacketKeys
from snapshotter.keys.resource import ResourceUri
from tests.clients import CLIENTS
from tests.harness import serve
from tests.harness.broker import Broker
from tests.harness.machine import Work
from tests.harness.process import Process
from tests.unit.keys.test_skopeo_interop import Layout

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not CLIENTS["skopeo"].built, reason="no skopeo: python3 -m tests.clients builds it"),
]

CHECKOUT = Path(__file__).parents[2]
URI = ResourceUri("default", "image-kek", "app")
KEY = bytes(range(32))
TAR = bytes(10240)
PLAIN = gzip.compress(TAR, mtime=0)
KEYID = f"keyid={URI}"


def kek(uri: ResourceUri = URI, key: bytes = KEY) -> Kek:
    return Kek(uri, SecretBytes(key))


def provider(*keks: Kek, allow_paths: bool = False) -> KeyProviderServer:
    return KeyProviderServer(Answers(keks or [kek()], None, Limits(), allow_paths=allow_paths))


class Held:
    async def get(self, uri: ResourceUri) -> SecretBytes:
        assert uri == URI
        return SecretBytes(KEY)


def encrypted(path: Path, made: Kek) -> Layout:
    """By us, for a KEK."""
    cipher, annotations = ocicrypt.encrypt_layer(PLAIN, [made])
    kind, diff_id = labels.MEDIA_LAYER_GZIP_ENCRYPTED, "sha256:" + hashlib.sha256(TAR).hexdigest()
    return Layout.create(path, cipher, diff_id, mediaType=kind, annotations=annotations)


async def skopeo(directory: Path, entry: dict[str, Any], *arguments: str | Path) -> None:
    """Copy with this key provider."""
    path = directory / "ocicrypt.conf"
    path.write_text(json.dumps({"key-providers": {"attestation-agent": entry}}))
    process = await asyncio.create_subprocess_exec(
        CLIENTS["skopeo"].program(), "--insecure-policy", "copy", "--quiet", *map(str, arguments),
        env=os.environ | {"OCICRYPT_KEYPROVIDER_CONFIG": str(path), "PYTHONPATH": str(CHECKOUT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    _, errors = await asyncio.wait_for(process.communicate(), 60)
    if process.returncode:
        raise RuntimeError(errors.decode())


def provider_program(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    (tmp_path / "app.kek").write_bytes(KEY)
    command = ["-m", "snapshotter", "keyprovider", "--exec", "--kek", f"{URI}={tmp_path}/app.kek", *arguments]
    return {"cmd": {"path": sys.executable, "args": command}}


async def both_ways(tmp_path: Path, entry: dict[str, Any]) -> None:
    """skopeo encrypts through the provider and we open with the KEK; we encrypt and skopeo opens through it."""
    source = Layout.create(tmp_path / "plain", PLAIN, "sha256:" + hashlib.sha256(TAR).hexdigest())
    agent = f"provider:attestation-agent:{KEYID}"
    await skopeo(tmp_path, entry, "--encryption-key", agent, f"oci:{source.path}:t", f"oci:{tmp_path}/theirs:t")
    descriptor, cipher = Layout(tmp_path / "theirs").layer()
    assert descriptor["mediaType"] == labels.MEDIA_LAYER_GZIP_ENCRYPTED
    assert await ocicrypt.decrypt_layer(cipher, descriptor["annotations"], PacketKeys(Held()), Limits()) == PLAIN
    ours = encrypted(tmp_path / "ours", kek())
    decrypting = ("--decryption-key", "provider:attestation-agent")
    for made in (ours.path, tmp_path / "theirs"):
        await skopeo(tmp_path, entry, *decrypting, f"oci:{made}:t", f"oci:{tmp_path}/opened-{made.name}:t")
        assert Layout(tmp_path / f"opened-{made.name}").layer()[1] == PLAIN
    strange = encrypted(tmp_path / "strange", kek(key=bytes(32)))
    with pytest.raises(RuntimeError, match="does not open the layer key"):
        await skopeo(tmp_path, entry, *decrypting, f"oci:{strange.path}:t", f"oci:{tmp_path}/no:t")
    for refused in (f"{agent}-other", f"{agent}::algorithm=A256CTR", "provider:attestation-agent"):
        with pytest.raises(RuntimeError):
            await skopeo(tmp_path, entry, "--encryption-key", refused, f"oci:{source.path}:t", f"oci:{tmp_path}/no:t")


async def test_over_grpc_on_a_socket(tmp_path: Path) -> None:
    running = provider()
    try:
        await both_ways(tmp_path, {"grpc": await running.start(str(tmp_path / "kp.sock"))})
    finally:
        await running.stop()


async def test_over_grpc_on_loopback(tmp_path: Path) -> None:
    """And a KEK in a file that the client names."""
    running = provider(kek(ResourceUri("a", "b", "c")), allow_paths=True)
    address = await running.start(("127.0.0.1", 0))
    (tmp_path / "k").write_bytes(KEY)
    source = Layout.create(tmp_path / "plain", PLAIN, "sha256:" + hashlib.sha256(TAR).hexdigest())
    where = f"provider:attestation-agent:{KEYID}::keypath={tmp_path}/k::algorithm=A256GCM"
    await skopeo(tmp_path, {"grpc": address}, "--encryption-key", where, f"oci:{source.path}:t", f"oci:{tmp_path}/e:t")
    await running.stop()
    descriptor, cipher = Layout(tmp_path / "e").layer()
    assert await ocicrypt.decrypt_layer(cipher, descriptor["annotations"], PacketKeys(Held()), Limits()) == PLAIN


async def test_as_a_program(tmp_path: Path) -> None:
    await both_ways(tmp_path, provider_program(tmp_path))


async def test_the_command_asks_the_broker_of_its_configuration(work: Work) -> None:
    broker = Broker(work, "--allow-sample")
    config = work.path / "config.toml"
    config.write_text(serve.toml({"keys": broker.keys()}))
    command: list[str | Path] = [*serve.PROGRAM, "keyprovider", "--listen", "127.0.0.1:0", "--config", config]
    process = Process(work, "keyprovider", command, environment={"PYTHONPATH": str(CHECKOUT)})
    process.wait_until(lambda: "\n" in process.output(), "keyprovider listens", 20)
    uri = ResourceUri.parse(broker.recipient.partition("=")[0])
    made = encrypted(work.path / "ours", kek(uri, broker.key.read_bytes()))
    entry = {"grpc": process.output().split()[0]}
    await skopeo(
        work.path, entry, "--decryption-key", "provider:attestation-agent", f"oci:{made.path}:t", f"oci:{work.path}/o:t"
    )
    assert Layout(work.path / "o").layer()[1] == PLAIN
    assert process.stop() == 0
    for secret in broker.secrets:
        assert secret not in process.output() + process.errors()
