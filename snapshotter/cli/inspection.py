"""`inspect`: what an image is made of. Shows chunk ids, never digests or keys of chunks."""

import argparse
import json
import stat
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from snapshotter import labels
from snapshotter.cli.opened import Opened, open_image, resolve
from snapshotter.cli.progress import size
from snapshotter.cli.table import plain
from snapshotter.config import Config
from snapshotter.crypto.chunk import CODEC_LZ4, CODEC_NONE, CODEC_ZSTD, chunk_id
from snapshotter.errors import InvalidArgument, KeyDenied
from snapshotter.formats import blobmeta
from snapshotter.formats.rafs6_tree import TreeEntry, walk
from snapshotter.image.manifest import ResolvedImage
from snapshotter.image.resolver import EncryptedImage, Image, LazyImage
from snapshotter.keys.configured import any_configured
from snapshotter.ondemand.attachment import BlobDevice
from snapshotter.registry.transport import open_location, parse_location

_YEAR_10000 = 253_402_300_800  # which datetime does not know
_CODECS = {CODEC_NONE: "none", CODEC_LZ4: "lz4", CODEC_ZSTD: "zstd"}


async def run(arguments: argparse.Namespace, config: Config) -> int:
    location = parse_location(arguments.image)
    keys: list[Path] = arguments.key
    async with open_location(location, config) as source:
        resolved, image = await resolve(source, location.reference, arguments.platform, config)
        opened = None
        if isinstance(image, LazyImage) and (keys or any_configured(config.keys) or not image.encrypted):
            opened = await open_image(source, image, keys, config)
    document = _outside(str(location), resolved, image)
    if opened is not None:
        document |= _inside(opened)
    if arguments.tree and opened is None:
        if not isinstance(image, LazyImage):
            raise InvalidArgument("--tree: only a lazy image has a bootstrap that lists its files")
        raise KeyDenied("--tree: the files of this image are visible only with --key")
    if arguments.json:
        if arguments.tree and opened is not None:
            document["tree"] = list(_tree(opened))
        print(json.dumps(document))
        return 0
    _print(document)
    if arguments.tree and opened is not None:
        for entry in walk(opened.bootstrap):
            print(_line(entry))
    return 0


def _outside(shown: str, resolved: ResolvedImage, image: Image) -> dict[str, Any]:
    """What everybody sees."""
    layers = [
        {
            "role": _role(layer.media_type, layer.annotations),
            "digest": layer.digest,
            "size": layer.size,
            "media_type": layer.media_type,
            "keys": sorted(
                name.removeprefix(labels.ENC_KEYS_PREFIX)
                for name in layer.annotations
                if name.startswith(labels.ENC_KEYS_PREFIX)
            ),
            "annotations": {
                name: value for name, value in layer.annotations.items() if not name.startswith(labels.ENC_PREFIX)
            },
        }
        for layer in resolved.manifest.layers
    ]
    kind = "ordinary"
    if isinstance(image, LazyImage):
        kind = "encrypted" if image.encrypted else "plain"
    elif isinstance(image, EncryptedImage):
        kind = "encrypted layers"
    return {
        "reference": shown,
        "manifest": resolved.manifest_digest,
        "kind": kind,
        "config_digest": resolved.manifest.config.digest,
        "config": resolved.config,
        "layers": layers,
    }


def _role(media_type: str, annotations: dict[str, str]) -> str:
    if labels.NYDUS_BOOTSTRAP in annotations:
        return "bootstrap"
    return "data" if media_type == labels.MEDIA_NYDUS_BLOB or labels.NYDUS_BLOB in annotations else "layer"


def _inside(opened: Opened) -> dict[str, Any]:
    """What only a holder of a key sees (of a plain image: everybody)."""
    bootstrap = opened.bootstrap
    document: dict[str, Any] = {
        "bootstrap": {
            "bytes": len(bootstrap.data),
            "names": bootstrap.inodes,
            "chunk_size": bootstrap.chunk_size,
            "sealed": bootstrap.sealed,
            "prefetch": len(bootstrap.prefetch),
        },
        "blobs": [
            {
                "digest": device.digest,
                "size": device.size,
                "device_bytes": device.device_bytes,
                "chunks": len(device.chunks),
                "codec": _CODECS.get(device.codec, str(device.codec)),
            }
            for device in opened.devices
        ],
    }
    if bootstrap.sealed:
        document["kind"] = "sealed"
        document["identity"] = json.loads(opened.files["image/identity.json"])
        document["true_config"] = json.loads(opened.files["image/config.json"])
    return document


def _tree(opened: Opened) -> Iterator[dict[str, Any]]:
    for entry in walk(opened.bootstrap):
        found: dict[str, Any] = {
            "path": _text(entry.path),
            "mode": stat.filemode(entry.mode),
            "uid": entry.uid,
            "gid": entry.gid,
            "size": entry.size,
            "mtime_ns": entry.mtime_ns,
            "nlink": entry.nlink,
        }
        if entry.target:
            found["target"] = _text(entry.target)
        if entry.xattrs:
            found["xattrs"] = {_text(name): value.hex() for name, value in sorted(entry.xattrs.items())}
        if entry.chunks and opened.bootstrap.sealed:
            found["chunk_ids"] = [_id(opened.devices[blob], index) for blob, index in entry.chunks]
        yield found


def _id(device: BlobDevice, index: int) -> str:
    info = device.chunks[index]
    codec = device.codec if info.flags & blobmeta.FLAG_COMPRESSED else CODEC_NONE
    return chunk_id(device.secrets[32 * index : 32 * index + 32], codec, info.compressed_size).hex()


def _text(name: bytes) -> str:
    """A hostile name: readable, and harmless on a terminal."""
    return plain(name.decode("utf-8", "backslashreplace"))


def _line(entry: TreeEntry) -> str:
    seconds = entry.mtime_ns // 1_000_000_000
    when = f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M}" if 0 <= seconds < _YEAR_10000 else f"@{seconds}"
    target = f" -> {_text(entry.target)}" if entry.target else ""
    owner = f"{entry.uid}/{entry.gid}"
    return f"{stat.filemode(entry.mode)} {owner:>11} {entry.size:>12} {when} {_text(entry.path)}{target}"


def _print(document: dict[str, Any]) -> None:
    """Names and identity come from the image."""
    print(f"reference  {document['reference']}")
    print(f"manifest   {document['manifest']}")
    print(f"kind       {document['kind']}")
    for layer in document["layers"]:
        wrapped = f", keys: {plain(', '.join(layer['keys']))}" if layer["keys"] else ""
        print(f"{layer['role']:10} {layer['digest']} {size(layer['size'])}{wrapped}")
    if "bootstrap" in document:
        shown = document["bootstrap"]
        print(f"files      {shown['names']} names in {size(shown['bytes'])}, chunks of {size(shown['chunk_size'])}")
    for blob in document.get("blobs", ()):
        print(f"blob       {blob['digest']} {blob['chunks']} chunks, {blob['codec']}, {size(blob['device_bytes'])}")
    for name, value in document.get("identity", {}).items():
        if name != "blobs":
            print(f"identity   {plain(f'{name} {value}')}")
