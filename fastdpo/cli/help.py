"""What ``--help`` prints: the options that most people need first, then all the others."""

import inspect
import textwrap
from collections.abc import Iterable, Iterator, Mapping

from fastdpo.cli.names import table
from fastdpo.cli.options import Option, meanings_of, options_of

_WIDTH = 100
_FILES = (
    "Options can stand in a YAML file too, those of a section nested under its name. What the "
    "command line says comes before what a file says."
)


def overview(commands: Mapping[str, type]) -> str:
    """The commands, a line each."""
    lines = "\n".join(f"  {name:10}{_summary(config)}" for name, config in commands.items())
    return f"""usage: fastdpo COMMAND [--config FILE] [--option VALUE ...]

Length-regularized DPO, fast and exact.

{lines}

fastdpo COMMAND --help lists its options. In a checkout, also: fastdpo bench."""


def help_of(command: str, config: type) -> str:
    """All options of a command, with their defaults and meanings."""
    options, sections = options_of(config), meanings_of(config)
    first = [options[name] for name in table()["first"].get(command, "").split()]
    rest = [x for x in options.values() if x not in first]
    needed = [f"--{x.name} ..." for x in options.values() if x.required]
    usage = ["usage: fastdpo", command, *needed, "[--config FILE] [--option VALUE ...]"]
    about = textwrap.wrap(_summary(config), _WIDTH)
    lines = [" ".join(usage), "", *about, "", *textwrap.wrap(_FILES, _WIDTH)]
    if first:
        lines += ["", "what most people need:", *_lines(first)]
    stage = any(x.inherited for x in options.values())
    groups: dict[str, list[Option]] = {}
    for option in rest:
        own = "inputs" if stage and not option.inherited else "options"
        groups.setdefault(option.section or f"{'other ' * bool(first)}{own}", []).append(option)
    for name, group in groups.items():
        meaning = f"{name}: {sections[name]}" if name in sections else f"{name}:"
        lines += ["", *textwrap.wrap(meaning, _WIDTH), *_lines(group)]
    return "\n".join(lines)


def _summary(config: type) -> str:
    """The first paragraph of a docstring."""
    return " ".join(inspect.cleandoc(config.__doc__ or "").split("\n\n")[0].split())


def _lines(options: Iterable[Option]) -> Iterator[str]:
    """An option and its default, and beside them, or below if they are long, what it means."""
    indent = " " * 34
    for option in options:
        shown = f"  --{option.name} {option.shown}"
        text = textwrap.fill(
            option.meaning, _WIDTH, initial_indent=indent, subsequent_indent=indent
        )
        yield f"{shown}\n{text}" if len(shown) >= len(indent) else shown + text[len(shown) :]
