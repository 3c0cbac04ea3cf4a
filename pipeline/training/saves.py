"""A run's saves as it goes on: when one is due, what came of it, and what its store still lacks."""

from __future__ import annotations

from collections.abc import Callable

from data.files import StoreError
from pipeline.checkpoint.run_state import Progress
from pipeline.checkpoint.writer import CheckpointSaver, Snapshot
from pipeline.config.schema import Config
from pipeline.training import stopping
from pipeline.training.elastic import SAVED, tell_launcher
from pipeline.training.monitor import Monitor
from pipeline.training.resilience import Watchdog, tell_job


class Saves:
    """What a run knows of its saves. All processes have one, and call it at the same steps.

    Args:
        saver: writes them.
        progress: where the run is.
        watchdog: is told of what takes long.
    """

    def __init__(self, config: Config, saver: CheckpointSaver, progress: Progress, watchdog: Watchdog) -> None:
        self.config, self.saver, self.progress, self.watchdog = config, saver, progress, watchdog
        self.saved_step: int | None = 0
        """That of the last checkpoint, or of the one that is being made; None after one that failed."""
        self._again = False
        self._failures = 0
        """In a row."""

    @property
    def is_saved(self) -> bool:
        """Whether there is nothing since the last save, as far as is known."""
        return self.saved_step == self.progress.step

    @property
    def is_due(self) -> bool:
        """Whether it is time for one: by the configuration, or because the last one failed."""
        interval = self.config.checkpoint.interval
        due = interval > 0 and self.progress.step % interval == 0
        return (due or self._again) and not self.is_saved

    def begin(self, make_snapshot: Callable[[], Snapshot]) -> None:
        """Begin one; the last one is settled. Collective."""
        self._again = False
        self.saver.save(make_snapshot)
        self.saved_step = self.progress.step

    def settle(self, monitor: Monitor) -> bool:
        """Wait for the save in flight and report it; one that failed is to be made again, with what is newest then.

        Returns:
            Whether a checkpoint was written.

        Raises:
            OSError: that was one failure in a row too many.
        """
        self.watchdog.progress(self.progress.step, "save", patient=True)
        self.saver.wait()
        report = self.saver.finished()
        if report is None:
            return False
        if report.error is not None:
            self._again, self.saved_step = True, None
            self._failures += 1
            if self._failures == self.config.checkpoint.attempts:
                raise OSError(f"{report.error} ({self._failures} attempts in a row)")
        monitor.saved(report)
        for note in report.notes:
            monitor.message(note)
        if report.error is not None:
            return False
        self._failures = 0
        tell_job(stopping.JOB_SAVED, str(report.step))
        tell_launcher(SAVED, str(report.step))
        return True

    def finish_uploading(self, monitor: Monitor, *, is_done: bool) -> None:
        """The run ends here: bring to its store what is not there yet.

        Raises:
            StoreError: it cannot be brought, and the run, which is done, will not come back to try again.
        """
        for _ in range(self.config.checkpoint.attempts):
            error = self.upload(monitor)
            if error is None:
                return
        if is_done:
            raise StoreError(
                f"all is trained and saved in {self.config.run_dir}, but not all of it could be copied to "
                f"{self.config.checkpoint.store}: {error}; `infini train --resume` does it"
            )

    def upload(self, monitor: Monitor) -> str | None:
        """Bring to the run's store, where it has one, what is not there yet; what went wrong. Collective."""
        self.watchdog.progress(self.progress.step, "upload", patient=True)
        report = self.saver.upload()
        if report is None:
            return None
        monitor.uploaded(report)
        return report.error
