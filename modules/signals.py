"""SIGTERM and SIGINT: a request to save and stop, which is heeded at the next step's end."""

import os
import signal
import threading

from speechbrain.utils.distributed import if_main_process

# Of sysexits.h, "try again later": tells a scheduler that the same command goes on.
EXIT_STOPPED = 75


class StopRequest:
    """Notes the first SIGTERM or SIGINT while it is entered; a second SIGINT ends the process.

    `name` is the signal's, None before it came. Checkpoints are written beside and renamed, so
    that even a second SIGINT in the middle of one leaves the earlier ones whole.
    """

    def __init__(self):
        self.name = None
        self.before = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                # Who was started in the background of a shell ignores Ctrl-C, and goes on to.
                if signal.getsignal(number) != signal.SIG_IGN:
                    self.before[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        self.name = signal.Signals(number).name
        # By the system and not by Python, whose code may wait for another process.
        if signal.SIGINT in self.before:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if if_main_process():
            text = f"\n{self.name}: a checkpoint is saved after this step; Ctrl-C stops at once\n"
            os.write(2, text.encode())  # print may be in the middle of a line
