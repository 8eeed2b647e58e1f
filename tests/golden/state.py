"""What is in a golden state, and what a client sees of it."""

import random
from typing import Any

from snapshotter.snapshots.model import Kind
from tests.conformance.client import Client

PLUGIN = "coco"
HELLO = b"hello from a golden image\n"
DATA = random.Random(7).randbytes(5000)


def known(client: Client) -> dict[str, Any]:
    """All snapshots with their labels and times, and what was measured when they were committed."""
    infos = sorted(client.walk())
    return {
        "snapshots": {info.name: [info.parent, info.kind.name, info.created_ns, info.updated_ns, dict(info.labels)]
                      for info in infos},
        "usage": {info.name: list(client.usage(info.name)) for info in infos
                  if info.kind is Kind.COMMITTED and "@" not in info.name},
    }  # fmt: skip
