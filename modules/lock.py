"""One run at a time in an output folder: two would write over each other's checkpoints."""

import os
import re
import socket
import time
from pathlib import Path

from filelock import FileLock, Timeout

from modules.errors import UserError


class FolderLock:
    """A run's hold on its output folder, which ends with the process however that ends.

    Arguments
    ---------
    folder : path
        Made if it is not there.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.lock = FileLock(self.folder / ".lock")
        self.holder = self.folder / ".lock_holder"

    def acquire(self):
        """UserError, naming its process and host, when another run has the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self.lock.acquire(timeout=self._patience())
        except Timeout:
            raise UserError(
                f"output_folder={self.folder} is in use by another run ({self._who()}); wait for "
                "it, end it, or give another --output_folder"
            ) from None
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        self.holder.write_text(f"pid {os.getpid()} on {socket.gethostname()} since {started}")

    def release(self):
        """Let others in; nothing if it was not acquired."""
        if self.lock.is_locked:
            self.holder.unlink(missing_ok=True)
            self.lock.release()

    def _patience(self):
        """Seconds to wait: a killed run's workers take up to 5 s to notice, and hold it so long."""
        found = re.match(r"pid (\d+) on (\S+)", self._who())
        if found is None or found[2] != socket.gethostname() or Path(f"/proc/{found[1]}").exists():
            return 0
        return 15 if Path("/proc/self").exists() else 0

    def _who(self):
        try:
            return self.holder.read_text() or "it does not say which"
        except OSError:
            return "it does not say which"
