"""SecretBytes: nothing prints, pickles or compares a secret by accident, and wipe overwrites it."""

import copy
import pickle

import pytest

from snapshotter.crypto.secret import SecretBytes

CANARY = b"canary-8f3a51c0"


def test_it_does_not_print() -> None:
    secret = SecretBytes(CANARY)
    for text in (
        repr(secret),
        str(secret),
        f"{secret}",
        f"{secret!r}",
        f"{secret}",
        repr([secret]),
        repr({1: secret}),
    ):
        assert "canary" not in text
        assert CANARY.hex() not in text
    assert "15 bytes" in repr(secret)


def test_it_does_not_pickle_or_copy() -> None:
    for act in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be pickled"):
            act(SecretBytes(CANARY))


def test_equality_is_by_content_and_only_among_secrets() -> None:
    assert SecretBytes(CANARY) == SecretBytes(CANARY)
    assert SecretBytes(CANARY) != SecretBytes(b"other")
    assert SecretBytes(CANARY) != CANARY
    with pytest.raises(TypeError):
        hash(SecretBytes(CANARY))


def test_wipe_overwrites_the_buffer() -> None:
    secret = SecretBytes(CANARY)
    buffer = secret._buffer
    secret.wipe()
    assert buffer == bytes(len(CANARY))
    assert len(secret) == 0
    with pytest.raises(ValueError, match="wiped"):
        secret.expose()
    secret.wipe()


def test_leaving_the_block_wipes_even_after_an_error() -> None:
    secret = SecretBytes(CANARY)

    def use() -> None:
        with secret:
            assert secret.expose() == CANARY
            raise RuntimeError

    with pytest.raises(RuntimeError):
        use()
    assert len(secret) == 0
