"""Whatever a registry, a token server or a person writes: a value or a SnapshotterError, never anything else."""

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from snapshotter import labels
from snapshotter.config import Limits
from snapshotter.credentials import dockerconfig
from snapshotter.digest import Digest
from snapshotter.errors import BadReference, IntegrityError, SnapshotterError
from snapshotter.image import manifest as m
from snapshotter.registry.auth import parse_challenges
from snapshotter.registry.ranges import Span, check_answer, parse_content_range
from snapshotter.registry.redirects import lifetime_seconds, next_hop
from snapshotter.registry.reference import LayoutLocation, Reference, parse_location
from snapshotter.registry.retry import retry_after_seconds

LIMITS = Limits(index_entries=4, layers=4, manifest_bytes=1 << 16, annotation_bytes=64)  # type: ignore[arg-type]

components = st.from_regex(r"[a-z0-9]{1,5}((\.|_|__|-{1,3})[a-z0-9]{1,5}){0,2}", fullmatch=True)
repositories = st.lists(components, min_size=1, max_size=3).map("/".join)
hosts = st.sampled_from(["localhost", "localhost:5000", "r.example", "a-b.example:443", "127.0.0.1:1", "[::1]:65535"])
tags = st.none() | st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", fullmatch=True)
digests = st.none() | st.binary(max_size=4).map(Digest.of)
headers = st.text(st.characters(min_codepoint=1, max_codepoint=0x2FF), max_size=200)


@given(hosts, repositories, tags, digests)
def test_a_reference_survives_its_text(host: str, repository: str, tag: str | None, digest: Digest | None) -> None:
    reference = Reference(host, repository, tag, digest)
    assert Reference.parse(str(reference)) == reference
    assert parse_location(f"docker://{reference}").reference == reference


@given(st.text(max_size=60) | st.from_regex(r"[a-zA-Z0-9:/@._\[\]-]{0,80}", fullmatch=True))
def test_any_text_is_a_reference_or_refused(text: str) -> None:
    with suppress(BadReference):
        reference = Reference.parse(text)
        assert Reference.parse(str(reference)) == reference
    for prefix in ("oci:", "docker://", ""):
        with suppress(BadReference):
            location = parse_location(prefix + text)
            if not isinstance(location, LayoutLocation) or ".." not in text:
                assert parse_location(str(location)) == location


@given(st.lists(headers, max_size=3) | st.lists(st.from_regex(r'[Bb]asic( [a-z]+="?[a-z\\",= ]*)*', fullmatch=True)))
def test_any_challenge_is_parsed(values: list[str]) -> None:
    for challenge in parse_challenges(values):
        assert challenge.scheme == challenge.scheme.lower()


@pytest.mark.parametrize("text", ['B a="' + "\\" * 8000, "B " + "a" * 8000, "a," * 4000, 'a="",' * 1600, " \t," * 2600])
def test_a_challenge_made_to_be_slow_is_not(text: str) -> None:
    parse_challenges([text])


@given(st.integers(0, 1 << 64), st.integers(0, 1 << 64), st.integers(0, 1 << 64))
def test_a_content_range_is_consistent_or_refused(first: int, last: int, size: int) -> None:
    try:
        span = parse_content_range(f"bytes {first}-{last}/{size}")
    except IntegrityError:
        assert not first <= last < size or max(first, last, size) >= 10**19
    else:
        assert span == Span(first, last + 1, size)


answers = st.fixed_dictionaries(
    {},
    optional={
        "Content-Range": headers | st.sampled_from(["bytes 5-9/20", "bytes 5-9/21", "bytes 0-9/20"]),
        "Content-Length": headers | st.sampled_from(["5", "20", "-1", "9" * 30]),
        "Content-Encoding": headers,
        "Content-Type": headers,
    },
)


