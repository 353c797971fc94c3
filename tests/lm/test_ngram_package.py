"""A CTC run's word n-gram: in the test stage, in the package, and in transcribing."""

import json
import shutil

import pytest

from inference import Recognizer
from inference.hub import FILES
from inference.package import package
from inference.report.folder import Run
from modules.errors import UserError
from modules.lm import ngram
from tests.recipes import runs
from tests.recipes.packages import RECIPES, trained


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The test stage of a trained model with an n-gram: (its folder, the n-gram)."""
    folder = tmp_path_factory.mktemp("ngram")
    arpa = folder / "made" / "2-gram.arpa"
    text = ["--order", "2", "--tool", "python", "--output", str(arpa)]
    (folder / "text.txt").write_text("CAB DEAF FACE\nBED ABE CAB\n")  # and no BEAD
    ngram.main([str(folder / "text.txt"), *text])
    options = {"kenlm_model_path": arpa, "no_lm": False, "lm_weight": 4.0, "word_bonus": 0.5}
    options |= {"token_prune_min_logp": -6, "d_model": 32, "resume": trained("ctc")[0]}
    runs.train(RECIPES["ctc"], folder / "run", skip_train=True, **options)
    return folder / "run", arpa


def texts(run):
    """The test stage's: {utterance: text}."""
    every = (u for utterances in Run(run).test_sets.values() for u in utterances)
    return {u.id: " ".join(u.hypothesis) for u in every}


def test_the_package_transcribes_as_the_test_stage(run, tmp_path):
    folder, arpa = run
    made = package(folder, tmp_path / "package")
    assert (made / "n-gram.arpa").read_bytes() == arpa.read_bytes()
    assert "| language model | word n-gram |" in (made / "README.md").read_text()
    # From the hub comes all but what could be run, and the licence.
    left = {path.name for path in made.iterdir()} - set(FILES)
    assert left == {"src", "interface.py", "hyperparams.yaml", "LICENSE"}
    moved = tmp_path / "moved"
    shutil.move(made, moved)
    expected = texts(folder)
    assert len(expected) == 8 and expected != texts(trained("ctc")[0])
    found = {}
    recognizer = Recognizer.from_folder(moved, device="cpu")
    for path in runs.corpus().rglob("*.flac"):
        if path.stem in expected:
            found[path.stem] = recognizer.transcribe(path).text
    assert found == expected
    scorer = recognizer.search.searcher.lm
    assert (scorer.alpha, scorer.beta) == (4.0, 0.5)
    other = Recognizer.from_folder(moved, device="cpu", lm_weight=0.1).search.searcher.lm
    assert other.alpha == 0.1
    (moved / "n-gram.arpa").unlink()
    with pytest.raises(UserError, match=r"n-gram\.arpa is missing"):
        Recognizer.from_folder(moved, device="cpu")


def test_what_cannot_be_packaged(run, tmp_path):
    folder, arpa = run
    copied = tmp_path / "run"
    shutil.copytree(folder, copied)
    yaml = (copied / "hyperparams.yaml").read_text()
    for name, message in (("a.bin", "a package holds an .arpa"), ("a.arpa", "is missing")):
        (copied / "hyperparams.yaml").write_text(yaml.replace(str(arpa), name))
        with pytest.raises(UserError, match=message):
            package(copied, tmp_path / "package")
    without = package(copied, tmp_path / "without", use_lm=False)
    assert Recognizer.from_folder(without, device="cpu").search.searcher is None
    # An n-gram that it gets later has more tokens of a frame to choose from than its own search.
    config = json.loads((without / "config.json").read_text())
    config["parts"]["search"]["token_prune_min_logp"] = -1.2
    (without / "config.json").write_text(json.dumps(config))
    searcher = Recognizer.from_folder(without, device="cpu", lm=arpa).search.searcher
    assert (searcher.token_prune_min_logp, searcher.lm.alpha, searcher.lm.beta) == (-8.0, 0.5, 0.0)
    with pytest.raises(UserError, match="is a language model's, and the package has none"):
        Recognizer.from_folder(without, device="cpu", lm_weight=2.0)
    small = tmp_path / "small.arpa"
    small.write_text(arpa.read_text().lower())
    with pytest.raises(UserError, match="has words that the model cannot write, such as 'cab'"):
        Recognizer.from_folder(without, device="cpu", lm=small)
