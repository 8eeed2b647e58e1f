"""The key-access audit log: every try to get a layer key, before the key is used. Each line is bound to the one before.

    <root>/audit.log      one JSON object a line: n, time, namespace, request, image, manifest, by, kek, outcome,
                          previous, hash
    <root>/audit.log.1    … .4: older ones, the last of the older file is the `previous` of the newer one's first

`hash` is SHA-256 of the line without it, so a changed, removed or inserted line breaks the chain. Lines cut off at the
end do not; each hash is in the ordinary log too, which is to be kept elsewhere.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import structlog

from snapshotter import failpoints
from snapshotter.config import Limits
from snapshotter.crypto import encoding
from snapshotter.crypto.layer import LayerPrivate
from snapshotter.errors import IntegrityError, SnapshotterError
from snapshotter.keys import wrapping
from snapshotter.keys.provider import KeyProvider
from snapshotter.monitor.trail import outcome_of

log = structlog.get_logger(__name__)

NAME: Final = "audit.log"
FILE_BYTES: Final = 8 << 20
FILES: Final = 5
LINE_BYTES: Final = 64 << 10  # seven members of 512 characters, of up to 12 bytes each in JSON
_START: Final = "0" * 64
_TEXT = 512  # characters of one member
_KEKS = 8  # named in one line


class AuditLog:
    """Appends. One process at a time writes (that of snapshotd.lock)."""

    def __init__(self, root: Path) -> None:
        """Continues what is there. A line that a crash left unfinished was never acted upon and is cut off."""
        self._path = root / NAME
        self._fd = _open(self._path)
        self.entries, self.head = self._last()

    def append(self, **members: str) -> None:
        """Write one line through to the disk. Raises OSError: a key that cannot be accounted for is not used."""
        if os.fstat(self._fd).st_size > FILE_BYTES:
            self._rotate()
        entry: dict[str, Any] = {
            "n": self.entries + 1,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **{name: text[:_TEXT] for name, text in members.items()},
            "previous": self.head,
        }
        entry["hash"] = _hash(entry)
        line = encoding.json_bytes(entry) + b"\n"
        before = os.fstat(self._fd).st_size
        try:
            if os.write(self._fd, line) != len(line):
                raise OSError("audit log: short write")
            os.fsync(self._fd)
            failpoints.hit("audit.written")
        except OSError:
            os.ftruncate(self._fd, before)
            raise
        self.entries, self.head = entry["n"], entry["hash"]
        log.info("key access", **{name: entry[name] for name in entry if name not in ("time", "previous")})

    def close(self) -> None:
        os.close(self._fd)

    def _last(self) -> tuple[int, str]:
        size = os.fstat(self._fd).st_size
        tail = os.pread(self._fd, LINE_BYTES, max(0, size - LINE_BYTES))
        whole = tail.rfind(b"\n") + 1
        if whole < len(tail):
            log.warning("an unfinished line of the audit log was cut off", bytes=len(tail) - whole)
            os.ftruncate(self._fd, size - (len(tail) - whole))
        lines = tail[:whole].splitlines()
        if not lines:
            older = _numbered(self._path, 1)
            return _end_of(older) if older.exists() else (0, _START)
        return _position(_decode(lines[-1], self._path.name))

    def _rotate(self) -> None:
        """Whatever fails leaves the log as it is: a file that is open and in its place."""
        path = self._path.with_name(f"{NAME}.new")
        path.unlink(missing_ok=True)
        new = _open(path)
        for number in range(FILES - 1, 0, -1):
            newer = _numbered(self._path, number - 1)
            if newer.exists():
                newer.rename(_numbered(self._path, number))
        path.rename(self._path)
        os.close(self._fd)
        self._fd = new


class AuditedKeys:
    """A `KeyProvider` whose every answer is in the log. `subject` tells for whom and which image it is asked."""

    def __init__(
        self, name: str, provider: KeyProvider, audit: AuditLog, subject: Callable[[], Mapping[str, str]]
    ) -> None:
        self._name = name
        self._provider = provider
        self._audit = audit
        self._subject = subject

    async def unwrap(self, annotations: Mapping[str, str], limits: Limits) -> LayerPrivate:
        """See KeyProvider. Raises OSError when the log cannot be written."""
        try:
            private = await self._provider.unwrap(annotations, limits)
        except BaseException as error:  # also a call that is given up: the broker may have answered it
            self._append(_keks(annotations, limits), outcome_of(error))
            raise
        try:
            self._append(private.kek, "released")
        except BaseException:
            private.symkey.wipe()
            raise
        return private

    def _append(self, kek: str, outcome: str) -> None:
        self._audit.append(**self._subject(), by=self._name, kek=kek, outcome=outcome)


def _keks(annotations: Mapping[str, str], limits: Limits) -> str:
    """Whose keys would have been needed, as far as the packets say."""
    try:
        packets = wrapping.describe(annotations, limits)
    except SnapshotterError:
        return ""
    return " ".join([packet.recipient or packet.scheme for packet in packets][:_KEKS])


def read(root: Path) -> Iterator[dict[str, Any]]:
    """All entries that are there, the oldest first. Raises IntegrityError (audit-chain) at the first broken link."""
    previous: tuple[int, str] | None = None
    for number in range(FILES - 1, -1, -1):
        path = _numbered(root / NAME, number)
        if not path.exists():
            continue
        with path.open("rb") as file:
            while line := file.readline(LINE_BYTES + 1):
                if number == 0 and not line.endswith(b"\n") and len(line) < LINE_BYTES:
                    log.warning("the last line of the audit log is unfinished", file=path.name)
                    break  # of a crash, or being written; it was not acted upon
                entry = _decode(line, path.name)
                n, _ = _position(entry)
                if previous is None:  # only where the oldest file was let go may the beginning be missing
                    previous = (n - 1, entry["previous"]) if number == FILES - 1 else (0, _START)
                if (n - 1, entry["previous"]) != previous or entry["hash"] != _hash(entry):
                    raise broken(f"{path.name}: the chain breaks before entry {n}")
                previous = (n, entry["hash"])
                yield entry


def broken(text: str) -> IntegrityError:
    return IntegrityError(f"audit log: {text}", reason="audit-chain")


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _numbered(path: Path, number: int) -> Path:
    return path if number == 0 else path.with_name(f"{path.name}.{number}")


def _end_of(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LINE_BYTES))
        return _position(_decode(file.read().splitlines()[-1], path.name))


def _position(entry: Mapping[str, Any]) -> tuple[int, str]:
    return entry["n"], entry["hash"]


def _decode(line: bytes, name: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
        if line.endswith(b"\n"):
            line = line[:-1]
        if (
            encoding.json_bytes(entry) == line
            and type(entry["n"]) is int
            and isinstance(entry["hash"], str)
            and entry["previous"]
        ):
            return entry  # type: ignore[no-any-return]
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise broken(f"{name}: a line is not one that was written here")


def _hash(entry: Mapping[str, Any]) -> str:
    return hashlib.sha256(
        encoding.json_bytes({name: value for name, value in entry.items() if name != "hash"})
    ).hexdigest()