@given(st.integers(100, 599) | st.sampled_from([200, 206, 416]), answers, st.integers(0, 20))
def test_an_answer_to_a_range_is_exact_or_refused(status: int, shown: dict[str, str], discard: int) -> None:
    with suppress(SnapshotterError):
        skip = check_answer("blob", status, shown, Span(5, 10, 20), discard)
        assert (status, skip) in ((200, 5), (206, 0))
        assert status == 200 or shown["Content-Range"] == "bytes 5-9/20"
        assert skip <= discard


@given(headers | st.from_regex(r"(https?:)?//[a-z0-9@:%\[\].]{0,30}(/[a-z%2F?&=#]{0,20})?", fullmatch=True))
def test_any_location_is_followed_safely_or_refused(location: str) -> None:
    with suppress(SnapshotterError):
        target = next_hop("blob", URL("https://registry.example/v2/a/blobs/b"), location)
        assert target.scheme == "https"
        assert target.host
        assert (target.raw_user, target.raw_password) == (None, None)
        assert 0 <= lifetime_seconds(target, 0.0) <= 300


@given(st.none() | headers | st.integers().map(str))
def test_any_retry_after_is_a_time_or_nothing(value: str | None) -> None:
    seconds = retry_after_seconds(value, 0.0)
    assert seconds is None or seconds >= 0


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from(["schemaVersion", "mediaType", "config", "layers", "manifests", "Layers", "annotations", "x"])
descriptors = st.fixed_dictionaries(
    {
        "mediaType": st.sampled_from([labels.MEDIA_OCI_CONFIG, labels.MEDIA_LAYER_GZIP, labels.MEDIA_OCI_MANIFEST]),
        "digest": st.sampled_from([Digest.of(b""), "sha256:x"]),
        "size": st.integers(-1, 1 << 70),
    },
    optional={"annotations": json_values, "platform": json_values},
)
documents = st.fixed_dictionaries(
    {"schemaVersion": st.just(2)},
    optional={
        "mediaType": st.sampled_from([labels.MEDIA_OCI_MANIFEST, labels.MEDIA_OCI_INDEX, ""]) | json_values,
        "config": descriptors | json_values,
        "layers": st.lists(descriptors | json_values, max_size=5) | json_values,
        "manifests": st.lists(descriptors | json_values, max_size=5) | json_values,
        "annotations": json_values,
        "rootfs": json_values,
        "architecture": json_values,
        "os": json_values,
    },
) | st.dictionaries(names, json_values)


@given(documents, st.sampled_from(["", labels.MEDIA_OCI_MANIFEST, labels.MEDIA_OCI_INDEX, "application/json", "x/y"]))
def test_any_document_is_parsed_or_refused(document: dict[str, Any], content_type: str) -> None:
    raw = json.dumps(document).encode()
    with suppress(SnapshotterError):
        parsed = m.parse_manifest(raw, LIMITS, content_type)
        assert m.parse_manifest(m.encode(parsed), LIMITS) == parsed
    with suppress(SnapshotterError):
        index = m.parse_index(raw, LIMITS, content_type)
        assert m.parse_index(m.encode(index), LIMITS, labels.MEDIA_OCI_INDEX) == index
        m.choose_platform(index, "linux/amd64")
    with suppress(SnapshotterError):
        m.parse_config(raw, LIMITS)


@given(st.binary(max_size=200), st.data())
def test_any_bytes_are_parsed_or_refused(content: bytes, data: st.DataObject) -> None:
    seed = json.dumps(
        {"schemaVersion": 2, "config": {}, "layers": [], "auths": {"h": {"auth": "dTpw"}}, "rootfs": {"diff_ids": []}}
    ).encode()
    cut = data.draw(st.integers(0, len(seed)))
    for raw in (content, seed[:cut] + content[:3] + seed[cut + 1 :]):
        for parse in (m.parse_manifest, m.parse_index, m.parse_config):
            with suppress(SnapshotterError):
                parse(raw, LIMITS)
        with suppress(ValueError):
            dockerconfig.logins(dockerconfig.parse(raw), "h")
