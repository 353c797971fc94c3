"""Both training scripts on a tiny corpus: every YAML file's two steps, and whole runs."""

import contextlib
import fcntl
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios

import pytest
import torch
from speechbrain.lobes.models.transformer.TransformerLM import TransformerLM

from modules.errors import UserError
from tests.recipes import runs
from tests.test_hparams import RECIPES

CTC = "CTC/conmamba_tiny.yaml"
S2S = "S2S/conmambamamba_tiny.yaml"
BAR = re.compile(r"\d+%\|")


# ---- Two steps of every file ----


@pytest.mark.parametrize("name", RECIPES)
def test_two_steps(name, tmp_path):
    brain, train, valid, _ = runs.build(name, tmp_path, optimizer_step_limit=2)
    before = {k: v.clone() for k, v in brain.modules.named_parameters()}
    runs.fit(brain, train, valid)
    assert brain.optimizer_step == 2
    (epoch,) = runs.log_lines(tmp_path)
    assert 0 < epoch["train loss"] < float("inf")
    assert 0 < epoch["valid loss"] < float("inf")
    unchanged = {k for k, v in brain.modules.named_parameters() if torch.equal(v, before[k])}
    assert not unchanged


# ---- Whole runs from the command line ----


def finish(name, folder):
    done = runs.run(runs.command(name, folder, number_of_epochs=2))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done


@pytest.fixture(scope="module")
def ctc_run(tmp_path_factory):
    return finish(CTC, tmp_path_factory.mktemp("ctc") / "run")


@pytest.fixture(scope="module")
def s2s_run(tmp_path_factory):
    return finish(S2S, tmp_path_factory.mktemp("s2s") / "run")


@pytest.mark.parametrize("recipe", ["ctc_run", "s2s_run"])
def test_a_run_leaves_transcripts_log_and_summary(recipe, request):
    folder, done = request.getfixturevalue(recipe)
    summary = (folder / "summary.txt").read_text()
    assert summary.strip() in done.stdout
    for split in ("test-a", "test-b"):
        text = (folder / f"wer_{split}.txt").read_text()
        # SpeechBrain's format: the rate, counts of errors, then an alignment an utterance.
        assert re.search(r"^%WER \d+\.\d\d \[ \d+ / \d+, \d+ ins, \d+ del, \d+ sub \]$", text, re.M)
        assert len(re.findall(r"^[\w-]+, %WER ", text, re.M)) == 4
        wer = re.search(r"%WER (\S+)", text)[1]
        assert re.search(rf"^{split} .* {re.escape(wer)} ", summary, re.M)
    first, second = runs.log_lines(folder)
    assert (first["epoch"], second["epoch"]) == (1, 2)
    assert second["train loss"] < first["train loss"]
    assert f"{int(second['steps'])} steps" in summary
    log = (folder / "train_log.txt").read_text()
    assert "test set: test-a" in log
    assert "test set: test-b" in log


@pytest.mark.parametrize("recipe", ["ctc_run", "s2s_run"])
def test_no_progress_bars_off_a_terminal(recipe, request):
    _, done = request.getfixturevalue(recipe)
    assert not BAR.search(done.stderr + done.stdout)
    assert "Traceback" not in done.stderr + done.stdout


