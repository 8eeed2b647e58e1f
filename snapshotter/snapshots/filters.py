"""containerd's filter language: which snapshots a List returns.

    filter    = selector *("," selector)            all of them must hold
    selector  = fieldpath [("==" | "!=" | "~=") value]     without an operator: the field is present
    fieldpath = field *("." field)
    field     = 1*[A-Za-z0-9_] | quoted
    value     = quoted | a run of visible characters other than a comma
    quoted    = Go string in double quotes; for "~=" also /…/ or |…|, in which only the quote character is escaped

Fields are `name`, `parent`, `kind` and `labels.<key>`, whose parts are joined with dots again. An absent field fulfils
`!=` and nothing else. Source: containerd pkg/filters, and the adaptor of its snapshot service.
"""

import unicodedata
from collections.abc import Callable, Sequence
from typing import NamedTuple

from snapshotter.errors import InvalidArgument
from snapshotter.snapshots.model import Info
from snapshotter.snapshots.pattern import Effort, Pattern

MAX_CHARACTERS, MAX_SELECTORS = 256 << 10, 1000  # of all filters of a request

_FIELD = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")
_OPERATOR = frozenset("=!~")
_ESCAPES = {"a": 7, "b": 8, "f": 12, "n": 10, "r": 13, "t": 9, "v": 11, "\\": 92, '"': 34}
_HEX = {"x": 2, "u": 4, "U": 8}  # digits after \x, \u, \U


class Selector(NamedTuple):
    """One condition on one field. `operator` "" asks for presence."""

    field: tuple[str, ...]
    operator: str
    value: str
    holds: Callable[[str | None], bool]


class Filter:
    """What the `filters` of one request ask for: any of the strings; all snapshots if there are none."""

    def __init__(self, texts: Sequence[str]) -> None:
        """Raises InvalidArgument with the place of the error."""
        size = sum(map(len, texts))
        if size > MAX_CHARACTERS or len(texts) > MAX_SELECTORS:
            raise InvalidArgument(
                f"{len(texts)} filters of {size} characters; {MAX_SELECTORS} of {MAX_CHARACTERS} are allowed"
            )
        effort = Effort()
        self._alternatives = [_Parser(text, effort).parse() for text in texts]
        if sum(map(len, self._alternatives)) > MAX_SELECTORS:
            raise InvalidArgument(f"filters have more than {MAX_SELECTORS} conditions")

    def matches(self, info: Info) -> bool:
        return not self._alternatives or any(
            all(selector.holds(_field(info, selector.field)) for selector in selectors)
            for selectors in self._alternatives
        )

    def required_label(self) -> tuple[str, str] | None:
        """A label (key, value) without which nothing matches, so that an index can be asked. None if there is none."""
        if len(self._alternatives) != 1:
            return None
        for field, operator, value, _ in self._alternatives[0]:
            if field[0] == "labels" and operator == "==" and value:
                return ".".join(field[1:]), value
        return None


def _field(info: Info, path: tuple[str, ...]) -> str | None:
    """Value of a field; None if it is absent."""
    if path[0] == "name":
        return info.name
    if path[0] == "parent":
        return info.parent
    if path[0] == "kind":
        return info.kind.name.lower()
    if path[0] == "labels":
        return info.labels.get(".".join(path[1:]))
    return None


def _condition(operator: str, value: str, effort: Effort) -> Callable[[str | None], bool]:
    if operator == "==":
        return lambda found: found == value
    if operator == "!=":
        return lambda found: found != value
    if operator == "~=":
        pattern = Pattern(value, effort)
        return lambda found: found is not None and pattern.search(found)
    return lambda found: found is not None


class _Parser:
    """Recursive descent over one filter string; white space between tokens means nothing."""

    def __init__(self, text: str, effort: Effort) -> None:
        self._text, self._at, self._effort = text, 0, effort

    def parse(self) -> list[Selector]:
        if self._peek() == "":
            return []
        selectors = [self._selector()]
        while self._peek() == ",":
            self._at += 1
            selectors.append(self._selector())
        if self._peek():
            raise self._error("expected a comma or the end")
        return selectors

    def _selector(self) -> Selector:
        field = self._fieldpath()
        operator = self._run(_OPERATOR.__contains__)
        if not operator:
            return Selector(field, "", "", _condition("", "", self._effort))
        if operator not in ("==", "!=", "~="):
            raise self._error(f"unknown operator {operator!r}")
        value = self._value(regular=operator == "~=")
        return Selector(field, operator, value, _condition(operator, value, self._effort))

    def _fieldpath(self) -> tuple[str, ...]:
        fields = [self._name()]
        while self._peek() == ".":
            self._at += 1
            fields.append(self._name())
        return tuple(fields)

    def _name(self) -> str:
        if self._peek() == '"':
            return self._quoted()
        name = self._run(_FIELD.__contains__)
        if not name:
            raise self._error("expected a field name")
        return name

    def _value(self, *, regular: bool) -> str:
        first = self._peek()
        if first == '"':
            return self._quoted()
        if first and first in "/|":
            if not regular:
                raise self._error(f"{first}…{first} is only for ~=")
            return self._raw(first)
        value = self._run(_visible)
        if not value:
            raise self._error("expected a value")
        return value

    def _peek(self) -> str:
        """The next character after white space; "" at the end."""
        while self._at < len(self._text) and self._text[self._at].isspace():
            self._at += 1
        return self._text[self._at : self._at + 1]

    def _run(self, belongs: Callable[[str], bool]) -> str:
        self._peek()
        begin = self._at
        while self._at < len(self._text) and belongs(self._text[self._at]):
            self._at += 1
        return self._text[begin : self._at]

    def _next(self) -> str:
        if self._at >= len(self._text) or self._text[self._at] == "\n":
            raise self._error("quoted text does not end")
        self._at += 1
        return self._text[self._at - 1]

    def _raw(self, quote: str) -> str:
        self._at += 1
        text = ""
        while (character := self._next()) != quote:
            if character == "\\":
                following = self._next()
                character = quote if following == quote else character + following
            text += character
        return text

    def _quoted(self) -> str:
        self._at += 1
        raw = bytearray()
        while (character := self._next()) != '"':
            if character == "\\":
                raw += self._escape(self._next())
            else:
                raw += character.encode()
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self._error("quoted text is not UTF-8") from None

    def _escape(self, character: str) -> bytes:
        if character in _ESCAPES:
            return bytes((_ESCAPES[character],))
        if character in _HEX:
            number = self._number("".join(self._next() for _ in range(_HEX[character])), 16)
            if character == "x":
                return bytes((number,))
            if number <= 0x10FFFF and not 0xD800 <= number < 0xE000:
                return chr(number).encode()
        elif "0" <= character <= "7":
            number = self._number(character + self._next() + self._next(), 8)
            if number < 256:
                return bytes((number,))
        raise self._error(f"bad escape \\{character}")

    def _number(self, digits: str, base: int) -> int:
        if not digits.isascii() or not digits.isalnum():
            raise self._error(f"bad escape {digits!r}")
        try:
            return int(digits, base)
        except ValueError:
            raise self._error(f"bad escape {digits!r}") from None

    def _error(self, what: str) -> InvalidArgument:
        return InvalidArgument(f"filter {self._text[:200]!r}: {what} (at {self._at})")


def _visible(character: str) -> bool:
    return character != "," and not character.isspace() and unicodedata.category(character)[0] in "LMNPS"
