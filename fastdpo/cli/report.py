"""``fastdpo report``: the page of a folder, whichever command it is of."""

from dataclasses import dataclass
from pathlib import Path

from fastdpo.cli.stages import TrainCommand
from fastdpo.cli.training import defaults as defaults_of
from fastdpo.report.runfiles import is_training
from fastdpo.report.summary import html
from fastdpo.rounds.config import defaults


@dataclass(kw_only=True)
class ReportCommand:
    """Write the report of a run as one HTML page.

    Attributes:
        output_dir: folder of fastdpo iterate, or of fastdpo train.
    """

    output_dir: str = "runs/iterate"


def run_report(config: ReportCommand) -> None:
    out = Path(config.output_dir)
    known = defaults_of(TrainCommand) if is_training(out) else defaults()
    print(f"report: {html(out, known)}")
