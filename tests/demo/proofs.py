"""The proofs of the demo. Each tries to make a promise fail on a running stage, and reports one line."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from tests.demo.canary import Canaries, Scan
from tests.demo.report import Report
from tests.demo.stage import REPOSITORY, Published, Stage
from tests.harness import serve
from tests.harness.broker import NAME
from tests.harness.containerd import Container, Containerd
from tests.harness.link import ShapedLink
from tests.harness.machine import Work, until
from tests.harness.serve import Serve

_READ_CANARIES = "cat /opt/app/canary-name-* | sha256sum; readlink /opt/app/link; ls /opt/app"
_BLOCK = 64 << 10
# Prints for each 64 KiB block of a file its SHA-256, or the name of the error that reading it gave.
_BLOCKS = f"""
import errno, hashlib, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
for at in range(0, os.fstat(fd).st_size, {_BLOCK}):
    try:
        print(hashlib.sha256(os.pread(fd, {_BLOCK}, at)).hexdigest())
    except OSError as error:
        print(errno.errorcode[error.errno])
"""


def no_layer_by_containerd(stage: Stage, image: Published, containerd: Containerd, mark: int) -> None:
    traffic = stage.registry.since(mark)
    asked = traffic.by("containerd").of(set(image.layers))
    ours = traffic.by("coco-snapshotter").of(set(image.layers))
    held = containerd.content() & set(image.layers)
    stage.report.proof(
        "no_layer_requests_by_containerd",
        not asked and not held and bool(ours),
        f"containerd asked for {len(asked)} of {len(image.layers)} layers and holds {len(held)}; "
        f"ours fetched {ours.size / 1e6:.1f} MB of {sum(image.layers.values()) / 1e6:.1f} MB in {len(ours)} requests",
    )


def same_files(report: Report, ours: str, theirs: str, name: str = "same_files") -> None:
    report.proof(
        name,
        ours == theirs and ours.count("\n") > 1000,
        f"{ours.count(chr(10))} files read by a container of the image have the hashes that overlayfs shows",
    )


def key_release(stage: Stage, image: Published, daemon: Serve) -> None:
    """The key broker releases the key on (sample) evidence of the right guest; another guest is refused."""
    log = daemon.log()
    leaked = [secret for secret in stage.broker.secrets if secret in log]
    audit = _audit(stage, daemon)
    released = [entry for entry in audit if entry["outcome"] == "released"]
    stage.report.proof(
        "key_released_after_attestation",
        bool(released) and all(entry["kek"] == f"kbs:///{NAME}" for entry in released) and not leaked,
        f"{released[0]['kek']} released by {released[0]['by']} for {released[0]['namespace']}" if released else "NO",
    )
    wrong = stage.wrong_guest(image)
    containerd = stage.containerd("containerd-wrong-guest", wrong)
    reason = refusal(containerd, image.by_digest)
    denied = [entry for entry in _audit(stage, wrong) if entry["outcome"] == "no-key"]
    stage.report.proof(
        "wrong_evidence_refused",
        reason == "no-key" and bool(denied) and not wrong.images_mounted(),
        f"a guest with other initdata: {reason or 'GOT THE KEY'}",
    )
    containerd.process.stop()
    wrong.stop()
    stage.report.note("audit logs of both, each line bound to the one before by its hash:")
    for entry in [*audit, *denied]:
        line = (entry["n"], entry["time"], entry["outcome"], entry["by"], entry["kek"], entry["hash"][:16])
        stage.report.note("  " + "  ".join(map(str, line)))


def _audit(stage: Stage, daemon: Serve) -> list[dict[str, Any]]:
    """The verified key-access audit log."""
    shown = serve.program(stage.work, "audit", "--root", daemon.root, "--json")
    if shown.returncode:
        raise RuntimeError(f"audit ended with {shown.returncode}: {shown.stderr[-500:]}")
    return [json.loads(line) for line in shown.stdout.splitlines()]


# canaries


def read_canaries(containerd: Containerd, image: Published, canaries: Canaries) -> None:
    """Have a container touch every canary, so that its bytes have travelled and are cached."""
    result = containerd.run(image.by_digest, "/bin/sh", "-c", _READ_CANARIES)
    expected = hashlib.sha256(canaries.content).hexdigest()
    if expected not in result.stdout or canaries.symlink_target not in result.stdout:
        raise RuntimeError(f"the container reads other canaries: {result.stdout!r} {result.stderr!r}")


def scan(daemon: Serve, link: ShapedLink, canaries: Canaries, into: Scan | None = None) -> Scan:
    """Look through the cache, the state, the logs and the recorded traffic of a daemon."""
    found = into or Scan(canaries)
    found.tree("cache", daemon.cache)
    found.tree("state", daemon.root)
    found.content("log", daemon.log().encode())
    for name, stream in link.streams():
        found.content(f"traffic/{name}", stream)
    if (daemon.cache / "chunks").exists():
        found.chunk_files(daemon.cache / "chunks")
    return found


def canary(report: Report, sealed: Scan, written: int, plain: Scan) -> None:
    report.proof(
        "canaries_nowhere",
        sealed.clean and sealed.chunks > 0 and written > 0,
        f"searched {sealed.places} places, {sealed.size / 1e6:.0f} MB (cache, state, logs, traffic, {written} files "
        f"that our processes wrote) for 5 kinds of canary, found: {sealed.report()}",
    )
    report.proof(
        "chunks_do_not_decode",
        sealed.chunks > 0 and not sealed.decodable_chunks,
        f"{sealed.decodable_chunks} of {sealed.chunks} cached chunks decode as zstd or lz4",
    )
    report.proof(
        "scan_can_fail",
        plain.finds_all and plain.decodable_chunks > 0,
        f"the same scan of the plain conversion: {plain.report()}; "
        f"{plain.decodable_chunks} of {plain.chunks} cached chunks decode",
    )


# tampering


def flipped_byte(stage: Stage, image: Published, container: Container) -> None:
    """Damage one byte of the blob that holds /opt/flip/data before it was ever read; then mend it."""
    blob = list(image.layers)[-2]  # data blobs come in layer order, the bootstrap last
    size = image.layers[blob]
    stage.registry.flip(blob, size // 2)
    damaged = _read_blocks(container)
    stage.registry.flip(blob, size // 2)
    mended = _read_blocks(container)
    content = stage.flip_content
    true = [hashlib.sha256(content[at : at + _BLOCK]).hexdigest() for at in range(0, len(content), _BLOCK)]
    failed = damaged.count("EIO")
    wrong = sum(1 for seen, expected in zip(damaged, true, strict=True) if seen not in (expected, "EIO"))
    stage.report.proof(
        "flipped_byte_is_EIO",
        failed > 0 and wrong == 0,
        f"1 of {size} bytes flipped on the registry: {failed} of {len(true)} blocks give EIO, {wrong} wrong data",
    )
    right = sum(1 for seen, expected in zip(mended, true, strict=True) if seen == expected)
    stage.report.proof(
        "heals_after_flip_back", mended == true, f"same daemon, byte flipped back: {right} of {len(true)} blocks right"
    )


def _read_blocks(container: Container) -> list[str]:
    result = container.exec("/usr/bin/python3", "-c", _BLOCKS, "/opt/flip/data")
    lines = result.stdout.split()
    if not lines:
        raise RuntimeError(f"the reader failed: {result.stderr[-500:]}")
    return lines


def refusal(containerd: Containerd, reference: str) -> str:
    """Pull what must be refused: the reason in containerd's error, or that error; "" when the pull succeeds."""
    try:
        containerd.cri.pull(reference)
    except grpc.RpcError as error:
        text = str(error.details())
        found = re.search(r"reason=([\w-]+)", text)
        return found[1] if found else text
    return ""


