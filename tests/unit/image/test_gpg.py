"""OpenPGP signatures as `gpgv` sees them, and messages that are made to confuse or to burst it."""

import subprocess
from collections.abc import Callable, Iterator

import pytest

from snapshotter.image import gpg

CLAIM = b'{"critical":{}}'
Gpg = Callable[..., bytes]


@pytest.fixture(scope="module")
def author(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gpg]:
    home = tmp_path_factory.mktemp("gpg")
    home.chmod(0o700)

    def run(*arguments: str, given: bytes = b"") -> bytes:
        command = ["gpg", "--homedir", str(home), "--batch", "--yes", "--passphrase", "", "--pinentry-mode", "loopback"]
        return subprocess.run([*command, *arguments], input=given, capture_output=True, check=True).stdout

    for name in ("author", "stranger"):
        run("--quick-generate-key", f"{name}@example.org", "ed25519", "sign", "never")
    yield run
    subprocess.run(["gpgconf", "--homedir", str(home), "--kill", "gpg-agent"], check=True)


@pytest.fixture(scope="module")
def key(author: Gpg) -> bytes:
    return author("--export", "author@example.org")


async def test_what_a_key_of_the_ring_signed(author: Gpg, key: bytes) -> None:
    message = author("-u", "author@example.org", "--sign", given=CLAIM)
    assert await gpg.signed_message(message, [key]) == CLAIM
    armored = author("--armor", "--export", "author@example.org")
    assert await gpg.signed_message(message, [author("--export", "stranger@example.org"), armored]) == CLAIM


async def test_messages_that_are_not_exactly_one_good_signature(author: Gpg, key: bytes) -> None:
    signed = author("-u", "author@example.org", "-z", "0", "--sign", given=CLAIM)
    stranger = author("-u", "stranger@example.org", "-z", "0", "--sign", given=CLAIM)
    literal = author("-z", "0", "--store", given=b"evil")
    bad = bytearray(signed)
    bad[signed.index(b"critical")] ^= 1
    both = author("-u", "author@example.org", "-u", "stranger@example.org", "--sign", given=CLAIM)
    messages = {
        "another's": stranger, "changed": bytes(bad), "cut": signed[:-3], "empty": b"", "unsigned": literal,
        "unsigned before": literal + signed, "unsigned behind": signed + literal, "two": signed + stranger,
        "by two": both, "twice": signed + signed,
        "detached": author("-u", "author@example.org", "--detach-sign", given=CLAIM),
        "keys": author("--export"), "noise": bytes(range(256)),
    }  # fmt: skip
    for name, message in messages.items():
        assert await gpg.signed_message(message, [key]) is None, name


async def test_a_small_message_of_a_large_text_is_refused(author: Gpg, key: bytes) -> None:
    """Of anybody: what is packed is unpacked before its signature is known."""
    bomb = author("-u", "author@example.org", "--compress-algo", "zip", "-z", "9", "--sign", given=bytes(4 << 20))
    assert len(bomb) < 64 << 10
    assert await gpg.signed_message(bomb, [key]) is None
