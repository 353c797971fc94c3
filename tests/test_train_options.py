"""Training by other options: weight decay, other parts, precision, batches, loggers."""

import sys
import types

import pytest
import torch
from speechbrain.utils.train_logger import TensorboardLogger

from modules import loggers
from modules.errors import UserError
from tests.recipes import runs

CTC = "CTC/conmamba_tiny.yaml"
S2S = "S2S/conmambamamba_tiny.yaml"


# ---- Weight decay ----


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
