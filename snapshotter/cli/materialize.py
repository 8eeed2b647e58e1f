"""`materialize`: gives containerd the blobs of a lazily pulled image, so that push, save, commit and export work.

containerd has downloaded none of them, because the snapshotter answered for their layers. They come from the registry
that the image's name leads to, and get what an ordinary pull gives them: the label that says where they are from, and
labels on the manifest that keep them from garbage collection.
"""

import argparse
import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from snapshotter.errors import BadReference, NotFound

if TYPE_CHECKING:
    from snapshotter.cli.containerd import Containerd, Target
    from snapshotter.cli.progress import Progress
    from snapshotter.config import Config
    from snapshotter.digest import Digest
    from snapshotter.image.manifest import Descriptor, Manifest
    from snapshotter.registry.client import RegistryClient
    from snapshotter.registry.reference import Reference

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

_SOCKET = "/run/containerd/containerd.sock"
_SOURCE = "containerd.io/distribution.source."
_KEPT = "containerd.io/gc.ref.content."
_RANGE = 8 << 20  # bytes asked for at once when an interrupted blob is continued


def register(commands: "Commands") -> None:
    command = commands.add_parser(
        "materialize",
        help="give containerd the blobs of a lazy image",
        description="Fetch the blobs of an image that containerd did not download into its content store, verified and "
        "resumable, so that push, save, commit, export and conversion work. Containers are not touched, and sealed "
        "layers stay sealed. The blobs go when the image is removed.",
    )
    command.add_argument("image", metavar="IMAGE", help="its name in containerd (ctr images ls)")
    command.add_argument(
        "--containerd", metavar="SOCK", type=Path, default=Path(_SOCKET), help="its socket (default: %(default)s)"
    )
    command.add_argument(
        "--namespace", metavar="NS", default="k8s.io", help="containerd's namespace (default: %(default)s)"
    )
    command.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="configuration: [registry] and [limits] (default: the node's)",
    )
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(run=run, root=None)


class Done(NamedTuple):
    """What was fetched, and what was there."""

    fetched: int
    bytes: int
    present: int


def run(arguments: argparse.Namespace) -> int:
    from snapshotter import log
    from snapshotter.cli.node import load_config
    from snapshotter.cli.progress import size

    log.configure("warning", "console")
    _, config = load_config(arguments)
    done = asyncio.run(_run(arguments, config))
    if arguments.json:
        print(json.dumps(done._asdict()))
    else:
        print(f"{done.fetched} blobs, {size(done.bytes)} fetched; {done.present} were there")
    return 0


async def _run(arguments: argparse.Namespace, config: "Config") -> Done:
    from snapshotter.cli.containerd import Containerd
    from snapshotter.cli.progress import Progress
    from snapshotter.registry.client import RegistryClient

    async with (
        Containerd(arguments.containerd.absolute(), arguments.namespace) as containerd,
        RegistryClient(config.registry, config.limits) as registry,
    ):
        name, target = await _find(containerd, arguments.image)
        return await Materializer(containerd, registry, config, Progress()).run(name, target)


async def _find(containerd: "Containerd", text: str) -> "tuple[Reference, Target]":
    """The image by the name that was typed, or by the full one that clients make of a short name."""
    from snapshotter.registry.reference import Reference

    reference = Reference.parse(text)
    names = [text, str(reference), f"{reference}:latest"]
    for name in dict.fromkeys(names):
        try:
            return reference, await containerd.image(name)
        except NotFound:
            continue
    raise NotFound(f"image {text[:200]}: containerd has no image of this name", hint="ctr -n NAMESPACE images ls")


class Materializer:
    """Brings one image's content store up to date."""

    def __init__(
        self, containerd: "Containerd", registry: "RegistryClient", config: "Config", progress: "Progress"
    ) -> None:
        self._containerd = containerd
        self._registry = registry
        self._limits = config.limits
        self._progress = progress

    async def run(self, name: "Reference", target: "Target") -> Done:
        """Raises NotFound, DigestMismatch, Unavailable and the registry's errors."""
        if not name.host:
            raise BadReference(f"image {name}: not from a registry")
        fetched = amount = present = 0
        for digest, manifest in await self._manifests(target.digest):
            await self._keep(digest, manifest)
            for blob in (manifest.config, *manifest.layers):
                if await self._has(name, blob):
                    present += 1
                else:
                    await self._fetch(name.pinned(digest), blob)
                    fetched, amount = fetched + 1, amount + blob.size
        return Done(fetched, amount, present)

    async def _manifests(self, digest: "Digest") -> "list[tuple[Digest, Manifest]]":
        """The image manifests that containerd has of this image: one, or of an index those of pulled platforms."""
        from snapshotter.image.manifest import INDEX_TYPES, MANIFEST_TYPES, document_type, parse_index, parse_manifest

        raw = await self._containerd.read(digest, self._limits.manifest_bytes)
        if document_type(raw) not in INDEX_TYPES:
            return [(digest, parse_manifest(raw, self._limits))]
        found = []
        for entry in parse_index(raw, self._limits).manifests:
            if entry.media_type in MANIFEST_TYPES and await self._containerd.labels(entry.digest) is not None:
                found += await self._manifests(entry.digest)
        return found

    async def _keep(self, digest: "Digest", manifest: "Manifest") -> None:
        """What hangs on a manifest by these labels is not garbage. They come first, so that nothing is collected
        between its last byte and its label.
        """
        labels = {f"{_KEPT}config": str(manifest.config.digest)}
        labels |= {f"{_KEPT}l.{index}": str(layer.digest) for index, layer in enumerate(manifest.layers)}
        known = await self._containerd.labels(digest)
        if known is None or any(known.get(name) != value for name, value in labels.items()):
            await self._containerd.add_labels(digest, labels)

    async def _has(self, name: "Reference", blob: "Descriptor") -> bool:
        """Whether containerd has the blob, which then also says where it came from."""
        known = await self._containerd.labels(blob.digest)
        if known is None:
            return False
        label, value = _source(name, known)
        if known.get(label) != value:
            await self._containerd.add_labels(blob.digest, {label: value})
        return True

    async def _fetch(self, source: "Reference", blob: "Descriptor") -> None:
        async def rest(offset: int) -> AsyncGenerator[bytes, None]:
            if offset == 0:
                async with aclosing(self._registry.blob_stream(source, blob.digest, blob.size)) as pieces:
                    async for piece in pieces:
                        yield piece
            while 0 < offset < blob.size:
                length = min(_RANGE, blob.size - offset)
                yield await self._registry.read_range(source, blob.digest, offset, length, blob.size)
                offset += length

        self._progress.begin(f"blob {blob.digest}", blob.size)
        await self._containerd.write(blob.digest, blob.size, dict([_source(source, {})]), rest, self._progress.advance)
        self._progress.end()


def _source(name: "Reference", known: dict[str, str]) -> tuple[str, str]:
    """The label by which a push may mount the blob from another repository, as pulls of containerd write it."""
    host = name.host.rpartition(":")[0] if name.host.rpartition(":")[2].isdecimal() else name.host
    label = f"{_SOURCE}{host.strip('[]')}"
    repositories = {*filter(None, known.get(label, "").split(",")), name.repository}
    return label, ",".join(sorted(repositories))
