"""A small image around a static busybox, made in a moment: for tests that need a container, not a distribution."""

import random
import shutil
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from tests.harness import oci
from tests.harness.oci import member

APPLETS = "cat cp dd echo env false find getfattr grep head kill ls md5sum mkdir mv readlink rm sh sha256sum sleep stat sync tail test touch true wc".split()  # noqa: E501, SIM905
DATA_SIZE = 3 << 20

Member = tuple[tarfile.TarInfo, bytes]


def data(seed: int = 1, size: int = DATA_SIZE) -> bytes:
    """Content of `/data/random` in an image of that seed: incompressible."""
    return random.Random(seed).randbytes(size)


def text(seed: int = 1) -> bytes:
    """Content of `/data/text`: compressible, 600 KiB."""
    chooser = random.Random(seed)
    return b"".join(b"line %d of %d\n" % (chooser.randrange(10**9), n) for n in range(25_000))


def base_members() -> list[Member]:
    """busybox and the files every container wants."""
    found = shutil.which("busybox")
    if found is None:
        raise FileNotFoundError("busybox-static is not installed")
    members = [(member(f"{name}/"), b"") for name in ("bin", "dev", "etc", "proc", "root", "sys", "tmp")]
    members.append((member("bin/busybox", 0o755), Path(found).read_bytes()))
    members += [(member(f"bin/{applet}", link="busybox"), b"") for applet in APPLETS]
    members.append((member("etc/passwd"), b"root:x:0:0:root:/root:/bin/sh\n"))
    return members


def data_members(seed: int = 1) -> list[Member]:
    """Files to read: compressible, incompressible, empty, small, linked, with xattrs."""
    return [
        (member("data/"), b""),
        (member("data/random"), data(seed)),
        (member("data/text"), text(seed)),
        (member("data/empty"), b""),
        (member("data/small", xattrs={"user.note": f"note {seed}"}), b"small %d\n" % seed),
        (member("data/link", link="small"), b""),
    ]


def layout(
    path: Path,
    *,
    seed: int = 1,
    name: str = "tiny",
    extra: Iterable[Iterable[Member]] = (),
    config: Mapping[str, object] | None = None,
) -> oci.Layout:
    """Write image `name` to an OCI layout: busybox, data of `seed`, then one layer per `extra`."""
    made = oci.Layout(path)
    layers = [made.add_members(members) for members in (base_members(), data_members(seed), *extra)]
    settings = {"Env": [oci.PATH_ENV], "Cmd": ["/bin/sh"], "WorkingDir": "/"} | dict(config or {})
    made.add_image(name, layers, settings)
    return made


def large_members(count: int, size: int, seed: int = 7) -> list[Member]:
    """`count` incompressible files `/large/N` of `size` bytes."""
    return [(member("large/"), b"")] + [(member(f"large/{n}"), data(seed + n, size)) for n in range(count)]
