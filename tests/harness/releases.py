"""The containerd versions that tests run: where their binaries are and how their configuration is written."""

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.clients import CLIENTS


@dataclass(frozen=True)
class Layout:
    """Where a private containerd keeps its things, and what differs from test to test."""

    home: Path
    snapshotter: str
    plugins: Mapping[str, Path]  # proxy plugin name → socket
    exports: Mapping[str, str] = field(default_factory=dict)  # of every proxy plugin
    sandbox: str = ""  # image of pod sandboxes, "" for the version's own
    annotations: bool = True  # CRI sends image labels itself; if not, 2.x leaves that to its transfer service

    @property
    def socket(self) -> Path:
        return self.home / "c.sock"

    def proxies(self, *capabilities: str) -> str:
        """2.1 and later read in the exports that pulls shall name their image; the others do not mind."""
        exports = {"enable_remote_snapshot_annotations": "true"} | dict(self.exports)
        lines = "".join(f'    {key} = "{value}"\n' for key, value in exports.items())
        offered = f"  capabilities = {list(capabilities)}\n" if capabilities else ""
        return "".join(
            f'[proxy_plugins.{name}]\n  type = "snapshot"\n  address = "{socket}"\n'
            f"{offered}  [proxy_plugins.{name}.exports]\n{lines}"
            for name, socket in self.plugins.items()
        )

    def places(self) -> str:
        """The same in all versions."""
        return f"""root = "{self.home}/root"
state = "{self.home}/state"
[grpc]
  address = "{self.socket}"
[ttrpc]
  address = "{self.home}/t.sock"
"""


def config_v2(layout: Layout) -> str:
    """containerd 1.6 and 1.7."""
    home = layout.home
    sandbox = f'sandbox_image = "{layout.sandbox}"' if layout.sandbox else ""
    unused = ", ".join(f'"io.containerd.snapshotter.v1.{name}"' for name in ("aufs", "btrfs", "devmapper", "zfs"))
    return f"""version = 2
disabled_plugins = [{unused}, "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing"]
{layout.places()}{layout.proxies()}
[plugins."io.containerd.internal.v1.opt"]
  path = "{home}/opt"
[plugins."io.containerd.grpc.v1.cri"]
  restrict_oom_score_adj = true
  stats_collect_period = 1
  {sandbox}
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "{layout.snapshotter}"
    disable_snapshot_annotations = {str(not layout.annotations).lower()}
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        Root = "{home}/runc"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{home}/cni"
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = "{home}/certs.d"
"""


def config_v3(layout: Layout) -> str:
    """containerd 2.x. It imports /etc/containerd/conf.d as well, which no key switches off."""
    home = layout.home
    pinned = "[plugins.'io.containerd.cri.v1.images'.pinned_images]"
    sandbox = f'{pinned}\n    sandbox = "{layout.sandbox}"' if layout.sandbox else ""
    unpack = "".join(
        "[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\n"
        f'  platform = "linux/amd64"\n  snapshotter = "{name}"\n  differ = "walking"\n'
        for name in ("overlayfs", *layout.plugins)
    )
    return f"""version = 3
disabled_plugins = ["io.containerd.snapshotter.v1.devmapper", "io.containerd.tracing.processor.v1.otlp"]
{layout.places()}{layout.proxies("remap-ids")}
[plugins.'io.containerd.internal.v1.opt']
  path = "{home}/opt"
[plugins.'io.containerd.nri.v1.nri']
  disable = true
[plugins.'io.containerd.cri.v1.images']
  snapshotter = "{layout.snapshotter}"
  disable_snapshot_annotations = {str(not layout.annotations).lower()}
  stats_collect_period = 1
  {sandbox}
  [plugins.'io.containerd.cri.v1.images'.registry]
    config_path = "{home}/certs.d"
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
      Root = "{home}/runc"
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    bin_dirs = ["/usr/lib/cni"]
    conf_dir = "{home}/cni"
{unpack}"""


@dataclass(frozen=True)
class Release:
    """A containerd version. `client` names its binaries among tests/clients, "" those of the system."""

    version: str
    client: str
    config: Callable[[Layout], str]

    @property
    def missing(self) -> str:
        """Why it cannot run here; empty when it can."""
        if self.client:
            return "" if CLIENTS[self.client].built else f"{self.client} is not built (tests/setup.sh does)"
        return "" if shutil.which("containerd") else "containerd is not installed"

    @property
    def path(self) -> str:
        """PATH with its binaries first: a daemon takes the shim that it finds there."""
        system = os.environ["PATH"]
        return f"{CLIENTS[self.client].home}:{system}" if self.client else system


DEBIAN = Release("1.6", "", config_v2)
CONTAINERD_1_7 = Release("1.7", "containerd-1.7", config_v2)
CONTAINERD_2_4 = Release("2.4", "containerd-2.4", config_v3)
RELEASES = (DEBIAN, CONTAINERD_1_7, CONTAINERD_2_4)
