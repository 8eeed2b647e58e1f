"""`completion`: scripts for bash, zsh and fish, made from the parsers, so that they know what the program knows."""

import argparse
import re
from collections.abc import Callable, Iterator, Sequence

from snapshotter.cli.tree import Command, Option, commands

_NAME = "coco-snapshotter"


def register(group: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = group.add_parser(
        "completion",
        help="print a completion script",
        description="Print a script that completes commands, options and file names. bash: source <(coco-snapshotter "
        "completion bash), or put it into /etc/bash_completion.d. zsh: save it as _coco-snapshotter in a directory of "
        "$fpath. fish: save it as ~/.config/fish/completions/coco-snapshotter.fish.",
    )
    command.add_argument("shell", choices=tuple(SHELLS), help="which shell")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from snapshotter.cli.main import parser

    print("\n".join(SHELLS[arguments.shell](commands(parser()))))
    return 0


def _bash(found: Sequence[Command]) -> Iterator[str]:
    yield f"# bash completion of {_NAME}"
    yield "_coco_snapshotter() {"
    yield '    local word command="" current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD-1]}'
    yield '    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do'
    yield "        [[ $word == -* ]] || { command=$word; break; }"
    yield "    done"
    yield "    COMPREPLY=()"
    yield "    case $command in"
    names = " ".join(command.name for command in found)
    yield f"""    "") mapfile -t COMPREPLY < <(compgen -W "{names} --help --version" -- "$current") ;;"""
    for command in found:
        yield f"    {command.name})"
        yield "        case $previous in"
        for option in command.switches:
            if option.value:
                yield f"        {'|'.join(option.flags)}) {_bash_value(option)}; return ;;"
        yield "        esac"
        words = " ".join(flag for option in command.switches for flag in option.flags)
        yield f"""        if [[ $current == -* ]]; then mapfile -t COMPREPLY < <(compgen -W "{words}" -- "$current")"""
        yield f"        else {_bash_value(command.arguments[0]) if command.arguments else ':'}; fi ;;"
    yield "    esac"
    yield "}"
    yield f"complete -o filenames -F _coco_snapshotter {_NAME}"


def _bash_value(option: Option) -> str:
    if option.choices:
        return f"""mapfile -t COMPREPLY < <(compgen -W "{" ".join(option.choices)}" -- "$current")"""
    if option.takes_file:
        return """mapfile -t COMPREPLY < <(compgen -f -- "$current")"""
    if option.takes_directory:
        return """mapfile -t COMPREPLY < <(compgen -d -- "$current")"""
    return ":"


def _zsh(found: Sequence[Command]) -> Iterator[str]:
    yield f"#compdef {_NAME}"
    yield "_coco_snapshotter() {"
    yield "    local -a commands"
    yield "    local context state line"
    yield "    _arguments -C '(- *)--help[show help]' '(- *)--version[print the version]' \\"
    yield "        '1:command:->command' '*::argument:->argument'"
    yield "    case $state in"
    yield "    command)"
    yield "        commands=("
    for command in found:
        yield f"            {_quoted(f'{command.name}:{command.help}')}"
    yield "        )"
    yield "        _describe command commands ;;"
    yield "    argument)"
    yield "        case $words[1] in"
    for command in found:
        yield f"        {command.name}) _arguments \\"
        for option in command.switches:
            text = re.sub(r"([][:])", r"\\\1", option.help)
            for flag in option.flags:
                yield f"            {_quoted(f'*{flag}[{text}]{_zsh_value(option)}')} \\"
        for argument in command.arguments:
            yield f"            {_quoted(_zsh_value(argument))} \\"
        yield "            ;;"
    yield "        esac ;;"
    yield "    esac"
    yield "}"
    yield 'if [ "$funcstack[1]" = _coco_snapshotter ] || [ "$funcstack[1]" = _coco-snapshotter ]; then'
    yield '    _coco_snapshotter "$@"'
    yield "else"
    yield f"    compdef _coco_snapshotter {_NAME}"
    yield "fi"


def _zsh_value(option: Option) -> str:
    if not option.value:
        return ""
    name = option.value.replace(":", "\\:").replace("|", " or ")
    if option.choices:
        return f":{name}:({' '.join(option.choices)})"
    return f":{name}:{'_files' if option.takes_file else '_files -/' if option.takes_directory else ''}"


def _fish(found: Sequence[Command]) -> Iterator[str]:
    yield f"# fish completion of {_NAME}"
    yield f"complete -c {_NAME} -f"
    for command in found:
        yield f"complete -c {_NAME} -n __fish_use_subcommand -a {command.name} -d {_quoted(command.help)}"
    for command in found:
        inside = f"complete -c {_NAME} -n '__fish_seen_subcommand_from {command.name}'"
        for option in command.switches:
            flags = " ".join(f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in option.flags)
            yield f"{inside} {flags}{_fish_value(option)} -d {_quoted(option.help)}"
        for argument in command.arguments:
            if argument.choices:
                yield f"{inside} -a {_quoted(' '.join(argument.choices))}"


def _fish_value(option: Option) -> str:
    if not option.value:
        return ""
    if option.choices:
        return f" -x -a {_quoted(' '.join(option.choices))}"
    if option.takes_directory:
        return " -x -a '(__fish_complete_directories)'"
    return " -r -F" if option.takes_file else " -x"


def _quoted(text: str) -> str:
    """For all three shells: in single quotes nothing is special but the quote itself."""
    return "'" + text.replace("'", "'\\''") + "'"


SHELLS: dict[str, Callable[[Sequence[Command]], Iterator[str]]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
