"""Recorded words put together anew: what is cut, what the new strings hold, what is refused."""

from collections import Counter

import numpy as np
import pytest
import soundfile as sf

from demo import recombine
from demo.recombine import EVERYBODY, cut, main, read_words, resample, share_out
from demo.split import held
from librispeech_prepare import prepare_librispeech
from modules.errors import UserError

RATE = 8000
PITCH = {"ONE": 400, "TWO": 900, "THREE": 1600}  # Hz


def tone(word, seconds=0.2):
    return 0.5 * np.sin(2 * np.pi * PITCH[word] * np.arange(round(seconds * RATE)) / RATE)


def said(words, gap=0.1):
    """Tones between silences."""
    silence = np.zeros(round(gap * RATE))
    return np.concatenate([silence, *(part for w in words for part in (tone(w), silence))])


@pytest.fixture
def split(tmp_path):
    """Two speakers: 7 never says THREE; one utterance of 8 has no silence between its words."""
    texts = {"7-1": ["ONE TWO", "TWO ONE ONE"], "8-1": ["THREE TWO", "ONE THREE"]}
    for chapter, lines in texts.items():
        folder = tmp_path / "recorded" / chapter.replace("-", "/")
        folder.mkdir(parents=True)
        transcript = []
        for i, text in enumerate(lines):
            sound = said(text.split(), 0 if text == "ONE THREE" else 0.1)
            sf.write(folder / f"{chapter}-{i:04d}.flac", sound, RATE)
            transcript.append(f"{chapter}-{i:04d} {text}\n")
        (folder / f"{chapter}.trans.txt").write_text("".join(transcript) + "\n")
    return tmp_path / "recorded"


def strings(folder):
    """{utterance: (words, samples)}."""
    found = {}
    for path in sorted(folder.glob("*/*/*.trans.txt")):
        for line in path.read_text().splitlines():
            name, *words = line.split()
            found[name] = words, sf.read(path.parent / f"{name}.flac")[0]
    return found


def pitch(samples):
    spectrum = np.abs(np.fft.rfft(samples, RATE))
    return int(spectrum.argmax())


def test_words_are_cut_at_silence(split):
    words, rate, unclear = read_words(split)
    assert rate == RATE and unclear == 1
    assert [word for word, _ in words["7"]] == ["ONE", "TWO", "TWO", "ONE", "ONE"]
    for own in words.values():
        for word, samples in own:
            assert abs(pitch(samples) - PITCH[word]) <= 10
            assert abs(len(samples) / RATE - 0.2) < 0.02
    assert cut(said(["ONE", "TWO"]), RATE, 3) is None
    assert abs(pitch(resample(tone("ONE"), 1.1)) - 440) <= 10


def test_strings_say_what_their_transcripts_tell(split, tmp_path, capsys):
    options = ["--length", "2", "4", "--gap", "0.08", "0.2", "--workers", "1", "--mixed", "0.5"]
    for name in ("more", "again"):
        main([str(split), str(tmp_path / name), "--utterances", "250", *options])
    assert "1 utterances whose words run together are left out" in capsys.readouterr().err
    found, again = strings(tmp_path / "more"), strings(tmp_path / "again")
    assert len(found) == len(again) == 250 and not found.keys() & again.keys()
    assert [words for words, _ in found.values()] == [words for words, _ in again.values()]
    for name, (words, samples) in list(found.items())[::10]:
        assert 2 <= len(words) <= 4
        heard = [samples[a:b] for a, b in cut(samples, RATE, len(words))]
        assert all(abs(pitch(x) / PITCH[w] - 1) < 0.1 for x, w in zip(heard, words, strict=True))
        assert "THREE" not in words or not name.startswith("7-")
    # All are one training set, whose ids differ.
    prepare_librispeech(tmp_path, tmp_path / "m", ["recorded", "more", "again"], sample_rate=RATE)
    assert len((tmp_path / "m/again.csv").read_text().splitlines()) == 251


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--utterances", "0"], "utterances=0: expected 1"),
        (["--length", "8", "2"], "length=8 2: expected 1 or more, the lower first"),
        (["--speed", "0", "1"], "speed=0.0 1.0: expected 0.1"),
        (["--mixed", "2"], "mixed=2.0 is a share"),
    ],
)
def test_mistakes_are_told(split, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as end:
        main([str(split), str(tmp_path / "more"), *options])
    assert end.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "more").exists()


