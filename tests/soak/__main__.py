"""Big numbers, for hours if wanted: random kills, random damage, fuzzing. `python -m tests.soak [--scale N] [PART…]`.

Ends with one line per part and exit status 0 only if every part held. Scale 1 takes about an hour.
"""

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.demo.proofs import kill_and_recover, start_reader
from tests.demo.stage import listing
from tests.harness import debian, serve, tiny
from tests.harness.containerd import Containerd
from tests.harness.machine import Work
from tests.harness.registry import Registry
from tests.harness.serve import WORKERS, Serve
from tests.soak import matrix

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Node:
    """A daemon and a containerd with one sealed image pulled."""

    work: Work
    registry: Registry
    daemon: Serve
    containerd: Containerd
    reference: str
    layers: dict[str, int]


@contextmanager
def node(layout: Path, name: str) -> Iterator[Node]:
    with Work("soak") as work:
        registry = Registry(work)
        key, public = serve.key_pair(work.path)
        target = f"docker://{registry.address}/t/app:sealed"
        digest = serve.convert(work, f"oci:{layout}:{name}", target, "--recipient", f"jwe:{public}")
        daemon = Serve(work, settings={"keys": {"files": [str(key)]}, "log": {"level": "warning"}})
        containerd = Containerd(work, "c", plugins={"coco": daemon.address})
        reference = f"{registry.address}/t/app@{digest}"
        containerd.cri.pull(reference)
        manifest = json.loads(registry.get_manifest("t/app", digest)[0])
        layers = {layer["digest"]: layer["size"] for layer in manifest["layers"]}
        yield Node(work, registry, daemon, containerd, reference, layers)


def kills(scale: int, say: Callable[[str], None]) -> str:
    """Random processes killed, one after the other, while a container reads and compares."""
    count = 100 * scale
    with node(debian.image("python", say).path, "python") as here:
        expected = listing(here.containerd, here.reference)
        reader = start_reader(here.work, here.containerd, here.reference, expected)
        try:
            for number in range(count):
                kill_and_recover(here.daemon, random.choice(WORKERS))
                reader.advance(50)
                if reader.bad:
                    raise AssertionError(f"after kill {number + 1}: {reader.bad[:3]}")
                if (number + 1) % 10 == 0:
                    say(f"{number + 1} of {count} kills, {reader.done} files read")
        finally:
            reader.container.kill()
        return f"{count} kills of random processes, {reader.done} files read, none failed or wrong"


def tampering(scale: int, say: Callable[[str], None]) -> str:
    """One random byte of a random data blob flipped at a time: the file it hits fails, no file is ever wrong."""
    count = 300 * scale
    failed = served = 0
    with Work("soak-layout") as outer:
        layout = tiny.layout(outer.path / "layout")
        with node(layout.path, "tiny") as here:
            files = ("random", "text", "small")
            expected = {"random": tiny.data(), "text": tiny.text(), "small": b"small 1\n"}
            sums = {name: hashlib.md5(expected[name]).hexdigest() for name in files}
            blob = list(here.layers)[1]
            container = here.containerd.start(here.reference, "/bin/sleep", "100000")
            container.wait_running()
            for number in range(count):
                for path in filter(Path.is_file, (here.daemon.cache / "chunks").rglob("*")):
                    path.unlink()
                Path("/proc/sys/vm/drop_caches").write_text("3")
                offset = random.randrange(here.layers[blob])
                here.registry.flip(blob, offset)
                result = container.exec("/bin/md5sum", *(f"/data/{name}" for name in files))
                here.registry.flip(blob, offset)
                seen = {line.split()[1].rpartition("/")[2]: line.split()[0] for line in result.stdout.splitlines()}
                wrong = [name for name, digest in seen.items() if digest != sums[name]]
                if wrong:
                    raise AssertionError(f"byte {offset} of {blob} flipped: {wrong} read wrong")
                failed += len(files) - len(seen)
                served += len(seen)
                if (number + 1) % 50 == 0:
                    say(f"{number + 1} of {count} flips, {failed} files failed, none wrong")
            container.kill()
    if not failed:
        raise AssertionError("no flip was ever noticed")
    return f"{count} flipped bytes: {failed} files gave EIO, {served} were right, 0 wrong"


def fuzzing(scale: int, say: Callable[[str], None]) -> str:
    """The property and tamper tests with many more examples."""
    say("pytest tests/property tests/tamper, profile soak")
    environment = os.environ | {"HYPOTHESIS_PROFILE": "soak", "COCO_SOAK": str(scale)}
    folders = [str(ROOT / "tests" / name) for name in ("property", "tamper") if (ROOT / "tests" / name).is_dir()]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--timeout=3600", *folders], env=environment, cwd=ROOT, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    if result.returncode:
        raise AssertionError(result.stdout[-3000:])
    return result.stdout.strip().splitlines()[-1]


PARTS: dict[str, Callable[[int, Callable[[str], None]], str]] = {
    "kills": kills, "matrix": matrix.run, "tampering": tampering, "fuzzing": fuzzing,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--scale", type=int, default=1, help="multiplies every count (default 1)")
    parser.add_argument("parts", nargs="*", help=f"only these of {', '.join(PARTS)}")
    arguments = parser.parse_args()
    begun = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begun:7.1f} s] {text}", flush=True)

    summary: dict[str, str] = {}
    held = True
    for name in arguments.parts or PARTS:
        say(f"soak: {name}")
        try:
            summary[name] = PARTS[name](arguments.scale, say)
        except Exception as error:  # noqa: BLE001 - a part that breaks must not hide the others
            held = False
            summary[name] = f"FAILED: {error}"
    for name, text in summary.items():
        print(f"{name}: {text}")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
