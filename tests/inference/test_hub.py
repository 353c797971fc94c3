"""A package by its name on the hub: what is downloaded, what works offline, what is refused."""

import shutil
import sys

import huggingface_hub
import pytest
from huggingface_hub import constants

import transcribe as script
from inference import Recognizer
from inference.hub import FILES, located
from modules.errors import UserError
from tests.recipes.packages import RATE, SENTENCES, hearing_package, said


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The hub's cache on this machine, empty, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def test_what_an_earlier_call_brought_is_used_offline(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    repo, revision = cache / "models--someone--model", "0123456789" * 4
    shutil.copytree(hearing_package(), repo / "snapshots" / revision)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(revision)
    recognizer = Recognizer.from_folder("someone/model", "cpu")
    assert recognizer.transcribe(said(SENTENCES[0]), RATE).text == SENTENCES[0]
    assert located(f"someone/model@{revision}") == repo / "snapshots" / revision
    with pytest.raises(UserError, match="someone/model@v2 is no folder here and cannot be had"):
        located("someone/model@v2")


def test_only_data_is_asked_for(monkeypatch, tmp_path):
    asked = []

    def snapshot_download(repo, **options):
        asked.append((repo, options))
        return str(hearing_package())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert located("someone/model@v1") == hearing_package()
    assert asked == [("someone/model", {"revision": "v1", "allow_patterns": FILES})]
    assert not any(name.endswith((".py", ".yaml")) for name in FILES)
    # A folder here, or a mistake in its name, is nobody else's business.
    (tmp_path / "packages/mine").mkdir(parents=True)
    assert located("packages/mine").samefile(tmp_path / "packages/mine")
    for name in ("packages/mien", "nowhere", "/some/model", "a/b/c", "../model", "http://x/y"):
        with pytest.raises(UserError, match="there is no folder"):
            located(name)
    assert len(asked) == 1


def test_without_a_network_it_says_so(cache, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["transcribe.py", "a.wav", "--model", "someone/model"])
    with pytest.raises(SystemExit) as ended:
        script.main()
    shown = capsys.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in shown
    assert "someone/model is no folder here and cannot be had from the Hugging Face hub" in shown
    assert "check the name and the network" in shown
