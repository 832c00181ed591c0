"""The files that keep the jobs: written when a job changes, or as soon as the disk has room."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

from ..utils.files import sweep
from .jobs import Job, read_job

log = logging.getLogger(__name__)


class JobFiles:
    """A file for each job, in a folder that is created.

    Attributes:
        trouble: why some files are behind their jobs, in a line; None if none is.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.trouble: str | None = None
        self._folder = folder
        self._owed: dict[str, Job | None] = {}  # by id: files still to be written, or to be deleted if None

    def read(self) -> list[Job]:
        """Reads all jobs; files that hold none are renamed to end in .damaged."""
        sweep(self._folder)
        jobs = []
        for path in sorted(self._folder.glob("*.json")):
            try:
                jobs.append(read_job(path))
            except (ValueError, TypeError, OSError) as error:
                log.warning(f"{path} is no job: {error}")
                with contextlib.suppress(OSError):
                    path.rename(path.with_suffix(".damaged"))
        return jobs

    def add(self, job: Job) -> None:
        """Writes a new job's file. Raises OSError if that fails."""
        try:
            job.write(self._folder)
        except OSError as error:
            raise OSError(error.errno, self._told(error)) from error

    def keep(self, job: Job) -> None:
        """Writes a job's file now or, if that fails, as soon as it can."""
        self._owed[job.id] = job
        self.catch_up()

    def forget(self, name: str) -> None:
        """Deletes a job's file, now or as soon as it can."""
        self._owed[name] = None
        self.catch_up()

    def catch_up(self) -> None:
        """Writes and deletes the files that are behind."""
        before, self.trouble = self.trouble, None
        for name, job in list(self._owed.items()):
            try:
                if job:
                    job.write(self._folder)
                else:
                    (self._folder / f"{name}.json").unlink(missing_ok=True)
            except OSError as error:
                self.trouble = self._told(error)
            else:
                del self._owed[name]
        if self.trouble != before:
            log.warning(self.trouble or f"jobs are kept in {self._folder} again")

    def _told(self, error: OSError) -> str:
        return f"jobs cannot be kept in {self._folder} ({error.strerror or error}); make room there"
