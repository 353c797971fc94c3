"""The encoder: its mixers against SpeechBrain's, memory saved, precision, errors."""

from functools import partial

import pytest
import torch
from speechbrain.nnet.attention import RelPosEncXL, RelPosMHAXL, RoPEMHA
from speechbrain.utils.dynamic_chunk_training import (
    DynChunkTrainConfig,
    DynChunkTrainConfigRandomSampler,
)
from torch import nn

from modules.attention import CachedAttention, RelPosAttention, RoPEAttention
from modules.encoder import Encoder
from modules.encoder_layer import ConvModule
from modules.mamba import BiMamba, Mamba
from modules.mamba2 import BiMamba2, Mamba2
from modules.two_mambas import TwoMambas

torch.set_num_threads(1)  # for tensors this small, threads cost more than they save

MIXERS = {
    "relative": partial(RelPosAttention, num_heads=2),
    "rotary": partial(RoPEAttention, num_heads=2),
    "bimamba": partial(BiMamba, d_state=4),
    "mamba": partial(Mamba, d_state=4),
    "two": partial(TwoMambas, d_state=4),
    "bimamba2": partial(BiMamba2, d_state=4, d_head=8),
    "mamba2": partial(Mamba2, d_state=4, d_head=8),
}


def make_encoder(mixer, **options):
    torch.manual_seed(0)
    return Encoder(10, 16, 24, 2, MIXERS[mixer], kernel_size=7, **options)


