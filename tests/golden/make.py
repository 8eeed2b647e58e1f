"""Makes `state-VERSION.tar.xz`: root, cache and key of a node of that release, and what its clients knew.

    python -m tests.golden.make CHECKOUT OUT     # CHECKOUT: a working tree of the release

Needs root. Run once when a version is released; the archive is never made again.
"""

import json
import os
import random
import subprocess
import sys
import tarfile
from pathlib import Path

from tests.conformance.client import Client
from tests.conformance.layers import mounted
from tests.conformance.pull import pull
from tests.golden.state import DATA, HELLO, PLUGIN, known
from tests.harness import oci, serve
from tests.harness.machine import Work
from tests.harness.registry import Registry
from tests.harness.serve import Serve

REPOSITORY = "golden/app"


def main(checkout: Path, out: Path) -> None:
    with Work("golden") as work:
        key, public = serve.key_pair(work.path)
        registry = Registry(work)
        reference = push(work, registry, checkout, public)
        daemon = Serve(work, settings={"keys": {"files": [str(key)]}}, environment={"PYTHONPATH": str(checkout)})
        client = Client(daemon.address, PLUGIN)
        ordinary(client, work)
        lazy(client, registry, reference, work)
        document = known(client) | {"version": daemon.status()["version"]}
        client.close()
        if daemon.terminate():
            raise RuntimeError(daemon.log())
        (work.path / "known.json").write_text(json.dumps(document, indent=1, sort_keys=True))
        with tarfile.open(out, "w:xz") as tar:
            for name, path in (("root", daemon.root), ("cache", daemon.cache), ("key.pem", key)):
                tar.add(path, name, filter=without_sockets)
            tar.add(work.path / "known.json", "known.json")


def without_sockets(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if member.name.endswith((".sock", ".lock", "/lock")) else member


def push(work: Work, registry: Registry, checkout: Path, public: Path) -> str:
    """A sealed image of two small layers; its reference by digest."""
    layout = oci.Layout(work.path / "layout")
    layers = [
        layout.add_members([(oci.member("etc/"), b""), (oci.member("etc/hello"), HELLO)]),
        layout.add_members([(oci.member("data", 0o640), DATA), (oci.member("link", link="data"), b"")]),
    ]
    layout.add_image("app", layers, {"Cmd": ["/nothing"]})
    target = f"docker://{registry.address}/{REPOSITORY}:1"
    command = [*serve.PROGRAM, "convert", f"oci:{layout.path}:app", target, "--recipient", f"jwe:{public}"]
    environment = work.environment | {"PYTHONPATH": str(checkout)}
    done = subprocess.run(command, env=environment, cwd=checkout, check=True, capture_output=True, text=True)
    return done.stdout.strip().splitlines()[-1].removeprefix("docker://").replace(f"{REPOSITORY}:1@", f"{REPOSITORY}@")


def ordinary(client: Client, work: Work) -> None:
    """base ← top ← an active one and a view; one with many labels; one that was removed."""
    for name, parent in (("base", ""), ("top", "base"), ("gone", "")):
        with mounted(client.prepare(f"extract-{name}", parent), work.path) as top:
            (top / name).write_text(f"content of {name}\n")
            (top / "directory").mkdir(exist_ok=True)
            (top / "directory" / "file").write_bytes(random.Random(name).randbytes(500))
        client.commit(name, f"extract-{name}", {"containerd.io/gc.root": "2026-01-01T00:00:00Z", "note": name})
    client.remove("gone")
    with mounted(client.prepare("container", "top", {"a": "1"}), work.path) as top:
        (top / "written").write_text("by a container\n")
        (top / "base").unlink()
    client.view("look", "top")
    client.prepare("labelled", "", {f"example.org/label-{n}.dotted": "ä" * n for n in range(1, 40)})
    client.update("labelled", {"added": "later"}, "labels.added")


def lazy(client: Client, registry: Registry, reference: str, work: Work) -> None:
    """The image, and a container on top that has read everything."""
    top = pull(client, registry, reference)
    with mounted(client.prepare("lazy-container", top), work.path) as root:
        if (root / "etc/hello").read_bytes() != HELLO or (root / "data").read_bytes() != DATA:
            raise RuntimeError("the image does not read back")
        (root / "etc/hello").write_bytes(b"changed\n")


if __name__ == "__main__":
    os.umask(0o022)
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
