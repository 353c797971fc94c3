"""Word n-grams: the estimate, its file, its command, and what the CTC search makes of it."""

import gzip
import shutil
from pathlib import Path

import pytest
import torch

from modules.errors import UserError
from modules.lm import ngram
from modules.lm.arpa import Arpa, write_arpa
from modules.lm.kneser_ney import BOS, EOS, UNKNOWN, adjusted_counts, estimate
from modules.lm.text import read_sentences
from modules.search import CTCSearch
from tests.search.test_ctc import LABELS, frames_of

ROOT = Path(__file__).parents[2]
# English that is at hand: letters alone, in capitals.
TEXT = [
    "".join(c if c.isalpha() else " " for c in line.upper())
    for line in (ROOT / "LICENSE").read_text().split(".")
]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(TEXT) + "\n")
    return path


@pytest.fixture(params=[2, 3, 5])
def arpa(request, text, tmp_path):
    write_arpa(estimate(read_sentences([text], "TEXT"), request.param), tmp_path / "a.arpa")
    return Arpa(tmp_path / "a.arpa")


def test_what_follows_any_words_sums_to_one(arpa):
    vocabulary = [*arpa.words, EOS, UNKNOWN]
    contexts = [g for g in arpa.ngrams if len(g) < arpa.order and g[-1] not in (EOS, UNKNOWN)]
    for context in [(), ("NOTHING",), *contexts[::7]]:
        total = sum(10 ** arpa.score(context, word)[0] for word in vocabulary)
        assert total == pytest.approx(1.0, abs=1e-5), context


def test_counts_of_a_sentence_by_hand():
    """What begins a sentence counts as often as it does; other words by those before them."""
    one, two, three = adjusted_counts(["A B", "A B", "C B"], 3)
    assert one == {("A",): 1, ("B",): 2, ("C",): 1, (EOS,): 1}
    assert two == {(BOS, "A"): 2, (BOS, "C"): 1, ("A", "B"): 1, ("C", "B"): 1, ("B", EOS): 2}
    assert three[(BOS, "A", "B")] == 2 and three[("C", "B", EOS)] == 1


def test_kenlm_reads_the_same(arpa, tmp_path):
    kenlm = pytest.importorskip("kenlm")
    model = kenlm.Model(str(tmp_path / "a.arpa"))
    for sentence in [*TEXT[:5], "NOTHING OF THE SOFTWARE", ""]:
        context, ours = (BOS,), []
        for word in (*sentence.split(), EOS):
            score, context = arpa.score(context, word)
            ours.append(score)
        theirs = [score for score, *_ in model.full_scores(sentence)]
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_lmplz_estimates_the_same(text, tmp_path):
    if shutil.which("lmplz") is None:
        pytest.skip("lmplz is not on PATH")
    made = {}
    for tool in ("lmplz", "python"):
        ngram.main([str(text), "--output", str(tmp_path / f"{tool}.arpa"), "--tool", tool])
        made[tool] = Arpa(tmp_path / f"{tool}.arpa").ngrams
    assert made["python"].keys() == made["lmplz"].keys()
    for words, numbers in made["lmplz"].items():
        if words != (BOS,):
            assert made["python"][words] == pytest.approx(numbers, abs=1e-4), words


def test_the_command_writes_and_measures(text, tmp_path, capsys):
    output = tmp_path / "models/3-gram.arpa"
    arguments = [str(text), "--output", str(output), "--tool", "python"]
    ngram.main([*arguments, "--dev", str(text)])
    shown = capsys.readouterr().out
    words = {word for line in TEXT for word in line.split()}
    assert f"wrote {output}, made by python: {len(words) + 3}, " in shown
    assert "0 unknown words left out" in shown
    assert float(shown.split("perplexity ")[1].split()[0]) < 10
    assert list(output.parent.iterdir()) == [output]
    before = output.read_bytes()
    ngram.main([*arguments, "--overwrite"])
    assert output.read_bytes() == before


def test_transcripts_folders_and_gzip_are_read(tmp_path):
    (tmp_path / "1/2").mkdir(parents=True)
    (tmp_path / "1/2/1-2.trans.txt").write_text("1-2-0000 A  B\n1-2-0001 C\n")
    (tmp_path / "1/2/notes.txt").write_text("not a transcript\n")
    with gzip.open(tmp_path / "more.gz", "wt") as file:
        file.write("\ufeffÉTÉ 1-2\n\n1-2-0000 stays where others have none\n")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/1").symlink_to(tmp_path / "1")
    (tmp_path / "linked/1/2/u.trans.txt").write_text("u-1 D\nu_2 E\n")  # ids of one's own
    for folder in (tmp_path, tmp_path / "linked"):
        assert list(read_sentences([folder], "TEXT")) == ["A B", "C", "D", "E"]
    (tmp_path / "1/2/u.trans.txt").unlink()
    found = list(read_sentences([tmp_path, tmp_path / "more.gz"], "TEXT"))
    assert found == ["A B", "C", "ÉTÉ 1-2", "1-2-0000 stays where others have none"]


