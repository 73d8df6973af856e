"""Workers of `bench.step` without processes."""

import multiprocessing
import tempfile
import threading
from pathlib import Path

from bench import step_crew, step_worker


class Threaded(step_crew.Worker):
    """A worker that is a thread, so that a test doesn't import everything once a variant."""

    def __init__(self, variant, folder):
        self.folder = Path(tempfile.mkdtemp(dir=folder))
        self.conn, theirs = multiprocessing.Pipe()

        def work():
            step_worker.serve(theirs)
            theirs.close()

        self.process = threading.Thread(target=work)
        self.process.start()
        self.alive = True

    def begin(self, job):
        """One after another: loading sets the default dtype of all threads."""
        self.job = job

    def receive(self):
        if self.job is not None:
            super().begin(self.job)
            self.job = None
        return super().receive()
