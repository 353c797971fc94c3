"""train_CTC.py, to which something happens in one process before one of its training batches.

python tests/recipes/faulty.py SIGNAL BATCH RANK HPARAMS.yaml [--key value ...]
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import train_CTC
from modules import launch


def at_batch(number, rank, happen):
    """Let something happen before a rank's training batch of this number, counted from 1."""
    whole, seen = train_CTC.ASR.fit_batch, []

    def fit_batch(self, batch):
        seen.append(1)
        first_life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if len(seen) == number and int(os.environ.get("RANK", "0")) == rank and first_life:
            happen()
        return whole(self, batch)

    train_CTC.ASR.fit_batch = fit_batch


if __name__ == "__main__":
    name, number, rank = sys.argv[1:4]
    at_batch(int(number), int(rank), lambda: os.kill(os.getpid(), signal.Signals[name]))
    del sys.argv[1:4]
    launch.run(train_CTC.main, "train_CTC.py", "hparams/CTC/conmamba_large.yaml")
