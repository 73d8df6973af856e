"""Rows of results: what all of them say of where they were measured, and files of JSON lines."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy")
PLACE = ("device", "threads", "versions", "git", "dirty")  # where measurements are the same


def this_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def where(device: torch.device, commit: str | None = None, *packages: str) -> dict[str, Any]:
    """The machine, the versions (of `packages` too), the commit and the time of a run.

    `commit` is for a copy of the files without their repository.
    """
    versions = {name: installed(name) for name in (*PACKAGES, *packages)}
    return {
        "device": device_name(device),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(), "cuda": torch.version.cuda, **versions,
        },
        "git": git("rev-parse", "HEAD") or commit,
        "dirty": bool(git("status", "--porcelain", "--", "fastdpo", "kernels", "bench/*.py")),
        "utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def git(*arguments: str) -> str | None:
    """None outside a repository, or without git."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def matching(rows: Iterable[dict], here: dict[str, Any], **more: Any) -> list[dict]:
    """Rows of the same place as `here`, and of whatever else is asked."""
    wanted = {**{name: here[name] for name in PLACE}, **more}
    return [row for row in rows if all(row.get(name) == x for name, x in wanted.items())]


def load(paths: Iterable[Path]) -> list[dict]:
    """Rows of all files, in order. A last line that was cut off is left out."""
    rows = []
    for path in paths:
        text = path.read_text()
        lines = [line for line in text.splitlines() if line]
        for line in lines:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                if line is not lines[-1] or text.endswith("\n"):
                    raise
    return rows


def resume(path: Path) -> list[dict]:
    """Rows of an interrupted run; a last line that was cut off is removed from the file."""
    if not path.exists():
        return []
    text = path.read_text()
    kept = text[: text.rfind("\n") + 1]
    if kept != text:
        path.write_text(kept)
    return load([path])


def append(path: Path | None, row: dict) -> dict:
    """The row, which a file now has; no file, no line."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
    return row


def command_line(module: str, text: str | None) -> argparse.ArgumentParser:
    """A parser with the module's own text as it is, and the commit of rows as an option."""
    parser = argparse.ArgumentParser(
        f"python -m {module}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--commit", help="the commit to record where there is no repository")
    return parser
