"""The manual page, made from the parsers and some prose:

python -m snapshotter.cli.manual >deploy/man/coco-snapshotter.1
"""

import re
import sys
from collections.abc import Iterator, Sequence

from snapshotter.cli import main
from snapshotter.cli.tree import Command, Option, commands

_FILES = (
    ("/etc/coco-snapshotter/config.toml", "The configuration. deploy/config.toml explains every key."),
    ("/var/lib/coco-snapshotter", "root: trusted state, and what containers write."),
    ("/var/cache/coco-snapshotter", "cache_dir: encrypted chunks and metadata. May be deleted at any time."),
    ("/run/coco-snapshotter/coco-snapshotter.sock", "address: the socket for containerd."),
)
_EXAMPLES = (
    ("Seal an image for the holder of a key:",
     "coco-snapshotter convert docker://registry/app:1 docker://registry/app:1-sealed --recipient jwe:node.pub.pem"),
    ("Find out why pulls are not lazy:", "coco-snapshotter doctor --image registry/app:1-sealed"),
    ("Find out why a container started slowly:", "coco-snapshotter explain CONTAINER"),
    ("Push a lazily pulled image elsewhere:",
     "coco-snapshotter materialize registry/app:1 && ctr -n k8s.io images push other/app:1 registry/app:1"),
)  # fmt: skip


def page() -> str:
    return "\n".join(_page()) + "\n"


def _page() -> Iterator[str]:
    found = commands(main.parser())
    yield '.\\" Made by snapshotter/cli/manual.py from the command line itself; do not edit.'
    yield '.TH COCO\\-SNAPSHOTTER 1 "" "" "coco\\-snapshotter"'
    yield from (".SH NAME", "coco\\-snapshotter \\- containerd snapshotter for lazy and encrypted images")
    yield from (".SH SYNOPSIS", ".B coco\\-snapshotter", ".I COMMAND", ".RI [ OPTION ]...")
    yield from (".SH DESCRIPTION", *_text(main.DESCRIPTION))
    yield ".SH COMMANDS"
    for command in found:
        yield from _command(command)
    yield ".SH EXIT STATUS"
    for status in re.split(r";\s+", main.EPILOG.partition(":")[2].strip()):
        number, _, meaning = " ".join(status.split()).partition(" ")
        yield from (".TP", f".B {number}", *_text(meaning))
    yield from (*_text("Errors end with the name of what failed, [reason=…]; docs/troubleshooting.md explains each."),)
    yield ".SH FILES"
    for path, meaning in _FILES:
        yield from (".TP", f".I {_escaped(path)}", *_text(meaning))
    yield ".SH EXAMPLES"
    for purpose, line in _EXAMPLES:
        yield from (".PP", *_text(purpose), ".PP", ".nf", ".RS", _escaped(line), ".RE", ".fi")
    yield from (".SH SEE ALSO", ".BR containerd (8),", ".BR ctr (8),", ".BR systemd.service (5)")


def _command(command: Command) -> Iterator[str]:
    yield f".SS {_escaped(command.name)}"
    parts = [_usage(option) for option in command.options if "--help" not in option.flags]
    yield from (".PP", " ".join([f"\\fB{_escaped(command.name)}\\fR", *parts]), ".PP")
    yield from _text(command.description)
    yield from _options(command.arguments)
    yield from _options([option for option in command.switches if "--help" not in option.flags])


def _usage(option: Option) -> str:
    shown = _shown(option, option.flags[-1:])
    return shown if option.required else f"[{shown}]"


def _shown(option: Option, flags: Sequence[str]) -> str:
    names = ", ".join(f"\\fB{_escaped(flag)}\\fR" for flag in flags)
    return " ".join(filter(None, [names, f"\\fI{_escaped(option.value)}\\fR" if option.value else ""]))


def _options(options: Sequence[Option]) -> Iterator[str]:
    for option in options:
        yield from (".TP", _shown(option, option.flags), *_text(option.help))


def _text(text: str) -> Iterator[str]:
    yield _escaped(" ".join(text.split()))


def _escaped(text: str) -> str:
    """As roff would take nothing for its own: no escapes, no requests, and hyphens that can be copied."""
    plain = text.replace("\\", "\\e").replace("-", "\\-").replace("…", "...")
    return f"\\&{plain}" if plain.startswith((".", "'")) else plain


if __name__ == "__main__":
    sys.stdout.write(page())
