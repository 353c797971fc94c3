"""The learning rate of every step."""

import math

import pytest
import torch

from modules.errors import UserError
from modules.optimizers import advance_before_steps
from modules.schedules import CosineScheduler


def rates(schedule, steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    advance_before_steps(schedule, optimizer)
    found = []
    for _ in range(steps):
        optimizer.step()
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_half_a_cosine_after_warm_up():
    found = rates(CosineScheduler(0.4, n_warmup_steps=4, total_steps=12), 14)
    assert found[:4] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    expected = [0.2 * (1 + math.cos(math.pi * n / 8)) for n in range(1, 9)]
    assert found[4:12] == pytest.approx(expected)
    assert found[11:] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("steps, warnings", [(12, 0), (15, 1)])
def test_a_training_that_goes_on_at_rate_0_is_told_so(steps, warnings, caplog):
    rates(CosineScheduler(0.4, n_warmup_steps=4, total_steps=12), steps)
    assert caplog.text.count("has come to 0 at total_steps=12") == warnings


def test_it_goes_on_where_it_was_saved(tmp_path):
    whole = rates(CosineScheduler(0.4, 4, 12), 12)
    first, second = CosineScheduler(0.4, 4, 12), CosineScheduler(0.4, 4, 12)
    begun = rates(first, 7)
    first.save(tmp_path / "schedule.ckpt")
    second.load(tmp_path / "schedule.ckpt")
    assert begun + rates(second, 5) == whole


def test_a_training_that_ends_before_warm_up_is_refused():
    with pytest.raises(UserError, match="total_steps=100 must be more than n_warmup_steps=200"):
        CosineScheduler(1e-3, n_warmup_steps=200, total_steps=100)
