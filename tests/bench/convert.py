"""Conversion: megabytes of unpacked files per second, and peak resident memory."""

import os
import subprocess
import time
from pathlib import Path

from tests.bench.table import Row, Say
from tests.harness import debian, serve
from tests.harness.machine import Work

_RSS_LIMIT_MB = 250


def rows(say: Say) -> list[Row]:
    """Convert the python image from and to a layout on disk."""
    source = debian.image("python", say)
    with Work("bench-convert") as work:
        _, public = serve.key_pair(work.path)
        target = f"oci:{work.path / 'out'}:sealed"
        arguments = ["convert", f"oci:{source.path}:python", target, "--recipient", f"jwe:{public}"]
        start = time.monotonic()
        process = subprocess.Popen(
            [*serve.PROGRAM, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, env=work.environment, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - start
    if process.returncode:
        raise RuntimeError(f"convert ended with {process.returncode}")
    unpacked = sum(layer_size(source.path, layer.digest) for layer in source.layers("python")) / 1e6
    peak = usage.ru_maxrss / 1e3
    return [
        Row("conversion", "speed", f"{unpacked / seconds:.0f} MB/s", f"{unpacked:.0f} MB in {seconds:.1f} s"),
        Row("conversion", "peak RSS", f"{peak:.0f} MB", "", None, f"< {_RSS_LIMIT_MB} MB", peak < _RSS_LIMIT_MB),
    ]


def layer_size(layout: Path, digest: str) -> int:
    """Uncompressed bytes of a gzip layer."""
    name = digest.removeprefix("sha256:")
    result = subprocess.run(
        f"gzip -dc < {layout}/blobs/sha256/{name} | wc -c", shell=True, check=True, capture_output=True, text=True
    )
    return int(result.stdout)
