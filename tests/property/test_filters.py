"""Filters and regular expressions against a second opinion."""

import re
from contextlib import suppress
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from snapshotter.errors import InvalidArgument
from snapshotter.snapshots.filters import Filter
from snapshotter.snapshots.model import Info, Kind
from snapshotter.snapshots.pattern import Effort, Pattern

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
KEYS = st.sampled_from(["l", "a.b", "containerd.io/gc.root", "ü", ""])
INFOS = st.builds(
    Info, TEXT, TEXT, st.sampled_from(Kind), st.just(0), st.just(0), st.dictionaries(KEYS, TEXT.filter(bool))
)
FIELDS = st.one_of(st.sampled_from(["name", "parent", "kind", "created"]), KEYS.map(lambda key: f"labels.{key}"))


def quoted(text: str, how: int) -> str:
    """A Go string in one of the ways to write it."""
    if how == 0:
        return '"' + "".join(f"\\x{byte:02x}" for byte in text.encode()) + '"'
    if how == 1:
        return '"' + "".join(f"\\U{ord(character):08x}" for character in text) + '"'
    if how == 2:
        return '"' + "".join(f"\\{byte:03o}" for byte in text.encode()) + '"'
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def expected(info: Info, field: str, operator: str, value: str) -> bool:
    values = {"name": info.name, "parent": info.parent, "kind": info.kind.name.lower()}
    found = values.get(field) if "." not in field else info.labels.get(field.partition(".")[2])
    if operator == "":
        return found is not None
    return (found == value) if operator == "==" else (found != value)


@given(
    INFOS,
    st.lists(st.lists(st.tuples(FIELDS, st.sampled_from(["", "==", "!="]), TEXT), min_size=1, max_size=3)),
    st.data(),
)
def test_filters_mean_what_they_say(info: Info, wanted: list[list[tuple[str, str, str]]], data: st.DataObject) -> None:
    texts: list[str] = []
    meant: list[list[tuple[str, str, str]]] = []
    space = st.sampled_from(["", " ", "\t"])
    for selectors in wanted:
        parts: list[str] = []
        meant.append([])
        for field, operator, value in selectors:
            if data.draw(st.booleans()) and info.labels.get(field.partition(".")[2]):
                value = info.labels[field.partition(".")[2]]
            meant[-1].append((field, operator, value))
            first, dot, key = field.partition(".")
            path = first + dot + (quoted(key, data.draw(st.integers(0, 3))) if dot else "")
            spelled = operator and operator + data.draw(space) + quoted(value, data.draw(st.integers(0, 3)))
            parts.append(data.draw(space) + path + data.draw(space) + spelled)
        texts.append(",".join(parts))
    found = Filter(texts).matches(info)
    assert found == (not meant or any(all(expected(info, *s) for s in selectors) for selectors in meant))
    label = Filter(texts).required_label()
    if found and label:
        assert info.labels[label[0]] == label[1]


@given(st.text(st.sampled_from('name.labels"l==!=~=,/|\\x41 \t\na()[]{}*+?^$'), max_size=30))
@example('labels."')
@example("name~=|")
def test_any_text_is_a_filter_or_an_error(text: str) -> None:
    with suppress(InvalidArgument):
        Filter([text]).matches(Info("a", "", Kind.VIEW, 0, 0, {"l": "a"}))


def patterns() -> "st.SearchStrategy[str]":
    atoms = st.sampled_from(["a", "b", ".", r"\d", r"\W", "[ab]", "[^a1]", r"\b", "^", r"\x61", "(?i:A)", "[a-c]", "-"])
    signs = st.sampled_from(["*", "+", "?", "{2}", "{0,2}", "{1,}", "*?", "{0}"])

    def larger(inner: Any) -> Any:
        return st.one_of(
            st.builds("{}{}".format, inner, inner),
            st.builds("(?:{}|{})".format, inner, inner),
            st.builds("({}){}".format, inner, signs),
        )

    return st.recursive(atoms, larger, max_leaves=12)


@settings(max_examples=500)
@given(patterns(), st.text("abA1 \n-", max_size=10))
def test_patterns_find_what_backtracking_finds(pattern: str, text: str) -> None:
    assert Pattern(pattern, Effort()).search(text) == bool(re.compile(pattern, re.ASCII).search(text))


@given(st.text(st.sampled_from("ab()[]{}|*+?^$.\\d-,1:P<>i"), max_size=40), st.text("ab1", max_size=5))
def test_any_text_is_a_pattern_or_an_error(pattern: str, text: str) -> None:
    with suppress(InvalidArgument):
        Pattern(pattern, Effort()).search(text)
