"""The decoders: causal, the same token by token as at once, ready for beam search."""

from functools import partial

import pytest
import torch
from torch import nn

from modules.attention import CachedAttention, fused_width
from modules.decoder import (
    Decoder,
    MambaDecoderLayer,
    TransformerDecoderLayer,
    select_hypotheses,
)

torch.set_num_threads(1)  # for tensors this small, threads cost more than they save

LAYERS = {
    "transformer": partial(TransformerDecoderLayer, num_heads=2),
    "mamba": partial(MambaDecoderLayer, d_state=4),
}
every_decoder = pytest.mark.parametrize("name", LAYERS)


def make_decoder(name, dtype=torch.float64):
    torch.manual_seed(0)
    decoder = Decoder(11, 16, 24, 2, LAYERS[name])
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return decoder.to(dtype).eval()


def batch(dtype=torch.float64):
    torch.manual_seed(1)
    memory = torch.randn(3, 13, 16, dtype=dtype), torch.tensor([13, 4, 9])
    return torch.randint(1, 11, (3, 8)), torch.tensor([8, 3, 6]), *memory


@every_decoder
def test_a_token_changes_nothing_before_it(name):
    decoder = make_decoder(name)
    tokens, _, memory, memory_lengths = batch()
    lengths = torch.tensor([8, 8, 8])
    with torch.no_grad():
        before, _ = decoder(tokens, lengths, memory, memory_lengths)
        for u in range(8):
            changed = tokens.clone()
            changed[:, u] = changed[:, u] % 10 + 1
            after, _ = decoder(changed, lengths, memory, memory_lengths)
            difference = (after - before).abs().amax(dim=2)
            assert (difference[:, :u] == 0).all() or difference[:, :u].max() < 1e-12
            assert (difference[:, u] > 1e-3).all()
            assert (difference[:, u:].amax(dim=1) > 1e-3).all()
            if u < 7:
                assert (difference[:, u + 1] > 1e-9).all(), "later tokens do not hear of it"


@every_decoder
def test_every_valid_frame_of_the_memory_is_heard_and_no_other(name):
    decoder = make_decoder(name)
    tokens, lengths, memory, memory_lengths = batch()
    memory.requires_grad_()
    y, _ = decoder(tokens, lengths, memory, memory_lengths)
    # The norm's weights keep its outputs from adding up to a constant.
    (y * torch.randn_like(y)).sum().backward()
    heard = memory.grad.abs().amax(dim=2) > 0
    assert torch.equal(heard, torch.arange(13) < memory_lengths.unsqueeze(1))


@every_decoder
@torch.no_grad()
def test_token_by_token_equals_at_once(name):
    decoder = make_decoder(name)
    tokens, lengths, memory, memory_lengths = batch()
    expected, expected_lengths = decoder(tokens, lengths, memory, memory_lengths)
    assert expected_lengths.tolist() == lengths.tolist()
    state = decoder.start(memory, memory_lengths)
    for u in range(8):
        y, state = decoder.advance(tokens[:, u : u + 1], state)
        for row in (lengths > u).nonzero().flatten():
            torch.testing.assert_close(y[row, 0], expected[row, u], atol=1e-10, rtol=0)
    assert (expected[1, 3:] == 0).all()


@every_decoder
@torch.no_grad()
def test_hypotheses_are_reordered_and_repeated(name):
    decoder = make_decoder(name)
    tokens, _, memory, memory_lengths = batch()
    _, state = decoder.advance(tokens[:, :5], decoder.start(memory, memory_lengths))
    index = torch.tensor([2, 0, 0, 1, 2])
    y, after = decoder.advance(tokens[index, 5:6], select_hypotheses(state, index))

    expected, _ = decoder(
        tokens[index, :6], torch.full((5,), 6), memory[index], memory_lengths[index]
    )
    torch.testing.assert_close(y[:, 0], expected[:, 5], atol=1e-10, rtol=0)
    y, _ = decoder.advance(tokens[index, 6:7], after)
    expected, _ = decoder(
        tokens[index, :7], torch.full((5,), 7), memory[index], memory_lengths[index]
    )
    torch.testing.assert_close(y[:, 0], expected[:, 6], atol=1e-10, rtol=0)


