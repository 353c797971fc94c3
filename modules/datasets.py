"""Datasets for workers that live longer than an epoch."""

import torch
from speechbrain.dataio.dataset import DynamicItemDataset


class Copy(int):
    """The index of an utterance that comes several times an epoch, and which time it is."""

    def __new__(cls, index, copy=0):
        self = super().__new__(cls, index)
        self.copy = copy
        return self


class EpochDataset(DynamicItemDataset):
    """SpeechBrain's, which knows the epoch in every worker, whenever that was started.

    Its pipelines may take `copy`, which an index that is a Copy tells.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.pipeline.add_static_keys(["copy"])
        self.shared_epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __getitem__(self, index):
        return self.example(index)

    def example(self, index, **values):
        """What the pipelines make of an utterance; values: in place of the manifest's."""
        name, copy = self.data_ids[index], getattr(index, "copy", 0)
        return self.pipeline.compute_outputs(
            {"id": name, "copy": copy, **self.data[name], **values}
        )

    @property
    def epoch(self):
        return int(self.shared_epoch)

    def set_epoch(self, epoch):
        """Between epochs, when no worker reads: what is drawn by the epoch is drawn by this one."""
        self.shared_epoch.fill_(epoch)


def without_utterances():
    """A dataset of none, for SpeechBrain looks at the first one's columns."""
    dataset = EpochDataset({"": dict.fromkeys(("duration", "wav", "spk_id", "wrd"))})
    dataset.data, dataset.data_ids = {}, []
    return dataset
