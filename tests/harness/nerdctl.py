"""nerdctl on a private containerd. Containers get no network, since nerdctl's own would stay on the machine."""

import subprocess

from tests.clients import CLIENTS
from tests.harness.containerd import Containerd


class Nerdctl:
    """Raises with nerdctl's own words when a command fails."""

    def __init__(self, containerd: Containerd, snapshotter: str, namespace: str = "default") -> None:
        self._environment = containerd.environment
        home = containerd.home / "nerdctl"
        self._command = [
            str(CLIENTS["nerdctl"].program()), "--address", str(containerd.layout.socket), "--namespace", namespace,
            "--data-root", str(home), "--cni-path", "/usr/lib/cni", "--cni-netconfpath", str(home / "cni"),
            "--snapshotter", snapshotter,
        ]  # fmt: skip

    def attempt(self, *arguments: str, timeout: float = 120) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*self._command, *arguments], capture_output=True, text=True, errors="replace", timeout=timeout,
            env=self._environment, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def __call__(self, *arguments: str) -> str:
        result = self.attempt(*arguments)
        if result.returncode:
            raise RuntimeError(
                f"nerdctl {' '.join(arguments[:2])}: {result.returncode}: {result.stderr.strip()[-2000:]}"
            )
        return result.stdout

    def start(self, name: str, reference: str) -> None:
        """A container that sleeps."""
        self("run", "-d", "--net", "none", "--pull", "never", "--name", name, reference, "sleep", "1000")

    def shell(self, reference: str, script: str) -> str:
        """Output of a script in a new container. By exec, since a busy `nerdctl run` loses what a short one prints."""
        self.start("shell", reference)
        try:
            return self("exec", "shell", "sh", "-ec", script)
        finally:
            self("rm", "-f", "shell")
