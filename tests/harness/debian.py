"""Real multi-layer images made from Debian packages: debootstrap, then one overlay layer per package set.

`image("python")` builds an OCI layout once (about two minutes) and keeps it under $COCO_CACHE
(default /var/cache/coco-snapshotter-tests), keyed by what this file and `oci.py` say.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tests.harness import oci

SUITE = "bookworm"
RECIPES: dict[str, list[tuple[str, ...]]] = {
    "python": [("python3",), ("python3-numpy", "python3-requests", "python3-flask")],
    "postgres": [("postgresql-15",)],
}
CONFIGS: dict[str, dict[str, object]] = {
    "python": {"Env": [oci.PATH_ENV, "LANG=C.UTF-8"], "Cmd": ["python3", "-c", "print('hello')"]},
    "postgres": {"Env": [oci.PATH_ENV, "LANG=C.UTF-8"], "Cmd": ["postgres"]},
}
_UNWANTED = ("var/cache/apt/archives/*.deb", "var/cache/apt/*.bin", "var/lib/apt/lists/*", "var/log/*.log",
             "var/log/apt/*", "var/cache/ldconfig/aux-cache")  # fmt: skip
_ENVIRONMENT = {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C", "PATH": oci.PATH_ENV.removeprefix("PATH=")}

Say = Callable[[str], None]


def cache_directory() -> Path:
    return Path(os.environ.get("COCO_CACHE") or "/var/cache/coco-snapshotter-tests")


def image(name: str, say: Say = print) -> oci.Layout:
    """The layout of recipe `name` (its image has the same name), built if it is not in the cache. Needs root."""
    recipe = b"".join(Path(module.__file__ or "").read_bytes() for module in (oci,)) + Path(__file__).read_bytes()
    home = cache_directory() / f"debian-{hashlib.sha256(recipe).hexdigest()[:12]}"
    home.mkdir(parents=True, exist_ok=True)
    done = home / f"{name}.oci"
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            _remove_older(home)
            _build(home, name, done, say)
    return oci.Layout(done)


def _remove_older(home: Path) -> None:
    """Delete what other versions of the recipes built, unless somebody is building there."""
    for other in home.parent.glob("debian-*"):
        if other != home and (other / "lock").exists():
            with (other / "lock").open("w") as lock, suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(other)


def _build(home: Path, name: str, done: Path, say: Say) -> None:
    trees = [_base(home, say)]
    for index, packages in enumerate(RECIPES[name]):
        tree = home / f"{name}-{index}"
        if not tree.exists():
            say(f"installing {' '.join(packages)} into a layer")
            _install(home, trees, tree, packages)
        trees.append(tree)
    say(f"packing {len(trees)} layers of image {name}")
    unfinished = home / f".{name}.oci"
    shutil.rmtree(unfinished, ignore_errors=True)
    layout = oci.Layout(unfinished)
    layout.add_image(name, [layout.add_tree(tree) for tree in trees], CONFIGS[name])
    unfinished.rename(done)


def _base(home: Path, say: Say) -> Path:
    base, unfinished = home / "base", home / ".base"
    if not base.exists():
        say(f"debootstrap --variant=minbase {SUITE}")
        shutil.rmtree(unfinished, ignore_errors=True)
        _run(home, "debootstrap", "--variant=minbase", SUITE, str(unfinished))
        _tidy(unfinished)
        unfinished.rename(base)
    return base


def _install(home: Path, lowers: list[Path], tree: Path, packages: tuple[str, ...]) -> None:
    """apt-get install in a chroot on an overlay of `lowers` (bottom first); what it writes becomes `tree`."""
    upper, work, target = (home / f".{tree.name}.{part}" for part in ("upper", "work", "mnt"))
    for path in (upper, work, target):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
    stack = ":".join(str(lower) for lower in reversed(lowers))
    with ExitStack() as mounts:
        mounts.enter_context(
            _mounted(
                home, ["-t", "overlay", "overlay", "-o", f"lowerdir={stack},upperdir={upper},workdir={work}"], target
            )
        )
        mounts.enter_context(_mounted(home, ["-t", "proc", "proc"], target / "proc"))
        mounts.enter_context(_mounted(home, ["--bind", "/dev"], target / "dev"))
        mounts.enter_context(_mounted(home, ["-t", "tmpfs", "tmpfs"], target / "var/lib/apt/lists"))
        mounts.enter_context(_mounted(home, ["-t", "tmpfs", "tmpfs"], target / "var/cache/apt/archives"))
        no_services = target / "usr/sbin/policy-rc.d"
        no_services.write_text("#!/bin/sh\nexit 101\n")
        no_services.chmod(0o755)
        resolver = target / "etc/resolv.conf"
        resolver.write_bytes(Path("/etc/resolv.conf").read_bytes())
        apt = ["chroot", str(target), "apt-get", "-qq", *_proxy_options()]
        _run(home, *apt, "update")
        _run(home, *apt, "-y", "--no-install-recommends", "install", *packages)
        no_services.unlink()
        resolver.unlink()
        _tidy(target)
    shutil.rmtree(work)
    target.rmdir()
    upper.rename(tree)


@contextmanager
def _mounted(home: Path, arguments: list[str], target: Path) -> Iterator[None]:
    _run(home, "mount", *arguments, str(target))
    try:
        yield
    finally:
        _run(home, "umount", str(target))


def _proxy_options() -> list[str]:
    """The host's apt proxy, passed on the command line so that it never gets into the image."""
    found = subprocess.run(
        ["apt-config", "shell", "PROXY", "Acquire::http::Proxy"], check=True, capture_output=True, text=True
    ).stdout.strip()
    return [f"-oAcquire::http::Proxy={found.removeprefix('PROXY=').strip(chr(39))}"] if found else []


def _tidy(root: Path) -> None:
    for pattern in _UNWANTED:
        for path in root.glob(pattern):
            if not path.is_dir():
                path.unlink()


def _run(home: Path, *command: str) -> None:
    """Run quietly; on failure raise with the end of the log."""
    log = home / "build.log"
    with log.open("ab") as output:
        result = subprocess.run(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=os.environ | _ENVIRONMENT,
            check=False,
        )  # fmt: skip
    if result.returncode:
        tail = log.read_text(errors="replace").splitlines()[-15:]
        raise RuntimeError(f"{' '.join(command[:4])} … failed with {result.returncode}:\n" + "\n".join(tail))
