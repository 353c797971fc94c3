"""Output folders for the tests of reports: wer_*.txt by SpeechBrain itself, logs as of a run."""

import io

import numpy as np
from hyperpyyaml import resolve_references
from speechbrain.utils.metric_stats import ErrorRateStats

from tests.recipes.runs import ROOT

WORDS = ["ZERO", "ONE", "TWO", "A", "SEVENTEEN", "DON'T"]
ODD = [*WORDS, ";", "<eps>", "=", "S", "ÄRGER", "x;y", ",%WER", "====", "日本"]


def sentences(random, count, words=WORDS, changes=0.3):
    """[(id, said, heard)]: what is heard lacks words, has others, and has some too many."""
    out = []
    for i in range(count):
        said = list(random.choice(words, random.integers(1, 9)))
        heard = []
        for word in said:
            kind = random.random() / changes
            if kind > 1 or kind < 1 / 3:
                heard.append(word if kind > 1 else str(random.choice(words)))
            if 1 / 3 <= kind < 2 / 3:
                heard += [word, str(random.choice(words))]
        out.append((f"{100 + i % 3}-1-{i:04d}", said, heard))
    return out


def stats(found, **options):
    """SpeechBrain's metric of sentences."""
    metric = ErrorRateStats(**options)
    for name, said, heard in found:
        metric.append([name], [heard], [said])
    return metric


def wer_text(found):
    """wer_*.txt as the test stage writes it."""
    stream = io.StringIO()
    stats(found).write_stats(stream)
    return stream.getvalue()


LOG = """epoch: 1, lr: 1.0e-03, steps: 10 - train loss: 90.10 - valid loss: 80.00, valid WER: 9.90e+01
epoch: 2, lr: 1.0e-03, steps: 20 - train loss: 50.00 - valid loss: 45.00, valid WER: 60.00, valid CER: 30.00
epoch: 3, lr: 1.0e-03, steps: 30 - train loss: 30.00 - valid loss: 35.00, valid WER: 40.00, valid CER: 20.00
test set: test-clean, epochs: 3 - test loss: 3.64, test WER: 14.04, test CER: 3.70, test RTF: 6.61e-03
"""  # noqa: E501


def run_folder(
    folder, seed, yaml_file="CTC/conmamba_small.yaml", changes=0.3, log=LOG, **overrides
):
    """A folder such as comes back from another machine: four files, no checkpoints, no manifests.

    All seeds have the same test sentences.
    """
    folder.mkdir(parents=True)
    said = [(i, s) for i, s, _ in sentences(np.random.default_rng(0), 40)]
    random = np.random.default_rng(seed)
    found = [(i, s, [w if random.random() > changes else "OH" for w in s]) for i, s in said]
    (folder / "wer_test-clean.txt").write_text(wer_text(found))
    (folder / "train_log.txt").write_text(log)
    values = {"seed": seed, "avg_checkpoints": 2, "data_folder": "/data/of/digits"} | overrides
    values["output_folder"] = str(folder)
    path = ROOT / "hparams" / yaml_file
    with open(path) as f:
        resolved = resolve_references(f, values).read()
    (folder / "hyperparams.yaml").write_text(
        f"# From /another/machine/hparams/{yaml_file}\n{resolved}"
    )
    (folder / "summary.txt").write_text(
        f"\nmodel        {yaml_file} (6.9 M parameters)\ntraining     0.31 h an epoch, 3 epochs, "
        "30 steps\n"
    )
    return folder
