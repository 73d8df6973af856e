"""What ``--help`` prints: the options that most people need first, then all the others."""

import argparse
import inspect
from collections.abc import Mapping
from functools import partial

from fastdpo.cli.names import table
from fastdpo.cli.options import meanings_of, options_of

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
    needed = [f"--{x.name} ..." for x in options.values() if x.required]
    parser = argparse.ArgumentParser(
        usage=" ".join(["fastdpo", command, *needed, "[--config FILE] [--option VALUE ...]"]),
        description=f"{_summary(config)} {_FILES}",
        formatter_class=partial(argparse.HelpFormatter, max_help_position=34, width=100),
        add_help=False,
    )
    stage = any(x.inherited for x in options.values())
    groups: dict[str, argparse._ArgumentGroup] = {}
    for option in [*first, *(x for x in options.values() if x not in first)]:
        own = "inputs" if stage and not option.inherited else "options"
        name = option.section or (f"other {own}" if first else own)
        name = "what most people need" if option in first else name
        if name not in groups:
            groups[name] = parser.add_argument_group(name, sections.get(name))
        meaning = option.meaning.replace("%", "%%")
        groups[name].add_argument(f"--{option.name}", metavar=option.shown, help=meaning)
    return parser.format_help().rstrip()


def _summary(config: type) -> str:
    """The first paragraph of a docstring."""
    return " ".join(inspect.cleandoc(config.__doc__ or "").split("\n\n")[0].split())
