"""A package in SpeechBrain, with the code that lies beside it and nothing of the repository.

foreign_class(source=DIR, pymodule_file="interface.py", classname="Interface")
"""

import sys
from pathlib import Path

from speechbrain.inference.interfaces import Pretrained

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from inference import Recognizer


class Interface(Pretrained):
    """A packaged model as one of SpeechBrain's; `run_opts={"device": ...}` sets the device."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.recognizer = Recognizer(
            self.hparams.parts,
            self.hparams.sample_rate,
            self.device,
            self.hparams.whole_seconds,
            self.hparams.window_seconds,
        )

    def transcribe_file(self, path):
        """The text of an audio file of any rate and number of channels."""
        return self.recognizer.transcribe(path).text

    def transcribe_batch(self, wavs, wav_lens):
        """The texts of wavs (B, N) at the model's rate, wav_lens (B,) relative to the longest."""
        lengths = (wav_lens * wavs.shape[1]).round().long().tolist()
        signals = [wav[:n].float().cpu() for wav, n in zip(wavs, lengths, strict=True)]
        return self.recognizer.texts(signals)

    def forward(self, wavs, wav_lens):
        return self.transcribe_batch(wavs, wav_lens)