def test_sources_that_do_not_fit(split, tmp_path):
    with pytest.raises(UserError, match="holds no speech of separate words"):
        read_words(tmp_path / "nowhere")
    (split / "7/1/7-1-0000.flac").write_bytes(b"fLaC")
    with pytest.raises(UserError, match=r"7-1-0000\.flac cannot be read"):
        read_words(split)
    (split / "7/1/7-1-0000.flac").unlink()
    with pytest.raises(UserError, match=r"7-1-0000\.flac cannot be read"):
        read_words(split)
    sf.write(split / "7/1/7-1-0000.flac", np.zeros((800, 2)), RATE)
    with pytest.raises(UserError, match="has 2 channels"):
        read_words(split)
    with pytest.raises(SystemExit) as end:
        main([str(split), str(split)])
    assert end.value.code == 2


def test_a_stopped_run_goes_on(split, tmp_path, monkeypatch, capsys):
    """With whole chapters alone, and to the very strings of a run that was never stopped."""
    monkeypatch.setattr(recombine, "CHAPTER", 5)
    options = [str(split), "--utterances", "20", "--workers", "1", "--mixed", "0"]
    main([*options[:1], str(tmp_path / "whole/more"), *options[1:]])
    whole, seen = recombine.write_chapter, []

    def full(chapter, strings, rate):
        seen.append(1)
        if len(seen) == 3:
            raise OSError(28, "No space left on device")
        return whole(chapter, strings, rate)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(recombine, "write_chapter", full)
        main([*options[:1], str(tmp_path / "more"), *options[1:]])
    assert end.value.code == 2
    assert "once that is mended, the same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "more").exists()
    main([*options[:1], str(tmp_path / "more"), *options[1:]])
    assert "2 chapters of 4 are there already, and kept" in capsys.readouterr().out
    found, straight = strings(tmp_path / "more"), strings(tmp_path / "whole/more")
    assert found.keys() == straight.keys() and len(found) == 20
    for name, (words, samples) in found.items():
        assert words == straight[name][0] and np.array_equal(samples, straight[name][1])
    main([*options[:1], str(tmp_path / "more"), *options[1:]])
    assert "made before with the same options, kept" in capsys.readouterr().out


@pytest.mark.parametrize("folder", ["more", "more.partial"])
def test_other_runs_are_not_mixed(split, tmp_path, capsys, folder):
    """Neither those that made the folder, nor one that is making it."""
    main([str(split), str(tmp_path / "more"), "--utterances", "3", "--workers", "1"])
    (tmp_path / "more").rename(tmp_path / "kept")
    (tmp_path / "kept").rename(tmp_path / folder)
    with pytest.raises(SystemExit):
        main([str(split), str(tmp_path / "more"), "--utterances", "4"])
    assert "made by other options (utterances)" in capsys.readouterr().err
    sf.write(split / "7/1/7-1-0001.flac", said(["TWO", "TWO", "TWO"]), RATE)
    with pytest.raises(SystemExit):
        main([str(split), str(tmp_path / "more"), "--utterances", "3"])
    assert "made by other options (source)" in capsys.readouterr().err


def test_one_run_at_a_time(split, tmp_path, capsys):
    with held(tmp_path / "more"), pytest.raises(SystemExit) as end:
        main([str(split), str(tmp_path / "more"), "--utterances", "3"])
    assert end.value.code == 2
    assert "another run is writing" in capsys.readouterr().err
    assert not (tmp_path / "more.partial").exists()


def test_all_speakers_have_equally_many_strings_beside_those_that_are_mixed(tmp_path):
    words = {str(i): [] for i in range(40)}
    chapters = list(share_out(words, tmp_path, 1, 1000, 0.3, seed=1))
    counts = Counter()
    for chapter in chapters:
        counts[chapter.folder.parent.name] += chapter.count
        assert chapter.count <= 100
    assert counts.pop(str(EVERYBODY)) == 300
    assert sum(counts.values()) == 700 and set(counts.values()) == {17, 18}
    assert len({chapter.folder.name for chapter in chapters}) == len(chapters)
