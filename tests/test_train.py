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
import types

import pytest
import torch
from speechbrain.lobes.models.transformer.TransformerLM import TransformerLM
from speechbrain.utils.train_logger import TensorboardLogger

from modules import loggers
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


@pytest.mark.parametrize("name", [CTC, S2S])
def test_scan_parameters_biases_and_norms_do_not_decay(name, tmp_path):
    brain, *_ = runs.build(name, tmp_path, weight_decay=0.1)
    brain.init_optimizers()
    decay = {p: g["weight_decay"] for g in brain.optimizer.param_groups for p in g["params"]}
    parameters = dict(brain.modules.named_parameters())
    spared = {k for k, p in parameters.items() if decay[p] == 0}
    assert {decay[p] for p in parameters.values()} == {0.0, 0.1}
    assert {k for k in parameters if k.endswith((".A_log", ".D"))} <= spared
    assert {k for k, p in parameters.items() if p.dim() < 2} <= spared
    assert any(k.endswith("in_proj.weight") for k in parameters.keys() - spared)
    assert any("A_log" in k for k in spared)


def test_everything_may_decay(tmp_path):
    brain, *_ = runs.build(CTC, tmp_path, weight_decay=0.1, decay_everything=True)
    brain.init_optimizers()
    assert {g["weight_decay"] for g in brain.optimizer.param_groups} == {0.1}


# ---- Variants from the command line ----


MIXERS = {
    "Mamba": "modules.mamba.Mamba {d_state: 4}",
    "TwoMambas": "modules.two_mambas.TwoMambas {d_state: 4, expand: 1, d_conv: 3}",
    "BiMamba2": "modules.mamba2.BiMamba2 {d_state: 4, d_head: 8}",
    "RoPEAttention": "modules.attention.RoPEAttention {num_heads: 2, dropout: 0.1}",
    "BiMamba": "modules.mamba.BiMamba ",  # with its defaults, not with the file's
}


@pytest.mark.parametrize("name", MIXERS)
def test_another_mixer_needs_no_file(name, tmp_path):
    encoder = f"{{kernel_size: 5, mixer: !name:{MIXERS[name]}}}"
    brain, train, valid, _ = runs.build(CTC, tmp_path, optimizer_step_limit=2, encoder=encoder)
    layer = brain.modules.encoder.layers[0]
    assert type(layer.mixer).__name__ == name
    assert layer.conv.depthwise.kernel_size == (5,)
    runs.fit(brain, train, valid)
    assert brain.optimizer_step == 2


def test_a_run_of_another_class_is_repeated_by_its_hyperparams(tmp_path):
    options = {
        "encoder": f"{{mask_padding: False, mixer: !name:{MIXERS['TwoMambas']}}}",
        "activation": "!name:torch.nn.SiLU",
        "decay_everything": True,
    }
    command = runs.command(
        CTC, tmp_path / "a", number_of_epochs=1, optimizer_step_limit=2, **options
    )
    assert not (done := runs.run(command)).returncode, done
    text = (tmp_path / "a/hyperparams.yaml").read_text()
    (tmp_path / "b.yaml").write_text(text.replace(str(tmp_path / "a"), str(tmp_path / "b")))
    again = [str(tmp_path / "b.yaml"), "--device=cpu", "--optimizer_step_limit=2"]
    assert not (done := runs.run([*command[:2], *again])).returncode, done
    assert runs.log_lines(tmp_path / "a") == runs.log_lines(tmp_path / "b") != []
    _, hparams, *_ = runs.launch.start(again)
    layer = hparams["encoder"].layers[0]
    assert type(layer.mixer).__name__ == "TwoMambas" and layer.mixer.out_proj.in_features == 16
    assert isinstance(layer.conv.activation, torch.nn.SiLU)
    assert not hparams["encoder"].mask_padding and hparams["decay_everything"]


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
        "train_CTC.dataio_prepare, train_S2S.dataio_prepare"
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


# ---- Precision, accumulation, checkpointing, batches ----


@pytest.mark.parametrize("name", [CTC, "CTC/conformer_tiny.yaml", S2S])
def test_bf16_on_the_cpu(name, tmp_path):
    losses = {}
    for precision in ("fp32", "bf16"):
        brain, train, valid, _ = runs.build(
            name, tmp_path / precision, precision=precision, optimizer_step_limit=2, **runs.PLAIN
        )
        seen = set()
        brain.modules.ctc_head.register_forward_hook(lambda m, i, o, seen=seen: seen.add(o.dtype))
        runs.fit(brain, train, valid)
        expected = {torch.float32} if precision == "fp32" else {torch.float32, torch.bfloat16}
        assert seen == expected  # validation stays in float32
        (epoch,) = runs.log_lines(tmp_path / precision)
        losses[precision] = epoch["train loss"]
    assert losses["bf16"] != losses["fp32"] or name != CTC
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.03)


