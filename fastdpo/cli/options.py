"""A dataclass as options: read from YAML and from the command line, with errors of one line.

The fields of the dataclass are the options, its docstring says what they mean. A field that is
itself a dataclass is a section: ``--train.alpha 0.02``, and in YAML ``train: {alpha: 0.02}``. What
the whole and a section both have, as ``seed``, is the whole's, and is said once.
"""

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import yaml

from fastdpo.errors import ConfigError

_MEANING = re.compile(r"^ {4}(\w+(?:, \w+)*): (.*(?:\n {8,}.*)*)", re.MULTILINE)
_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_KINDS = {
    int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null",
}  # fmt: skip


@dataclass(frozen=True)
class Option:
    """One option of a command.

    Attributes:
        name: as on the command line, ``section.field`` in a section.
        kind: its type.
        default: MISSING where it must be given.
        meaning: what it is, from the docstring.
        inherited: whether it is of the stage that a command runs, not the command's own.
    """

    name: str
    kind: Any
    default: Any
    meaning: str
    inherited: bool

    @property
    def section(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def required(self) -> bool:
        return self.default is MISSING

    @property
    def shown(self) -> str:
        """The default as one would write it."""
        return "(required)" if self.required else as_text(self.default)


class Given(NamedTuple):
    """A value that was given for an option, and where; as text, and lists and mappings of text."""

    name: str
    value: Any
    place: str  # "file:line: ", empty for the command line

    def __str__(self) -> str:
        return self.name if self.place else f"--{self.name}"


@cache
def options_of(config: type) -> dict[str, Option]:
    """The options that a dataclass stands for, by name, its own before those of its sections."""
    return {option.name: option for option in _options(config, "", frozenset())}


def _options(config: type, prefix: str, said: frozenset[str]) -> Iterator[Option]:
    kinds, meanings = get_type_hints(config), meanings_of(config)
    stages = [base for base in config.__bases__ if is_dataclass(base)]
    inherited = {field.name for base in stages for field in fields(base)}
    for field in sorted(fields(config), key=lambda field: field.name in inherited):
        name, kind = prefix + field.name, kinds[field.name]
        if is_dataclass(kind):
            outer = said | {other.name for other in fields(config)}
            yield from _options(kind, f"{name}.", outer)  # type: ignore[arg-type]
        elif field.name not in said:
            made = field.default_factory
            default = field.default if made is MISSING else made()
            meaning = meanings.get(field.name, "")
            yield Option(name, kind, default, meaning, field.name in inherited)


def meanings_of(config: type) -> dict[str, str]:
    """What each field means, from the "Attributes:" of the docstrings of a class and its bases."""
    found: dict[str, str] = {}
    for each in reversed(config.__mro__):
        for names, text in _MEANING.findall(inspect.cleandoc(each.__doc__ or "")):
            text = " ".join(text.split()).replace("``", "`")
            found |= dict.fromkeys(names.split(", "), text)
    return found


def as_text(value: Any) -> str:
    """A value as one would write it in YAML."""
    if isinstance(value, float):
        return f"{value:g}"
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).split("\n")[0]


def convert(value: Any, kind: Any) -> Any:
    """Text, or a list of it, as a value of a type.

    Raises ValueError when it is no such value.
    """
    if isinstance(kind, UnionType):
        for member in sorted(get_args(kind), key=lambda x: x is str):  # all is text, so it is last
            try:
                return convert(value, member)
            except ValueError:
                continue
    elif get_origin(kind) is list and isinstance(value, list):
        return [convert(x, get_args(kind)[0]) for x in value]
    elif isinstance(value, str):
        if kind is NoneType and value in ("", "~", "null"):
            return None
        if kind is bool and value.lower() in _BOOLEANS:
            return _BOOLEANS[value.lower()]
        if kind in (int, float, str):
            return kind(value)
    raise ValueError(value)


def kinds_of(kind: Any) -> str:
    """A type in words: "a number or null"."""
    if get_origin(kind) is list:
        return "a list of " + ("numbers" if get_args(kind)[0] is float else "texts, as [a, b]")
    members = sorted(get_args(kind), key=lambda x: x is NoneType)
    return " or ".join(map(kinds_of, members)) or _KINDS[kind]


