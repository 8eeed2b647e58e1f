"""The stage of the demo: one image in three forms on one registry, and the ways to start it."""

import hashlib
import json
import os
import secrets
import stat
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.demo.canary import Canaries
from tests.demo.report import Figures, Report
from tests.harness import debian, oci, serve
from tests.harness.broker import Broker
from tests.harness.containerd import Containerd
from tests.harness.link import ShapedLink
from tests.harness.machine import Work
from tests.harness.oci import member
from tests.harness.registry import Registry
from tests.harness.serve import Serve

REPOSITORY = "demo/app"
ROUND_TRIP_MS, MEGABITS = 20, 100
HELLO = ("/usr/bin/python3", "-c", "print('hello')")
MARK = "COCO_DEMO_DAEMON"  # in the environment of the daemons under watch


@dataclass(frozen=True)
class Published:
    """An image on the registry: its digest, layers (digest → size), and the link through which it is pulled."""

    tag: str
    digest: str
    layers: dict[str, int]
    link: ShapedLink

    @property
    def repository(self) -> str:
        return f"{self.link.address}/{REPOSITORY}"

    @property
    def by_digest(self) -> str:
        return f"{self.repository}@{self.digest}"

    @property
    def by_tag(self) -> str:
        return f"{self.repository}:{self.tag}"


class Stage:
    """Registry, links, keys and images. Everything is in `work`."""

    def __init__(self, work: Work, report: Report) -> None:
        self.work = work
        self.report = report
        self.canaries = Canaries()
        self.flip_content = secrets.token_bytes(
            1 << 20
        )  # a layer of its own, so that every byte of its blob is this file's
        self.registry = Registry(work)
        self.trusted = self._tmpfs(work.directory("guest"))
        self.private_key, self.public_key = serve.key_pair(self.trusted)
        self.init_data = self._init_data("initdata.toml", "demo")
        digest = hashlib.sha384(self.init_data.read_bytes()).hexdigest()
        self.broker = Broker(work, "--allow-sample", "--expect", f"init_data={digest}")

    def _tmpfs(self, path: Path) -> Path:
        """The guest's trusted memory: the daemon's root and the private key."""
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g,mode=0700", "tmpfs", str(path)], check=True)
        self.work.stack.callback(subprocess.run, ["umount", str(path)], check=True)
        return path

    def _init_data(self, name: str, purpose: str) -> Path:
        """What a guest was started with, which is part of its evidence."""
        path = self.trusted / name
        path.write_text(f'version = "0.1.0"\nalgorithm = "sha384"\n[data]\n"purpose" = "{purpose}"\n')
        return path

    def link(self, name: str) -> ShapedLink:
        return ShapedLink(
            self.work, self.registry.address, round_trip_ms=ROUND_TRIP_MS, megabits=MEGABITS, name=f"link-{name}"
        )

    # the three forms

    def build(self) -> oci.Layout:
        """Debian, Python, libraries (cached), and two small layers that are new in each run."""
        base = debian.image("python", self.report.note)
        layout = oci.Layout(self.work.path / "app.oci")
        layout.take_blobs(base)
        application = layout.add_members(self.canaries.members())
        flip = layout.add_members([(member("opt/flip/"), b""), (member("opt/flip/data"), self.flip_content)])
        config = debian.CONFIGS["python"]
        environment = [*map(str, config["Env"]), f"DEMO_TOKEN={self.canaries.env}"]  # type: ignore[call-overload]
        layout.add_image("app", [*base.layers("python"), application, flip], {**config, "Env": environment})
        return layout

    def publish_ordinary(self, layout: oci.Layout) -> Published:
        digest = self.registry.push(layout.path, "app", REPOSITORY, "oci")
        return self.published("oci", digest, self.link("ordinary"))

    def convert(self, tag: str, *options: str | Path) -> Published:
        """Convert the ordinary image on the registry into `tag`, pushing through a link of its own."""
        link = self.link(tag)
        target = f"docker://{link.address}/{REPOSITORY}:{tag}"
        digest = serve.convert(self.work, f"docker://{self.registry.address}/{REPOSITORY}:oci", target, *options)
        return self.published(tag, digest, link)

    def encrypt(self, tag: str) -> Published:
        """The ordinary image with every layer encrypted as a whole, by skopeo: what guests pull today."""
        where = f"docker://{self.registry.address}/{REPOSITORY}"
        subprocess.run(
            ["skopeo", "--insecure-policy", "copy", "--quiet", "--src-tls-verify=false", "--dest-tls-verify=false",
             "--encryption-key", f"jwe:{self.public_key}", f"{where}:oci", f"{where}:{tag}"],
            check=True, capture_output=True,
        )  # fmt: skip
        content, _ = self.registry.get_manifest(REPOSITORY, tag)
        return self.published(tag, "sha256:" + hashlib.sha256(content).hexdigest(), self.link(tag))

    def published(self, tag: str, digest: str, link: ShapedLink) -> Published:
        manifest = json.loads(self.registry.get_manifest(REPOSITORY, digest)[0])
        return Published(tag, digest, {layer["digest"]: layer["size"] for layer in manifest["layers"]}, link)

    # the ways to run it

    def confidential(self, image: Published, name: str = "coco", init_data: Path | None = None) -> Serve:
        """Our daemon as a guest runs it: state in memory, cache on an untrusted disk, one pinned image.

        It has no key of its own; the broker releases one for the evidence that belongs to `init_data`.
        """
        keys = self.broker.keys(init_data=str(init_data or self.init_data))
        return self._guest(image, name, keys)

    def wrong_guest(self, image: Published) -> Serve:
        """The same with other initdata, as a host that wants the key would start it."""
        return self.confidential(image, "wrong-guest", self._init_data("other.toml", "something else"))

    def guest_with_key(self, image: Published, name: str) -> Serve:
        """One that was given a private key."""
        return self._guest(image, name, {"files": [str(self.private_key)]})

    def _guest(self, image: Published, name: str, keys: Mapping[str, Any]) -> Serve:
        settings = {"mode": "confidential", "keys": keys, "policy": {"pins": [image.by_digest]}}
        return Serve(self.work, name, settings, root=self.trusted / name, environment={MARK: "1"})

    def containerd(self, name: str, daemon: Serve | None) -> Containerd:
        """A fresh containerd that pulls with our daemon, or with its own overlayfs."""
        if daemon is None:
            return Containerd(self.work, name, snapshotter="overlayfs")
        return Containerd(self.work, name, plugins={"coco": daemon.address})

    def measure(self, containerd: Containerd, image: Published, daemon: Serve | None) -> Figures:
        """Pull by digest, run until the first line of output, and count."""
        mark = self.registry.mark()
        start = time.monotonic()
        containerd.cri.pull(image.by_digest)
        pulled = time.monotonic()
        container = containerd.start(image.by_digest, *HELLO)
        line = container.stdout.readline()
        done = time.monotonic()
        rest = container.stdout.read()
        container.kill()
        if line != "hello\n":
            raise RuntimeError(f"the container said {line + rest!r}")
        traffic = self.registry.since(mark)
        return Figures(
            pull_seconds=round(pulled - start, 3),
            first_output_seconds=round(done - start, 3),
            registry_bytes=traffic.size,
            registry_requests=len(traffic),
            layer_bytes_by_containerd=traffic.by("containerd").of(set(image.layers)).size,
            disk_bytes=disk_usage(containerd.home) + (disk_usage(daemon.cache) if daemon else 0),
            memory_bytes=disk_usage(daemon.root) if daemon else 0,
        )


