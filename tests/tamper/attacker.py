"""A registry in the hands of an attacker, and a node that pulls from it: real rooms, no data plane."""

import hashlib
import json
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from snapshotter import labels
from snapshotter.bootstrap.loader import Loader
from snapshotter.config import Config, Limits, Policy
from snapshotter.crypto.layer import LayerPrivate
from snapshotter.crypto.secret import SecretBytes
from snapshotter.digest import Digest
from snapshotter.errors import KeyDenied, SnapshotterError
from snapshotter.image.documents import DocumentCache
from snapshotter.image.policy import ImagePolicy
from snapshotter.image.resolver import Resolver
from snapshotter.keys.packet import PacketKeys
from snapshotter.keys.provider import AnyOf, FileKeys, KeyProvider
from snapshotter.keys.resource import Resources, ResourceUri
from snapshotter.registry.layout import OciLayout
from snapshotter.snapshots.images import Images
from snapshotter.snapshots.pullpath import origin
from snapshotter.snapshots.remote import LayerRequest, LayerVerdict

REPOSITORY = "registry.example/team/app"


@dataclass
class Keys:
    private: Path
    public: Path

    @classmethod
    def make(cls, directory: Path, name: str) -> "Keys":
        private, public = directory / f"{name}.pem", directory / f"{name}.pub"
        subprocess.run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", private], check=True)
        subprocess.run(["openssl", "ec", "-in", private, "-pubout", "-out", public], check=True, capture_output=True)
        return cls(private, public)


@dataclass
class World:
    """Two source images, one sealed twice by different people, one plain; in one layout."""

    keys: Keys
    stranger: Keys
    layout: Path


@dataclass
class NoDataPlane:
    """Refusals happen before anything is attached or mounted; this records that nothing was."""

    calls: list[str] = field(default_factory=list)

    async def attached(self, attach_id: int) -> int | None:
        self.calls.append("attached")
        return None

    async def attach(self, attach_id: int, memfd: int) -> None:
        self.calls.append("attach")

    async def detach(self, attach_id: int) -> None:
        self.calls.append("detach")

    async def mount(self, image_id: int, devices: int, target: Path) -> None:
        self.calls.append("mount")

    async def unmount(self, target: Path) -> None:
        self.calls.append("unmount")

    def is_mounted(self, target: Path) -> bool:
        return False


