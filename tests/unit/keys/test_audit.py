"""The key-access audit log: what is in it, and that no line can be changed, removed or inserted unnoticed."""

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from snapshotter import labels
from snapshotter.cli.main import main
from snapshotter.config import Limits
from snapshotter.crypto.layer import LayerPrivate
from snapshotter.crypto.secret import SecretBytes
from snapshotter.errors import IntegrityError, KeyDenied
from snapshotter.keys import audit
from snapshotter.keys.audit import AuditedKeys, AuditLog

SUBJECT = {"namespace": "k8s.io", "request": "r-1", "image": "registry.example/app:1", "manifest": "sha256:" + "a" * 64}


class Answers:
    """A key provider that does as it is told."""

    def __init__(self, answer: LayerPrivate | KeyDenied) -> None:
        self.answer = answer

    async def unwrap(self, annotations: Mapping[str, str], limits: Limits) -> LayerPrivate:
        if isinstance(self.answer, KeyDenied):
            raise self.answer
        return self.answer


def written(root: Path, count: int = 5) -> list[bytes]:
    log = AuditLog(root)
    for number in range(count):
        log.append(**SUBJECT, by="kbs", kek=f"kbs:///default/image-kek/{number}", outcome="released")
    log.close()
    return (root / audit.NAME).read_bytes().splitlines(keepends=True)


async def test_who_which_image_which_key_when_and_how_it_ended(tmp_path: Path) -> None:
    log = AuditLog(tmp_path)
    private = LayerPrivate(SecretBytes(b"k" * 32), b"n" * 16, "", "kbs:///default/image-kek/app")
    assert await AuditedKeys("kbs", Answers(private), log, lambda: SUBJECT).unwrap({}, Limits()) is private
    refused = AuditedKeys("files", Answers(KeyDenied("no")), log, lambda: SUBJECT)
    with pytest.raises(KeyDenied):
        await refused.unwrap({labels.ENC_KEYS_PKCS7: "AAAA"}, Limits())
    log.close()
    first, second = audit.read(tmp_path)
    assert {**SUBJECT, "by": "kbs", "kek": private.kek, "outcome": "released"}.items() <= first.items()
    assert {**SUBJECT, "by": "files", "kek": "pkcs7", "outcome": "no-key"}.items() <= second.items()
    assert (tmp_path / audit.NAME).stat().st_mode & 0o777 == 0o600
    assert b"kkkk" not in (tmp_path / audit.NAME).read_bytes()


async def test_a_call_that_is_given_up_is_in_the_log(tmp_path: Path) -> None:
    class Waits(Answers):
        async def unwrap(self, annotations: Mapping[str, str], limits: Limits) -> LayerPrivate:
            return await asyncio.Future()

    log = AuditLog(tmp_path)
    provider = AuditedKeys("kbs", Waits(KeyDenied("")), log, lambda: SUBJECT)
    call = asyncio.create_task(provider.unwrap({labels.ENC_KEYS_PKCS7: "AAAA"}, Limits()))
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    log.close()
    [entry] = audit.read(tmp_path)
    assert (entry["kek"], entry["outcome"]) == ("pkcs7", "cancelled")


def test_the_longest_line_is_read_again(tmp_path: Path) -> None:
    longest = "\U0001d11e" * 1000
    for _ in range(2):
        log = AuditLog(tmp_path)
        log.append(**dict.fromkeys(SUBJECT, longest), by=longest, kek=longest, outcome=longest)
        log.close()
    assert [entry["n"] for entry in audit.read(tmp_path)] == [1, 2]


async def test_a_key_that_cannot_be_accounted_for_is_not_used(tmp_path: Path) -> None:
    log = AuditLog(tmp_path)
    log.close()  # writing fails from now on
    private = LayerPrivate(SecretBytes(b"k" * 32), b"n" * 16, "")
    with pytest.raises(OSError, match="Bad file descriptor"):
        await AuditedKeys("kbs", Answers(private), log, lambda: SUBJECT).unwrap({}, Limits())
    assert not len(private.symkey)


def test_the_chain_goes_on_after_a_restart(tmp_path: Path) -> None:
    written(tmp_path, 2)
    written(tmp_path, 3)
    assert [entry["n"] for entry in audit.read(tmp_path)] == [1, 2, 3, 4, 5]


def test_the_chain_goes_on_across_files_and_old_ones_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "FILE_BYTES", 1000)
    written(tmp_path, 40)
    assert len(list(tmp_path.iterdir())) == audit.FILES
    numbers = [entry["n"] for entry in audit.read(tmp_path)]
    assert numbers == list(range(numbers[0], 41))
    assert numbers[0] > 1
    (tmp_path / f"{audit.NAME}.2").unlink()
    with pytest.raises(IntegrityError):
        list(audit.read(tmp_path))


