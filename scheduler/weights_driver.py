"""The rank's hands on new weights: the worker reads them, the storage processes learn what their pages are called.

Owned by the loop of one rank, on the scheduler thread.  Only a commit blocks, and then nothing runs that it could
hold up.
"""

from __future__ import annotations

from sglang_hicache.scheduler.storage_driver import StorageDriver
from sglang_hicache.scheduler.storage_launcher import StorageLauncher
from sglang_hicache.scheduler.weights_update import CommitWeights, DropWeights, StageWeights, WeightsInstruction
from sglang_hicache.workers.batch import Worker


class WeightsDriver:
    """Carries out what an update of the weights asks of one rank."""

    def __init__(self, worker: Worker, driver: StorageDriver, launcher: StorageLauncher) -> None:
        self._worker = worker
        self._next = worker.next_weights
        self._driver = driver
        self._launcher = launcher
        #: Command whose weights the worker reads; "" while it reads none.
        self._staging = ""

    @property
    def is_staging(self) -> bool:
        """The worker reads weights, and nobody will say when it has done so: `poll` must look."""
        return bool(self._staging)

    def carry_out_blocking(self, instruction: WeightsInstruction) -> None:
        """Begin to read, take what was read, or forget it."""
        match instruction:
            case StageWeights(command):
                self._next.stage(command.model_path, command.weights_digest)
                self._staging = command.id
            case CommitWeights(weights_digest):
                self._next.commit_blocking()
                # After the commit: an exact class is made of what the new weights compute.  Before anything else of
                # this tick, which is about pages of the new ones.
                self._driver.use_namespace(self._launcher.name_pages(self._worker.layout, weights_digest))
            case DropWeights():
                self._next.drop()
                self._staging = ""

    def poll(self) -> None:
        """Tell the leader when the worker has read the weights, or could not."""
        reason = self._next.outcome() if self._staging else None
        if reason is not None:
            self._driver.weights_read(self._staging, reason)
            self._staging = ""
