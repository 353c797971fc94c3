"""Device memory that runs out: the batch in halves with the same gradient, then a key to lower."""

import logging
import weakref

import pytest
import torch

import train_CTC
from inference import Recognizer
from modules.errors import UserError
from modules.memory import halves, out_of_memory
from tests.recipes import runs
from tests.recipes.packages import trained
from tests.test_numbers import same, state

CTC = "CTC/conmamba_tiny.yaml"
S2S = "S2S/conmambamamba_tiny.yaml"
# Features are measured and masked for the whole batch; dropout alone would draw anew.
OPTIONS = {"number_of_epochs": 1, "dropout": 0, "grad_accumulation_factor": 2}


def run_out_above(monkeypatch, brain_class, utterances, where, stages=("TRAIN",)):
    """Let memory run out in the forward or the backward pass of larger batches."""
    whole, seen, armed = brain_class.compute_objectives, [], []

    def fail(*_):
        if armed and armed[-1]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    def compute_objectives(self, predictions, batch, stage):
        if where == "backward" and not seen:
            # Late in the pass: most gradients are there already.
            self.modules.frontend.register_full_backward_hook(fail)
        seen.append((stage.name, len(batch)))
        armed.append(len(batch) > utterances and stage.name in stages)
        if where == "forward":
            fail()
        return whole(self, predictions, batch, stage)

    monkeypatch.setattr(brain_class, "compute_objectives", compute_objectives)
    return seen


def first_gradients(name, folder, **options):
    """Gradients of the first two steps, and the state after the whole epoch."""
    brain, train, valid, _ = runs.build(name, folder, **OPTIONS, **options)
    gradients, whole = [], brain.optimizers_step

    def step():
        gradients.append({n: p.grad.clone() for n, p in brain.modules.named_parameters()})
        whole()

    brain.optimizers_step = step
    runs.fit(brain, train, valid)
    return gradients, brain


VIEWS = {
    "views": 2,
    "consistency_weight": 0.2,
    "num_encoder_layers": 2,
    "inter_ctc_layers": "[1]",
}


@pytest.mark.parametrize(
    ("name", "where", "options"),
    [(CTC, "backward", {}), (S2S, "forward", {}), (S2S, "forward", VIEWS)],
)
def test_halves_have_the_gradient_of_the_whole(name, where, options, tmp_path, monkeypatch, caplog):
    brain_class = runs.SCRIPTS[runs.recipe_of(name)].ASR
    whole, brain = first_gradients(name, tmp_path / "whole", **options)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        seen = run_out_above(patch, brain_class, 2, where)
        halved, other = first_gradients(name, tmp_path / "halves", **options)
    for names, of_halves in zip(whole[:2], halved[:2], strict=True):
        norm = torch.stack([g.norm() for g in names.values()]).norm()
        for n, gradient in names.items():
            assert (of_halves[n] - gradient).norm() < 1e-5 * norm, n
    assert max(size for stage, size in seen if stage == "TRAIN") > 2
    assert "memory ran out on cpu in a batch of 5 utterances of up to" in caplog.text
    assert "lower --max_batch_length_train (now 12)" in caplog.text
    # Each batch once, whatever was tried.
    logs = runs.log_lines(tmp_path / "whole"), runs.log_lines(tmp_path / "halves")
    assert logs[1][0]["train loss"] == pytest.approx(logs[0][0]["train loss"], rel=1e-3)
    assert other.optimizer_step == brain.optimizer_step
    assert same(state(other)["schedule"], state(brain)["schedule"])


def test_a_single_utterance_too_large_stops_the_run(tmp_path, monkeypatch):
    seen = run_out_above(monkeypatch, train_CTC.ASR, 0, "forward")
    with pytest.raises(UserError, match=r"in a batch of 1 utterances .* --max_seconds below that"):
        runs.train(CTC, tmp_path, **OPTIONS)
    assert [size for _, size in seen] == [5, 3, 2, 1]


def test_cuda_graphs_and_several_processes_do_not_retry(tmp_path, monkeypatch):
    run_out_above(monkeypatch, train_CTC.ASR, 1, "forward")
    brain, train, valid, _ = runs.build(CTC, tmp_path, dynamic_batching=False, batch_size=6)
    brain.graphs = lambda *inputs: brain.network(*inputs)
    with pytest.raises(UserError, match=r"lower --batch_size \(now 6\) and raise"):
        runs.fit(brain, train, valid)


def test_validation_and_test_name_their_own_keys(tmp_path, monkeypatch):
    run_out_above(monkeypatch, train_CTC.ASR, 5, "forward", ("VALID", "TEST"))
    options = {"number_of_epochs": 1}
    with pytest.raises(UserError, match="lower --max_batch_length_val"):
        runs.train(CTC, tmp_path, dev_splits="[train]", max_batch_length_val=30, **options)
    runs.train(CTC, tmp_path, **options)
    with pytest.raises(UserError, match="lower --test_batch_size or --test_beam_size"):
        runs.train(CTC, tmp_path, skip_train=True, test_splits="[train]")


def test_a_recognizer_keeps_nothing_of_what_did_not_fit(monkeypatch):
    """So that fewer recordings do fit, while the caller still holds the error."""
    recognizer, kept = Recognizer.from_folder(trained("s2s")[1], "cpu"), []
    release = recognizer.search.release

    def fail(x, lengths):
        kept.append(weakref.ref(x))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(recognizer.search, "release", lambda: kept.append("released") or release())
    monkeypatch.setattr(recognizer, "_search", fail)
    with pytest.raises(UserError, match=r"2 pieces of up to 1\.0 s do not fit into"):
        try:
            recognizer.words([torch.zeros(16000), torch.zeros(8000)])
        except UserError:
            assert kept[0]() is None and kept[1:] == ["released"]
            raise


def test_other_errors_are_not_memory():
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"))
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60)
    assert out_of_memory(error.value)
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_halves_are_the_batch(tmp_path):
    brain, train, *_ = runs.build(CTC, tmp_path)
    batch = next(iter(brain.make_dataloader(train, None, batch_size=5, ckpt_prefix=None)))
    parts = halves(batch)
    assert [len(p) for p in parts] == [3, 2]
    assert [*parts[0].id, *parts[1].id] == batch.id
    for part in parts:
        for i, name in enumerate(part.id):
            ours, whole = ((b.sig, b.id.index(name)) for b in (part, batch))
            lengths = [round(float(s.lengths[j]) * s.data.shape[1]) for s, j in (ours, whole)]
            assert lengths[0] == lengths[1]
            assert torch.equal(
                part.sig.data[i, : lengths[0]], whole[0].data[whole[1], : lengths[0]]
            )
        assert part.sig.lengths.max() == 1
