"""Weights that were prepared give what weights give that are cast and stacked in every call."""

from functools import partial

import pytest
import torch
from torch import nn

from modules.encoder import Encoder
from modules.mamba import BiMamba, Mamba
from modules.prepared import Prepared
from modules.two_mambas import TwoMambas
from tests.recipes import runs

LENGTHS = torch.tensor([40, 25])


def make_encoder(mixer=BiMamba, d_model=32):
    torch.manual_seed(0)
    return Encoder(20, d_model, 64, 2, mixer, kernel_size=7, dropout=0.0).eval()


def run(network, x, bf16, before=None):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
        if before is not None:
            before()
        return network(x, LENGTHS)[0]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("mixer", [BiMamba, Mamba, TwoMambas])
def test_an_encoder_computes_the_same(mixer, bf16):
    encoder, x = make_encoder(mixer), torch.randn(2, 40, 20)
    prepared = Prepared(encoder, nn.ModuleList([encoder]))
    expected = run(encoder, x, bf16)
    got = run(prepared, x, bf16, prepared.refresh)
    tolerance = 3e-2 if bf16 else 1e-5
    assert (got - expected).abs().max() <= tolerance
    # Weights that change, as after an epoch, change the result, and what is read stays in place.
    places = [x.data_ptr() for x in prepared.copies] + [x.data_ptr() for x in all_derived(prepared)]
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(1.1)
    fresh = run(prepared, x, bf16, prepared.refresh)
    assert (fresh - run(encoder, x, bf16)).abs().max() <= tolerance
    assert (fresh - got).abs().max() > tolerance
    after = [x.data_ptr() for x in prepared.copies] + [x.data_ptr() for x in all_derived(prepared)]
    assert after == places


def test_steps_of_a_fused_optimizer():
    """Its steps do not count as changes of the weights, in `_version`."""
    encoder, x = make_encoder(), torch.randn(2, 40, 20)
    prepared = Prepared(encoder, nn.ModuleList([encoder]))
    before = run(prepared, x, True, prepared.refresh)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.1, fused=True)
    encoder(x, LENGTHS)[0].square().sum().backward()
    optimizer.step()
    prepared.forget()
    after = run(prepared, x, True, prepared.refresh)
    assert (after - run(encoder, x, True)).abs().max() <= 3e-2
    assert (after - before).abs().max() > 0.1


def losses_of_a_run(folder, prepares):
    """Of training and validation, epoch by epoch; evaluation runs as by graphs, without them."""
    options = {"number_of_epochs": 3, "dropout": 0, "lr_model": 0.01}
    brain, train, valid, _ = runs.build("CTC/conmamba_tiny.yaml", folder, **options)
    if prepares:
        layers = nn.ModuleList([brain.modules.frontend, brain.modules.encoder])
        brain.prepared = prepared = Prepared(brain.layers, layers)
        brain.evaluation_graphs = lambda *x: (prepared.refresh(), prepared(*x))[1]
    losses, end = [], brain.on_stage_end

    def on_stage_end(stage, loss, epoch=None):
        losses.append(loss)
        end(stage, loss, epoch)

    brain.on_stage_end = on_stage_end
    runs.fit(brain, train, valid)
    return losses


def test_every_validation_sees_the_weights_as_they_are(tmp_path, monkeypatch):
    """As without anything prepared, on a CPU by the fused optimizer that a GPU has."""
    monkeypatch.setattr("modules.training.fused", lambda make, *_: partial(make, fused=True))
    expected, got = (losses_of_a_run(tmp_path / str(p), p) for p in (False, True))
    assert len(expected) == 6 and abs(expected[5] - expected[1]) > 0.01
    assert got == pytest.approx(expected, rel=1e-4)


def all_derived(prepared):
    return [x for derived in prepared.derived for x in derived]


def test_nothing_is_prepared_again_for_the_same_weights(monkeypatch):
    encoder, calls = make_encoder(), []
    prepared = Prepared(encoder, nn.ModuleList([encoder]))
    derive = BiMamba.derive
    monkeypatch.setattr(BiMamba, "derive", lambda self: calls.append(self) or derive(self))
    for _ in range(3):
        run(prepared, torch.randn(2, 40, 20), True, prepared.refresh)
    assert len(calls) == len(encoder.layers)


def test_training_does_not_see_it():
    encoder, x = make_encoder(), torch.randn(2, 40, 20)
    prepared = Prepared(encoder, nn.ModuleList([encoder]))
    run(prepared, x, True, prepared.refresh)
    weights = dict(encoder.named_parameters())
    assert all(layer.mixer.derived is None for layer in encoder.layers)
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    encoder(x, LENGTHS)[0].square().sum().backward()
    assert encoder.layers[0].mixer.forward_ssm.A_log.grad.abs().max() > 0
