"""The project's conscience: an utterance gives the same alone and in any padded batch.

In float64 with gradients: those of a batch are the sums of those of its utterances, for every
parameter and for the input. Padding holds NaN, which nothing may read.
"""

import math
from functools import partial

import pytest
import torch
from speechbrain.processing.features import InputNormalization, make_padding_mask
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfigRandomSampler
from torch import nn
from torch.nn import functional as F  # noqa: N812

from modules.attention import RelPosAttention, RoPEAttention
from modules.decoder import Decoder, MambaDecoderLayer, TransformerDecoderLayer
from modules.encoder import Encoder
from modules.features import Features
from modules.frontend import ConvFrontend
from modules.lengths import absolute, relative
from modules.losses import ctc_loss, sequence_loss
from modules.mamba import BiMamba, Chunk, Mamba
from modules.mamba2 import BiMamba2, Mamba2
from modules.two_mambas import TwoMambas

torch.set_num_threads(1)  # for tensors this small, threads cost more than they save

D_MODEL, D_FFN, VOCAB, N_MELS = 16, 24, 11, 12
PRECISIONS = {
    torch.float32: {"atol": 1e-5, "rtol": 0},
    torch.float64: {"atol": 1e-9, "rtol": 0},
}
SMALL = {"d_state": 4, "d_conv": 4}
HEADS = {**SMALL, "d_head": 8}
FIVE = DynChunkTrainConfigRandomSampler(1.0, 5, 5, 0.0, 0, 0)  # the same whenever it is drawn
ENCODERS = {
    "conformer": {"mixer": partial(RelPosAttention, num_heads=2)},
    "conformer_rope": {"mixer": partial(RoPEAttention, num_heads=2), "activation": nn.SiLU},
    "conmamba": {"mixer": partial(BiMamba, **SMALL)},
    "mamba": {"mixer": partial(Mamba, **SMALL)},
    "causal_conmamba": {"mixer": partial(Mamba, **SMALL), "causal": True},
    "chunked_conmamba": {"mixer": partial(BiMamba, **SMALL), "chunks": FIVE, "lookahead": 3},
    "two_mambas": {"mixer": partial(TwoMambas, **SMALL)},
    "conmamba2": {"mixer": partial(BiMamba2, **HEADS)},
    "causal_conmamba2": {"mixer": partial(Mamba2, **HEADS), "causal": True},
    "chunked_conmamba2": {"mixer": partial(BiMamba2, **HEADS), "chunks": FIVE, "lookahead": 3},
}
DECODERS = {
    "transformer": partial(TransformerDecoderLayer, num_heads=2, dropout=0.0),
    "mamba": partial(MambaDecoderLayer, dropout=0.0, **SMALL),
}
# Frames and tokens of an utterance; kernels of 7 reach past several of them.
LENGTHS = [(1, 1), (23, 6), (2, 7), (9, 1), (24, 3), (3, 5)]
BATCHES = [[0, 1, 2, 3, 4, 5], [2, 0], [3, 5, 0, 0], [4, 0]]


def make_encoder(name, input_size=10, **options):
    options = {"dropout": 0.0, "kernel_size": 7, **ENCODERS[name], **options}
    return Encoder(input_size, D_MODEL, D_FFN, 2, **options)


def make_decoder(name):
    return Decoder(VOCAB, D_MODEL, D_FFN, 2, DECODERS[name])


def pad(items, extra=0, filler=math.nan):
    """List of (T, ...) -> (B, max T + extra, ...) with the filler behind each, lengths (B,).

    Alone, an item has no padding, or what leaks from it would leak alike in both.
    """
    lengths = torch.tensor([len(item) for item in items])
    extra = extra if len(items) > 1 else 0
    shape = (len(items), int(lengths.max()) + extra, *items[0].shape[1:])
    rows = [
        torch.cat([item, item.new_full((shape[1] - len(item), *shape[2:]), filler)])
        for item in items
    ]
    return torch.stack(rows), lengths


