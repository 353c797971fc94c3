"""Both initialisations, and the two things an optimizer must be told about the parameters."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from modules.attention import RelPosAttention
from modules.decoder import Decoder, MambaDecoderLayer
from modules.encoder import Encoder
from modules.frontend import ConvFrontend
from modules.initialization import initialize
from modules.mamba import BiMamba, SelectiveSSM
from modules.optimizers import clip, gradients_of, parameter_groups


@pytest.fixture(scope="module", params=["mamba", "published"])
def scheme(request):
    return request.param


@pytest.fixture(scope="module")
def model(scheme):
    """The published small size, one layer each: d_model 144, so d_inner 288, N 16."""
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "encoder": Encoder(640, 144, 1024, 1, BiMamba, initialization=scheme),
            "decoder": Decoder(5000, 144, 1024, 1, MambaDecoderLayer, initialization=scheme),
        }
    )


def xavier_std(weight):
    fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(weight)
    return (2 / (fan_in + fan_out)) ** 0.5


def state_spaces(model):
    spaces = [m for m in model.modules() if isinstance(m, SelectiveSSM)]
    assert len(spaces) == 4
    return spaces


def test_decay(model, scheme):
    for ssm in state_spaces(model):
        A = -torch.exp(ssm.A_log)
        assert A.shape == (288, 16)
        if scheme == "mamba":
            torch.testing.assert_close(-A, torch.arange(1.0, 17).expand(288, 16))
        else:
            # Xavier over (288, 16) has a deviation of 0.081: exp of four of them either way.
            assert -1.45 < A.min() < -1.2
            assert -0.85 < A.max() < -0.7


def test_skip_and_step_are_mambas_own_in_both(model):
    for ssm in state_spaces(model):
        assert (ssm.D == 1).all()
        dt = F.softplus(ssm.dt_proj.bias)
        assert 0.999e-3 < dt.min() < 1.1e-3
        assert 0.09 < dt.max() < 0.1001
        # Log-uniform: every third of the two decades holds a third of the channels.
        thirds = torch.histc(dt.log10(), bins=3, min=-3, max=-1)
        assert ((thirds / 288 - 1 / 3).abs() < 0.1).all()


def test_step_weight(model, scheme):
    for ssm in state_spaces(model):
        weight = ssm.dt_proj.weight
        assert weight.shape == (288, 9)
        if scheme == "mamba":
            assert weight.abs().max() <= 9**-0.5
            assert weight.std().item() == pytest.approx(9**-0.5 / 3**0.5, rel=0.05)
        else:
            assert weight.std().item() == pytest.approx(xavier_std(weight), rel=0.05)


def test_every_other_weight_is_xavier_normal_in_both(model, scheme):
    tested = 0
    own = ("A_log", "dt_proj.weight", "conv1d.weight") if scheme == "mamba" else ()
    for name, weight in model.named_parameters():
        if weight.dim() < 2 or name.endswith(own):
            continue
        if weight.numel() < 2000:
            continue  # too few values to tell a deviation
        normal = (weight.abs() > 2 * weight.std()).float().mean().item()
        assert weight.std().item() == pytest.approx(xavier_std(weight), rel=0.07), name
        assert normal == pytest.approx(0.0455, abs=0.02), f"{name} is not normal"
        tested += 1
    assert tested >= 20


def test_the_convolution_is_pytorchs_own_under_mambas(model, scheme):
    for ssm in state_spaces(model):
        weight = ssm.conv1d.weight  # (288, 1, 4), so PyTorch's is uniform within 1/2
        if scheme == "mamba":
            assert 0.45 < weight.abs().max() <= 0.5
        else:
            assert weight.std().item() == pytest.approx(xavier_std(weight), rel=0.07)


def test_padding_embeds_to_zero(model):
    assert (model["decoder"].embedding.weight[0] == 0).all()
    assert (model["decoder"].embedding.weight[1:] != 0).any(dim=1).all()


def test_attention_is_xavier_normal_too(scheme):
    torch.manual_seed(0)
    encoder = Encoder(40, 64, 128, 1, partial(RelPosAttention, num_heads=4), initialization=scheme)
    mixer = encoder.layers[0].mixer
    for weight in (mixer.in_proj_weight, mixer.linear_pos.weight, mixer.out_proj.weight):
        assert weight.std().item() == pytest.approx(xavier_std(weight), rel=0.05)
    assert mixer.pos_bias_u.std().item() == pytest.approx(xavier_std(mixer.pos_bias_u), rel=0.3)


def test_an_unknown_scheme_is_an_error():
    with pytest.raises(ValueError, match="initialization='kaiming' is unknown; use one of"):
        initialize(nn.Linear(2, 2), "kaiming")


@pytest.fixture
def recipe():
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "frontend": ConvFrontend(8, channels=(4, 2)),
            "encoder": Encoder(4, 8, 16, 1, partial(RelPosAttention, num_heads=2)),
            "conmamba": Encoder(4, 8, 16, 1, BiMamba),
            "decoder": Decoder(11, 8, 16, 1, MambaDecoderLayer),
            "head": nn.Linear(8, 11),
        }
    )


def test_parameter_groups_say_what_decays(recipe):
    decaying, spared = parameter_groups(recipe, 0.01)
    assert (decaying["weight_decay"], spared["weight_decay"]) == (0.01, 0.0)
    group = {id(p): True for p in decaying["params"]} | {id(p): False for p in spared["params"]}
    for name, parameter in recipe.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        spare = "norm" in name or "bias" in name or leaf in ("A_log", "D")
        assert group[id(parameter)] is not spare, name
    # One with two dimensions of each kind that a look at the shape alone would let decay.
    by_name = dict(recipe.named_parameters())
    for name in (
        "frontend.blocks.convblock_0.convs.norm_0.norm.weight",
        "encoder.layers.0.mixer.pos_bias_u",
        "conmamba.layers.0.mixer.backward_ssm.A_log",
    ):
        assert by_name[name].dim() == 2
        assert not group[id(by_name[name])]


def test_everything_may_decay(recipe):
    groups, all_decay = (list(parameter_groups(recipe, 0.01, e)) for e in (False, True))
    assert [g["weight_decay"] for g in all_decay] == [0.01, 0.01]
    for group, same in zip(groups, all_decay, strict=True):  # an optimizer's state fits both
        assert [id(p) for p in group["params"]] == [id(p) for p in same["params"]]


def test_parameter_groups_hold_every_trainable_parameter_once_in_order(recipe):
    recipe["head"].weight = recipe["decoder"].embedding.weight  # tied
    recipe["frontend"].requires_grad_(False)
    groups = list(parameter_groups(recipe, 0.01))
    held = [id(p) for group in groups for p in group["params"]]
    trainable = [id(p) for p in recipe.parameters() if p.requires_grad]
    assert len(held) == len(set(held)) == len(trainable)
    assert set(held) == set(trainable)
    for group in groups:
        members = {id(p) for p in group["params"]}
        assert [id(p) for p in group["params"]] == [i for i in trainable if i in members]


def test_only_decaying_parameters_shrink_without_gradients(recipe):
    before = {name: p.detach().clone() for name, p in recipe.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(recipe, 0.1), lr=0.1)
    for p in recipe.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in recipe.named_parameters():
        spare = "norm" in name or "bias" in name or name.endswith(("A_log", ".D"))
        torch.testing.assert_close(p, before[name] * (1 if spare else 0.99))


def norm_of(gradients):
    return torch.stack([g.norm() for g in gradients]).norm()


@pytest.mark.parametrize("scale", [100.0, 1e-4])
def test_clipping_sees_all_groups_together(recipe, scale):
    optimizer = torch.optim.SGD(parameter_groups(recipe, 0.0), lr=1.0)
    gradients = [scale * torch.randn_like(p) for p in recipe.parameters()]
    before = [p.detach().clone() for p in recipe.parameters()]
    for p, gradient in zip(recipe.parameters(), gradients, strict=True):
        p.grad = gradient.clone()
    clip(gradients_of(optimizer), norm_of(gradients), max_norm=5.0)
    optimizer.step()

    factor = min(1.0, 5.0 / norm_of(gradients).item())
    assert (factor < 1) == (scale == 100.0)
    for p, old, gradient in zip(recipe.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(old - p, factor * gradient, rtol=1e-3, atol=1e-6)


def test_clipping_is_off_at_zero(recipe):
    gradients = [torch.ones_like(p) for p in recipe.parameters()]
    clip(gradients, norm_of(gradients), max_norm=0.0)
    assert all((g == 1).all() for g in gradients)