def batch(dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(3, 20, 10, dtype=dtype), torch.tensor([20, 7, 12])


@pytest.mark.parametrize("frames", [1, 2, 17])
def test_relative_attention_equals_speechbrain(frames):
    torch.manual_seed(0)
    ours, theirs = RelPosAttention(24, 4).eval(), RelPosMHAXL(24, 4).eval()
    weights = ours.state_dict()
    for name in ("pos_bias_u", "pos_bias_v"):
        weights[name] = weights[name].reshape(theirs.state_dict()[name].shape)
    theirs.load_state_dict(weights)
    x, lengths = torch.randn(3, frames, 24), torch.tensor([frames, max(frames // 2, 1), 1])
    padded = torch.arange(frames) >= lengths.unsqueeze(1)
    expected, _ = theirs(x, x, x, RelPosEncXL(24)(x), key_padding_mask=padded)
    y, _ = ours(x, lengths)
    torch.testing.assert_close(y, expected, atol=1e-6, rtol=1e-5)


def test_rotary_attention_is_speechbrains():
    torch.manual_seed(0)
    ours, theirs = RoPEAttention(24, 4).eval(), RoPEMHA(24, 4).eval()
    theirs.load_state_dict(ours.attention.state_dict())
    x = torch.randn(2, 9, 24)
    y, _ = ours(x, torch.tensor([9, 9]))
    assert torch.equal(y, theirs(x, x, x, return_attn_weights=False))


def test_rotary_tables_made_in_inference_mode_can_be_trained_with():
    mixer = RoPEAttention(20, 2)  # a head size of its own: SpeechBrain keeps tables by head size
    lengths = torch.tensor([5])
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            with torch.inference_mode():
                mixer(torch.randn(1, 5, 20), lengths)
            mixer(torch.randn(1, 5, 20), lengths)[0].sum().backward()


@pytest.mark.parametrize("mixer", ["relative", "rotary"])
def test_attention_knows_the_order_of_frames(mixer):
    attention = MIXERS[mixer](16).eval()
    x, lengths = torch.randn(1, 9, 16), torch.tensor([9])
    y, _ = attention(x, lengths)
    # Not merely reversed: relative attention goes by the distance, whichever side it lies on.
    order = torch.tensor([4, 0, 7, 2, 8, 5, 1, 3, 6])
    shuffled, _ = attention(x[:, order], lengths)
    assert (shuffled - y[:, order]).abs().max() > 1e-3


@pytest.mark.parametrize("mixer_name", ["bimamba", "two", "bimamba2"])
def test_bimamba_mirrors_itself(mixer_name):
    mixer = MIXERS[mixer_name](16).double()
    x, lengths = torch.randn(1, 9, 16, dtype=torch.float64), torch.tensor([9])
    y, _ = mixer(x, lengths)
    mixer.forward_ssm.load_state_dict(mixer.backward_ssm.state_dict())
    if isinstance(mixer, TwoMambas):
        for name in ("in_proj", "out_proj"):
            own = mixer.get_submodule(f"backward_{name}").state_dict()
            mixer.get_submodule(name).load_state_dict(own)
    if isinstance(mixer, BiMamba2):  # what each direction takes besides x
        *_, forward, backward = mixer.in_proj.weight.data.split(mixer.split)
        forward.copy_(backward)
    same, _ = mixer(x, lengths)
    mirrored, _ = mixer(x.flip(1), lengths)
    torch.testing.assert_close(mirrored.flip(1), same)
    assert (same - y).abs().max() > 1e-6  # each direction has weights of its own


def test_two_mambas_are_the_mean_of_both():
    mixer, forward = MIXERS["two"](16), Mamba(16, d_state=4)
    backward = Mamba(16, d_state=4)
    for mamba, of in ((forward, ""), (backward, "backward_")):
        mamba.ssm.load_state_dict(mixer.get_submodule(f"{of or 'forward_'}ssm").state_dict())
        for name in ("in_proj", "out_proj"):
            mamba.get_submodule(name).load_state_dict(mixer.get_submodule(of + name).state_dict())
    x, lengths = torch.randn(1, 9, 16), torch.tensor([9])
    mean = 0.5 * (forward(x, lengths)[0] + backward(x.flip(1), lengths)[0].flip(1))
    torch.testing.assert_close(mixer(x, lengths)[0], mean)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_non_causal_encoder_sees_both_ways_and_a_causal_one_the_past(mixer):
    for causal in {False, mixer in ("mamba", "mamba2")}:
        encoder = make_encoder(mixer, causal=causal).eval()
        x, _ = batch()
        changed = x.clone()
        changed[:, 10] += 1
        with torch.no_grad():
            before, after = (encoder(v, torch.tensor([20] * 3))[0] for v in (x, changed))
        moved = (before - after).abs().amax(dim=(0, 2)) > 1e-7
        assert moved[10:].all()
        assert moved[:10].any() != causal


@pytest.mark.parametrize("mixer", MIXERS)
def test_gradient_checkpointing_changes_nothing_but_memory(mixer):
    results = []
    for checkpointing in (False, True):
        encoder = make_encoder(mixer, dropout=0.3, gradient_checkpointing=checkpointing).train()
        x, lengths = batch()
        x.requires_grad_()
        torch.manual_seed(2)
        y, _ = encoder(x, lengths)
        saved = count_saved(encoder, x, lengths)
        y.square().sum().backward()
        gradients = {name: p.grad for name, p in encoder.named_parameters()}
        results.append((y.detach(), x.grad, gradients, saved))
    (y, dx, gradients, saved), (y_c, dx_c, gradients_c, saved_c) = results
    assert torch.equal(y, y_c)
    torch.testing.assert_close(dx, dx_c, atol=0, rtol=1e-6)
    torch.testing.assert_close(gradients, gradients_c, atol=1e-7, rtol=1e-5)
    assert saved_c < 0.2 * saved


def count_saved(encoder, x, lengths):
    """How many numbers a forward pass keeps for its backward pass, parameters aside."""
    sizes = {}
    own = {p.data_ptr() for p in encoder.parameters()}

    def pack(t):
        if t.data_ptr() not in own:
            sizes[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y, _ = encoder(x, lengths)
    del y
    return sum(sizes.values())


def test_gradient_checkpointing_hands_the_state_on():
    results = []
    for checkpointing in (False, True):
        encoder = make_encoder(
            "mamba", causal=True, dropout=0.0, gradient_checkpointing=checkpointing
        )
        x, lengths = batch()
        state = encoder.initial_state(3)
        _, _, state = encoder(x[:, :11], lengths.clamp(max=11), state)
        y, _, state = encoder(x[:, 11:], (lengths - 11).clamp(min=0), state)
        y.sum().backward()
        results.append((y, state, [p.grad for p in encoder.parameters()]))
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("mixer", MIXERS)
def test_bfloat16_autocast_is_close(mixer):
    encoder = make_encoder(mixer, dropout=0.0)
    x, lengths = batch()
    expected, _ = encoder(x, lengths)
    expected.square().mean().backward()
    exact = {name: p.grad.clone() for name, p in encoder.named_parameters()}
    encoder.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = encoder(x, lengths)
    y.float().square().mean().backward()
    assert (y.float() - expected).abs().max() < 0.15
    assert (y.float() - expected).square().mean().sqrt() < 0.02
    for name, p in encoder.named_parameters():
        assert p.grad.dtype == torch.float32
        assert torch.isfinite(p.grad).all(), name
        assert (p.grad - exact[name]).norm() < 0.15 * exact[name].norm() + 1e-3, name


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
def test_bfloat16_autocast_in_pieces_is_close(mixer):
    encoder = make_encoder(mixer, causal=True, dropout=0.0).eval()
    x, lengths = batch()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected, _ = encoder(x, lengths)
        state, results = encoder.initial_state(3), []
        for first in range(0, 20, 4):
            y, _, state = encoder(x[:, first : first + 4], (lengths - first).clamp(0, 4), state)
            results.append(y)
    torch.testing.assert_close(torch.cat(results, dim=1), expected, atol=0.1, rtol=0)


@pytest.mark.parametrize("mixer", MIXERS)
def test_dropout_acts_in_training_alone(mixer):
    encoder = make_encoder(mixer, dropout=0.5)
    x, lengths = batch()
    assert not torch.equal(encoder(x, lengths)[0], encoder(x, lengths)[0])
    encoder.eval()
    assert torch.equal(encoder(x, lengths)[0], encoder(x, lengths)[0])


@pytest.mark.parametrize("mixer", ["relative", "rotary", "bimamba", "bimamba2"])
def test_a_causal_encoder_needs_a_causal_mixer(mixer):
    with pytest.raises(ValueError, match=r"causal=True needs a causal mixer, not \w+; use"):
        make_encoder(mixer, causal=True)


def test_only_a_causal_or_chunked_encoder_runs_in_pieces():
    for mixer in ("mamba", "bimamba"):
        with pytest.raises(ValueError, match="build it with causal or chunks"):
            make_encoder(mixer).start(1)
    with pytest.raises(ValueError, match="chunk_size=0 needs whole utterances"):
        make_encoder("bimamba", chunks=chunks(0)).eval().start(1)


def chunks(size, smallest=3, largest=6, share=0.6):
    """A draw for the training, and the size in evaluation."""
    test = DynChunkTrainConfig(size)
    return DynChunkTrainConfigRandomSampler(share, smallest, largest, 0.0, 0, 0, test_config=test)


def test_chunks_are_drawn_in_training_alone():
    encoder = make_encoder("bimamba", dropout=0.0, chunks=chunks(4), lookahead=1)
    x, lengths = batch()
    with torch.no_grad():
        possible = {size: encoder(x, lengths, chunk_size=size)[0] for size in (3, 4, 5, 6, 20)}
        drawn = [encoder(x, lengths)[0] for _ in range(40)]
        evaluated = encoder.eval()(x, lengths)[0]
        whole = make_encoder("bimamba", dropout=0.0, chunks=chunks(0)).eval()(x, lengths)[0]
    assert torch.equal(evaluated, possible[4])
    torch.testing.assert_close(whole, possible[20])
    found = [[k for k, y in possible.items() if torch.allclose(d, y, atol=1e-6)] for d in drawn]
    assert all(len(keys) == 1 for keys in found)
    counts = {size: found.count([size]) for size in possible}
    assert all(counts.values()) and 8 <= counts[20] <= 24  # 40 x 0.4 saw everything


def test_gradient_checkpointing_repeats_the_chunks_that_were_drawn():
    results = []
    for checkpointing in (False, True):
        options = {"chunks": chunks(4), "gradient_checkpointing": checkpointing}
        encoder = make_encoder("bimamba", dropout=0.0, **options)
        x, lengths = batch()
        torch.manual_seed(3)
        for _ in range(2):
            encoder(x, lengths)[0].square().sum().backward()
        results.append({name: p.grad for name, p in encoder.named_parameters()})
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("message", "mixer", "options"),
    [
        ("chunks need the mixer modules.mamba.BiMamba, not Mamba", "mamba", {"chunks": chunks(4)}),
        ("not RelPosAttention", "relative", {"chunks": chunks(4)}),
        ("chunk_size=-1 must be at least 1 frame, or 0", "bimamba", {"chunks": chunks(-1)}),
        ("chunk_size_min=0 must be at least 1", "bimamba", {"chunks": chunks(4, 0)}),
        ("at most chunk_size_max=2", "bimamba", {"chunks": chunks(4, 3, 2)}),
        ("lookahead=-1 must be", "bimamba", {"chunks": chunks(4), "lookahead": -1}),
        ("lookahead=2 goes with chunks", "bimamba", {"lookahead": 2}),
    ],
)
def test_chunks_that_mean_nothing_are_errors(message, mixer, options):
    with pytest.raises(ValueError, match=message):
        make_encoder(mixer, **options)


@pytest.mark.parametrize("mixer", MIXERS)
def test_padding_leaks_only_where_it_is_asked_to(mixer):
    """Of an utterance alone, and with more padding than it has."""
    x, lengths = batch()
    x = x[1:2]
    for masked in (True, False):
        encoder = make_encoder(mixer, dropout=0.0, mask_padding=masked).eval()
        alone, _ = encoder(x[:, :7], lengths[1:2])
        padded, kept = encoder(x, lengths[1:2])
        assert kept.tolist() == [7] and not padded[:, 7:].any()
        leaks = not masked and mixer != "mamba2" and mixer != "mamba"
        # The convolutions see the padding after the last frames, whatever the mixer.
        assert torch.allclose(alone[:, -1], padded[:, 6], atol=1e-5) == masked
        assert torch.allclose(alone[:, 0], padded[:, 0], atol=1e-6) != leaks


@pytest.mark.parametrize(
    "options", [{"mixer": "mamba", "causal": True}, {"mixer": "bimamba", "chunks": chunks(4)}]
)
def test_padding_leaks_into_whole_utterances_alone(options):
    with pytest.raises(ValueError, match="mask_padding=False is for encoders of whole utterances"):
        make_encoder(**options, mask_padding=False)


def test_heads_must_divide_the_inner_channels():
    for mixer in (Mamba2, BiMamba2):
        message = (
            r"expand x d_model = 12 is not divisible by d_head=5; use one of \[1, 2, 3, 4, 6, "
        )
        with pytest.raises(ValueError, match=message):
            mixer(6, d_head=5)


@pytest.mark.parametrize("attention", [RelPosAttention, RoPEAttention, CachedAttention])
def test_heads_must_divide_the_model(attention):
    message = r"d_model=144 is not divisible by num_heads=5; use one of \[1, 2, 3, 4, 6, 8, 9\]"
    with pytest.raises(ValueError, match=message):
        attention(144, 5)


def test_rotary_heads_must_be_even():
    with pytest.raises(ValueError, match="make d_model a multiple of 4"):
        RoPEAttention(18, 2)


def test_an_even_kernel_is_an_error():
    with pytest.raises(ValueError, match="kernel_size=30 must be odd; use 31"):
        ConvModule(8, 30, nn.GELU, 0.1, causal=False)


def test_an_unknown_initialization_is_an_error():
    with pytest.raises(ValueError, match="initialization='xavier' is unknown"):
        make_encoder("mamba", initialization="xavier")
