"""A CTC run's word n-gram: in the test stage, in the package, and in transcribing."""

import shutil

import pytest

import score
import serve
import transcribe
from inference import Recognizer
from inference.hub import FILES
from inference.package import package
from inference.report.folder import Run
from inference.server.limits import Limits
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
    card = (made / "README.md").read_text()
    assert "| language model | word n-gram: weight 4.0, beta 0.5 |" in card
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
    card = (without / "README.md").read_text()
    assert "| language model | none |" in card and "beta" not in card and "weight 4" not in card
    assert Recognizer.from_folder(without, device="cpu").search.searcher is None
    for option in ("lm_weight", "word_bonus"):
        with pytest.raises(UserError, match=f"{option}=2.0 is a language model's, and the package"):
            Recognizer.from_folder(without, device="cpu", **{option: 2.0})
    with pytest.raises(UserError, match="package is a package already, which can be copied"):
        package(package(folder, tmp_path / "package"), tmp_path / "again")
    small = tmp_path / "small.arpa"
    small.write_text(arpa.read_text().lower())
    with pytest.raises(UserError, match="has words that the model cannot write, such as 'cab'"):
        Recognizer.from_folder(without, device="cpu", lm=small)


def searched(folder, **options):
    """(pruning, weight, bonus a word) of a package's search with an n-gram."""
    searcher = Recognizer.from_folder(folder, device="cpu", **options).search.searcher
    return searcher.token_prune_min_logp, searcher.lm.alpha, searcher.lm.beta


def test_an_n_gram_that_comes_later(run, tmp_path):
    """With the weights that were tuned for one; else with more tokens to choose from in a frame."""
    folder, arpa = run
    tuned = package(folder, tmp_path / "tuned", use_lm=False)
    assert Recognizer.from_folder(tuned, device="cpu").search.searcher is None
    assert searched(tuned, lm=arpa) == (-6.0, 4.0, 0.5)
    assert searched(tuned, lm=arpa, lm_weight=1.0, word_bonus=0.0) == (-6.0, 1.0, 0.0)
    plain = package(trained("ctc")[0], tmp_path / "plain")
    assert searched(plain, lm=arpa) == (-8.0, 0.5, 0.0)
    assert searched(plain, lm=arpa, word_bonus=1.5) == (-8.0, 0.5, 1.5)


def test_a_bonus_a_word_on_the_command_line(run, tmp_path):
    """Of transcribe.py, score.py and serve.py."""
    folder, arpa = run
    words = ["--model", str(package(folder, tmp_path / "package", use_lm=False)), "--device", "cpu"]
    words += ["--lm", str(arpa), "--lm-weight", "1", "--word-bonus", "-2"]
    for script, files in ((transcribe, ["a.wav"]), (score, ["a"])):
        recognizer = script.load(script.parser().parse_args([*files, *words]))
        assert recognizer.search.searcher.lm.beta == -2.0
    service = serve.service_of(serve.parser().parse_args(words), Limits(), None)
    assert service.recognizer.search.searcher.lm.beta == -2.0
