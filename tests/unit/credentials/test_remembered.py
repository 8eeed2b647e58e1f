"""Logins that came with pulls: per repository, bounded, and handed on in a sealed memfd."""

import os
import secrets

import pytest

from snapshotter.credentials.login import Login
from snapshotter.credentials.remembered import RememberedLogins
from snapshotter.crypto.secret import SecretBytes
from snapshotter.errors import MalformedImage
from snapshotter.files import is_sealed


def login(word: str) -> Login:
    return Login("user", SecretBytes(word.encode()))


async def words(known: RememberedLogins, repository: str = "team/app", host: str = "h") -> list[bytes]:
    return [found.secret.expose() for found in await known.find(host, repository, fresh=False)]


async def test_the_last_login_of_a_repository_comes_first_and_old_ones_go() -> None:
    known = RememberedLogins()
    assert known.add("h", "team/app", login("a"))
    assert not known.add("h", "team/app", login("a"))
    for word in "bcdeab":
        known.add("h", "team/app", login(word))
    assert await words(known) == [b"b", b"a", b"e", b"d"]
    assert await words(known, "team/other") == await words(known, host="g") == []
    known.discard("h", "team/app", login("b"))
    known.discard("h", "nowhere", login("b"))
    assert await words(known) == [b"a", b"e", b"d"]


async def test_old_repositories_go() -> None:
    known = RememberedLogins()
    for index in range(1500):
        known.add("h", f"r{index}", login("a"))
    assert await words(known, "r475") == []
    assert await words(known, "r476") == [b"a"]


async def test_a_packed_set_is_the_same_elsewhere() -> None:
    known, other = RememberedLogins(), RememberedLogins()
    for word in "abc":
        known.add("h", "team/app", login(word))
    known.add("h", "team/two", Login("", SecretBytes(b"token")))
    other.add("h", "gone", login("x"))
    fd = known.pack()
    try:
        assert is_sealed(fd)
        other.load(fd)
    finally:
        os.close(fd)
    assert await words(other) == await words(known) == [b"c", b"b", b"a"]
    assert [found.username for found in await other.find("h", "team/two", fresh=False)] == [""]
    assert await words(other, "gone") == []


@pytest.mark.allow_warnings
def test_what_was_not_packed_is_refused() -> None:
    for content in (b"", b"\x91\x92", secrets.token_bytes(100)):
        fd = os.memfd_create("x")
        os.write(fd, content)
        with pytest.raises(MalformedImage):
            RememberedLogins().load(fd)
        RememberedLogins().take(fd)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.close(fd)
