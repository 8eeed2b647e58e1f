"""containerd's filter language."""

import re

import pytest

from snapshotter.errors import InvalidArgument
from snapshotter.snapshots.filters import Filter
from snapshotter.snapshots.model import Info, Kind
from snapshotter.snapshots.pattern import MAX_PATTERN, Effort, Pattern

LABELS = {"l": "1", "containerd.io/gc.root": "check walk", "a.b": "x,y", "tab": "a\tb", "ä": "ü"}
INFO = Info("default/1/extract-7 sha256:ab", "p", Kind.ACTIVE, 0, 0, LABELS)


def matches(*texts: str, info: Info = INFO) -> bool:
    return Filter(texts).matches(info)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "name",
        "parent==p",
        "kind==active",
        "kind != view , parent == p",
        "labels.l",
        "labels.l==1",
        "labels.l!=2",
        "labels.nothing!=1",
        "created!=1",
        'labels."containerd.io/gc.root"=="check walk"',
        "labels.a.b==\"x,y\"",
        'labels."a.b"=="\\x78,\\171"',
        'labels.tab=="a\\tb"',
        'labels."ä"==ü',
        'labels."\\u00e4"=="\\U000000fc"',
        "name~=extract",
        "name~=/^default\\/[0-9]+\\/extract/",
        "name~=|sha256:[0-9a-f]+$|",
        'name~="EXTRACT|[[]|sha"',
        "labels.l~=^1$",
        "name.anything==\"default/1/extract-7 sha256:ab\"",
        'parent=="p",labels.l',
    ],
)  # fmt: skip
def test_what_matches(text: str) -> None:
    assert matches(text)


@pytest.mark.parametrize(
    "text",
    [
        "name==other",
        "parent==p,kind==view",
        "labels",
        "labels.nothing",
        "labels.nothing==1",
        "labels.nothing~=.*",
        "created",
        "created~=.",
        "parent!=p",
        'parent==""',
    ],
)
def test_what_does_not_match(text: str) -> None:
    assert not matches(text)


def test_an_empty_parent_is_present() -> None:
    base = INFO._replace(parent="")
    assert matches('parent==""', info=base)
    assert matches("parent", info=base)
    assert not matches('parent!=""', info=base)
    assert matches('parent!=""')


def test_several_strings_are_alternatives() -> None:
    assert matches("name==other", "kind==active")
    assert not matches("name==other", "kind==view")
    assert matches()
    assert matches("name==other", "")


@pytest.mark.parametrize(
    "text",
    [
        ",", "name==", "name==a,", "name=a", "name===a", "=a", "name==a b", ".name", "name.", "name..x", "na-me",
        'name=="open', 'name=="bad\\q"', 'name=="\\400"', 'name=="\\xf"', 'name=="\\ud800"', 'name=="\\xff"',
        "name==/x/", "name==|x|", "name~=/open", "name~=(", "name~=a**", "name~=(?=a)", 'name~="\\\\1"', "name~=\\pL",
        "name~=a{2,1}", "name~=a{1001}", "name~=[b-a]", "name~=[[:alpha:]]", "name==\"a\nb\"", "name ! a", "$",
        'name=="\\U00110000"', "name~=" + "a" * (MAX_PATTERN + 1), "name~=(a{100}){100}", "name~=" + "(" * 200,
        'name=="\\x1_"',
    ],
)  # fmt: skip
def test_what_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^filter"):
        Filter([text])


@pytest.mark.parametrize(
    ("texts", "label"),
    [
        (['labels."containerd.io/snapshot.ref"==sha256:1,parent==""'], ("containerd.io/snapshot.ref", "sha256:1")),
        (["kind==committed,labels.a.b==c"], ("a.b", "c")),
        (["labels.a==b", "labels.a==c"], None),
        (['labels.a==""'], None),
        (["labels.a!=b"], None),
        ([], None),
    ],
)
def test_the_index_that_can_be_asked(texts: list[str], label: tuple[str, str] | None) -> None:
    assert Filter(texts).required_label() == label


@pytest.mark.parametrize(
    ("pattern", "text", "found"),
    [
        ("", "", True),
        ("^$", "", True),
        ("a.c", "a\nc", False),
        ("(?s)a.c", "a\nc", True),
        ("(?i)ÄB", "xäbx", True),
        ("a(?i)b|c", "aB", True),
        ("(?i:a)b", "AB", False),
        ("(?m)^b$", "a\nb\nc", True),
        ("^b$", "a\nb\nc", False),
        (r"\bfoo\b", "a foo.", True),
        (r"\bfoo\b", "afoo", False),
        (r"\Aab\z", "ab", True),
        (r"\Qa.b\E+", "a.bbb", True),
        (r"x{2,}", "axxxb", True),
        (r"x{,2}", "x{,2}", True),
        (r"^x{0}y", "y", True),
        (r"(?P<name>a)(?<other>b)", "ab", True),
        (r"[]a]", "]", True),
        (r"[a\-z]", "-", True),
        (r"[^\W\d]", "_", True),
        (r"\x41\x{1F600}\07", "A\U0001f600\x07", True),
        (r"a{2}?b", "aab", True),
        (r"[\]^]", "^", True),
    ],
)
def test_regular_expressions(pattern: str, text: str, found: bool) -> None:
    assert Pattern(pattern, Effort()).search(text) is found


@pytest.mark.parametrize("pattern", ["(a*)*b", "(a|aa)+$", "(a?){50}a{50}b", "(.*)(.*)(.*)(.*)(.*)=x"])
@pytest.mark.timeout(20)
def test_no_pattern_takes_for_ever(pattern: str) -> None:
    assert re.compile(pattern), "a backtracking matcher takes exponential or high polynomial time"
    assert not Pattern(pattern, Effort()).search("a" * 10_000 + "!")