def other_entrypoint(stage: Stage, image: Published) -> str:
    """The registry's version of the image: same layers, a config that starts something else, same tag."""
    raw, kind = stage.registry.get_manifest(REPOSITORY, image.digest)
    manifest = json.loads(raw)
    config = json.loads(stage.registry.get_blob(REPOSITORY, manifest["config"]["digest"]))
    config.setdefault("config", {})["Entrypoint"] = ["/bin/sh", "-c", "echo evil"]
    content = json.dumps(config).encode()
    manifest["config"] |= {"digest": stage.registry.put_blob(REPOSITORY, content), "size": len(content)}
    return stage.registry.put_manifest(REPOSITORY, image.tag, json.dumps(manifest).encode(), kind)


def sealed_by_somebody_else(stage: Stage, image: Published) -> str:
    """Anybody who has the public key can seal an image for it."""
    source = f"docker://{stage.registry.address}/{REPOSITORY}:oci"
    target = f"docker://{stage.registry.address}/{REPOSITORY}:{image.tag}"
    return serve.convert(stage.work, source, target, "--recipient", f"jwe:{stage.public_key}")


def plain_under_same_tag(stage: Stage, image: Published) -> str:
    raw, kind = stage.registry.get_manifest(REPOSITORY, "oci")
    return stage.registry.put_manifest(REPOSITORY, image.tag, raw, kind)