def test_gradient_accumulation_takes_whole_steps(tmp_path):
    brain, train, valid, _ = runs.build(
        CTC, tmp_path, grad_accumulation_factor=3, number_of_epochs=1
    )
    runs.fit(brain, train, valid)
    # 5 batches are filled up to 6.
    assert len(brain.train_sampler.batch_sampler) == 5
    assert brain.optimizer_step == 2


@pytest.mark.parametrize("name", [CTC, "CTC/conformer_tiny.yaml", S2S])
def test_gradient_checkpointing_changes_nothing(name, tmp_path):
    weights = []
    for checkpointing in (False, True):
        brain, train, valid, _ = runs.build(
            name,
            tmp_path / str(checkpointing),
            gradient_checkpointing=checkpointing,
            optimizer_step_limit=2,
        )
        calls = []
        first = next(iter(brain.modules.encoder.layers))
        first.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        runs.fit(brain, train, valid)
        weights.append(brain.hparams.model.state_dict())
        weights[-1]["calls"] = torch.tensor(float(len(calls)))
    plain, checkpointed = weights
    # Each of the two training batches is computed twice.
    assert checkpointed.pop("calls") == plain.pop("calls") + 2
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], msg=name)


@pytest.mark.parametrize("sorting", ["ascending", "descending", "random"])
def test_fixed_batches(sorting, tmp_path):
    brain, train, valid, _ = runs.build(
        CTC, tmp_path, dynamic_batching=False, batch_size=5, sorting=sorting, number_of_epochs=2
    )
    orders = []
    whole = brain.fit_batch

    def fit_batch(self, batch):
        orders.append([float(train.data[i]["duration"]) for i in batch.id])
        return whole(batch)

    brain.fit_batch = types.MethodType(fit_batch, brain)
    runs.fit(brain, train, valid)
    assert [len(batch) for batch in orders] == [5, 5, 5, 5, 4] * 2
    first, second = ([d for o in half for d in o] for half in (orders[:5], orders[5:]))
    assert sorted(first) == sorted(second)
    if sorting == "random":
        assert first != second
        assert first not in (sorted(first), sorted(first, reverse=True))
    else:
        assert first == second == sorted(first, reverse=sorting == "descending")


def test_workers_read_the_same_audio(tmp_path):
    logs = []
    for workers in (0, 2):
        runs.train(
            CTC, tmp_path / str(workers), number_of_epochs=1, num_workers=workers, **runs.PLAIN
        )
        logs.append(runs.log_lines(tmp_path / str(workers)))
    assert logs[0] == logs[1]


# ---- Loggers ----


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runs.train(CTC, tmp_path, number_of_epochs=2, use_tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = [t for t in events.Tags()["scalars"] if "loss" in t]
    assert {len(events.Scalars(tag)) for tag in losses} == {2}
    assert len(losses) == 2  # training and validation


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_logger_that_does_not_start_is_told_before_work_starts(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    (tmp_path / "tensorboard").write_text("in the way")
    with pytest.raises(UserError, match=rf"{name} does not start: .*--use_{name} False") as error:
        runs.train(CTC, tmp_path, **{f"use_{name}": True})
    assert ("pip install wandb" in str(error.value)) == (name == "wandb")
    assert not runs.files_of(tmp_path / "save")


def test_wandb_without_network_is_one_run_an_output_folder(tmp_path):
    pytest.importorskip("wandb")
    for epochs in (1, 2):
        command = runs.command(CTC, tmp_path, number_of_epochs=epochs, use_wandb=True)
        assert runs.run(command, WANDB_MODE="offline").returncode == 0
    name = (tmp_path / "wandb_id.txt").read_text()
    records = list(tmp_path.glob(f"wandb/offline-run-*/run-{name}.wandb"))
    assert len(records) == len(list(tmp_path.glob("wandb/offline-run-*"))) == 2
    for path in records:
        written = path.read_bytes()
        assert b"train loss" in written and b"valid WER" in written


def test_a_failing_logger_never_stops_training(tmp_path, monkeypatch):
    calls = []

    def fail(self, *args, **kwargs):
        calls.append(1)
        raise OSError("no route to host")

    monkeypatch.setattr(TensorboardLogger, "log_stats", fail)
    runs.train(CTC, tmp_path, number_of_epochs=2, use_tensorboard=True)
    assert len(runs.log_lines(tmp_path)) == 2
    assert len(calls) == 1
    log = (tmp_path / "log.txt").read_text()
    assert "tensorboard is left out, training goes on: no route to host" in log


def test_a_log_that_cannot_be_written_stops_with_a_message():
    with pytest.raises(UserError, match=r"/dev/full cannot be written: .*No space left"):
        loggers.TrainLoggers("/dev/full", {}).log_stats({"epoch": 1}, train_stats={"loss": 1.0})


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
