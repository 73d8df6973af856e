"""Metrics of a run: JSON lines and TensorBoard, consistent across an interruption."""

import json
from pathlib import Path
from typing import Any

from fastdpo.lazy import installed
from fastdpo.storage import write_jsonl_atomic


class MetricsLog:
    """Appends rows with a ``step`` to ``metrics.jsonl``, and to TensorBoard where it is installed.

    Args:
        folder: gets both.
        done: steps of the checkpoint that training resumes from, 0 without one. Rows of later steps
            are dropped first: they will be logged again, and from the start those of the start too.
    """

    def __init__(self, folder: Path, done: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if done and row["step"] <= done]
        write_jsonl_atomic(self.path, kept, checksum=False)
        self.file = self.path.open("a")
        self.board = None
        if installed("tensorboard", "tensorboard", "metrics go to metrics.jsonl alone"):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(
                str(folder / "tensorboard"), purge_step=done + 1 if done else 0
            )

    def add(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if self.board is not None:
            for name in sorted(row.keys() - {"step"}):
                self.board.add_scalar(name, row[name], row["step"])

    def close(self) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()


def read_metrics(path: Path, steps: int | None = None) -> list[dict[str, Any]]:
    """Complete rows of a metrics file; a last line cut off by a kill is left out.

    Args:
        steps: leave out what was logged after so many; by default nothing.
    """
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows if steps is None else [row for row in rows if row["step"] <= steps]


def mean_metrics(path: Path, steps: int | None = None) -> dict[str, float]:
    """Metrics of all steps, or of so many, averaged over pairs.

    A step without desirable responses, or without others, has no metrics of them, and no part in
    their mean.
    """
    rows = [row for row in read_metrics(path, steps) if "pairs" in row]
    names = dict.fromkeys(name for row in rows for name in row if name not in {"step", "pairs"})
    means = {}
    for name in names:
        having = [row for row in rows if name in row]
        total = sum(row["pairs"] for row in having)
        means[name] = sum(row[name] * row["pairs"] for row in having) / total
    return means
