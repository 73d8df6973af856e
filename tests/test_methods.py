"""Each method that the table of `fastdpo/loss/README.md` names is taken as it is spelled there."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from fastdpo.errors import ConfigError

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / ".ci"))
import objectives  # noqa: E402 # pyright: ignore[reportMissingImports]

TABLE = (ROOT / "fastdpo/loss/README.md").read_text().partition("| method |")[2]
ROWS = re.findall(r"^\| ([^|]+) \| (`[^|]+`) \| [^|]+ \|$", TABLE, re.MULTILINE)
COMMANDS_OF = {name: re.findall("`([^`]+)`", cell) for name, cell in ROWS}
OF_FIELD = """R-DPO, iLR-DPO; Step-DPO; ODPO; ODPO, ratio; TDPO1; TDPO2; DPO^γ; rDPO; PAR as an
    offset; Secrets of RLHF II, adaptive margin; SPPO; GPO's form; PRO; LiPO-λ; RankNet;
    DOVE; RPO; MPO; DPO on rankings (Plackett-Luce); RPO, average form; RPO, cumulative
    form; CPO; SimPO; CPO-SimPO; ORPO; AIPO; CREAM; MCTS-DPO; WPO; LD-DPO; KTO; BCO;
    f-DPO"""


def test_the_table_has_every_method():
    names = {" ".join(name.split()) for name in OF_FIELD.split(";")}
    assert names <= COMMANDS_OF.keys(), names - COMMANDS_OF.keys()
    assert [name for name, *_ in objectives.METHODS] == list(COMMANDS_OF)


@pytest.mark.parametrize("name", COMMANDS_OF)
def test_a_method_is_taken_as_it_is_spelled(name):
    """Its options become those of the command, and no length penalty comes with it unsaid."""
    for command in COMMANDS_OF[name]:
        config, (kind, *words) = objectives.parsed(command), shlex.split(command)
        given = {x.removeprefix("--"): yaml.safe_load(y) for x, y in zip(words[::2], words[1::2])}
        for option, value in given.items():
            found = config
            for part in option.split("."):
                found = getattr(found, part)
            assert found in (value, [value]), option
        if kind != "pair":
            alpha = {"train": "alpha", "iterate": "train.alpha"}[kind]
            training = config if kind == "train" else config.train
            assert getattr(training.objective, "alpha", 0.0) == given.get(alpha, 0.0)


@pytest.mark.parametrize(
    "command",
    [
        "train --loss_typ ipo", "train --loss_type sft --ld_alpha 0.5",
        "iterate --pair.transform par",
    ],
)  # fmt: skip
def test_what_a_command_refuses_is_no_method(command):
    with pytest.raises(ConfigError):
        objectives.parsed(command)
