"""A private docker-registry: pushes, its access log (who asked for what), its storage (for tampering)."""

import hashlib
import re
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.harness.machine import Work, free_port
from tests.harness.process import Process

_LINE = re.compile(
    r'"(?P<method>[A-Z]+) (?P<path>\S+) HTTP/[\d.]+" (?P<status>\d+) (?P<size>\d+) "[^"]*" "(?P<agent>[^"]*)"'
)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Request:
    """One line of the access log; `size` counts the bytes of the answer's body."""

    method: str
    path: str
    status: int
    size: int
    agent: str

    @property
    def digest(self) -> str | None:
        found = _DIGEST.search(self.path)
        return found[0] if found else None

    @property
    def is_blob(self) -> bool:
        return "/blobs/sha256:" in self.path


class Traffic(list[Request]):
    """Requests since a mark."""

    def by(self, agent: str) -> "Traffic":
        """Only those of one client, named by the start of its User-Agent ("containerd", "coco-snapshotter")."""
        return Traffic(request for request in self if request.agent.startswith(agent))

    def of(self, digests: set[str]) -> "Traffic":
        return Traffic(request for request in self if request.digest in digests)

    @property
    def size(self) -> int:
        return sum(request.size for request in self)


class Registry:
    """docker-registry on loopback with its storage in the run's directory. `address` is host:port."""

    def __init__(self, work: Work, name: str = "registry", *, htpasswd: str = "") -> None:
        """`htpasswd`: lines of user and bcrypt hash; "" = everybody may do everything."""
        self.address = f"127.0.0.1:{free_port()}"
        self.storage = work.directory(f"{name}-storage")
        config = work.path / f"{name}.yml"
        config.write_text(
            "version: 0.1\n"
            "log: {level: warn, accesslog: {disabled: false}}\n"
            f"storage: {{filesystem: {{rootdirectory: {self.storage}}}, delete: {{enabled: true}}}}\n"
            f"http: {{addr: {self.address}}}\n"
            + (f"auth: {{htpasswd: {{realm: here, path: {work.path}/{name}.htpasswd}}}}\n" if htpasswd else "")
        )
        (work.path / f"{name}.htpasswd").write_text(htpasswd)
        self.process = Process(work, name, ["docker-registry", "serve", config])
        self.process.wait_until(self._answers, "it answers /v2/")

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.address}/v2/", timeout=2) as answer:
                return bool(answer.status == 200)
        except urllib.error.HTTPError as error:
            with error:
                return error.code == 401
        except OSError:
            return False

    def push(self, layout: Path, name: str, repository: str, tag: str) -> str:
        """Copy image `name` of an OCI layout here with skopeo; returns the manifest digest."""
        target = f"docker://{self.address}/{repository}:{tag}"
        digest_file = layout.parent / f".digest-{tag}"
        subprocess.run(
            ["skopeo", "copy", "--quiet", "--dest-tls-verify=false", "--preserve-digests",
             f"--digestfile={digest_file}", f"oci:{layout}:{name}", target],
            check=True, capture_output=True,
        )  # fmt: skip
        digest = digest_file.read_text().strip()
        digest_file.unlink()
        return digest

    # access log

    def mark(self) -> int:
        """A position in the access log, for `since`."""
        return self.process.log.stat().st_size

    def since(self, mark: int = 0) -> Traffic:
        with self.process.log.open("rb") as log:
            log.seek(mark)
            text = log.read().decode(errors="replace")
        return Traffic(
            Request(m["method"], m["path"], int(m["status"]), int(m["size"]), m["agent"]) for m in _LINE.finditer(text)
        )

    # HTTP, as any client would

    def get_manifest(self, repository: str, reference: str) -> tuple[bytes, str]:
        """Raw manifest and its media type."""
        kinds = ["application/vnd.oci.image.manifest.v1+json", "application/vnd.oci.image.index.v1+json"]
        request = urllib.request.Request(
            f"http://{self.address}/v2/{repository}/manifests/{reference}",
            headers={"Accept": ",".join(kinds), "User-Agent": "harness"},
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read(), answer.headers["Content-Type"]

    def put_manifest(self, repository: str, tag: str, raw: bytes, media_type: str) -> str:
        """Store a manifest under a tag; returns its digest."""
        request = urllib.request.Request(
            f"http://{self.address}/v2/{repository}/manifests/{tag}",
            data=raw, method="PUT", headers={"Content-Type": media_type, "User-Agent": "harness"},
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=10):
            return f"sha256:{hashlib.sha256(raw).hexdigest()}"

    def get_blob(self, repository: str, digest: str) -> bytes:
        request = urllib.request.Request(
            f"http://{self.address}/v2/{repository}/blobs/{digest}", headers={"User-Agent": "harness"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return bytes(answer.read())

    def put_blob(self, repository: str, content: bytes) -> str:
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        start = urllib.request.Request(f"http://{self.address}/v2/{repository}/blobs/uploads/", data=b"", method="POST")
        with urllib.request.urlopen(start, timeout=10) as answer:
            location = answer.headers["Location"]
        joint = "&" if "?" in location else "?"
        upload = urllib.request.Request(
            f"{location}{joint}digest={digest}", data=content, method="PUT",
            headers={"Content-Type": "application/octet-stream"},
        )  # fmt: skip
        with urllib.request.urlopen(upload, timeout=60):
            return digest

    # tampering: what an evil registry does is done in its storage

    def stored(self, digest: str) -> Path:
        """The file that holds a blob or manifest."""
        name = digest.removeprefix("sha256:")
        return self.storage / f"docker/registry/v2/blobs/sha256/{name[:2]}/{name}/data"

    @contextmanager
    def tampered(self, digest: str, change: Callable[[bytes], bytes]) -> Iterator[None]:
        """Serve `change(content)` for a digest, and the true content again afterwards."""
        path = self.stored(digest)
        before = path.read_bytes()
        path.write_bytes(change(before))
        try:
            yield
        finally:
            path.write_bytes(before)

    def flip(self, digest: str, offset: int) -> None:
        """Invert the byte at `offset` of a stored blob, in place; a second call restores it."""
        with self.stored(digest).open("r+b") as file:
            file.seek(offset)
            byte = file.read(1)
            file.seek(offset)
            file.write(bytes([byte[0] ^ 0xFF]))
