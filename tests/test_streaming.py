"""In pieces of any size the result and the final state are those of the whole."""

import random
from functools import partial

import pytest
import torch
from speechbrain.utils.dynamic_chunk_training import (
    DynChunkTrainConfig,
    DynChunkTrainConfigRandomSampler,
)
from torch.utils._pytree import tree_leaves

from modules.attention import sine_encoding
from modules.decoder import Decoder, MambaDecoderLayer, TransformerDecoderLayer
from modules.encoder import Encoder
from modules.features import Features
from modules.frontend import ConvFrontend
from modules.mamba import BiMamba, Chunk, Mamba
from modules.mamba2 import BiMamba2, Mamba2
from modules.two_mambas import TwoMambas

torch.set_num_threads(1)  # for tensors this small, threads cost more than they save

TOLERANCES = {
    torch.float32: {"atol": 1e-5, "rtol": 1e-5},
    torch.float64: {"atol": 1e-10, "rtol": 0},
}
FRAMES = 41
# The second ends inside a piece, the third at the edge of several, the last never begins.
LENGTHS = torch.tensor([41, 17, 21, 1, 0])
MIXERS = [
    BiMamba,
    TwoMambas,
    partial(BiMamba2, d_head=4),
]
LAYERS = {
    "transformer": partial(TransformerDecoderLayer, num_heads=2),
    "mamba": partial(MambaDecoderLayer, d_state=4),
}