def run_on_terminal(command):
    """Run with stderr on a pseudo-terminal: (status, what it showed there)."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with contextlib.closing(open(ours, "rb", buffering=0)) as terminal:
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=theirs,
            cwd=runs.ROOT,
            env=runs.environment(TERM="xterm"),
        )
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # how Linux says that the other side is closed
            while part := terminal.read(4096):
                shown += part
    return process.wait(timeout=60), shown.decode()


def test_evaluating_again_deletes_nothing_and_shows_bars_on_a_terminal(ctc_run):
    folder, _ = ctc_run
    before, text = runs.files_of(folder / "save"), (folder / "hyperparams.yaml").read_text()
    wer = (folder / "wer_test-a.txt").read_text()
    (folder / "wer_test-a.txt").unlink()
    command = runs.command(CTC, folder, number_of_epochs=2, skip_train=True, max_batch_length_val=5)
    status, shown = run_on_terminal(command)
    assert status == 0, shown
    assert BAR.search(shown)
    assert runs.files_of(folder / "save") == before
    assert (folder / "hyperparams.yaml").read_text() == text
    assert (folder / "wer_test-a.txt").read_text() == wer


def test_hyperparams_can_be_loaded_and_say_what_ran(ctc_run):
    folder, _ = ctc_run
    text = (folder / "hyperparams.yaml").read_text()
    assert re.search(r"^d_model: 16$", text, re.M)
    assert re.search(r"^max_batch_length_train: 12$", text, re.M)
    assert str(runs.corpus()) in text
    # The copy is a YAML file as any other.
    runs.launch.start([str(folder / "hyperparams.yaml"), "--device=cpu"])


def test_importing_runs_nothing(tmp_path):
    code = (
        "import train_CTC, train_S2S; train_CTC.ASR, train_S2S.ASR, "
        "train_CTC.dataio_prepare, train_S2S.dataio_prepare; "
        # Compilers are for those who compile: their import takes a third of a command's start.
        "import sys; assert not {'torch._dynamo', 'sympy', 'triton'} & sys.modules.keys()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=runs.environment(PYTHONPATH=str(runs.ROOT)),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "torchvision" not in done.stderr
    assert not list(tmp_path.iterdir())


# ---- Evaluation leaves training alone ----


def test_evaluating_in_the_middle_of_training_deletes_nothing(tmp_path, monkeypatch):
    runs.die_after(monkeypatch, 7)
    with pytest.raises(runs.Killed):
        runs.train(CTC, tmp_path, number_of_epochs=3, ckpt_interval_steps=2)
    before = runs.files_of(tmp_path / "save")
    assert len(list((tmp_path / "save").glob("CKPT+*"))) == 2  # an epoch's, and one within
    printed = runs.train(CTC, tmp_path, number_of_epochs=3, skip_train=True)
    assert "test-a" in printed
    assert runs.files_of(tmp_path / "save") == before


# ---- Language model ----

TINY_LM = {"d_model": 16, "nhead": 2, "num_encoder_layers": 1, "d_ffn": 16}


def transcripts(folder):
    return {n: (folder / f"wer_{n}.txt").read_text() for n in ("test-a", "test-b")}


def test_no_lm_changes_the_language_model_alone(s2s_run, tmp_path):
    folder, _ = s2s_run
    pretrained = tmp_path / "pretrained"
    pretrained.mkdir()
    (pretrained / "tokenizer.ckpt").write_bytes((folder / "save/tokenizer.model").read_bytes())
    torch.manual_seed(0)
    lm = TransformerLM(
        vocab=10, num_decoder_layers=0, dropout=0.0, normalize_before=False, **TINY_LM
    )
    # It wants one letter, whatever came before.
    torch.nn.init.zeros_(lm.output_proj.layers[-1].w.weight)
    lm.output_proj.layers[-1].w.bias.data.copy_(20.0 * (torch.arange(10) == 5))
    torch.save(lm.state_dict(), pretrained / "lm.ckpt")

    found = {}
    for case, options in {
        "without": {"no_lm": True},
        "weightless": {"no_lm": False, "lm_weight": 0.0},
        "with": {"no_lm": False, "lm_weight": 5.0},
    }.items():
        runs.train(
            S2S,
            tmp_path / case,
            resume=folder,
            skip_train=True,
            pretrained_lm_tokenizer_path=pretrained,
            make_lm=str(TINY_LM),
            **options,
        )
        found[case] = transcripts(tmp_path / case)
    assert found["weightless"] == found["without"] == transcripts(folder)
    assert found["with"] != found["without"]


def test_a_tokenizer_of_a_local_folder_trains(s2s_run, tmp_path):
    folder, _ = s2s_run
    pretrained = tmp_path / "pretrained"
    pretrained.mkdir()
    (pretrained / "tokenizer.ckpt").write_bytes((folder / "save/tokenizer.model").read_bytes())
    runs.train(S2S, tmp_path / "run", number_of_epochs=1, pretrained_lm_tokenizer_path=pretrained)
    assert (tmp_path / "run/save/tokenizer.model").read_bytes() == (
        pretrained / "tokenizer.ckpt"
    ).read_bytes()


def test_s2s_refuses_transcripts_that_its_tokenizer_cannot_spell(s2s_run, tmp_path):
    """An unknown letter would be CTC's blank, and trained as such."""
    folder, _ = s2s_run
    data = tmp_path / "data"
    shutil.copytree(runs.corpus(), data)
    for path in data.rglob("*.trans.txt"):
        lines = (line.partition(" ") for line in path.read_text().splitlines())
        path.write_text("".join(f"{name} {text.lower()}\n" for name, _, text in lines))
    (tmp_path / "units").mkdir()
    shutil.copy(folder / "save/tokenizer.model", tmp_path / "units/tokenizer.ckpt")
    options = {"data_folder": data, "pretrained_lm_tokenizer_path": tmp_path / "units"}
    with pytest.raises(UserError, match="has no unit for; write the transcripts as those that"):
        runs.train(S2S, tmp_path / "run", **options)
