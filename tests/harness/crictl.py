"""crictl on a private containerd: pods on the host's network, and containers in them."""

import json
import subprocess
from collections.abc import Sequence
from typing import Any

from tests.clients import CLIENTS
from tests.harness.containerd import Containerd

_HOST_NETWORK = 2


class Crictl:
    """Raises with crictl's own words when a command fails."""

    def __init__(self, containerd: Containerd) -> None:
        self._home = containerd.home / "crictl"
        (self._home / "logs").mkdir(parents=True)
        self._environment = containerd.environment
        config = self._home / "crictl.yaml"
        endpoint = f"unix://{containerd.layout.socket}"
        config.write_text(f"runtime-endpoint: {endpoint}\nimage-endpoint: {endpoint}\ntimeout: 60\n")
        self._command = [str(CLIENTS["crictl"].program()), "--config", str(config)]

    def attempt(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*self._command, *arguments], capture_output=True, text=True, errors="replace", timeout=120, check=False,
            env=self._environment, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def __call__(self, *arguments: str) -> str:
        result = self.attempt(*arguments)
        if result.returncode:
            raise RuntimeError(
                f"crictl {' '.join(arguments[:2])}: {result.returncode}: {result.stderr.strip()[-2000:]}"
            )
        return result.stdout

    def json(self, command: str, *arguments: str) -> Any:
        return json.loads(self(command, "-o", "json", *arguments))

    def run_pod(self, name: str) -> str:
        """A sandbox; its id. Removed by `rmp`."""
        return self("runp", self._pod(name)).strip()

    def create(self, pod: str, pod_name: str, name: str, image: str, command: Sequence[str]) -> str:
        """A container in a pod, not started yet; its id."""
        table = {
            "metadata": {"name": name, "attempt": 0}, "image": {"image": image}, "command": list(command),
            "log_path": f"{name}.log", "linux": {},
        }  # fmt: skip
        return self("create", pod, self._file(name, table), self._pod(pod_name)).strip()

    def state(self, container: str) -> str:
        return str(self.json("inspect", container)["status"]["state"])

    def _pod(self, name: str) -> str:
        return self._file(name, {
            "metadata": {"name": name, "namespace": "default", "uid": name, "attempt": 0},
            "log_directory": str(self._home / "logs"),
            "linux": {"security_context": {"namespace_options": {"network": _HOST_NETWORK}}},
        })  # fmt: skip

    def _file(self, name: str, table: object) -> str:
        path = self._home / f"{name}.json"
        path.write_text(json.dumps(table))
        return str(path)
