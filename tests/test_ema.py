"""A moving average of the weights: what it is, and that validation, test and packages have it."""

import torch
from torch import nn

import train_CTC
from modules.checkpoints import Checkpointer
from modules.ema import WeightAverage
from tests.recipes import runs

CTC = "CTC/conmamba_tiny.yaml"


def test_it_is_the_formula_and_changes_places():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    ema, steps = WeightAverage(model, 0.9), []
    ema.show()  # before the first step there is nothing to show
    for _ in range(5):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        ema.update()
        steps.append(model.weight.clone())
    expected = steps[0]
    for weight in steps[1:]:
        expected = 0.9 * expected + 0.1 * weight
    with ema.showing():
        torch.testing.assert_close(model.weight, expected)
        with ema.showing():
            torch.testing.assert_close(model.weight, expected)
        torch.testing.assert_close(model.weight, expected)
    assert torch.equal(model.weight, steps[-1])


def test_without_a_decay_nothing_is_kept():
    model = nn.Linear(3, 2)
    ema = WeightAverage(model, 0)
    before = model.weight.clone()
    with ema.showing():
        assert torch.equal(model.weight, before)
    assert vars(ema).keys() == {"decay", "shown", "weights"}
    assert all(a is b for a, b in zip(ema.weights, model.parameters(), strict=True))


def test_validation_checkpoints_and_test_have_the_average(tmp_path, monkeypatch):
    """The log's validation is of the saved model, and the trained weights go on beside it."""
    options = {"number_of_epochs": 1, "ema_decay": 0.9, "avg_checkpoints": 1}
    options |= {"ckpt_interval_steps": 2, "test_splits": "[test-a]"}
    seen, show = [], WeightAverage.show

    def spy(self, shown=True):
        show(self, shown)
        seen.append((shown, [w.detach().clone() for w in self.weights]))

    monkeypatch.setattr(WeightAverage, "show", spy)
    runs.train(CTC, tmp_path, **options)
    monkeypatch.undo()
    found = Checkpointer(tmp_path / "save").find_checkpoint(max_key="epoch")
    model = torch.load(found.paramfiles["model"], weights_only=True)
    state = torch.load(found.paramfiles["ema"], weights_only=True)
    assert state["shown"] and state["n_averaged"] > 2
    validated = [weights for shown, weights in seen if shown][-1]
    assert all(torch.equal(a, b) for a, b in zip(model.values(), validated, strict=True))
    trained = [state[f"module.{i}"] for i in range(len(validated))]
    assert not any(torch.equal(a, b) for a, b in zip(trained, validated, strict=True))


def test_a_run_goes_on_without_the_average_from_the_weights_that_were_trained(
    tmp_path, monkeypatch
):
    options = {"ema_decay": 0.9, "avg_checkpoints": 1, "test_splits": "[test-a]"}
    runs.train(CTC, tmp_path, number_of_epochs=1, **options)
    found = Checkpointer(tmp_path / "save").find_checkpoint(max_key="epoch")
    state = torch.load(found.paramfiles["ema"], weights_only=True)
    options["ema_decay"] = 0

    # An evaluation is of the average still, whatever the key says now.
    before = (tmp_path / "wer_test-a.txt").read_text()
    runs.train(CTC, tmp_path, number_of_epochs=1, skip_train=True, **options)
    assert (tmp_path / "wer_test-a.txt").read_text() == before

    started, step = [], train_CTC.ASR.fit_batch

    def fit_batch(self, batch):
        started.append([p.detach().clone() for p in self.hparams.model.parameters()])
        return step(self, batch)

    monkeypatch.setattr(train_CTC.ASR, "fit_batch", fit_batch)
    runs.train(CTC, tmp_path, number_of_epochs=2, **options)
    for i, weight in enumerate(started[0]):
        assert torch.equal(weight, state[f"module.{i}"])
    newest = Checkpointer(tmp_path / "save").find_checkpoint(max_key="epoch")
    assert newest.meta["epoch"] == 2 and "ema" not in newest.paramfiles

    # And with one again: it begins with the weights as they are.
    started.clear()
    model = list(torch.load(newest.paramfiles["model"], weights_only=True).values())
    options["ema_decay"] = 0.9
    runs.train(CTC, tmp_path, number_of_epochs=3, **options)
    assert all(torch.equal(a, b) for a, b in zip(started[0], model, strict=True))