def swaps(stage: Stage, image: Published, daemon: Serve, containerd: Containerd) -> None:
    """By tag, with the repository pinned in the policy: whatever else the registry puts there is not authentic."""
    attacks: dict[str, tuple[str, Callable[[Stage, Published], str]]] = {
        "config_swap": ("a config with another Entrypoint", other_entrypoint),
        "foreign_seal": ("an image sealed by somebody else to the same key", sealed_by_somebody_else),
        "plain_swap": ("a plain image", plain_under_same_tag),
    }
    for name, (what, put) in attacks.items():
        put(stage, image)
        cached = _files(daemon.cache)
        reason = refusal(containerd, image.by_tag)
        clean = not daemon.images_mounted() and not containerd.snapshots() and _files(daemon.cache) <= cached
        stage.report.proof(
            f"{name}_refused", reason == "unauthentic-image" and clean,
            f"{what} under {image.tag!r}: {reason or 'ACCEPTED'}{'' if clean else ', but something was left behind'}",
        )  # fmt: skip


def swaps_without_pin(stage: Stage, image: Published, daemon: Serve, containerd: Containerd) -> None:
    """The same for a node that pins nothing and only demands sealed images: the next check names the swap."""
    for name, put, expected in (
        ("config_swap_by_seal", other_entrypoint, "config-mismatch"),
        ("plain_swap_by_seal", plain_under_same_tag, "not-sealed"),
    ):
        put(stage, image)
        reason = refusal(containerd, image.by_tag)
        clean = not daemon.images_mounted() and not containerd.snapshots()
        stage.report.proof(f"{name}_refused", reason == expected and clean, f"without a pin: {reason or 'ACCEPTED'}")


def _files(top: Path) -> set[Path]:
    return {path for path in top.rglob("*") if path.is_file()}


# kills


def start_reader(work: Work, containerd: Containerd, reference: str, expected: str) -> "Reader":
    """A container that reads Python's library for ever and compares each file with `expected` (lines of `listing`)."""
    shared = work.directory("reader")
    (shared / "reader.py").write_text((Path(__file__).parent / "reader.py").read_text())
    chosen = [line for line in expected.splitlines() if "/usr/lib/python3" in line][:1500]
    (shared / "expected").write_text("\n".join(chosen) + "\n")
    container = containerd.start(
        reference, "/usr/bin/python3", "/reader/reader.py", "/reader/expected",
        options=["--mount", f"type=bind,src={shared},dst=/reader,options=rbind:ro"],
    )  # fmt: skip
    return Reader(container)


def kill_and_recover(daemon: Serve, worker: str) -> None:
    """kill -9 a process, start a new keeper as a service manager would, and wait until all three answer again."""
    old = daemon.kill(worker)
    if worker == "keeper":
        daemon.start()
    daemon.wait_replaced(worker, old)


def kills(stage: Stage, image: Published, daemon: Serve, containerd: Containerd, expected: str) -> None:
    """kill -9 each process while a container reads past the page cache and compares every file with its hash."""
    reader = start_reader(stage.work, containerd, image.by_digest, expected)
    try:
        reader.advance(200)
        for worker in ("snapshotd", "blobd", "keeper"):
            before = reader.done
            kill_and_recover(daemon, worker)
            reader.advance(500)
            stage.report.proof(
                f"survives_kill_of_{worker}", not reader.bad,
                f"{reader.done - before} files read since the kill, {len(reader.bad)} failed or wrong {reader.bad[:1]}",
            )  # fmt: skip
    finally:
        reader.container.kill()


class Reader:
    """Follows the output of `reader.py`."""

    def __init__(self, container: Container) -> None:
        self.container = container
        self.done = 0
        self.bad: list[str] = []

    def _line(self) -> bool:
        line = self.container.stdout.readline()
        if not line:
            raise RuntimeError(f"the reading container ended with {self.container.process.wait()}; {self.bad[:3]}")
        if line.startswith("ok "):
            self.done = int(line.split()[1])
        else:
            self.bad.append(line.strip())
        return True

    def advance(self, count: int) -> None:
        """Follow until `count` more files have been read (or something is bad)."""
        goal = self.done + count
        until(
            lambda: self._line() and (self.done >= goal or bool(self.bad)), f"{count} more files are read", 90, every=0
        )
