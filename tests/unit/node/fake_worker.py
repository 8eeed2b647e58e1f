"""What the keeper sees of a worker: takes its lock, fetches descriptors, answers, and parks.

A blobd whose root has a file `busy` serves images: it stays on SIGTERM.
"""

import contextlib
import os
import signal
import socket
import sys
import time
from pathlib import Path

from snapshotter import control


def identity(fd: int) -> list[str]:
    """What tells this open file from others of its kind. No fstat: that would ask the FUSE server, which nobody is."""
    info = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    return [os.readlink(f"/proc/self/fd/{fd}"), *(line for line in info if line.startswith(("ino:", "mnt_id:")))]


def main(name: str, root: str) -> None:
    def told(number: int, _: object) -> None:
        if number == signal.SIGINT or name != "blobd" or not Path(root, "busy").exists():
            os._exit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, told)
    while Path(root, f"mute-{name}").exists():  # never serves
        time.sleep(0.02)
    lock = control.take_lock(f"{root}/{name}.lock", 5)
    held, _ = control.fetch_all(f"{root}/keeper.sock", {"op": "list"})
    if name == "blobd":
        listener = socket.socket(fileno=os.dup(held["listen-blobd"]))
    else:
        held = {"listen-grpc": held["listen-grpc"]} | held
        with socket.socket(fileno=os.dup(held["listen-grpc"])) as served:
            served.listen()
        listener = control.listen(f"{root}/snapshotd.sock")
    control.request(f"{root}/keeper.sock", {"op": "ready", "name": name})
    while lock:
        peer, _ = listener.accept()
        with peer, contextlib.suppress(BrokenPipeError):  # whoever asked has gone
            try:
                message, fds = control.receive(peer)
            except EOFError:
                continue
            if message["op"] == "dump":
                for key, fd in held.items():
                    control.send(peer, {"name": key}, [fd])
                control.send(peer, {"end": True})
            elif message["op"] == "attach":
                held[f"image-{message['id']}"] = fds[0]
                control.send(peer, {})
            else:
                control.send(peer, {"pid": os.getpid(), "held": {key: identity(fd) for key, fd in held.items()}})


if __name__ == "__main__":
    main(*sys.argv[1:])
