"""Processes that train a variant each, from the parent's side; the other is `step_worker`."""

from __future__ import annotations

import contextlib
import multiprocessing
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from .step_worker import STEP, STOP
from .step_worker import main as run_worker
from .turns import OUT_OF_MEMORY, Failed

PATIENCE_S = 60  # for a process to clean up, or to end


class Worker:
    """The parent's end: `step` lets the other side train one step and returns what it measured."""

    def __init__(self, variant: str, folder: Path) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=folder))
        context = multiprocessing.get_context("spawn")
        self.conn, theirs = context.Pipe()
        job = theirs, variant, str(self.folder / "log")
        self.process = context.Process(target=run_worker, args=job)
        self.process.start()
        theirs.close()  # so that its death is the end of the pipe
        self.alive = True

    def begin(self, job: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # receive says what happened
            self.conn.send({**job, "folder": tempfile.mkdtemp(dir=self.folder)})

    def receive(self) -> dict[str, Any]:
        try:
            found = self.conn.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode
            killed = f"{OUT_OF_MEMORY}, probably: killed" if code == -9 else f"exit code {code}"
            raise Failed(killed) from None
        if "failed" in found:
            raise Failed(found["failed"])
        return found

    def step(self) -> dict[str, Any]:
        with contextlib.suppress(OSError):
            self.conn.send(STEP)
        return self.receive()

    def stop(self) -> None:
        """End the job; a process that cannot take another ends too."""
        clean = False
        with contextlib.suppress(OSError, EOFError):
            self.conn.send(STOP)
            while not clean and self.conn.poll(PATIENCE_S):
                clean = self.conn.recv().get("clean", False)
        if not clean:
            self.close()

    def close(self) -> None:
        self.alive = False
        self.conn.close()
        self.process.join(PATIENCE_S)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        shutil.rmtree(self.folder, ignore_errors=True)


class Crew:
    """A process for each variant, started before it has a job and kept after it."""

    def __init__(self, folder: Path, worker: Callable[[str, Path], Any] = Worker) -> None:
        self.folder, self.worker = folder, worker
        self.workers: dict[str, Any] = {}

    def warm(self, variants: Iterable[str]) -> None:
        """Let processes import what they need, side by side."""
        for name in variants:
            if name not in self.workers or not self.workers[name].alive:
                self.workers[name] = self.worker(name, self.folder)

    def start(self, job: dict[str, Any]) -> Any:
        """Give a variant's process its job, without waiting for it."""
        self.warm([job["variant"]])
        worker = self.workers[job["variant"]]
        worker.begin(job)
        return worker

    def close(self) -> None:
        for worker in self.workers.values():
            if worker.alive:
                worker.close()


@contextlib.contextmanager
def crew_of(
    worker: Callable[[str, Path], Any] = Worker, inside: Path | None = None
) -> Iterator[Crew]:
    """Processes and a folder for them, and neither afterwards."""
    if inside is not None:
        inside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fastdpo-bench-", dir=inside) as scratch:
        crew = Crew(Path(scratch), worker)
        try:
            yield crew
        finally:
            crew.close()