def test_manifests_are_read_for_their_transcripts(tmp_path):
    (tmp_path / "a.csv").write_text(
        'ID,duration,wav,spk_id,wrd\n1,2.0,no.wav,x,A  B\n2,1,b,x,"C"\n'
    )
    (tmp_path / "a.jsonl").write_text('{"audio_filepath": "a.flac", "text": "D E"}\n')
    found = list(read_sentences([tmp_path / "a.csv", tmp_path / "a.jsonl"], "TEXT"))
    assert found == ["A B", "C", "D E"]
    (tmp_path / "bad.csv").write_text("ID,wav,wrd\n1,a.wav\n")
    with pytest.raises(UserError, match=r"TEXT=.*bad.csv, .*:2: 2 fields.* delete that row"):
        list(read_sentences([tmp_path / "bad.csv"], "TEXT"))


def test_mistakes_are_told(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")  # no KenLM
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes("GUT\nSCHÖN\n".encode("latin1"))
    damaged = bytearray(gzip.compress((ROOT / "LICENSE").read_bytes()))
    damaged[10:40] = bytes(30)
    (tmp_path / "bad.gz").write_bytes(damaged)
    (tmp_path / "cut.gz").write_bytes(gzip.compress((ROOT / "LICENSE").read_bytes())[:300])
    (tmp_path / "marks.txt").write_text("A <s> B\n")
    (tmp_path / "there.arpa").write_text("")
    (tmp_path / "nothing").mkdir()
    new = ["--output", tmp_path / "new.arpa"]
    for message, *arguments in (
        ("missing.txt is neither file nor folder", tmp_path / "missing.txt", *new),
        ("/dev/null is a pipe or a device", "/dev/null", *new),
        ("holds no *.trans.txt and no *.txt", tmp_path / "nothing", *new),
        ("empty.txt holds no sentence", tmp_path / "empty.txt", *new),
        ("latin.txt, line 2 is no UTF-8", tmp_path / "latin.txt", *new),
        ("cut.gz cannot be read", tmp_path / "cut.gz", *new),
        ("bad.gz cannot be read", tmp_path / "bad.gz", *new),
        ("nothing was written", text, "--output", text / "a.arpa"),
        ("has the word <s>", tmp_path / "marks.txt", *new),
        ("TEXT=missing is neither", text, *new, "--dev", "missing"),
        ("give --overwrite", text, "--output", tmp_path / "there.arpa"),
        ("must end in .arpa or .bin", text, "--output", tmp_path / "a.lm"),
        ("--order 1: KenLM reads 2 to 6", text, *new, "--order", 1),
        ("--tool lmplz: it is not on PATH; build KenLM", text, *new, "--tool", "lmplz"),
        ("build_binary is not on PATH", text, "--output", tmp_path / "a.bin"),
        ("--prune 0 1 needs lmplz", text, *new, "--prune", 0, 1),
    ):
        with pytest.raises(SystemExit) as stopped:
            ngram.main([str(a) for a in arguments])
        shown = capsys.readouterr().err
        assert stopped.value.code == 2 and message in shown, shown
    left = {p.name for p in tmp_path.iterdir()}
    assert "new.arpa" not in left and not any(name.startswith(".ngram") for name in left)


# ---- In the search ----


def blurred(sentence, seed):
    """Frames in which the wrong letter often wins."""
    torch.manual_seed(seed)
    frames = frames_of(sentence, sharpness=4.0)
    return (frames + 1.3 * torch.randn(frames.shape)).log_softmax(-1)[None]


def search(path, frames, **options):
    options = {"beam_size": 20, "token_prune_min_logp": -4.0} | options
    searcher = CTCSearch(LABELS, kenlm_model_path=path, **options)
    return [searcher(x, torch.tensor([x.shape[1]]))[0] for x in frames]


def test_it_mends_what_the_frames_leave_open(text, tmp_path, monkeypatch):
    """Also without KenLM installed, and with the same texts as with it."""
    sentences = [" ".join(line.split())[:40].rpartition(" ")[0] for line in TEXT[:3]]
    frames = [blurred(s, seed) for seed, s in enumerate(sentences)]
    write_arpa(estimate(read_sentences([text], "TEXT"), 3), tmp_path / "a.arpa")
    path = str(tmp_path / "a.arpa")
    monkeypatch.setattr("modules.search.ctc.kenlm_missing", lambda: ["kenlm"])
    found = search(path, frames)
    assert found == sentences != search(None, frames)
    monkeypatch.undo()
    assert search(path, frames) == found


def test_scores_are_speechbrains(arpa, tmp_path):
    pytest.importorskip("kenlm")
    pytest.importorskip("pygtrie")
    from modules.search.ngram import WordScorer

    path = str(tmp_path / "a.arpa")
    theirs = CTCSearch(LABELS, kenlm_model_path=path, alpha=0.7).searcher.lm
    ours = WordScorer(path, alpha=0.7, beta=1.5)
    states = ours.get_start_state(), theirs.get_start_state()
    for i, word in enumerate(["THE", "SOFTWARE", "XYZZYXYZZY", "IS", "PROVIDED", "AS", "IS"]):
        (a, mine), (b, other) = (
            scorer.score(state, word, i == 6)
            for scorer, state in zip((ours, theirs), states, strict=True)
        )
        states = mine, other
        assert a == pytest.approx(b, abs=1e-4)
        for beginning in (word[:1], word[:3], word + "Q"):
            expected = theirs.score_partial_token(beginning)
            assert ours.score_partial_token(beginning) == pytest.approx(expected)
