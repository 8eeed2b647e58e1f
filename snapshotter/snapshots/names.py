"""Names of remote snapshots, which are ours to choose: `<chain id>@<id> <reference> <manifest> <bootstrap>`.

containerd keeps them in its records and asks by them for ever, and it never sends labels a second time. So whatever is
needed to find and verify the image again is in the name: when our state is lost (a root in memory, after a reboot),
what containerd remembers is enough. It is a claim like the labels of a pull, and is verified like one; the manifest of
an image that was pulled by hints is `-`, so that it is verified like hints.
"""

import re

from snapshotter.snapshots.remote import LayerVerdict, NamedLayer

_DIGEST = r"sha256:[0-9a-f]{64}"
_NAME = re.compile(rf"({_DIGEST})@[0-9]{{1,18}} ([!-~]{{1,1024}}) (?:-|({_DIGEST})) ({_DIGEST})")


def name(chain_id: str, number: int, layer: LayerVerdict) -> str:
    """For the remote snapshot of a layer."""
    if layer.record is None:
        return f"{chain_id}@{number}"
    manifest = "-" if layer.hinted else layer.record.manifest
    return f"{chain_id}@{number} {layer.record.reference} {manifest} {layer.record.bootstrap}"


def parse(text: str) -> NamedLayer | None:
    """None for a name that does not lead to an image."""
    found = _NAME.fullmatch(text)
    return NamedLayer(*found.groups()) if found else None