def jolt(model, dtype):
    """Large random weights, so that a leak through a bias, a norm or a zero is a large error."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


def check_equal(run, model, utterances, dtype):
    """Compare `run(model, utterances)`: a list of results per utterance, alone and in batches.

    An utterance is a list of tensors; those of floating point get gradients.
    """
    tolerance = PRECISIONS[dtype]
    alone, alone_gradients = zip(
        *(with_gradients(run, model, [u]) for u in utterances), strict=True
    )
    for batch in BATCHES:
        results, gradients = with_gradients(run, model, [utterances[i] for i in batch])
        for row, i in enumerate(batch):
            for ours, expected in zip(results[row], alone[i][0], strict=True):
                torch.testing.assert_close(ours, expected, **tolerance)
        if dtype == torch.float32:
            continue
        inputs, parameters = gradients
        for row, i in enumerate(batch):
            for ours, expected in zip(inputs[row], alone_gradients[i][0][0], strict=True):
                torch.testing.assert_close(ours, expected, **tolerance)
        for name, ours in parameters.items():
            expected = sum(alone_gradients[i][1][name] for i in batch)
            torch.testing.assert_close(
                ours, expected, **tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


def with_gradients(run, model, utterances):
    """-> results by utterance, (gradients of inputs by utterance, of parameters by name)."""
    model.zero_grad()
    utterances = [
        [t.clone().requires_grad_() if t.is_floating_point() else t for t in u] for u in utterances
    ]
    results = run(model, utterances)
    weight = torch.linspace(-1, 1, 997, dtype=torch.float64)
    sum(
        (result.flatten() * weight[: result.numel()].to(result.dtype)).sum()
        for row in results
        for result in row
    ).backward()
    inputs = [[t.grad for t in u if t.is_floating_point()] for u in utterances]
    assert all(torch.isfinite(g).all() for row in inputs for g in row)
    parameters = {name: p.grad for name, p in model.named_parameters()}
    # RelPosAttention's bias has no gradient in an utterance of one frame, but it is there.
    missing = [name for name, gradient in parameters.items() if gradient is None]
    assert not missing, f"no gradient for {missing}"
    return [[r.detach() for r in row] for row in results], (
        inputs,
        {name: g.clone() for name, g in parameters.items()},
    )


def speech(channels, dtype, lengths=LENGTHS):
    torch.manual_seed(0)
    return [[torch.randn(frames, channels, dtype=dtype)] for frames, _ in lengths]


def cut(x, lengths):
    return [[row[:length]] for row, length in zip(x, lengths.tolist(), strict=True)]


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("extra", [0, 5])
@pytest.mark.parametrize(
    "options", [{"channels": (3, 2)}, {"channels": (3, 2, 2), "separable": True}], ids=["4", "8"]
)
def test_frontend(options, dtype, extra):
    def run(model, utterances):
        return cut(*model(*pad([u[0] for u in utterances], extra)))

    model = jolt(ConvFrontend(N_MELS, dropout=0.0, **options), dtype)
    check_equal(run, model, speech(N_MELS, dtype), dtype)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", ENCODERS)
def test_mixer(name, dtype):
    def run(model, utterances):
        # Layers hand finite values on, so nothing less is asked of a mixer alone.
        x, lengths = pad([u[0] for u in utterances], extra=3, filler=50.0)
        chunk = {"chunk": Chunk(5, 3)} if "chunks" in ENCODERS[name] else {}
        return cut(model(x, lengths, **chunk)[0], lengths)

    model = jolt(ENCODERS[name]["mixer"](D_MODEL), dtype)
    check_equal(run, model, speech(D_MODEL, dtype), dtype)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", ENCODERS)
def test_encoder(name, dtype):
    def run(model, utterances):
        x, lengths = model(*pad([u[0] for u in utterances], extra=3))
        assert (x[-1, lengths[-1] :] == 0).all()
        return cut(x, lengths)

    check_equal(run, jolt(make_encoder(name), dtype), speech(10, dtype), dtype)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", DECODERS)
def test_decoder(name, dtype):
    def run(model, utterances):
        memory, memory_lengths = pad([u[0] for u in utterances], extra=3)
        tokens, lengths = pad([u[1] for u in utterances], extra=2, filler=0)
        return cut(*model(tokens, lengths, memory, memory_lengths))

    utterances = speech(D_MODEL, dtype)
    for u, (_, tokens) in zip(utterances, LENGTHS, strict=True):
        u.append(torch.randint(3, VOCAB, (tokens,)))
    check_equal(run, jolt(make_decoder(name), dtype), utterances, dtype)


class Recognizer(nn.Module):
    """Features to both losses, as the S2S recipe has it, the losses of each utterance apart."""

    def __init__(self, encoder, decoder):
        super().__init__()
        self.frontend = ConvFrontend(N_MELS, channels=(3, 2), dropout=0.0)
        self.encoder = make_encoder(encoder, input_size=2 * math.ceil(N_MELS / 4))
        self.decoder = make_decoder(decoder)
        self.ctc_head = nn.Linear(D_MODEL, VOCAB)
        self.seq_head = nn.Linear(D_MODEL, VOCAB)

    def forward(self, x, lengths, tokens, token_lengths):
        x, lengths = self.encoder(*self.frontend(x, lengths))
        ctc = F.ctc_loss(
            self.ctc_head(x).log_softmax(-1).transpose(0, 1),
            tokens,
            lengths,
            token_lengths,
            reduction="none",
        )
        start = F.pad(tokens, (1, 0), value=1)
        y, lengths = self.decoder(start, token_lengths + 1, x, lengths)
        log_p = self.seq_head(y).log_softmax(-1)
        target = F.pad(tokens, (0, 1)).scatter(1, token_lengths.unsqueeze(1), 2)
        smoothed = torch.full_like(log_p, 0.1 / (VOCAB - 1)).scatter(2, target.unsqueeze(2), 0.9)
        kl = F.kl_div(log_p, smoothed, reduction="none").sum(-1)
        outside = torch.arange(kl.shape[1]) >= lengths.unsqueeze(1)
        return ctc, kl.masked_fill(outside, 0).sum(1)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize(
    ("encoder", "decoder"),
    [("conformer", "transformer"), ("conmamba", "mamba"), ("chunked_conmamba", "transformer")],
)
def test_losses(encoder, decoder, dtype):
    def run(model, utterances):
        features, lengths = pad([u[0] for u in utterances], extra=4)
        tokens, token_lengths = pad([u[1] for u in utterances], extra=1, filler=0)
        return zip(*model(features, lengths, tokens, token_lengths), strict=True)

    torch.manual_seed(0)
    utterances = [
        [torch.randn(4 * t + 9, N_MELS, dtype=dtype), torch.arange(3, 4 + t % 6)]
        for t in (1, 23, 2, 9, 24, 6)
    ]
    check_equal(
        lambda m, u: [list(row) for row in run(m, u)],
        jolt(Recognizer(encoder, decoder), dtype),
        utterances,
        dtype,
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_recipes_losses_add_up(smoothing):
    """A batch's loss is the mean of its utterances' losses, and so are the gradients."""
    torch.manual_seed(0)
    frames, tokens = (31, 3, 17, 8), (9, 1, 7, 4)
    scores = [torch.randn(n, VOCAB, dtype=torch.float64) for n in frames]
    words = [torch.randint(1, VOCAB, (n,)) for n in tokens]
    steps = [torch.randn(n, VOCAB, dtype=torch.float64) for n in tokens]

    def losses(members):
        leaves = [t[i].clone().requires_grad_() for t in (scores, steps) for i in members]
        ctc_scores, lengths = pad(leaves[: len(members)], extra=3, filler=5.0)
        seq_scores, token_lengths = pad(leaves[len(members) :], extra=2, filler=5.0)
        targets, _ = pad([words[i] for i in members], extra=2, filler=0)
        ctc = ctc_loss(ctc_scores, targets, lengths, token_lengths)
        kl = sequence_loss(seq_scores.log_softmax(-1), targets, token_lengths, smoothing)
        (len(members) * (ctc + kl)).backward()
        return torch.stack([ctc, kl]).detach(), [leaf.grad for leaf in leaves]

    alone = [losses([i]) for i in range(4)]
    value, gradients = losses([0, 1, 2, 3])
    torch.testing.assert_close(value, torch.stack([v for v, _ in alone]).mean(0))
    expected = [g[part] for part in (0, 1) for _, g in alone]
    torch.testing.assert_close(gradients, expected, **PRECISIONS[torch.float64])


@pytest.mark.parametrize("name", ENCODERS)
def test_an_utterance_of_no_frames_harms_no_other(name):
    def run(model, utterances):
        return cut(*model(*pad([u[0] for u in utterances])))

    model = jolt(make_encoder(name), torch.float64)
    full, empty = speech(10, torch.float64, [(9, 0), (0, 0)])
    expected, (inputs, parameters) = with_gradients(run, model, [full])
    results, (batch_inputs, batch_parameters) = with_gradients(run, model, [empty, full, empty])
    torch.testing.assert_close(results[1], expected[0], **PRECISIONS[torch.float64])
    torch.testing.assert_close(batch_inputs[1], inputs[0], **PRECISIONS[torch.float64])
    torch.testing.assert_close(batch_parameters, parameters, **PRECISIONS[torch.float64])


@pytest.mark.parametrize("name", DECODERS)
def test_an_empty_memory_or_no_tokens_harm_no_other(name):
    def run(model, utterances):
        memory, memory_lengths = pad([u[0] for u in utterances])
        tokens, lengths = pad([u[1] for u in utterances], filler=0)
        return cut(*model(tokens, lengths, memory, memory_lengths))

    model = jolt(make_decoder(name), torch.float64)
    full, empty = speech(D_MODEL, torch.float64, [(9, 0), (0, 0)])
    full.append(torch.arange(3, 8))
    silent = [full[0].clone(), full[1][:0]]
    empty.append(full[1][:0])
    deaf = [empty[0], full[1]]
    expected, (_, parameters) = with_gradients(run, model, [full])
    results, (_, batch_parameters) = with_gradients(run, model, [empty, full, silent])
    torch.testing.assert_close(results[1], expected[0], **PRECISIONS[torch.float64])
    torch.testing.assert_close(batch_parameters, parameters, **PRECISIONS[torch.float64])
    results, (_, batch_parameters) = with_gradients(run, model, [deaf, full])
    torch.testing.assert_close(results[1], expected[0], **PRECISIONS[torch.float64])
    assert all(torch.isfinite(g).all() for g in batch_parameters.values())


SAMPLES = [16000, 1, 159, 160, 161, 7999, 12001, 399]


@pytest.fixture(scope="module")
def features():
    """The CTC recipe's features and a normalisation with statistics like theirs, fixed."""
    fbank = Features(n_mels=80, n_fft=512, win_length=25)
    normalize = InputNormalization(norm_type="global").eval()
    normalize.count, normalize.glob_mean = 1, torch.linspace(-40, -10, 80)
    normalize.glob_std = torch.linspace(5, 15, 80)

    def compute(wavs, samples=None):
        if samples is None:
            samples = torch.full((len(wavs),), wavs.shape[1])
        x, lengths = fbank(wavs, samples)
        return normalize(x), lengths

    return compute