def cuts(size):
    """Sizes of the pieces of FRAMES frames; "random" ones may be empty."""
    if size == "random":
        draw = random.Random(0)
        points = sorted(draw.choices(range(FRAMES + 1), k=9))
        return [b - a for a, b in zip([0, *points], [*points, FRAMES], strict=True)]
    if size == "empty pieces":
        return [0, 5, 0, 0, FRAMES - 5, 0]
    return [size] * (FRAMES // size) + [FRAMES % size]


def pieces(x, size):
    """Cut (B, T, ...) into (piece, how much of it each utterance fills)."""
    first = 0
    for frames in cuts(size):
        yield x[:, first : first + frames], (LENGTHS - first).clamp(0, frames)
        first += frames
    assert first == FRAMES


SIZES = [1, 3, 7, 21, "random", "empty pieces"]
every_size = pytest.mark.parametrize("size", SIZES)
every_precision = pytest.mark.parametrize("dtype", TOLERANCES)


def prepare(model, dtype):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()


@every_precision
@every_size
@pytest.mark.parametrize("make", [Mamba, partial(Mamba2, d_head=4)], ids=["mamba", "mamba2"])
@torch.no_grad()
def test_mamba(make, size, dtype):
    mixer = prepare(make(8, d_state=4), dtype)
    x = torch.randn(5, FRAMES, 8, dtype=dtype)
    expected, expected_state = mixer(x, LENGTHS, mixer.initial_state(5))
    stateless, none = mixer(x, LENGTHS)
    assert none is None
    torch.testing.assert_close(expected, stateless, **TOLERANCES[dtype])

    state, results = mixer.initial_state(5), []
    for piece, lengths in pieces(x, size):
        y, state = mixer(piece, lengths, state)
        results.append(y)
    torch.testing.assert_close(torch.cat(results, dim=1), expected, **TOLERANCES[dtype])
    torch.testing.assert_close(state, expected_state, **TOLERANCES[dtype])


def leaves(state):
    return [part for part in tree_leaves(state) if isinstance(part, torch.Tensor)]


def run_mamba(x, lengths):
    mixer = prepare(Mamba(8, d_state=4), torch.float64)
    return mixer(x, lengths, mixer.initial_state(len(x)))[-1]


def run_mamba2(x, lengths):
    mixer = prepare(Mamba2(8, d_state=4, d_head=4), torch.float64)
    return mixer(x, lengths, mixer.initial_state(len(x)))[-1]


def run_causal_encoder(x, lengths):
    encoder = Encoder(8, 8, 12, 2, partial(Mamba, d_state=4), kernel_size=5, causal=True)
    encoder = prepare(encoder, torch.float64)
    return encoder(x, lengths, encoder.initial_state(len(x)))[-1]


def run_mamba_decoder(x, lengths):
    """The frames are the memory, so both that and the tokens have lengths."""
    decoder = prepare(Decoder(11, 8, 12, 2, LAYERS["mamba"]), torch.float64)
    tokens = torch.arange(x.shape[1]).expand(len(x), -1) % 10 + 1
    return decoder.advance(tokens, decoder.start(x, lengths), lengths)[-1][1]


@pytest.mark.parametrize("run", [run_mamba, run_mamba2, run_causal_encoder, run_mamba_decoder])
@torch.no_grad()
def test_the_state_of_an_utterance_is_that_after_its_own_end(run):
    torch.manual_seed(1)
    x = torch.randn(5, FRAMES, 8, dtype=torch.float64)
    states = []
    for i, length in [*enumerate(LENGTHS.tolist())][:4]:
        torch.manual_seed(0)
        states.append(leaves(run(x[i : i + 1, :length], LENGTHS[i : i + 1])))
    torch.manual_seed(0)
    for ours, *alone in zip(leaves(run(x, LENGTHS)), *states, strict=True):
        torch.testing.assert_close(ours[:4], torch.cat(alone), **TOLERANCES[torch.float64])


@every_precision
@every_size
@torch.no_grad()
def test_causal_encoder(size, dtype):
    encoder = Encoder(6, 8, 12, 2, partial(Mamba, d_state=4), kernel_size=5, causal=True)
    encoder = prepare(encoder, dtype)
    x = torch.randn(5, FRAMES, 6, dtype=dtype)
    expected, _, expected_state = encoder(x, LENGTHS, encoder.initial_state(5))
    torch.testing.assert_close(expected, encoder(x, LENGTHS)[0], **TOLERANCES[dtype])

    state, results = encoder.initial_state(5), []
    for piece, lengths in pieces(x, size):
        y, piece_lengths, state = encoder(piece, lengths, state)
        assert piece_lengths.tolist() == lengths.tolist()
        results.append(y)
    torch.testing.assert_close(torch.cat(results, dim=1), expected, **TOLERANCES[dtype])
    torch.testing.assert_close(state, expected_state, **TOLERANCES[dtype])


@every_precision
@pytest.mark.parametrize("chunk", [Chunk(3, 0), Chunk(7, 3), Chunk(5, 9), Chunk(60, 2)])
@pytest.mark.parametrize("make", MIXERS)
@torch.no_grad()
def test_chunked_bimamba(make, chunk, dtype):
    mixer = prepare(make(8, d_state=4), dtype)
    x = torch.randn(5, FRAMES, 8, dtype=dtype)
    expected, none = mixer(x, LENGTHS, chunk=chunk)
    assert none is None
    if chunk.size >= FRAMES:
        torch.testing.assert_close(expected, mixer(x, LENGTHS)[0], **TOLERANCES[dtype])

    state, results = mixer.initial_state(5), []
    for first in range(0, FRAMES, chunk.size):
        window = x[:, first : first + chunk.size + chunk.lookahead]
        lengths = (LENGTHS - first).clamp(0, window.shape[1])
        size = min(chunk.size, window.shape[1])
        ahead = window.shape[1] - size
        y, state = mixer(window, lengths, state, Chunk(chunk.size, chunk.lookahead, ahead))
        assert y.shape[1] == size
        results.append(y)
    torch.testing.assert_close(torch.cat(results, dim=1), expected, **TOLERANCES[dtype])
    _, forward_state = mixer(x, LENGTHS, mixer.initial_state(5), Chunk(FRAMES, 0))
    torch.testing.assert_close(state, forward_state, **TOLERANCES[dtype])


def chunked_encoder(dtype, chunk_size, lookahead=3):
    chunks = DynChunkTrainConfigRandomSampler(
        0.6, 2, 9, 0.0, 0, 0, test_config=DynChunkTrainConfig(chunk_size)
    )
    mixer = partial(BiMamba, d_state=4)
    options = {"kernel_size": 5, "chunks": chunks, "lookahead": lookahead}
    return prepare(Encoder(6, 8, 12, 2, mixer, **options), dtype)


@pytest.mark.parametrize(
    ("chunk_size", "size"), [(1, 7), *((7, size) for size in SIZES), (60, 1), (60, "random")]
)
@torch.no_grad()
def test_chunked_encoder(chunk_size, size):
    dtype = torch.float64 if size == 1 else torch.float32
    encoder = chunked_encoder(dtype, chunk_size)
    x = torch.randn(2, FRAMES, 6, dtype=dtype)
    expected, _ = encoder(x, torch.tensor([FRAMES, FRAMES]))

    state, results, came = encoder.start(2), [], 0
    for frames in cuts(size):
        y, state = encoder.advance(x[:, came : came + frames], state)
        results.append(y)
        came += frames
        # A chunk is there once its look-ahead is.
        whole = max(0, came - encoder.lookahead) // chunk_size * chunk_size
        assert sum(y.shape[1] for y in results) == whole
    results.append(encoder.advance(x[:, :0], state, final=True)[0])
    torch.testing.assert_close(torch.cat(results, dim=1), expected, **TOLERANCES[dtype])
    again = encoder.start(2, chunk_size)
    torch.testing.assert_close(
        encoder.advance(x, again, final=True)[0], expected, **TOLERANCES[dtype]
    )


@torch.no_grad()
def test_a_chunk_sees_its_look_ahead_and_no_more():
    encoder = chunked_encoder(torch.float64, 7)
    x = torch.randn(1, FRAMES, 6, dtype=torch.float64)
    lengths = torch.tensor([FRAMES])
    before, _ = encoder(x, lengths)
    for frame in range(FRAMES):
        changed = x.clone()
        changed[:, frame] += 1
        moved = (encoder(changed, lengths)[0] - before).abs().amax(dim=(0, 2)) > 1e-12
        # The first chunk whose end, and what it looks at, come after the frame.
        first = max(0, frame - encoder.lookahead) // 7 * 7
        assert not moved[:first].any() and moved[first:].all()


@every_precision
@every_size
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_decoder(name, size, dtype):
    decoder = prepare(Decoder(11, 8, 12, 2, LAYERS[name]), dtype)
    tokens = torch.randint(1, 11, (5, FRAMES))
    memory = torch.randn(5, 13, 8, dtype=dtype)
    memory_lengths = torch.tensor([13, 4, 1, 12, 7])
    expected, expected_state = decoder.advance(
        tokens, decoder.start(memory, memory_lengths), LENGTHS
    )
    whole, _ = decoder(tokens, LENGTHS, memory, memory_lengths)

    state, results = decoder.start(memory, memory_lengths), []
    for piece, lengths in pieces(tokens, size):
        y, state = decoder.advance(piece, state, lengths)
        results.append(y)
    results = torch.cat(results, dim=1)
    for row, length in enumerate(LENGTHS.tolist()):
        for reference in (expected, whole):
            torch.testing.assert_close(
                results[row, :length], reference[row, :length], **TOLERANCES[dtype]
            )
    torch.testing.assert_close(state, expected_state, **TOLERANCES[dtype])


@torch.no_grad()
def test_a_causal_encoder_has_no_length_limit():
    encoder = Encoder(4, 4, 4, 1, partial(Mamba, d_state=2), kernel_size=5, causal=True)
    encoder = prepare(encoder, torch.float64)
    x = torch.randn(1, 3100, 4, dtype=torch.float64)
    expected, _ = encoder(x, torch.tensor([3100]))
    state, results = encoder.initial_state(1), []
    for piece in x.split(1000, dim=1):
        y, _, state = encoder(piece, torch.tensor([piece.shape[1]]), state)
        results.append(y)
    torch.testing.assert_close(torch.cat(results, dim=1), expected, atol=1e-10, rtol=0)


@torch.no_grad()
def test_the_state_of_a_chunked_encoder_is_of_constant_size():
    encoder, sizes = chunked_encoder(torch.float32, 7), set()
    state = encoder.start(1)
    for _ in range(40):
        y, state = encoder.advance(torch.randn(1, 7, 6), state)
        sizes.add(sum(part.untyped_storage().nbytes() for part in leaves(state)))
    # The first chunk waits for its look-ahead, later ones have it.
    assert y.shape[1] == 7 and len(sizes) <= 2
    assert {part.device for part in leaves(state)} == {torch.device("cpu")}


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_decoders_have_no_length_limit(name):
    decoder = prepare(Decoder(11, 4, 4, 1, LAYERS[name]), torch.float64)
    tokens = torch.randint(1, 11, (1, 3010))
    memory, memory_lengths = torch.randn(1, 5, 4, dtype=torch.float64), torch.tensor([5])
    expected, _ = decoder.advance(tokens, decoder.start(memory, memory_lengths))
    _, state = decoder.advance(tokens[:, :3000], decoder.start(memory, memory_lengths))
    for u in range(3000, 3010):
        y, state = decoder.advance(tokens[:, u : u + 1], state)
        torch.testing.assert_close(y[:, 0], expected[:, u], atol=1e-10, rtol=0)


def test_positions_far_out_are_those_of_the_formula():
    positions = torch.tensor([0, 1, 2499, 2500, 2501, 3000, 45000])
    channels = torch.arange(12, dtype=torch.float64)
    angles = positions.double().unsqueeze(1) / 10000 ** ((channels - channels % 2) / 12)
    expected = torch.where(channels % 2 == 0, angles.sin(), angles.cos())
    encoding = sine_encoding(positions, 12, torch.float64)
    # Angles are float32: their rounding grows with them.
    error = (encoding - expected).abs().amax(dim=1)
    assert (error < 1e-6 + 1.2e-7 * positions).all()
    torch.testing.assert_close(
        encoding[5], sine_encoding(torch.arange(2990, 3010), 12, torch.float64)[10]
    )
    assert sine_encoding(positions, 7, torch.float32).shape == (7, 7)


@pytest.mark.parametrize("kernel", [(3, 2, 2), (5, 2, 2), (3, 1, 1), (7, 3, 2), (3, 2, 3, True)])
@torch.no_grad()
def test_frontend(kernel):
    kernel_size, stride, blocks, *separable = kernel
    options = {"separable": bool(separable)}
    frontend = ConvFrontend(13, [4] * blocks, kernel_size, stride, **options).eval()
    for frames in (*range(1, 14), 50):
        x = torch.randn(2, frames, 13)
        expected, _ = frontend(x, torch.tensor([frames, frames]))
        for size in (1, 2, 3, 7, 100):
            state, results = frontend.initial_state(2), []
            for piece in x.split(size, dim=1):
                y, state = frontend.advance(piece, state)
                results.append(y)
            # What has come is what does not read ahead.
            ready = max(0, (frames - 1 - frontend.lookahead) // frontend.subsampling + 1)
            assert sum(y.shape[1] for y in results) == ready or frames <= kernel_size
            results.append(frontend.advance(x[:, :0], state, final=True)[0])
            torch.testing.assert_close(torch.cat(results, dim=1), expected)


@torch.no_grad()
def test_features():
    features = Features(n_fft=512, n_mels=13, top_db=None)
    for samples in (1, 159, 160, 700):
        x = 0.1 * torch.randn(2, samples)
        expected, _ = features(x, torch.tensor([samples, samples]))
        for size in (1, 37, 160, 1000):
            state, results = features.initial_state(2), []
            for piece in x.split(size, dim=1):
                y, state = features.advance(piece, state)
                results.append(y)
            results.append(features.advance(x[:, :0], state, final=True)[0])
            torch.testing.assert_close(torch.cat(results, dim=1), expected, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=r"top_db=80.0 needs the loudest frame"):
        Features().initial_state(1)
