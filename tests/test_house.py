"""The plan of the house: which room may import which, and how long a file and a function may be."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fastdpo"
# What each room may import beside itself.
BASE = {"errors", "lazy", "progress", "storage", "remote"}
MODEL = {"kernels", "loss", "data", "model"} | BASE
TRAIN = {"train"} | MODEL
STAGES = {"sample", "score", "pair"}
MAY_IMPORT = {
    "kernels": set(),
    "errors": set(),
    "lazy": set(),
    "progress": set(),
    "storage": {"errors"},
    "remote": {"errors", "progress"},
    "loss": {"kernels"},
    "data": {"errors", "lazy", "progress", "storage", "loss"},
    "model": MODEL,
    "train": TRAIN | {"__init__"},  # the version
    "plan": STAGES | {"plan", "rounds"} | TRAIN,
    "sample": MODEL,
    "score": MODEL,
    "pair": MODEL,
    "report": {"errors", "lazy", "storage", "data"},
    "rounds": STAGES | {"report", "recipes"} | TRAIN,
    "recipes": MODEL | {"score"},
    "integrations": {"errors", "loss", "data", "model"},
    "cli": STAGES | {"plan", "report", "rounds", "recipes", "__init__"} | TRAIN,
    "examples": STAGES | {"__init__", "head", "integrations", "plan", "rounds"} | TRAIN,
    "__main__": {"cli"},
    # The documented names of what lies in a room.
    "__init__": {"loss", "lazy", "objectives", "reference"},
    "objectives": {"loss"},
    "reference": {"loss"},
    "head": {"model"},
    "scoring": {"score"},
}
LONGEST_FILE, LONGEST_FUNCTION = 500, 80
# A kernel is compiled as one function.
LONG_FUNCTIONS = {"merge_kernel", "pair_kernel", "project_tile"}
MODULES = [
    path
    for folder in (PACKAGE, ROOT / "kernels")
    for path in sorted(folder.rglob("*.py"))
    if (PACKAGE / "kernels") not in path.parents
]


def name_of(path: Path) -> str:
    """The dotted name of a module's file."""
    if path.parent == ROOT / "kernels":
        return f"fastdpo.kernels.{path.stem}"
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


BENCH = sorted((ROOT / "bench").glob("*.py"))
NAMES = {name_of(path) for path in [*MODULES, *BENCH]}


def room_of(name: str) -> str:
    return [*name.split("."), "__init__"][1]


def imports(path: Path) -> Iterator[str]:
    """The project's modules that a module imports, anywhere in it."""
    package = name_of(path).split(".")
    if path.stem != "__init__":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{source}.{alias.name}" for alias in node.names]
            found = [name if name in NAMES else source for name in names]
        else:
            continue
        yield from (name for name in found if name.split(".")[0] in ("fastdpo", "bench"))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_room_imports_only_what_lies_below_it(path):
    room = room_of(name_of(path))
    names = [name for name in imports(path) if name.startswith("fastdpo")]
    rooms = {room_of(name) for name in names} - {room}
    assert rooms <= MAY_IMPORT[room], f"{name_of(path)} imports {rooms - MAY_IMPORT[room]}"


def test_no_module_imports_itself_through_others():
    paths = [*MODULES, *BENCH]
    edges = {name_of(path): set(imports(path)) & NAMES - {name_of(path)} for path in paths}
    left = dict(edges)
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"import circles among {sorted(left)}"


@pytest.mark.parametrize("path", [*MODULES, *BENCH], ids=name_of)
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= LONGEST_FILE
    long = {
        node.name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= LONGEST_FUNCTION
    }
    assert long <= LONG_FUNCTIONS


def test_importing_the_stages_does_not_import_transformers():
    stages = "fastdpo.pair.stage, fastdpo.sample.stage, fastdpo.score.stage"
    code = f"import sys, {stages}; print(*sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, timeout=60, capture_output=True, text=True
    )
    loaded = out.stdout.split()
    assert "fastdpo.sample.stage" in loaded and "transformers" not in loaded, out.stderr


@pytest.mark.parametrize("name", ["objectives", "reference"])
@pytest.mark.parametrize("first", ["import fastdpo.{0}", "from fastdpo import {0}"])
def test_a_documented_name_is_one_module(name, first):
    code = (
        f"{first}; import fastdpo.{{0}}; from fastdpo import {{0}}; from fastdpo.loss import {{0}} "
        "as real; assert fastdpo.{0} is {0} is real"
    ).format(name)
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=True)


@pytest.mark.parametrize(
    "statement",
    [
        "from fastdpo import LinearDPOLoss, linear_dpo_loss, linear_kl, linear_logp",
        "from fastdpo import linear_preference_loss, objectives, reference",
        "from fastdpo.objectives import lr_dpo",
        "from fastdpo.reference import linear_dpo_loss",
        "from fastdpo.head import HeadCall, attach",
        "from fastdpo.scoring import plain_language",
        "from fastdpo.data import TokenizedPair, pack_pairs, preference_rows, read_rows",
        "from fastdpo.data import tokenize_dataset",
        "from fastdpo.model import ModelError, fuse_head, layout_of, prepare_model",
        "from fastdpo.train import TrainConfig, packed_loss, train",
        "from fastdpo.rounds import iterate",
        "from fastdpo.plan import estimate, longest_pair",
    ],
)
def test_documented_names_stay(statement):
    exec(statement, {})
