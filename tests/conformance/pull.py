"""The calls with which containerd's CRI pulls an image that needs no unpacking."""

import hashlib
import json

import grpc

from snapshotter import labels
from tests.conformance.client import ROOT_LABEL, Client
from tests.harness.registry import Registry


def pull(client: Client, registry: Registry, reference: str) -> str:
    """Prepare every layer of `reference` (host/repository@digest); the name of the topmost snapshot."""
    name, digest = reference.split("@")
    repository = name.partition("/")[2]
    manifest = json.loads(registry.get_manifest(repository, digest)[0])
    config = json.loads(registry.get_blob(repository, manifest["config"]["digest"]))
    parent = chain = ""
    for number, (layer, diff_id) in enumerate(zip(manifest["layers"], config["rootfs"]["diff_ids"], strict=True)):
        chain = f"sha256:{hashlib.sha256(f'{chain} {diff_id}'.encode()).hexdigest()}" if chain else diff_id
        given = {key: text for key, text in layer["annotations"].items() if key.startswith("containerd.io/snapshot/")}
        given |= ROOT_LABEL | {
            labels.SNAPSHOT_REF: chain,
            labels.CRI_IMAGE_REF: reference,
            labels.CRI_MANIFEST_DIGEST: digest,
            labels.CRI_LAYER_DIGEST: layer["digest"],
            labels.CRI_IMAGE_LAYERS: ",".join(later["digest"] for later in manifest["layers"][number:]),
        }
        try:
            client.prepare(f"extract-{number}", parent, given)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.ALREADY_EXISTS:
                raise
        [found] = [each for each in client.walk() if each.labels.get(labels.SNAPSHOT_REF) == chain]
        parent = found.name
    return parent
