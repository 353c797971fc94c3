"""Loading that outlives its worker processes: those that are killed are started again."""

import logging
import signal
import threading
from multiprocessing.connection import wait
from pickle import UnpicklingError

from modules.errors import UserError

logger = logging.getLogger(__name__)
# What a batch that is cut off on its way raises.
BROKEN = OSError, EOFError, UnpicklingError


class Restarting:
    """A DataLoader's batches, all of them and in order, whatever becomes of its workers.

    Augmentation is drawn by the utterance, so the new workers give what the old ones would have.

    Arguments
    ---------
    loader : SaveableDataLoader
    limit : int
        UserError once the workers have died so often in one pass.
    """

    def __init__(self, loader, limit=5):
        self.loader, self.limit = loader, limit

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        deaths, done = 0, self.loader._speechbrain_recovery_skip_to or 0
        while True:
            try:
                iterator = iter(self.loader)  # which meets those that died since the last epoch
                wait_to_be_told()
                for batch in iterator:
                    done += 1
                    yield batch
                return
            except (RuntimeError, *BROKEN) as error:
                if not self.tells_of_death(error):
                    raise
                deaths += 1
                reason = str(error)
                if "DataLoader worker" not in reason:  # a broken connection's own words
                    reason = "a DataLoader worker is gone" + (reason and f": {reason}")
                if deaths == self.limit:
                    raise UserError(
                        f"processes that load data were killed {deaths} times ({reason}); often "
                        "the machine's memory is short: lower --num_workers"
                    ) from error
                logger.warning("%s; all are started again", reason)
                # As SpeechBrain's loader goes on after a checkpoint was read.
                self.loader._speechbrain_recovery_skip_to = done
                self.loader._iterator = None  # PyTorch's, of workers that live on

    def tells_of_death(self, error):
        """Whether an error is a killed worker's; PyTorch says so, or hands on a broken pipe's.

        A process that is killed closes its connections a moment before it counts as ended. The
        thread that pins batches ends by that, and its own words are all that come here.
        """
        if "DataLoader worker" in str(error):
            return True
        workers = getattr(self.loader._speechbrain_iterator, "_workers", [])
        broken = isinstance(error, BROKEN) or "Pin memory thread" in str(error)
        sentinels = [worker.sentinel for worker in workers]
        return broken and bool(sentinels and wait(sentinels, timeout=1))


def end_workers(loader):
    """End those that wait for the next epoch."""
    if loader._iterator is not None:
        loader._iterator._shutdown_workers()
        loader._iterator = None


def wait_to_be_told():
    """Let the next batch's reader find out that a worker is gone.

    PyTorch's handler raises wherever the main thread is, a step half done.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
