"""Files that start runs: a recipe, accelerate's configurations, a job for Slurm.

python -m fastdpo.recipes.files                             lists them
python -m fastdpo.recipes.files fsdp2-8.yaml fastdpo.slurm  copies these into this folder
"""

import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent


def files() -> dict[str, Path]:
    """All that can be copied, by name, and those of an engine by the number of GPUs."""

    def order(path: Path) -> tuple[str, int]:
        engine, _, gpus = path.stem.rpartition("-")
        return (engine, int(gpus)) if gpus.isdigit() else (path.stem, 0)

    found = [HERE / "storm-7b.yaml", *HERE.glob("launch/*")]
    return {path.name: path for path in sorted(found, key=order)}


def main(argv: list[str]) -> int:
    known = files()
    if not argv:
        print("\n".join(f"{name:18}{_about(path)}" for name, path in known.items()))
        return 0
    for name in argv:
        problem = "is no file of fastdpo's; without names they are listed" * (name not in known)
        problem = problem or "is in this folder already" * Path(name).exists()
        if problem:
            print(f"error: {name} {problem}", file=sys.stderr)
            return 2
    for name in argv:
        shutil.copyfile(known[name], name)
        print(f"{name} copied into {Path.cwd()}")
    return 0


def _about(path: Path) -> str:
    """The first line of a file that is a comment, without the sign."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return next((x[2:] for x in lines if x.startswith("# ")), "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
