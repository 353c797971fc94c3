"""A corpus in which everything is wrong that can be: each fault is found, told and set aside."""

import csv

import numpy as np
import pytest
import soundfile as sf

from librispeech_prepare import main

RATE = 16000
GOOD = 400  # the faults are less than 5 % of the split


def tone(seconds=0.2):
    return 0.1 * np.sin(np.arange(int(seconds * RATE)) / 10)


def noise(seconds):
    return 0.2 * np.random.default_rng(0).standard_normal(int(seconds * RATE))


def cut(path, fraction):
    data = path.read_bytes()
    path.write_bytes(data[: int(fraction * len(data))])


def corrupt_middle(path):
    """Header, length and end stay as they are."""
    sf.write(path, noise(2), RATE)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 200] = bytes(200)
    path.write_bytes(data)


def cut_flac(path):
    sf.write(path, noise(2), RATE)
    cut(path, 0.5)


def cut_wav(path):
    sf.write(path, tone(2), RATE)
    cut(path, 0.5)


def streamed_wav(path):
    """As a program leaves it that writes to a pipe: any length will do."""
    sf.write(path, tone(), RATE)
    data = bytearray(path.read_bytes())
    data[4:8] = data[40:44] = b"\xff" * 4
    path.write_bytes(data)


def nan_wav(path):
    x = tone()
    x[1600] = np.nan
    sf.write(path, x, RATE, subtype="FLOAT")


def an_hour(path):
    with sf.SoundFile(path, "w", RATE, 1) as file:
        for _ in range(60):
            file.write(np.zeros(60 * RATE, np.int16))


# name of the file -> (how to make it, the fault, what its line tells).
AUDIO = {
    "corrupt.flac": (corrupt_middle, "unreadable audio", ""),
    "cut.flac": (cut_flac, "unreadable audio", ""),
    "cut2.wav": (cut_wav, "unreadable audio", "breaks off: 32022 of 64000 bytes"),
    "streamed.wav": (streamed_wav, "unreadable audio", "leaves its length open"),
    "zero.flac": (lambda p: p.write_bytes(b""), "unreadable audio", ""),
    "empty.wav": (lambda p: sf.write(p, np.zeros(0), RATE), "audio with 0 samples", ""),
    "nan.wav": (nan_wav, "audio with NaN or infinity", "nan at 0.100 s"),
    "silent.flac": (lambda p: sf.write(p, np.zeros(RATE), RATE), "silent audio", ""),
    "constant.flac": (lambda p: sf.write(p, np.full(RATE, 0.1), RATE), "silent audio", ""),
    "clipped.flac": (
        lambda p: sf.write(p, np.clip(20 * tone(), -1, 1), RATE),
        "clipped audio",
        "66.8 % of the samples",
    ),
    "8k.flac": (lambda p: sf.write(p, tone(), 8000), "wrong sample rate", "8000 Hz"),
    "stereo.flac": (
        lambda p: sf.write(p, np.stack([tone()] * 2, 1), RATE),
        "more than one channel",
        "2 channel",
    ),
    "hour.flac": (an_hour, "audio too long", "3600.0 s"),
}
TEXT = {  # what is in the transcript file besides: (line, the fault, where)
    "missing": (b"missing HELLO", "text without audio", "all.trans.txt:"),
    "double": (b"double HELLO\ndouble BYE", "duplicate id", "all.trans.txt:"),
    "wordless": (b"wordless", "empty text", "wordless.flac"),
    "greek": ("greek ΓΕΙΑ".encode(), "unexpected characters", "greek.flac"),
    "latin": (b"latin CAF\xc9", "transcript not UTF-8", "all.trans.txt:"),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults") / "train"
    folder.mkdir()
    lines = []
    for i in range(GOOD):
        sf.write(folder / f"good-{i:03d}.flac", tone(), RATE)
        lines.append(f"good-{i:03d} HELLO".encode())
    for name, (make, *_) in AUDIO.items():
        make(folder / name)
        lines.append(name.split(".")[0].encode() + b" HELLO")
    for name, (line, *_) in TEXT.items():
        if name != "missing":
            sf.write(folder / f"{name}.flac", tone(), RATE)
        lines.append(line)
    (folder / "all.trans.txt").write_bytes(b"\n".join(lines))
    return folder


def prepare(corpus, save, *options):
    main([str(corpus.parent), str(save), "--train", "train", "--characters", "HELOBY", *options])


def quarantined(save):
    """{path or FILE:LINE: (fault, detail)}"""
    with open(save / "quarantine.tsv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, dialect="excel-tab"))
    assert {row["split"] for row in rows} == {"train"}
    return {row["where"]: (row["fault"], row["detail"]) for row in rows}


def test_every_fault_is_set_aside(corpus, tmp_path, caplog):
    prepare(corpus, tmp_path)
    found = quarantined(tmp_path)
    report = (tmp_path / "prepare_report.txt").read_text()
    for name, (_, fault, detail) in AUDIO.items():
        kind, told = found.pop(str(corpus / name))
        assert (kind, detail in told) == (fault, True), (name, told)
        assert str(corpus / name) in report
    for fault, place in (row[1:] for row in TEXT.values()):
        (where,) = (w for w, (kind, _) in found.items() if kind == fault and place in w)
        assert where in report
        del found[where]
    assert not found
    assert f"{GOOD} sentences" in report
    assert f"{len(AUDIO) + len(TEXT)} left out" in caplog.text
    with open(tmp_path / "train.csv", newline="") as file:
        assert [row["ID"][:5] for row in csv.DictReader(file)] == ["good-"] * GOOD


def test_strict_refuses(corpus, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        prepare(corpus, tmp_path, "--strict")
    error = capsys.readouterr().err
    assert "No manifest was written" in error
    assert "Traceback" not in error
    assert not (tmp_path / "train.csv").exists()
    assert len(quarantined(tmp_path)) == len(AUDIO) + len(TEXT)


def test_headers_alone_do_not_tell_all(corpus, tmp_path):
    prepare(corpus, tmp_path, "--headers-only")
    found = {place.rpartition("/")[2] for place in quarantined(tmp_path)}
    unseen = {"corrupt.flac", "nan.wav", "silent.flac", "constant.flac", "clipped.flac"}
    assert AUDIO.keys() - found == unseen
