"""Programs that Debian lacks, each pinned by a Go module of ours: which they are and where they were built to.

`python3 -m tests.clients` builds what is missing; it and this module need the standard library only. A folder of
binaries is named after a hash of the module it came from, so a changed pin or check sum never finds an old build.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from tests.harness.debian import cache_directory

ROOT = Path(__file__).parents[2]
_DIRECT = re.compile(r"^(?:require )?\s*(\S+/\S+) (v\S+)$", re.MULTILINE)  # a line of go.mod that is not "// indirect"


@dataclass(frozen=True)
class Client:
    """The tools that a Go module names, or, of a module without tools, its tests as one program."""

    name: str
    module: str  # its folder, below the repository's root
    programs: tuple[str, ...]
    tags: str = ""
    tests: bool = False

    @property
    def source(self) -> Path:
        return ROOT / self.module

    @property
    def home(self) -> Path:
        """Where the programs are, once they are built."""
        digest = hashlib.sha256(repr(self).encode())
        for path in sorted(path for path in self.source.rglob("*") if path.is_file()):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(self.source)} {len(content)}\n".encode() + content)
        return cache_directory() / "clients" / f"{self.name}-{digest.hexdigest()[:12]}"

    @property
    def pins(self) -> dict[str, str]:
        """Module → version, of what go.mod requires directly."""
        return dict(_DIRECT.findall((self.source / "go.mod").read_text()))

    @property
    def built(self) -> bool:
        return self.home.is_dir()

    def program(self, name: str = "") -> Path:
        return self.home / (name or self.programs[0])


_CONTAINERD = ("containerd", "containerd-shim-runc-v2", "ctr")
CLIENTS = {
    client.name: client
    for client in (
        Client("containerd-2.4", "tests/clients/containerd24", _CONTAINERD),
        Client("containerd-1.7", "tests/clients/containerd17", _CONTAINERD, "no_btrfs no_devmapper no_zfs no_aufs"),
        Client("crictl", "tests/clients/crictl", ("crictl",)),
        Client("nerdctl", "tests/clients/nerdctl", ("nerdctl",)),
        Client("conformance-2.4", "tests/conformance/go/v2", ("conformance",), tests=True),
        Client("conformance-1.7", "tests/conformance/go/v17", ("conformance",), tests=True),
        Client("cosign", "tests/clients/cosign", ("cosign",)),
        Client("skopeo", "tests/clients/skopeo", ("skopeo",), "containers_image_openpgp exclude_graphdriver_btrfs"),
    )
}