def waveforms():
    """Noise under an envelope, then digital silence in some, as a recorder gives it."""
    torch.manual_seed(0)
    wavs = [0.1 * torch.randn(n) * torch.linspace(0.1, 1, n) for n in SAMPLES]
    wavs[5][2000:3500] = 0
    return wavs


def test_frames_of_n_samples(features):
    for samples in (*SAMPLES, 640, 15999, 16001):
        x, lengths = features(torch.randn(1, samples))
        assert x.shape[1] == lengths.item() == samples // 160 + 1


@pytest.mark.parametrize("name", ENCODERS)
def test_from_waveform_to_ctc_head(name, features):
    model = nn.ModuleDict(
        {
            "frontend": ConvFrontend(80, channels=(6, 4)),
            "encoder": make_encoder(name, input_size=80),
            "ctc_head": nn.Linear(D_MODEL, VOCAB),
        }
    )
    model = jolt(model, torch.float32).eval()

    def run(wavs):
        wav, samples = pad(wavs, extra=3000, filler=0.0)
        x, lengths = model["encoder"](*model["frontend"](*features(wav, samples)))
        return cut(model["ctc_head"](x), lengths)

    wavs = waveforms()
    with torch.no_grad():
        expected = []
        for wav in wavs:
            x, _ = model["encoder"](*model["frontend"](*features(wav[None])))
            assert x.shape[1] == math.ceil((len(wav) // 160 + 1) / 4)
            expected.append([model["ctc_head"](x)[0]])
        for ours, theirs in zip(run(wavs), expected, strict=True):
            torch.testing.assert_close(ours, theirs, **PRECISIONS[torch.float32])


def test_features_of_a_sound_cut_at_its_loudest(features):
    # SpeechBrain's Fbank raises all bins to 80 dB below the loudest frame of its tensor. Only
    # here, behind digital silence, is the first padded frame the loudest: it ends the sound.
    wav = torch.zeros(1, 16159)
    wav[0, -3:] = 1.0
    padded, _ = features(F.pad(wav, (0, 3000)), torch.tensor([16159]))
    alone, _ = features(wav)
    torch.testing.assert_close(padded[:, :101], alone, **PRECISIONS[torch.float32])


def test_relative_lengths_mark_no_frame_of_padding():
    for frames in range(1, 1500, 7):
        lengths = torch.arange(1, frames + 1)
        found = relative(lengths, frames)
        mask = make_padding_mask(torch.empty(frames, frames), found)
        assert torch.equal(mask.sum(1), lengths) and torch.equal(absolute(found, frames), lengths)
