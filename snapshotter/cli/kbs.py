"""`kbs-dev`: a key broker service for development, on this machine only."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from snapshotter.errors import InvalidArgument, NotFound

if TYPE_CHECKING:
    from snapshotter.kbs_dev.server import KbsDev

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

_DESCRIPTION = """\
Serve the files DIR/repository/type/tag as resources kbs:///repository/type/tag to clients that attest themselves.
The protocol (0.4.0) is that of a real key broker; the trust is not: only "sample" evidence is understood, which anybody
can make up. So it listens on loopback only, marks every answer, and refuses sample evidence until --allow-sample.
The first line of the output is its URL."""
_BANNER = """\
************************************************************************
*  coco-snapshotter kbs-dev: FOR DEVELOPMENT ONLY.                     *
*  It releases keys on sample evidence, which proves nothing.          *
*  Never put a key into it that protects anything.                     *
************************************************************************"""


def register(commands: "Commands") -> None:
    command = commands.add_parser(
        "kbs-dev",
        help="run a key broker service for development",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("--resources", required=True, type=Path, metavar="DIR", help="directory of repository/type/tag files")
    add("--listen", default="127.0.0.1:8080", metavar="HOST:PORT", help="loopback address (default: %(default)s)")
    add("--allow-sample", action="store_true", help="release resources on sample evidence")
    add(
        "--expect",
        action="append",
        default=[],
        metavar="CLAIM=VALUE",
        help="also ask for this claim: init_data=HEX, svn=1, launch_digest=…; may be repeated",
    )
    add("--token-seconds", type=int, default=300, metavar="N", help="life of a token (default: %(default)s)")
    command.set_defaults(run=run_kbs_dev)


def run_kbs_dev(arguments: argparse.Namespace) -> int:
    import asyncio

    from snapshotter import log
    from snapshotter.kbs_dev.appraisal import Policy
    from snapshotter.kbs_dev.server import KbsDev

    host, _, port = arguments.listen.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise InvalidArgument(f"--listen {arguments.listen!r}: write HOST:PORT")
    if not arguments.resources.is_dir():
        raise NotFound(f"--resources {arguments.resources}: no such directory")
    expect = dict(text.partition("=")[::2] for text in arguments.expect)
    if not all("=" in text for text in arguments.expect):
        raise InvalidArgument("--expect: write CLAIM=VALUE")
    log.configure("info", "console")
    print(_BANNER, file=sys.stderr)
    server = KbsDev(arguments.resources, Policy(arguments.allow_sample, expect), token_seconds=arguments.token_seconds)
    asyncio.run(_serve(server, host.strip("[]"), int(port)))
    return 0


async def _serve(server: "KbsDev", host: str, port: int) -> None:
    import asyncio
    import signal

    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await server.start(host, port)
    print(server.url, flush=True)
    await stop.wait()
    await server.stop()
