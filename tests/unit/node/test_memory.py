"""What keeps keys in a process: nobody but root may look into it."""

import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[3]

# Both children run as an ordinary user without a new program, which that user might not be able to read.
_PROGRAM = """
import ctypes, os
from snapshotter import memory

def drop():
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)

def reads(hidden):
    ready, told = os.pipe()
    stay, go = os.pipe()
    watched = os.fork()
    if watched == 0:
        drop()
        ctypes.CDLL(None).prctl(4, 1)  # PR_SET_DUMPABLE, as after an exec
        if hidden:
            memory.set_undumpable()
        os.write(told, b"x")
        os.read(stay, 1)
        os._exit(0)
    os.read(ready, 1)
    reader = os.fork()
    if reader == 0:
        drop()
        try:
            os.read(os.open(f"/proc/{watched}/environ", os.O_RDONLY), 1)
        except PermissionError:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(reader, 0)
    os.write(go, b"x")
    os.waitpid(watched, 0)
    return os.waitstatus_to_exitcode(status) == 0

print(reads(False), reads(True))
"""


@pytest.mark.root
def test_a_process_of_the_same_user_cannot_look_into_one_that_hides() -> None:
    command = [sys.executable, "-c", _PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=CHECKOUT, timeout=30)
    assert done.stdout == "True False\n", "a plain process is open to its user"
