"""The command line as data, read off the parsers: what completion scripts and the manual are made of."""

import argparse
from collections.abc import Iterator
from typing import NamedTuple


class Option(NamedTuple):
    """An option, or with no `flags` an argument. `value` is what it takes, as the help calls it; "" for a switch."""

    flags: tuple[str, ...]
    value: str
    help: str
    choices: tuple[str, ...]
    required: bool

    @property
    def takes_file(self) -> bool:
        return any(word in self.value for word in ("FILE", ".pem", "SOCK"))

    @property
    def takes_directory(self) -> bool:
        return "DIR" in self.value


class Command(NamedTuple):
    """One command: a line of help, its description, and what it takes."""

    name: str
    help: str
    description: str
    options: tuple[Option, ...]

    @property
    def switches(self) -> list[Option]:
        return [option for option in self.options if option.flags]

    @property
    def arguments(self) -> list[Option]:
        return [option for option in self.options if not option.flags]


def commands(parser: argparse.ArgumentParser) -> list[Command]:
    """Every command of the parser, in the order of its help."""
    group = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    helps = {action.dest: action.help or "" for action in group._choices_actions}
    return [
        Command(name, helps[name], command.description or "", tuple(_options(command)))
        for name, command in group.choices.items()
    ]


def _options(parser: argparse.ArgumentParser) -> Iterator[Option]:
    for action in parser._actions:
        value = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
        choices = tuple(map(str, action.choices or ()))
        yield Option(
            tuple(action.option_strings),
            "" if action.nargs == 0 else "|".join(choices) or value,
            (action.help or "") % {"default": action.default},
            choices,
            action.required,
        )
