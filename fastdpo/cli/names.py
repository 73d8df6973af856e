"""Names that are no options, and what stands for them: old ones, TRL's, and misspelt ones."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

import yaml

from fastdpo.cli.options import Given, Option
from fastdpo.errors import ConfigError
from fastdpo.rounds.config import IterateConfig
from fastdpo.rounds.old_names import RENAMED, moved, old_names


@cache
def table() -> dict[str, Any]:
    """``names.yaml``: what comes first in ``--help``, and TRL's names."""
    return yaml.safe_load((resources.files("fastdpo.cli") / "names.yaml").read_text())


def refuse(unknown: Sequence[Given], command: str, options: Mapping[str, Option]) -> None:
    """Raise ConfigError, in one line with the place, for names that are no options of a command."""
    first = unknown[0]
    old, where = _old(command, first.place), first.place
    found = list(dict.fromkeys(given.name for given in unknown if given.name in old))
    if found and command in ("iterate", "plan") and where:
        raise ConfigError(
            f"{where}these options are in sections now, nested under them: {moved(found, old)}"
        )
    if found:
        pairs = ", ".join(f"--{name} is --{old[name]}" for name in found)
        raise ConfigError(f"{where}options of fastdpo {command} have other names now: {pairs}")
    if meant := _of_trl(first.name, options):
        raise ConfigError(f"{where}{first} is {meant}")
    close = nearest(first.name, options)
    guess = f"; did you mean {'' if where else '--'}{close}?" if close else ""
    raise ConfigError(
        f"{where}{first} is no option of fastdpo {command}{guess} "
        f"(fastdpo {command} --help lists them)"
    )


def _old(command: str, place: str) -> dict[str, str]:
    """Old names of a command's options, or of those in a file of a whole run, and the new ones."""
    if command == "iterate" or (command == "plan" and place):
        return old_names(IterateConfig)
    ours = {old: new.partition(".") for old, new in RENAMED.items()}
    return {old: name for old, (section, _, name) in ours.items() if section == command}


def _of_trl(name: str, options: Mapping[str, Option]) -> str | None:
    """What stands for an option of TRL, if it is one of those listed."""
    places = {short: f"--{name}" for short, name in _short(options).items()}
    for line in (x for row in table()["trl"] if name in row["names"].split() for x in row["are"]):
        try:
            return line.format_map(places)
        except KeyError:
            continue
    return None


def nearest(name: str, options: Mapping[str, Option]) -> str | None:
    """The option whose name is most like this one, with or without its section."""
    names = _short(options) | {option: option for option in options}
    names |= {option.section: option.section for option in options.values() if option.section}
    bare = name.rpartition(".")[2]
    found = bare if bare in names else closest(name, names) or closest(bare, names)
    return names[found] if found else None


def closest(name: str, names: Iterable[str]) -> str | None:
    """The one of several names that is most like this one, if any is."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1)), None)


def _short(options: Mapping[str, Option]) -> dict[str, str]:
    """Options by their names without a section; where several share one, the trainer's first."""
    first = sorted(options, key=lambda name: not name.startswith("train."))
    return {name.rpartition(".")[2]: name for name in reversed(first)}
