"""Config and manifest of a converted image."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from snapshotter import labels
from snapshotter.build.options import Options
from snapshotter.config import Limits
from snapshotter.digest import Digest
from snapshotter.errors import InvalidArgument
from snapshotter.image.manifest import Descriptor, Manifest

# What a runtime or a policy generator cannot do without; the rest stays in the encrypted image/config.json.
_KEPT = ("User", "Env", "Entrypoint", "Cmd", "WorkingDir", "Volumes", "StopSignal")
_TOP = ("architecture", "os", "variant")


def config(source: Mapping[str, Any], diff_ids: Sequence[str], options: Options) -> dict[str, Any]:
    """The config that the registry will hold."""
    if options.plain:
        return plain_config(source, diff_ids)
    return public_config(source, diff_ids, hide_all=options.hide_config == "all")


def public_config(config: Mapping[str, Any], diff_ids: Sequence[str], *, hide_all: bool) -> dict[str, Any]:
    """The readable config of a sealed image: without history, labels, author, times and ports."""
    public = {name: config[name] for name in _TOP if config.get(name)}
    if not hide_all:
        process = config.get("config") or {}
        public["config"] = {name: process[name] for name in _KEPT if process.get(name)}
    public["rootfs"] = {"type": "layers", "diff_ids": list(diff_ids)}
    return public


def plain_config(config: Mapping[str, Any], diff_ids: Sequence[str]) -> dict[str, Any]:
    """The source's config with other layers. Its history goes when it cannot tell these layers any more."""
    result = dict(config)
    result["rootfs"] = {"type": "layers", "diff_ids": list(diff_ids)}
    history = config.get("history")
    history = [item for item in history if isinstance(item, dict)] if isinstance(history, list) else []
    if sum(not item.get("empty_layer") for item in history) == len(diff_ids) - 1:
        made = {"created_by": "coco-snapshotter convert", "comment": "RAFS bootstrap"}
        result["history"] = [*history, made]
    else:
        result.pop("history", None)
    return result


def layer_annotations(kind: Mapping[str, str], repository: str, own: Digest, bootstrap: Digest) -> dict[str, str]:
    """Annotations of a layer, with the hints that become labels where a client sends none of its own."""
    annotations = dict(kind)
    if repository:
        annotations[labels.HINT_REPOSITORY] = repository
    annotations[labels.HINT_LAYER_DIGEST] = own
    annotations[labels.HINT_BOOTSTRAP_DIGEST] = bootstrap
    return annotations


def manifest(config: bytes, layers: Sequence[Descriptor], limits: Limits) -> Manifest:
    """Raises InvalidArgument when annotations would not survive as containerd labels."""
    for layer in layers:
        for key, value in layer.annotations.items():
            if key.startswith(labels.ENC_PREFIX):
                continue
            if len(key) + len(value) > limits.label_bytes:
                raise InvalidArgument(f"annotation {key}: longer than limits.label_bytes")
    return Manifest(
        schema_version=2,
        media_type=labels.MEDIA_OCI_MANIFEST,
        config=Descriptor(media_type=labels.MEDIA_OCI_CONFIG, digest=Digest.of(config), size=len(config)),
        layers=tuple(layers),
    )


def encode_config(config: Mapping[str, Any]) -> bytes:
    return json.dumps(config, separators=(",", ":"), ensure_ascii=False).encode()