class Registry:
    """A layout that an attacker edits."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def blob(self, digest: str) -> bytes:
        return (self.path / "blobs/sha256" / digest[7:]).read_bytes()

    def put(self, content: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        (self.path / "blobs/sha256" / digest).write_bytes(content)
        return {"digest": f"sha256:{digest}", "size": len(content)}

    def overwrite(self, digest: str, content: bytes) -> None:
        (self.path / "blobs/sha256" / digest[7:]).write_bytes(content)

    def digest(self, tag: str) -> Digest:
        for entry in json.loads((self.path / "index.json").read_bytes())["manifests"]:
            if entry["annotations"]["org.opencontainers.image.ref.name"] == tag:
                return Digest(entry["digest"])
        raise KeyError(tag)

    def tag(self, tag: str, digest: str) -> None:
        """Let `tag` lead to a manifest, and to no other."""
        index = json.loads((self.path / "index.json").read_bytes())
        name = "org.opencontainers.image.ref.name"
        kept = [entry for entry in index["manifests"] if entry["annotations"][name] != tag]
        entry = {"mediaType": labels.MEDIA_OCI_MANIFEST, "digest": digest, "size": len(self.blob(digest))}
        index["manifests"] = [*kept, entry | {"annotations": {name: tag}}]
        (self.path / "index.json").write_text(json.dumps(index))

    def manifest(self, tag: str) -> dict[str, Any]:
        return json.loads(self.blob(self.digest(tag)))  # type: ignore[no-any-return]

    def config(self, tag: str) -> dict[str, Any]:
        return json.loads(self.blob(self.manifest(tag)["config"]["digest"]))  # type: ignore[no-any-return]

    def forge(self, tag: str, edit: Callable[[dict[str, Any], dict[str, Any]], None]) -> Digest:
        """A new manifest made from that of `tag`; `edit` changes manifest and config in place."""
        manifest, config = self.manifest(tag), self.config(tag)
        edit(manifest, config)
        manifest["config"] |= self.put(json.dumps(config).encode())
        return Digest(self.put(json.dumps(manifest).encode())["digest"])


class Broker:
    """Hands out what it has; a real one asks for evidence first, which is tested elsewhere."""

    def __init__(self, resources: Mapping[str, bytes]) -> None:
        self._resources = resources

    async def get(self, uri: ResourceUri) -> SecretBytes:
        if str(uri) not in self._resources:
            raise KeyDenied(f"{uri}: not here")
        return SecretBytes(self._resources[str(uri)])


class Asked:
    """A key provider that counts how often it is asked."""

    def __init__(self, provider: KeyProvider) -> None:
        self._provider = provider
        self.times = 0

    async def unwrap(self, annotations: Mapping[str, str], limits: Limits) -> LayerPrivate:
        self.times += 1
        return await self._provider.unwrap(annotations, limits)


class Node:
    """A node that pulls: real rooms over an attacker's registry."""

    def __init__(
        self, registry: Registry, key: Path | None, tmp: Path, mode: str = "open", require: str = "any", *pins: str,
        limits: Limits | None = None, rules: Policy | None = None, broker: Resources | None = None,
    ) -> None:  # fmt: skip
        limits = limits or Limits()
        wanted = rules or Policy(require=require, pins=pins)  # type: ignore[arg-type]
        policy = ImagePolicy.of(mode, wanted)  # type: ignore[arg-type]
        source = OciLayout(registry.path, limits)
        self.cache = tmp / "cache"
        self.plane = NoDataPlane()
        keys: list[KeyProvider] = [FileKeys([key])] if key else []
        self.keys = Asked(AnyOf([*keys, *([PacketKeys(broker)] if broker else [])]))
        loader = Loader(source, self.keys, self.cache, limits, policy)
        documents = DocumentCache(source, self.cache / "documents", limits)
        settings = Config(cache_dir=str(self.cache), policy=wanted)
        resolver = Resolver(documents, origin(settings, policy, documents), limits)
        self.images = Images(documents, resolver, loader, policy, self.plane, self.plane)

    async def prepare(
        self, registry: Registry, manifest: Digest, reference: str | None = None, layer: int = 0,
        chain: list[str] | None = None, cri: bool = True,
    ) -> LayerVerdict:  # fmt: skip
        """What containerd asks for layer number `layer`, with the chain ids that the image's config claims.

        Without `cri`, it hands on no more than the annotations.
        """
        document = json.loads(registry.blob(manifest))
        claimed = chain or chain_ids(json.loads(registry.blob(document["config"]["digest"]))["rootfs"]["diff_ids"])
        digests = [entry["digest"] for entry in document["layers"]]
        snapshot_labels = {labels.SNAPSHOT_REF: claimed[layer]}
        if cri:
            snapshot_labels |= {
                labels.CRI_IMAGE_REF: reference or f"{REPOSITORY}@{manifest}",
                labels.CRI_MANIFEST_DIGEST: manifest,
                labels.CRI_LAYER_DIGEST: digests[layer],
                labels.CRI_IMAGE_LAYERS: ",".join(digests[layer:]),
            }
        annotations = document["layers"][layer].get("annotations", {})
        snapshot_labels |= {k: v for k, v in annotations.items() if k.startswith("containerd.io/snapshot/")}
        parent = claimed[layer - 1] if layer else ""
        return await self.images.resolve(LayerRequest("k8s.io", snapshot_labels, claimed[layer], parent))

    def assert_nothing_left(self) -> None:
        assert self.plane.calls == []
        assert not self.cache.exists() or not [path for path in self.cache.rglob("*") if path.is_file()]


def chain_ids(diff_ids: list[str]) -> list[str]:
    chain = [diff_ids[0]]
    for diff_id in diff_ids[1:]:
        chain.append("sha256:" + hashlib.sha256(f"{chain[-1]} {diff_id}".encode()).hexdigest())
    return chain


BEFORE_KEYS = ("unauthentic-image", "wrapping", "digest-mismatch", "not-sealed")
ONLY_INSIDE = "its chunks are not sealed"  # which shows when the bootstrap is open


async def refused(node: Node, registry: Registry, manifest: Digest, reason: str, **how: Any) -> SnapshotterError:
    """Nothing is left, and what can be told from outside was decided before anybody was asked for a key."""
    asked = node.keys.times
    with pytest.raises(SnapshotterError) as caught:
        await node.prepare(registry, manifest, **how)
    assert caught.value.reason == reason, str(caught.value)
    if reason in BEFORE_KEYS and ONLY_INSIDE not in str(caught.value):
        assert node.keys.times == asked, "no key is asked for"
    node.assert_nothing_left()
    return caught.value
