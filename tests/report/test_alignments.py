"""wer_*.txt is read back as it was written, whatever the words; less than all of it is an error."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inference.report.alignments import read_alignments
from modules.errors import UserError
from tests.report.written import ODD, WORDS, sentences, stats, wer_text


def read(tmp_path, text):
    path = tmp_path / "wer_test.txt"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_alignments(path)


def contents(utterances):
    return [(u.id, u.reference, u.hypothesis) for u in utterances]


@pytest.mark.parametrize("words", [WORDS, ODD], ids=["words", "odd"])
def test_what_was_said_and_heard_comes_back(words, tmp_path):
    found = sentences(np.random.default_rng(1), 60, words)
    utterances = read(tmp_path, wer_text(found))
    assert contents(utterances) == found
    summary = stats(found).summarize()
    assert sum(u.errors for u in utterances) == summary["num_edits"]
    assert utterances[4].speaker == "101"


def test_nothing_heard_and_other_ends_of_lines(tmp_path):
    found = [("1-1-1", ["ONE", "A"], []), ("1-1-2", ["TWO"], ["TWO"])]
    text = wer_text(found)
    stripped = "\n".join(line.rstrip() for line in text.split("\n"))
    for form in (text, text.replace("\n", "\r\n"), stripped, text + "\n\n"):
        assert contents(read(tmp_path, form)) == found


def test_what_is_cut_off_is_refused(tmp_path):
    text = wer_text(sentences(np.random.default_rng(2), 3)).encode()
    whole = contents(read(tmp_path, text))
    for end in range(len(text)):
        # The last blanks and the last newline may go: no word is lost with them.
        if text[end:].strip():
            with pytest.raises(UserError, match=r"wer_test.txt.*give a wer_<test set>.txt"):
                read(tmp_path, text[:end])
    assert contents(read(tmp_path, text.rstrip() + b"\n")) == whole


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("%WER", "%CER", "line 1: .* is not the head"),
        ("Scored 5", "Scored 6", "tells of 6 sentences, and 5 follow"),
        ("1-1-2, %WER", "1-1-1, %WER", "an utterance is there twice"),
        ("ONE ; TOO", "ONE   TOO", "the three lines of the alignment do not fit"),
        ("1 / 2, 0 ins", "2 / 2, 1 ins", "alignment has 1 errors in 2 words"),
    ],
)
def test_what_does_not_fit_is_named(old, new, problem, tmp_path):
    found = [(f"1-1-{i}", ["ONE", "TWO"], ["ONE", "TOO"]) for i in range(1, 6)]
    text = wer_text(found)
    assert old in text
    with pytest.raises(UserError, match=problem):
        read(tmp_path, text.replace(old, new, 1))


def test_other_files_are_refused(tmp_path):
    for content in (
        b"",
        b"\xff\xfe\x00",
        b"epoch: 1\n",
        b"%WER 1.00 [ 1 / 100, 0 ins, 0 del, 1 sub ]\n",
    ):
        with pytest.raises(UserError, match=r"wer_test.txt"):
            read(tmp_path, content)
    with pytest.raises(UserError, match="cannot be read"):
        read_alignments(tmp_path / "none.txt")


TEXT = wer_text(sentences(np.random.default_rng(3), 6, ODD))


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.tuples(st.integers(0, len(TEXT)), st.integers(0, 5), st.text(max_size=4)),
        min_size=1,
        max_size=3,
    )
)
def test_changed_text_gives_utterances_or_an_error(tmp_path, changes):
    text = TEXT
    for at, length, new in changes:
        text = text[:at] + new + text[at + length :]
    try:
        found = read(tmp_path, text.encode("utf-8", "surrogatepass"))
    except UserError:
        return
    assert len(found) == 6