@torch.no_grad()
def test_the_mamba_decoders_state_does_not_grow():
    decoder = make_decoder("mamba")
    tokens, _, memory, memory_lengths = batch()

    def size(state):
        if isinstance(state, torch.Tensor):
            return state.numel()
        return sum(map(size, state)) if isinstance(state, tuple | list) else 0

    state = decoder.start(memory, memory_lengths)
    _, longer = decoder.advance(tokens, state)
    short_memory = decoder.start(memory[:, :2], memory_lengths.clamp(max=2))
    assert size(state) == size(longer) == size(short_memory) > 0


@torch.no_grad()
def test_attention_equals_torchs():
    ours = CachedAttention(16, 4).double()
    theirs = nn.MultiheadAttention(16, 4, batch_first=True, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    x, memory = (
        torch.randn(2, 5, 16, dtype=torch.float64),
        torch.randn(2, 9, 16, dtype=torch.float64),
    )
    padded = torch.arange(9) >= torch.tensor([[9], [4]])
    expected, _ = theirs(x, memory, memory, key_padding_mask=padded)
    y = ours(x, *ours.project_memory(memory), ~padded[:, None, None])
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("is_causal", [False, True])
def test_wider_heads_attend_the_same(is_causal):
    """As on CUDA, where one kernel takes them."""
    torch.manual_seed(0)
    attention = CachedAttention(12, 4).double()
    x, memory = torch.randn(2, 5, 12).double(), torch.randn(2, 9, 12).double()
    mask = (torch.arange(9) < torch.tensor([[9], [4]]))[:, None, None]
    found = []
    for width in (3, 8):
        inputs = x.clone().requires_grad_(), memory.clone().requires_grad_()
        keys, values = attention.project_memory(inputs[0 if is_causal else 1], width)
        assert keys.shape[-1] == values.shape[-1] == width
        options = {"is_causal": True} if is_causal else {"mask": mask}
        y = attention(inputs[0], keys, values, **options)
        learnt = *inputs, *attention.parameters()
        loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum()
        found.append((y, *torch.autograd.grad(loss, learnt, materialize_grads=True)))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


def test_heads_are_filled_up_on_cuda_alone():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [fused_width(n, cuda) for n in (36, 40, 64)] == [40, 40, 64]
    assert fused_width(36, cpu) == 36


def test_wider_heads_decode_the_same(monkeypatch):
    decoder, inputs = make_decoder("transformer"), batch()
    expected, _ = decoder(*inputs)
    monkeypatch.setattr("modules.decoder.fused_width", lambda head_dim, device: head_dim + 3)
    y, _ = decoder(*inputs)
    torch.testing.assert_close(y, expected)


@every_decoder
def test_the_padding_token_learns_nothing(name):
    decoder = make_decoder(name)
    tokens, lengths, memory, memory_lengths = batch()
    tokens[:, 2] = 0
    y, _ = decoder(tokens, lengths, memory, memory_lengths)
    y.square().sum().backward()
    assert (decoder.embedding.weight.grad[0] == 0).all()
    assert (decoder.embedding.weight.grad != 0).any()


@every_decoder
def test_bfloat16_autocast_is_close(name):
    decoder = make_decoder(name, torch.float32)
    tokens, lengths, memory, memory_lengths = batch(torch.float32)
    expected, _ = decoder(tokens, lengths, memory, memory_lengths)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = decoder(tokens, lengths, memory, memory_lengths)
        with torch.no_grad():
            state, results = decoder.start(memory, memory_lengths), []
            for u in range(8):
                step, state = decoder.advance(tokens[:, u : u + 1], state)
                results.append(step)
    y.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in decoder.parameters())
    assert (y.float() - expected).square().mean().sqrt() < 0.02
    for row, length in enumerate(lengths.tolist()):
        whole, pieces = y[row, :length].float(), torch.cat(results, dim=1)[row, :length].float()
        assert (whole - pieces).abs().max() < 0.1


def test_heads_must_divide_the_model():
    with pytest.raises(ValueError, match="d_model=16 is not divisible by num_heads=3"):
        Decoder(11, 16, 24, 1, partial(TransformerDecoderLayer, num_heads=3))


@every_decoder
def test_an_unknown_initialization_is_an_error(name):
    with pytest.raises(ValueError, match="initialization='theirs' is unknown"):
        Decoder(11, 16, 24, 1, LAYERS[name], initialization="theirs")
