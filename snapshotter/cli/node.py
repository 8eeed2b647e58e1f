"""Commands of a node: `serve`, `status`, `version`."""

import argparse
import importlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from snapshotter import __version__, control
from snapshotter.errors import Unavailable

if TYPE_CHECKING:
    from snapshotter.config import Config

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

# What `serve` comes to run, whole: a file that is missing or broken shows when these are imported.
_PARTS = (
    "snapshotter.keeper", "snapshotter.daemon", "snapshotter.snapshots.pullpath", "snapshotter.ondemand.blobd",
    "snapshotter.mounts.oneshot",
)  # fmt: skip
DEFAULT_CONFIG = Path("/etc/coco-snapshotter/config.toml")


def register(commands: "Commands") -> None:
    serve = commands.add_parser(
        "serve",
        help="run the snapshotter on this node",
        description="Run the snapshotter: listens on a Unix socket for containerd. Stays in the foreground and logs to "
        "stderr. SIGTERM ends it; images in use are served on until the next start. SIGHUP replaces its code and "
        "reads the configuration again without disturbing containers.",
    )
    add_flags(serve)
    serve.add_argument("--cache", metavar="DIR", help="untrusted cache of encrypted chunks (cache_dir)")
    serve.add_argument("--address", metavar="SOCK", help="Unix socket for containerd (address)")
    serve.add_argument(
        "--check", action="store_true", help="only check that this program could serve with these settings"
    )
    serve.set_defaults(run=run_serve)
    status = commands.add_parser(
        "status",
        help="show what runs here",
        description="Show processes, images, cache and counters. Exits with 0 only if all three processes answer.",
    )
    add_flags(status)
    status.add_argument("--json", action="store_true", help="print one JSON object")
    status.set_defaults(run=run_status)
    version = commands.add_parser("version", help="print the version", description="Print the version.")
    version.set_defaults(run=run_version)


def add_flags(command: argparse.ArgumentParser) -> None:
    """Which node is meant."""
    command.add_argument("--config", metavar="FILE", type=Path, help=f"configuration (default: {DEFAULT_CONFIG})")
    command.add_argument("--root", metavar="DIR", help="directory of trusted state (root)")


def load_config(arguments: argparse.Namespace) -> tuple[Path | None, "Config"]:
    """The file that counts (None: there is none) and its content under the flags. Raises ConfigError."""
    from snapshotter import config

    path: Path | None = arguments.config or (DEFAULT_CONFIG if DEFAULT_CONFIG.exists() else None)
    flags = {"root": arguments.root, "cache_dir": getattr(arguments, "cache", None)}
    flags["address"] = getattr(arguments, "address", None)
    given = {key: os.path.abspath(value) for key, value in flags.items() if value is not None}
    return path and path.absolute(), config.load(path, **given)


def run_serve(arguments: argparse.Namespace) -> int:
    """Check everything that can be wrong from the start, then become the keeper: same pid, a fraction of the memory."""
    _open_standard_streams()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until the keeper handles it: there is nothing to reload yet
    from snapshotter import log
    from snapshotter.credentials import configured as credentials
    from snapshotter.image import origin
    from snapshotter.image.initdata import with_initdata
    from snapshotter.image.policy import ImagePolicy
    from snapshotter.keys import configured
    from snapshotter.mounts import placement
    from snapshotter.registry.tls import TlsContexts
    from snapshotter.snapshots import recovery

    path, config = load_config(arguments)
    log.configure("error", config.log.format)  # the workers say the rest
    placement.check(config)
    config = with_initdata(config)
    ImagePolicy.of(config.mode, config.policy)
    origin.stated(config)
    configured.provider(config.keys)
    credentials.check(config.registry)
    TlsContexts(config.registry.ca_file)
    recovery.refuse_newer_database(Path(config.root))
    if arguments.check:
        for module in _PARTS:
            importlib.import_module(module)
        return 0
    return _become_keeper(config, path)


def _become_keeper(config: "Config", path: Path | None) -> NoReturn:
    flags = ["--root", config.root, "--cache", config.cache_dir, "--address", config.address]
    flags += ["--config", str(path)] if path else []
    # -P keeps the working directory out of the import path; this package is found where it was found now.
    search = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(search)
    os.execv(sys.executable, [sys.executable, "-P", "-m", "snapshotter.keeper", *flags])  # noqa: S606


def _open_standard_streams() -> None:
    """Give numbers 0 to 2, where they are closed, to /dev/null: a database that got one would get our log, too."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)


def run_status(arguments: argparse.Namespace) -> int:
    _, config = load_config(arguments)
    answers: dict[str, dict[str, Any]] = {}
    silent: list[str] = []
    for name in ("keeper", "snapshotd", "blobd"):
        try:
            answers[name], fds = control.request(f"{config.root}/{name}.sock", {"op": "status"})
            control.close_all(fds)
        except OSError as error:
            silent.append(f"{name} ({error.strerror or error})")
        except EOFError:
            silent.append(f"{name} (closed the connection)")
    document = _document(config, answers)
    if arguments.json:
        print(json.dumps(document))
    else:
        _print(document)
    if silent:
        raise Unavailable(f"root {config.root}: no answer from {', '.join(silent)}", hint="is `serve` running?")
    return 0


def _document(config: "Config", answers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The keys of docs/architecture.md, section 8. The running snapshotd knows better than the file what it uses."""
    keeper, snapshotd, blobd = (answers.get(name, {}) for name in ("keeper", "snapshotd", "blobd"))
    return {
        "version": keeper.get("version", __version__),
        "mode": snapshotd.get("mode", config.mode),
        "root": config.root,
        "cache_dir": snapshotd.get("cache_dir", config.cache_dir),
        "address": snapshotd.get("address", config.address),
        "pids": {
            "keeper": keeper.get("pids", {}).get("keeper"),
            "snapshotd": snapshotd.get("pid"),
            "blobd": blobd.get("pid"),
        },
        "images": snapshotd.get("images", []),
        "cache": blobd.get("cache", {"bytes": 0, "entries": 0}),
        "counters": {**blobd.get("counters", {}), **snapshotd.get("counters", {})},
        "versions": {name: answers.get(name, {}).get("version") for name in ("keeper", "snapshotd", "blobd")},
    }


def _print(document: dict[str, Any]) -> None:
    for key in ("version", "mode", "root", "cache_dir", "address"):
        print(f"{key:10} {document[key]}")
    for name, pid in document["pids"].items():
        print(f"{name:10} {f'pid {pid}' if pid else 'does not answer'}")
    print(f"{'cache':10} {document['cache']['entries']} chunks, {document['cache']['bytes'] / (1 << 20):.1f} MiB")
    for image in document["images"]:
        print(f"image      {image['reference']} {image['manifest']}{' mounted' if image['mounted'] else ''}")
    for name, value in sorted(document["counters"].items()):
        print(f"counter    {name} {value}")


def run_version(_: argparse.Namespace) -> int:
    print(f"coco-snapshotter {__version__}")
    return 0
