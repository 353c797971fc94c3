"""Published weights give the published outputs, one by one and as one padded batch."""

import os
from pathlib import Path

import pytest
import torch

from modules.errors import UserError
from modules.upstream import from_upstream

FOLDER = Path(
    os.environ.get("MAMBA_ASR_PARITY", Path(__file__).parents[1] / ".." / "shared" / "parity")
)
FIXTURES = [
    "conmamba_ctc",
    "conmamba_causal_ctc",
    "conmamba_transformer",
    "conmamba_mamba",
    "conformer_transformer",
]


@pytest.fixture(params=FIXTURES)
def fixture(request):
    path = FOLDER / f"{request.param}.pt"
    if not path.exists():
        pytest.skip(f"{path} is absent; set MAMBA_ASR_PARITY to the fixtures' folder")
    return torch.load(path, weights_only=True)


def as_batch(utterances, key, filler):
    items = [u[key] for u in utterances]
    lengths = torch.tensor([len(item) for item in items])
    batch = torch.full((len(items), int(lengths.max()), *items[0].shape[1:]), filler)
    for row, item in zip(batch, items, strict=True):
        row[: len(item)] = item
    return batch, lengths


def check(model, utterances, src, lengths):
    with torch.no_grad():
        enc, enc_lengths = model.encode(src, lengths)
        assert enc_lengths.tolist() == lengths.tolist()
        for row, u in zip(enc, utterances, strict=True):
            torch.testing.assert_close(row[: len(u["src"])], u["enc_out"], atol=1e-4, rtol=0)
        if utterances[0].get("tgt") is None:
            return
        tgt, _ = as_batch(utterances, "tgt", 0)
        dec = model.decode(tgt, enc, lengths)
        for row, u in zip(dec, utterances, strict=True):
            torch.testing.assert_close(row[: len(u["tgt"])], u["dec_out"], atol=1e-4, rtol=0)


def test_one_by_one(fixture):
    model = from_upstream(fixture["config"], fixture["state_dict"])
    for u in fixture["utterances"]:
        check(model, [u], u["src"].unsqueeze(0), torch.tensor([len(u["src"])]))


def test_padded_batch_with_nan_in_the_padding(fixture):
    model = from_upstream(fixture["config"], fixture["state_dict"])
    src, lengths = as_batch(fixture["utterances"], "src", float("nan"))
    check(model, fixture["utterances"], src, lengths)


def test_every_missing_weight_is_an_error(fixture):
    used = [k for k in fixture["state_dict"] if "positional_encoding" not in k]
    for key in used[:: max(1, len(used) // 12)]:
        state = {k: v for k, v in fixture["state_dict"].items() if k != key}
        with pytest.raises(UserError, match="missing weight"):
            from_upstream(fixture["config"], state)


def test_wrong_names_shapes_and_values_are_errors(fixture):
    config, state = fixture["config"], fixture["state_dict"]
    with pytest.raises(UserError, match=r"unexpected weight 'encoder\.layers\.0\.surprise'"):
        from_upstream(config, {**state, "encoder.layers.0.surprise": torch.ones(1)})
    with pytest.raises(UserError, match="unexpected weight"):
        from_upstream({**config, "num_encoder_layers": 1}, state)
    with pytest.raises(UserError, match=r"has shape \(3,\)"):
        from_upstream(config, {**state, "encoder.norm.norm.weight": torch.ones(3)})
    with pytest.raises(UserError, match="lacks d_ffn"):
        from_upstream({k: v for k, v in config.items() if k != "d_ffn"}, state)
    with pytest.raises(UserError, match="encoder_module='lstm'"):
        from_upstream({**config, "encoder_module": "lstm"}, state)
