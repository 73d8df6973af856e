"""The command line: ``fastdpo demo | iterate | sample | score | pair | train | report | chat |
plan | doctor``; in a checkout, ``bench``.

Words in, a room's function called, an exit status out. Every option can stand in a YAML file
(``--config``) and be overridden on the command line. Errors a user can mend are one line and exit
status 2, from several processes of a launch once; an interruption exits with 130 and loses at most
the unfinished part of a stage. Open
`stages`, `commands` and `chat` first: a dataclass of options and a function for each command.
`options` reads them, `names` knows what else people call them, `help` prints them.
"""

import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from fastdpo import __version__
from fastdpo.cli import chat, commands, demo, names, report, stages
from fastdpo.cli.datasets import is_first
from fastdpo.cli.failing import fail, in_several
from fastdpo.cli.help import help_of, overview
from fastdpo.cli.options import Given, made, options_of, read_arguments, read_file
from fastdpo.errors import ConfigError, DataError, ModelError, ProcessError
from fastdpo.rounds.config import IterateConfig

COMMANDS: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "demo": (demo.DemoCommand, demo.run_demo),
    "iterate": (IterateConfig, commands.run_iterate),
    "sample": (stages.SampleCommand, stages.run_sample),
    "score": (stages.ScoreCommand, stages.run_score),
    "pair": (stages.PairCommand, stages.run_pair),
    "train": (stages.TrainCommand, stages.run_train),
    "report": (report.ReportCommand, report.run_report),
    "chat": (chat.ChatCommand, chat.run_chat),
    "plan": (commands.PlanCommand, commands.run_plan),
    "doctor": (commands.DoctorCommand, commands.run_doctor),
}
_GONE = (
    "error: a process of this launch ended without a word, as where the system kills one for "
    "memory; its launcher says which. The same command goes on from the last checkpoint"
)


def parse(argv: Sequence[str]) -> tuple[str, Any]:
    """Command name and its validated options.

    Raises ConfigError, in one line, for a name that is none, a missing or impossible value, and a
    file that cannot be read.
    """
    command, *rest = argv or [""]
    if command not in COMMANDS:
        close = names.closest(command, [*COMMANDS, "bench"])
        guess = f"; did you mean {close}?" if close else f"; there are {', '.join(COMMANDS)}"
        raise ConfigError(f"{command or 'nothing'} is no command of fastdpo{guess}")
    config = COMMANDS[command][0]
    options = options_of(config)
    given = list(read_arguments(rest, options))
    files = [str(x.value) for x in given if x.name == "config"]
    given = [
        *(x for path in files for x in _of_file(path, command)),
        *(x for x in given if x.name != "config"),
    ]
    unknown = [x for x in given if x.name not in options]
    if unknown:
        names.refuse(unknown, command, options)
    own = made(config, given)
    if command == "plan":
        own.run = _whole_run(files, given)
    return command, own


def _whole_run(files: Sequence[str], given: Sequence[Given]) -> IterateConfig | None:
    """The options of the run whose file `plan` was given, and on its command line; None where it
    was given no such file, which would name prompts."""
    options = options_of(IterateConfig)
    of_files = [x for path in files for x in read_file(path, IterateConfig)]
    if not any(x.name == "prompts" for x in of_files):
        return None
    own = [x._replace(name=x.name if x.name in options else f"train.{x.name}") for x in given]
    return made(IterateConfig, [*of_files, *(x for x in own if x.name in options)])


def _of_file(path: str, command: str) -> list[Given]:
    """What a file gives to a command; to `plan`, which takes that of a whole run, what it uses."""
    if command != "plan":
        return read_file(path, COMMANDS[command][0])
    own = options_of(commands.PlanCommand)
    others = {name for config, _ in COMMANDS.values() for name in options_of(config)} - {*own}
    found = (x._replace(name=x.name.removeprefix("train.")) for x in read_file(path, IterateConfig))
    return [x for x in found if x.name not in others]


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["bench"]:
            commands.run_bench(argv[1:])
        elif not argv or argv[0] in ("--help", "-h"):
            print(overview({name: config for name, (config, _) in COMMANDS.items()}))
            return 0 if argv else 2
        elif argv[0] == "--version":
            print(f"fastdpo {__version__}")
        elif argv[0] in COMMANDS and {"--help", "-h"} & {*argv}:
            print(help_of(argv[0], COMMANDS[argv[0]][0]))
        else:
            commands.check_one_process(argv[0])
            if not is_first():  # which warns of the same
                logging.disable(logging.WARNING)
                warnings.simplefilter("ignore")
            command, config = parse(argv)
            COMMANDS[command][1](config)
    except (ConfigError, DataError, ModelError, ProcessError, OSError) as error:
        return fail(f"error: {error}", 2)
    except KeyboardInterrupt:
        if is_first():
            print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except Exception as error:
        if not in_several():
            raise
        gone = "by peer" in str(error)  # as gloo says that a connection is closed or reset
        return fail(_GONE if gone else traceback.format_exc(), 1)
    return 0