def read_arguments(argv: Sequence[str], options: Mapping[str, Option]) -> Iterator[Given]:
    """What a command line gives: ``--name value``, ``--name=value``, or ``--name`` for true.

    Raises ConfigError for a word that belongs to no option, or an option without its value.
    """
    words = list(argv)
    while words:
        word = words.pop(0)
        if not re.match(r"--[a-zA-Z]", word):
            raise ConfigError(f"{word!r} belongs to no option; options are --name value")
        name, given, value = word[2:].partition("=")
        name = name.replace("-", "_")
        option = options.get(name)
        if not given and words and not words[0].startswith("--"):
            value = words.pop(0)
        elif not given and option is not None and option.kind is not bool:
            raise ConfigError(f"--{name} needs a value, {kinds_of(option.kind)}")
        elif not given:
            value = "true"
        yield Given(name, _listed(value) if option and "list" in str(option.kind) else value, "")


def _listed(text: str) -> Any:
    """The list that text in brackets is, other text as it is."""
    try:
        return yaml.load(text, yaml.BaseLoader) if text.startswith("[") else text
    except yaml.YAMLError:
        return text


def read_file(path: str, config: type) -> list[Given]:
    """What a YAML file gives, with the names of the dataclass's sections before their options'.

    Raises ConfigError, with the file and the line, when it is no mapping in YAML.
    """
    sections = {option.section for option in options_of(config).values()} - {""}
    try:
        loader = yaml.BaseLoader(Path(path).read_text(encoding="utf-8"))
        root = loader.get_single_node()
        return list(_leaves(loader, root, path, "", sections)) if root is not None else []
    except OSError as error:
        raise ConfigError(f"config={path} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"config={path} is no text: {error}") from error
    except yaml.YAMLError as error:  # a character that is none has no mark
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else path
        problem = getattr(error, "problem", str(error).splitlines()[0])
        raise ConfigError(f"{place}: this is no YAML: {problem}") from error


def _leaves(loader: Any, node: Any, path: str, prefix: str, sections: set[str]) -> Iterator[Given]:
    if isinstance(node, yaml.ScalarNode) and not node.value:  # a section of comments
        return
    if not isinstance(node, yaml.MappingNode):
        what = prefix[:-1] or "a file of options"
        place = f"{path}:{node.start_mark.line + 1}"
        raise ConfigError(f"{place}: {what} must be lines of 'name: value'")
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        if name in sections:
            yield from _leaves(loader, value, path, f"{name}.", sections)
        else:
            place = f"{path}:{key.start_mark.line + 1}: "
            yield Given(name, loader.construct_object(value, deep=True), place)


def made(config: type, given: Iterable[Given]) -> Any:
    """The dataclass of options that were given; of one given twice the last counts.

    Raises ConfigError, in one line, for a value of another type, an impossible one, or a missing
    one.
    """
    options = options_of(config)
    values = {}
    for name, value, place in given:
        kind = options[name].kind
        try:
            values[name] = convert(value, kind)
        except ValueError:
            raise ConfigError(f"{place}{name}={value} must be {kinds_of(kind)}") from None
    missing = [f"--{x.name}" for x in options.values() if x.required and x.name not in values]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} must be given")
    return build(config, values)


def build(config: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    """The dataclass of values by their option names.

    Errors name options as ``name=value``; of a section, each name gets that of the section.
    """
    arguments = {}
    for field, kind in get_type_hints(config).items():
        name = prefix + field
        if is_dataclass(kind):
            arguments[field] = build(kind, values, f"{name}.")  # type: ignore[arg-type]
        elif name in values:
            arguments[field] = values[name]
    try:
        return config(**arguments)
    except ConfigError as error:
        names = "|".join(get_type_hints(config))
        text = re.sub(rf" ({names})=", rf" {prefix}\1=", str(error))
        raise ConfigError(f"{prefix}{text}") from error
