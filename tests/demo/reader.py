"""Runs inside the container: reads the image's files for ever, past the page cache, and compares each with its hash.

Arguments: a file of lines `<sha256>  <path>`. Prints `ok N` now and then, `BAD …` for a failed or wrong read.
Stands alone: Debian's Python 3.11, no imports from the project.
"""

import hashlib
import os
import sys
import threading
import time

WORKERS = 4


def read(path: str) -> str:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        digest = hashlib.sha256()
        while data := os.read(fd, 1 << 20):
            digest.update(data)
        return digest.hexdigest()
    finally:
        os.close(fd)


class Progress:
    def __init__(self) -> None:
        self.done = 0
        self.shown = 0.0
        self.lock = threading.Lock()

    def add(self, line: str) -> None:
        with self.lock:
            self.done += 1
            if line:
                print(line, flush=True)
            elif time.monotonic() - self.shown > 0.1:
                self.shown = time.monotonic()
                print("ok", self.done, flush=True)


def work(files: list[tuple[str, str]], first: int, progress: Progress) -> None:
    while True:
        for expected, path in files[first::WORKERS]:
            line = ""
            try:
                seen = read(path)
                if seen != expected:
                    line = f"BAD {path}: {seen} instead of {expected}"
            except OSError as error:
                line = f"BAD {path}: {error}"
            progress.add(line)


def main() -> None:
    with open(sys.argv[1]) as listing:
        files = [(line[:64], line[66:].rstrip("\n")) for line in listing]
    progress = Progress()
    threads = [threading.Thread(target=work, args=(files, n, progress)) for n in range(WORKERS)]
    for thread in threads:
        thread.start()


if __name__ == "__main__":
    main()
