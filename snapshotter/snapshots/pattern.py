"""Regular expression search in linear time, for the `~=` operator of filters.

Patterns come from clients, and Python's `re` can be made to run for ages while it holds the interpreter. So a pattern
becomes a nondeterministic automaton that is simulated one character at a time, with its transitions remembered: the
method and the syntax are RE2's (https://github.com/google/re2/wiki/Syntax), without Unicode classes. Groups only group.
"""

from collections.abc import Callable
from typing import NamedTuple

from snapshotter.errors import InvalidArgument

MAX_PATTERN = 1024  # characters
MAX_STATES = 1024
MAX_REPEAT = 1000  # as in RE2
MAX_DEPTH = 100  # nested groups
_MEMORY = 10_000  # remembered transitions
_EFFORT = 4_000_000  # characters read and states passed for one request: a second or two
_MADE = 20  # what a compiled state costs

Test = Callable[[str], bool]
Part = tuple[int, int]  # first and last state; the last one is an empty jump to be aimed

_DIGIT, _SPACE = frozenset("0123456789"), frozenset("\t\n\f\r ")
_WORD = _DIGIT | frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_")
_CLASSES = {"d": _DIGIT, "s": _SPACE, "w": _WORD}
_CONTROL = {"a": "\a", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
_START = "\0start"  # what stands before the first character; longer than a character, so it equals none


class _State(NamedTuple):
    """Consumes a character that passes `test`, or (test is None) nothing if `condition` holds; then goes to `next`."""

    test: Test | None
    condition: Callable[[str, str], bool] | None
    next: tuple[int, ...]


class Effort:
    """What the patterns of one request may still cost. Linear time is long for large patterns on much text."""

    def __init__(self) -> None:
        self._left = _EFFORT

    def spend(self, amount: int) -> None:
        """Raises InvalidArgument once there is nothing left."""
        self._left -= amount
        if self._left < 0:
            raise InvalidArgument("filter: its regular expressions take too long")


class Pattern:
    """A compiled pattern. Raises InvalidArgument for what RE2 refuses or this subset lacks."""

    def __init__(self, text: str, effort: Effort) -> None:
        if len(text) > MAX_PATTERN:
            raise InvalidArgument(f"filter: regular expression of {len(text)} characters, {MAX_PATTERN} are allowed")
        compiler = _Compiler(text)
        self._states, self._first, self._last = compiler.compile()
        self._effort = effort
        effort.spend(_MADE * len(self._states))
        self._remembered: dict[tuple[frozenset[int], str, str], frozenset[int] | None] = {}

    def search(self, text: str) -> bool:
        """Whether the pattern matches anywhere in `text`. Raises InvalidArgument when the effort is spent."""
        self._effort.spend(len(text))
        current = frozenset((self._first,))
        before = _START
        for character in text:
            following = self._step(current, before, character)
            if following is None:
                return True
            current = following
            before = "a" if character in _WORD else "\n" if character == "\n" else " "
        return self._last in self._closure(current, before, "")

    def _step(self, states: frozenset[int], before: str, character: str) -> frozenset[int] | None:
        """States after `character`; None once the pattern has matched."""
        key = (states, before, character)
        if key in self._remembered:
            return self._remembered[key]
        reached = self._closure(states, before, character)
        result = None
        if self._last not in reached:
            following = {self._first}
            for number in reached:
                state = self._states[number]
                if state.test is not None and state.test(character):
                    following.update(state.next)
            result = frozenset(following)
        if len(self._remembered) >= _MEMORY:
            self._remembered.clear()
        self._remembered[key] = result
        return result

    def _closure(self, states: frozenset[int], before: str, after: str) -> set[int]:
        """All states reachable without consuming anything, between `before` and `after`."""
        reached, todo = set(states), list(states)
        while todo:
            state = self._states[todo.pop()]
            if state.test is None and (state.condition is None or state.condition(before, after)):
                new = [number for number in state.next if number not in reached]
                reached.update(new)
                todo += new
        self._effort.spend(len(reached))
        return reached


class _Compiler:
    """Recursive descent over the pattern; appends states as it goes."""

    def __init__(self, text: str) -> None:
        self._text, self._at, self._depth = text, 0, 0
        self._flags: frozenset[str] = frozenset()
        self._states: list[_State] = []

    def compile(self) -> tuple[list[_State], int, int]:
        first, last = self._alternatives()
        if self._at < len(self._text):
            raise self._error("unexpected )")
        return self._states, first, last

    # states

    def _add(self, test: Test | None = None, condition: Callable[[str, str], bool] | None = None) -> Part:
        """A state and, behind it, an empty one that a later part can be joined to."""
        number = len(self._states)
        if number + 2 > MAX_STATES:
            raise self._error("too large")
        self._states += [_State(test, condition, (number + 1,)), _State(None, None, ())]
        return number, number + 1

    def _aim(self, state: int, *targets: int) -> None:
        self._states[state] = _State(None, None, self._states[state].next + targets)

    # grammar

    def _alternatives(self) -> Part:
        first, last = self._add()
        self._states[first] = _State(None, None, ())
        while True:
            start, end = self._sequence()
            self._aim(first, start)
            self._aim(end, last)
            if not self._take("|"):
                return first, last

    def _sequence(self) -> Part:
        first, last = self._add()
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            start, end = self._repeated()
            self._aim(last, start)
            last = end
        return first, last

    def _repeated(self) -> Part:
        begin = self._at
        part = self._atom()
        end = self._at
        counts = self._quantifier()
        if counts is None:
            return part
        self._take("?")  # lazy: matters only to captures
        behind = self._at
        if self._quantifier() is not None:
            raise self._error("nested repetition operator")
        if counts == (1, 1):
            return part
        flags = self._flags

        def copy() -> Part:
            self._at, self._flags = begin, flags
            made = self._atom()
            assert self._at == end
            return made

        result = self._repeat(part, copy, *counts)
        self._at, self._flags = behind, flags
        return result

    def _repeat(self, part: Part, copy: Callable[[], Part], least: int, most: int | None) -> Part:
        first, last = self._add()
        self._states[first] = _State(None, None, ())
        joint = first
        for index in range(max(least, most or 0, 1)):
            start, end = part if index == 0 else copy()
            if index >= least:
                self._aim(joint, last)
            self._aim(joint, start)
            if most is None and index == max(least, 1) - 1:
                self._aim(end, start)
            joint = end
        self._aim(joint, last)
        if most == 0:
            self._states[first] = _State(None, None, (last,))
        return first, last

    def _quantifier(self) -> tuple[int, int | None] | None:
        for sign, counts in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._take(sign):
                return counts
        closing = self._text.find("}", self._at)
        if self._text[self._at : self._at + 1] != "{" or closing < 0:
            return None
        low, comma, high = self._text[self._at + 1 : closing].partition(",")
        if not _number(low) or (comma and high and not _number(high)):
            return None  # an ordinary brace
        least, most = int(low), int(high) if high else None if comma else int(low)
        if least > MAX_REPEAT or (most is not None and not least <= most <= MAX_REPEAT):
            raise self._error("invalid repeat count")
        self._at = closing + 1
        return least, most

    def _atom(self) -> Part:
        character = self._next()
        if character in "*+?":
            raise self._error(f"nothing to repeat before {character}")
        if character == "(":
            return self._group()
        if character == "[":
            return self._add(self._folded(self._class()))
        if character == ".":
            return self._add("".__ne__ if "s" in self._flags else "\n".__ne__)
        if character == "^":
            return self._add(None, _line_start if "m" in self._flags else _text_start)
        if character == "$":
            return self._add(None, _line_end if "m" in self._flags else _text_end)
        if character == "\\":
            return self._escape()
        return self._add(self._folded(character.__eq__))

    def _group(self) -> Part:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._error("nested too deeply")
        outside = self._flags
        if self._take("?"):
            if self._take("P<") or self._take("<"):
                name = self._until(">")
                if not name.isidentifier():
                    raise self._error("bad group name")
            elif self._set_flags():  # (?i) holds until the enclosing group ends
                self._depth -= 1
                return self._add()
        part = self._alternatives()
        if not self._take(")"):
            raise self._error("missing )")
        self._flags = outside
        self._depth -= 1
        return part

    def _set_flags(self) -> bool:
        """Read `i)` or `i-s:`; whether the group ended with that."""
        on = True
        while True:
            character = self._next()
            if character in "imsU":
                self._flags = self._flags | {character} if on else self._flags - {character}
            elif character == "-" and on:
                on = False
            elif character in ":)":
                return character == ")"
            else:
                raise self._error("unsupported group")

    def _escape(self) -> Part:
        character = self._next()
        conditions = {"A": _text_start, "z": _text_end, "b": _boundary, "B": lambda b, a: not _boundary(b, a)}
        if character in conditions:
            return self._add(None, conditions[character])
        if character == "Q":
            end = self._text.find("\\E", self._at)
            literal = self._text[self._at : None if end < 0 else end]
            self._at = len(self._text) if end < 0 else end + 2
            first, last = self._add()
            for wanted in literal:
                start, end = self._add(self._folded(wanted.__eq__))
                self._aim(last, start)
                last = end
            return first, last
        return self._add(self._folded(self._character_or_class(character)))

    def _class(self) -> Test:
        inverted = self._take("^")
        tests: list[Test] = []
        first = True
        while first or not self._take("]"):
            first = False
            low = self._class_item()
            if callable(low):
                tests.append(low)
                continue
            high = low
            if self._text[self._at : self._at + 1] == "-" and self._text[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                end = self._class_item()
                if callable(end) or end < low:
                    raise self._error("bad character class range")
                high = end
            tests.append(lambda c, low=low, high=high: low <= c <= high)  # type: ignore[misc]
        return lambda c: any(test(c) for test in tests) != inverted

    def _class_item(self) -> str | Test:
        if self._text.startswith("[:", self._at):
            raise self._error("named character classes are not supported")
        character = self._next()
        if character != "\\":
            return character
        character = self._next()
        if character.lower() in _CLASSES:
            return self._character_or_class(character)
        return self._literal(character)

    def _character_or_class(self, character: str) -> Test:
        members = _CLASSES.get(character.lower())
        if members is None:
            return self._literal(character).__eq__
        return members.__contains__ if character.islower() else lambda c: c not in members

    def _literal(self, character: str) -> str:
        """The character that an escape stands for."""
        if character in _CONTROL:
            return _CONTROL[character]
        try:
            if character == "x":
                digits = self._until("}") if self._take("{") else self._next() + self._next()
                return chr(int(digits, 16))
            if character == "0":
                begin = self._at
                while self._at < begin + 2 and self._text[self._at : self._at + 1] in set("01234567"):
                    self._at += 1
                return chr(int(self._text[begin - 1 : self._at], 8))
        except (ValueError, OverflowError):
            raise self._error("bad escape") from None
        if character.isascii() and not character.isalnum():
            return character
        raise self._error(f"escape \\{character} is not supported")

    def _folded(self, test: Test) -> Test:
        if "i" not in self._flags:
            return test
        return lambda c: test(c) or test(c.lower()) or test(c.upper())

    # characters

    def _next(self) -> str:
        if self._at >= len(self._text):
            raise self._error("ends too early")
        self._at += 1
        return self._text[self._at - 1]

    def _take(self, expected: str) -> bool:
        found = self._text.startswith(expected, self._at)
        self._at += len(expected) if found else 0
        return found

    def _until(self, end: str) -> str:
        found = self._text.find(end, self._at)
        if found < 0:
            raise self._error(f"missing {end}")
        text, self._at = self._text[self._at : found], found + 1
        return text

    def _error(self, what: str) -> InvalidArgument:
        return InvalidArgument(f"filter: regular expression {self._text[:100]!r}: {what} (at {self._at})")


def _number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 6


# Conditions on what stands before and after a place: _START or "" at the ends of the text. Of the character before,
# only its class is kept ("a" for a word character, "\n", " " for all others), which keeps the transitions few.


def _text_start(before: str, _after: str) -> bool:
    return before == _START


def _text_end(_before: str, after: str) -> bool:
    return after == ""


def _line_start(before: str, _after: str) -> bool:
    return before in (_START, "\n")


def _line_end(_before: str, after: str) -> bool:
    return after in ("", "\n")


def _boundary(before: str, after: str) -> bool:
    return (before in _WORD) != (after in _WORD)