def test_a_rotation_that_a_crash_interrupted_is_found_again(tmp_path: Path) -> None:
    written(tmp_path, 3)
    (tmp_path / audit.NAME).rename(tmp_path / f"{audit.NAME}.1")
    written(tmp_path, 1)
    assert [entry["n"] for entry in audit.read(tmp_path)] == [1, 2, 3, 4]


def test_a_rotation_that_fails_leaves_the_log_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "FILE_BYTES", 1)
    written(tmp_path, 3)
    log = AuditLog(tmp_path)
    obstacle = tmp_path / f"{audit.NAME}.new"
    obstacle.mkdir()
    for _ in range(audit.FILES):
        with pytest.raises(OSError, match=r"audit\.log\.new"):
            log.append(**SUBJECT, by="kbs", kek="", outcome="released")
    assert [entry["n"] for entry in audit.read(tmp_path)] == [1, 2, 3]
    obstacle.rmdir()
    log.append(**SUBJECT, by="kbs", kek="", outcome="released")
    log.close()
    assert [entry["n"] for entry in audit.read(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.allow_warnings
def test_an_unfinished_line_is_cut_off(tmp_path: Path) -> None:
    lines = written(tmp_path)
    (tmp_path / audit.NAME).write_bytes(b"".join(lines) + lines[0][:50])
    assert [entry["n"] for entry in audit.read(tmp_path)] == [1, 2, 3, 4, 5], "to a reader it is no forgery"
    written(tmp_path, 1)
    assert [entry["n"] for entry in audit.read(tmp_path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("at", range(4))
def test_removed_repeated_and_exchanged_lines_show(tmp_path: Path, at: int) -> None:
    lines = written(tmp_path)
    for forged in (
        [*lines[:at], *lines[at + 1 :]],
        [*lines[: at + 1], *lines[at:]],
        [*lines[:at], lines[at + 1], lines[at], *lines[at + 2 :]],
    ):
        (tmp_path / audit.NAME).write_bytes(b"".join(forged))
        with pytest.raises(IntegrityError) as caught:
            list(audit.read(tmp_path))
        assert caught.value.reason == "audit-chain"


def test_every_changed_member_of_every_line_shows(tmp_path: Path) -> None:
    lines = written(tmp_path)
    tried = 0
    for number, line in enumerate(lines):
        entry: dict[str, Any] = json.loads(line)
        for name, value in entry.items():
            changed = entry | {name: value + 1 if isinstance(value, int) else "0" + value[1:] if value else "x"}
            if changed == entry:
                continue
            raw = json.dumps(changed, separators=(",", ":")).encode() + b"\n"
            (tmp_path / audit.NAME).write_bytes(b"".join([*lines[:number], raw, *lines[number + 1 :]]))
            with pytest.raises(IntegrityError):
                list(audit.read(tmp_path))
            tried += 1
    assert tried >= 40


@pytest.mark.parametrize("junk", [b"\n", b"{}\n", b"[]\n", b"x" * (1 << 16), b'{"n":true}\n', b"\xff\n"])
def test_what_was_not_written_here_is_refused(tmp_path: Path, junk: bytes) -> None:
    lines = written(tmp_path)
    (tmp_path / audit.NAME).write_bytes(b"".join(lines) + junk)
    with pytest.raises(IntegrityError):
        list(audit.read(tmp_path))


def test_the_command_prints_and_verifies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = written(tmp_path)
    assert main(["audit", "--root", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 5
    assert "released  kbs  kbs:///default/image-kek/0  k8s.io  registry.example/app:1" in printed.out
    log = AuditLog(tmp_path)
    log.append(**SUBJECT, by="kbs", kek="x\n2026-01-01T00:00:00Z  released\x1b[2J", outcome="no-key")
    log.close()
    assert main(["audit", "--root", str(tmp_path)]) == 0
    forged = capsys.readouterr().out
    assert (len(forged.splitlines()), "\x1b" in forged) == (6, False)
    lines = (tmp_path / audit.NAME).read_bytes().splitlines(keepends=True)
    head = json.loads(lines[-1])["hash"]
    assert main(["audit", "--root", str(tmp_path), "--json", "--head", head]) == 0
    assert capsys.readouterr().out.encode() != b""
    (tmp_path / audit.NAME).write_bytes(b"".join(lines[:-1]))  # cut off at the end
    assert main(["audit", "--root", str(tmp_path)]) == 0
    assert main(["audit", "--root", str(tmp_path), "--head", head]) == 20
    assert "reason=audit-chain" in capsys.readouterr().err
    (tmp_path / audit.NAME).unlink()
    (tmp_path / audit.NAME).mkdir()
    assert main(["audit", "--root", str(tmp_path)]) == 1
    assert f"error: [Errno 21] Is a directory: '{tmp_path}/{audit.NAME}'" in capsys.readouterr().err
