"""Datasets for workers that live longer than an epoch."""

import torch
from speechbrain.dataio.dataset import DynamicItemDataset


class EpochDataset(DynamicItemDataset):
    """SpeechBrain's, which knows the epoch in every worker, whenever that was started."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.shared_epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self):
        return int(self.shared_epoch)

    def set_epoch(self, epoch):
        """Between epochs, when no worker reads: what is drawn by the epoch is drawn by this one."""
        self.shared_epoch.fill_(epoch)
