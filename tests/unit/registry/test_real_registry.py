"""The same client against Debian's docker-registry, with and without a password, and against skopeo's eyes."""

import json
import os
import resource
import subprocess
from collections.abc import AsyncIterator

import pytest

from snapshotter import labels
from snapshotter.config import Config, Limits, Registry
from snapshotter.digest import Digest
from snapshotter.errors import DigestMismatch, IntegrityError, NotFound, RegistryDenied
from snapshotter.image.manifest import Descriptor, Manifest, encode, fetch_image
from snapshotter.registry.client import RegistryClient
from snapshotter.registry.reference import Reference, parse_location
from snapshotter.registry.transport import open_location
from tests.harness.machine import Work
from tests.harness.registry import Registry as RealRegistry
from tests.harness.sim_registry import docker_config

pytestmark = pytest.mark.real

# bcrypt of "hunter2", cost 4
HTPASSWD = "user:$2y$04$abcdefghijklmnopqrstuuV3duMsC0HpUex6N9qapiuOHHWkwRXVm\n"
CONTENT = os.urandom(1 << 20)
DIGEST = Digest.of(CONTENT)


async def pieces_of(content: bytes) -> AsyncIterator[bytes]:
    yield content


async def test_an_image_goes_there_and_back_and_skopeo_reads_it(work: Work) -> None:
    registry = RealRegistry(work)
    config = json.dumps(
        {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [DIGEST]}}
    ).encode()
    manifest = Manifest(
        schema_version=2,
        media_type=labels.MEDIA_OCI_MANIFEST,
        config=Descriptor(media_type=labels.MEDIA_OCI_CONFIG, digest=Digest.of(config), size=len(config)),
        layers=(Descriptor(media_type=labels.MEDIA_LAYER_TAR, digest=DIGEST, size=len(CONTENT)),),
    )
    location = parse_location(f"docker://{registry.address}/team/app:v1")
    reference = location.reference
    async with open_location(location, Config()) as store:
        for stored in (True, False):
            assert await store.upload_blob(reference, DIGEST, len(CONTENT), lambda: pieces_of(CONTENT)) is stored
        await store.upload_blob(reference, Digest.of(config), len(config), lambda: pieces_of(config))
        digest = await store.put_manifest(reference, encode(manifest), manifest.media_type)
        resolved = await fetch_image(store, reference, "linux/amd64", Limits())
        assert (resolved.manifest, resolved.manifest_digest) == (manifest, digest)
        assert await store.read_range(reference, DIGEST, 1000, 5000, len(CONTENT)) == CONTENT[1000:6000]
        assert await store.blob(reference, DIGEST, len(CONTENT), len(CONTENT)) == CONTENT
        with pytest.raises(DigestMismatch):
            await store.read_range(reference, DIGEST, len(CONTENT), 10, len(CONTENT) + 10)
        with pytest.raises(NotFound):
            await store.manifest(Reference(reference.host, reference.repository, "absent"))
        with registry.tampered(DIGEST, lambda content: content[:-1] + b"\0"), pytest.raises(IntegrityError):
            await store.blob(reference, DIGEST, len(CONTENT), len(CONTENT))
    raw = subprocess.run(  # noqa: ASYNC221
        ["skopeo", "inspect", "--raw", "--tls-verify=false", str(location)], check=True, capture_output=True
    ).stdout
    assert Digest.of(raw) == resolved.manifest_digest
    agents = {request.agent for request in registry.since() if request.digest == DIGEST}
    assert all(agent.startswith("coco-snapshotter/") for agent in agents)


async def test_a_large_blob_streams_both_ways_in_little_memory(work: Work) -> None:
    registry = RealRegistry(work)
    path = work.path / "large"
    size = 160 << 20
    block = os.urandom(1 << 20)
    with path.open("wb") as file:
        for index in range(size >> 20):
            file.write(index.to_bytes(8, "little") + block[8:])
    digest = Digest.parse("sha256:" + subprocess.check_output(["sha256sum", path], text=True)[:64])  # noqa: ASYNC221
    reference = Reference.parse(f"{registry.address}/team/large:1")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with RegistryClient(Registry(), Limits()) as client:
        await client.upload_blob(reference, digest, size, path)
        received = 0
        async for piece in client.blob_stream(reference, digest, size):
            received += len(piece)
    assert received == size
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 48 << 10


async def test_a_password_opens_a_real_registry(work: Work) -> None:
    address = RealRegistry(work, htpasswd=HTPASSWD).address
    reference = Reference.parse(f"{address}/team/app:1")
    login = work.path / "config.json"
    login.write_text(docker_config(address, "user", "hunter2"))
    async with RegistryClient(Registry(docker_config=str(login)), Limits()) as client:
        await client.upload_blob(reference, DIGEST, len(CONTENT), lambda: pieces_of(CONTENT))
        assert await client.read_range(reference, DIGEST, 5, 10, len(CONTENT)) == CONTENT[5:15]
    login.write_text(docker_config(address, "user", "wrong"))
    for config in (Registry(), Registry(docker_config=str(login))):
        async with RegistryClient(config, Limits()) as client:
            with pytest.raises(RegistryDenied):
                await client.read_range(reference, DIGEST, 5, 10, len(CONTENT))