def disk_usage(top: Path) -> int:
    """Allocated bytes of the files below `top` on its own file system, hard links once; 0 if there is no `top`.

    Of the last container directories may go meanwhile, which then count nothing.
    """
    if not top.exists():
        return 0
    device = os.stat(top).st_dev
    blocks: dict[int, int] = {}  # by inode

    def here(path: str) -> bool:
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            return False
        if status.st_dev == device and not stat.S_ISDIR(status.st_mode):
            blocks[status.st_ino] = status.st_blocks
        return status.st_dev == device

    for directory, directories, files in os.walk(top):
        directories[:] = [name for name in directories if here(os.path.join(directory, name))]
        for name in files:
            here(os.path.join(directory, name))
    return 512 * sum(blocks.values())


def listing(containerd: Containerd, reference: str) -> str:
    """Hashes and names of the image's files, as a container sees them: sorted lines `<sha256>  <path>`.

    /opt/flip is left out: nobody may have read it before its byte is flipped.
    """
    chosen = "! -path '/opt/flip/*' ! -path '*/__pycache__/*'"
    script = f"find /usr /opt /etc -xdev -type f {chosen} -print0 | sort -z | xargs -0 sha256sum"
    result = containerd.run(reference, "/bin/sh", "-c", script, timeout=300)
    if result.returncode:
        raise RuntimeError(f"listing ended with {result.returncode}: {result.stderr[-500:]}")
    return result.stdout
