"""What ``--help`` prints: the options that most people need first, then all the others."""

import inspect
import textwrap
from collections.abc import Iterable, Mapping

from fastdpo.cli.names import table
from fastdpo.cli.options import Option, meanings_of, options_of

_WIDTH, _INDENT = 100, 34
_FILES = (
    "Options can stand in a YAML file too, those of a section nested under its name. What the "
    "command line says comes before what a file says."
)


def overview(commands: Mapping[str, type]) -> str:
    """The commands, a line each."""
    lines = [f"  {name:10}{_summary(config)}" for name, config in commands.items()]
    return "\n".join(
        [
            "usage: fastdpo COMMAND [--config FILE] [--option VALUE ...]",
            "",
            "Length-regularized DPO, fast and exact.",
            "",
            *lines,
            "",
            "fastdpo COMMAND --help lists its options. In a checkout, also: fastdpo bench.",
        ]
    )


def help_of(command: str, config: type) -> str:
    """All options of a command, with their defaults and meanings."""
    options, sections = options_of(config), meanings_of(config)
    first = [options[name] for name in table()["first"].get(command, "").split()]
    rest = [x for x in options.values() if x not in first]
    needed = " ".join(f"--{x.name} ..." for x in options.values() if x.required)
    lines = [
        f"usage: fastdpo {command} {needed} [--config FILE] [--option VALUE ...]".replace(
            "  ", " "
        ),
        "",
        *textwrap.wrap(_summary(config), _WIDTH),
        "",
        *textwrap.wrap(_FILES, _WIDTH),
    ]
    if first:
        lines += ["", "what most people need:", *_lines(first)]
    groups: dict[str, list[Option]] = {}
    for option in rest:
        groups.setdefault(option.section or ("" if option.inherited else command), []).append(
            option
        )
    for name, group in groups.items():
        title = name if name != command else f"other options of {command}" if first else "options"
        meaning = f": {sections[name]}" if name in sections else ":"
        lines += ["", *textwrap.wrap((title or "options of the stage") + meaning, _WIDTH)]
        lines += _lines(group)
    return "\n".join(lines)


def _summary(config: type) -> str:
    """The first paragraph of a docstring, less its full stop."""
    return " ".join(inspect.cleandoc(config.__doc__ or "").split("\n\n")[0].split())


def _lines(options: Iterable[Option]) -> list[str]:
    lines = []
    for option in options:
        shown = f"  --{option.name} {option.shown}"
        meaning = textwrap.wrap(option.meaning, _WIDTH - _INDENT) or [""]
        if len(shown) >= _INDENT:
            lines.append(shown)
        else:
            meaning[0] = f"{shown:{_INDENT}}{meaning[0]}"
        indented = [" " * _INDENT + x for x in meaning]
        lines += indented if len(shown) >= _INDENT else [meaning[0], *indented[1:]]
    return lines
