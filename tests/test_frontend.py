"""The frontend is SpeechBrain's, except that it knows where an utterance ends."""

import math

import pytest
import torch
from speechbrain.lobes.models.convolution import ConvolutionFrontEnd
from speechbrain.nnet.CNN import DepthwiseSeparableConv2d
from torch.nn import functional as F  # noqa: N812

from modules.convolutions import ChannelsLastConv2d
from modules.frontend import ConvFrontend, reflect_frames

EIGHT = {"channels": (6, 4, 5), "separable": True}


def speechbrain_frontend(n_mels, channels, kernel_size=3, stride=2):
    blocks = len(channels)
    return ConvolutionFrontEnd(
        input_shape=(None, None, n_mels),
        num_blocks=blocks,
        num_layers_per_block=1,
        out_channels=channels,
        kernel_sizes=[kernel_size] * blocks,
        strides=[stride] * blocks,
        dilations=[1] * blocks,
        residuals=[False] * blocks,
        padding="same",
    ).eval()


@pytest.mark.parametrize("n_mels", [80, 40, 23, 5])
@pytest.mark.parametrize("frames", [3, 4, 5, 6, 7, 8, 50, 51, 52, 53])
def test_alone_it_equals_speechbrain_to_the_bit(n_mels, frames):
    torch.manual_seed(0)
    ours = ConvFrontend(n_mels, channels=(6, 4)).eval()
    theirs = speechbrain_frontend(n_mels, [6, 4])
    theirs.load_state_dict(ours.blocks.state_dict())
    x = torch.randn(2, frames, n_mels)
    y, lengths = ours(x, torch.tensor([frames, frames]))
    assert torch.equal(y, theirs(x).flatten(2))
    assert lengths.tolist() == [y.shape[1]] * 2


@pytest.mark.parametrize(("kernel_size", "stride", "blocks"), [(5, 2, 2), (3, 1, 1), (3, 2, 3)])
def test_other_sizes_equal_speechbrain_too(kernel_size, stride, blocks):
    torch.manual_seed(0)
    channels = [4] * blocks
    ours = ConvFrontend(40, channels, kernel_size, stride).eval()
    theirs = speechbrain_frontend(40, channels, kernel_size, stride)
    theirs.load_state_dict(ours.blocks.state_dict())
    x = torch.randn(1, 37, 40)
    y, _ = ours(x, torch.tensor([37]))
    assert torch.equal(y, theirs(x).flatten(2))


@pytest.mark.parametrize(
    "options", [{"channels": (6, 4)}, {"channels": (6, 4), "kernel_size": 5, "stride": 1}, EIGHT]
)
def test_the_layout_of_cuda_gives_the_same(options, monkeypatch):
    torch.manual_seed(0)
    frontend = ConvFrontend(23, **options).double().eval()
    x, lengths = torch.randn(2, 31, 23).double(), torch.tensor([31, 18])
    results = []
    for forward in (ChannelsLastConv2d.forward, ChannelsLastConv2d.in_place):
        monkeypatch.setattr(ChannelsLastConv2d, "forward", forward)
        y, _ = frontend(x, lengths)
        results.append((y, *torch.autograd.grad(y.square().sum(), list(frontend.parameters()))))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("frames", [8, 50])
def test_separable_blocks_equal_speechbrains_convolutions(frames):
    torch.manual_seed(0)
    x, lengths = torch.randn(2, frames, 23), torch.tensor([frames, frames])
    frontend = ConvFrontend(23, **EIGHT).eval()
    y, found = frontend(x, lengths)
    assert found.tolist() == [math.ceil(frames / 8)] * 2 and y.shape[2] == 3 * 5
    for i, shape in ((1, (None, None, 14, 6)), (2, (None, None, 8, 4))):
        block = frontend.blocks[f"convblock_{i}"].convs
        ours, channels = block.conv_0, EIGHT["channels"][i]
        theirs = DepthwiseSeparableConv2d(channels, 3, shape, stride=2, padding="valid")
        theirs.depthwise.load_state_dict(ours[0].state_dict())
        theirs.pointwise.load_state_dict(ours[1].state_dict())
        block.conv_0 = theirs
    assert torch.equal(frontend(x, lengths)[0], y)


def test_a_separable_frontend_by_8_is_a_third_of_the_size():
    def size(**options):
        return sum(p.numel() for p in ConvFrontend(channels=(64, 64, 64), **options).parameters())

    y, lengths = ConvFrontend(channels=(64, 64, 64), separable=True)(
        torch.randn(1, 401, 80), torch.tensor([401])
    )
    assert y.shape == (1, 51, 640) and lengths.tolist() == [51]  # what 4x gives an encoder
    assert size(separable=True) < size() / 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_equals_the_cpu():
    torch.manual_seed(0)
    frontend = ConvFrontend().double().eval()
    x, lengths = torch.randn(3, 203, 80).double(), torch.tensor([203, 77, 10])
    expected, _ = frontend(x, lengths)
    y, _ = frontend.cuda()(x.cuda(), lengths.cuda())
    torch.testing.assert_close(y.cpu(), expected, rtol=1e-9, atol=1e-9)


def test_the_published_size():
    ours = ConvFrontend()
    y, lengths = ours(torch.randn(1, 401, 80), torch.tensor([401]))
    assert y.shape == (1, 101, 640)
    assert lengths.tolist() == [101]


@pytest.mark.parametrize("n_mels", [1, 2, 3, 4, 13])
def test_any_number_of_mels_and_of_frames(n_mels):
    frontend = ConvFrontend(n_mels, channels=(3, 2)).eval()
    bins = math.ceil(n_mels / 4)
    for frames in range(1, 12):
        y, lengths = frontend(torch.randn(1, frames, n_mels), torch.tensor([frames]))
        assert lengths.item() == math.ceil(frames / 4)
        assert y.shape == (1, lengths.item(), bins * 2)
        assert torch.isfinite(y).all()


def test_lengths_are_halved_twice_rounding_up():
    lengths = torch.arange(0, 30)
    frontend = ConvFrontend(4, channels=(2, 2)).eval()  # dropout may leave nothing of so few
    y, subsampled = frontend(torch.randn(30, 29, 4), lengths)
    assert subsampled.tolist() == [math.ceil(n / 4) for n in range(30)]
    assert y.shape[1] == subsampled.max()
    for row, length in zip(y, subsampled.tolist(), strict=True):
        assert (row[length:] == 0).all()
        assert (row[:length] != 0).any() or length == 0


@pytest.mark.parametrize("reach", [1, 2, 3])
def test_every_utterance_is_reflected_at_its_own_end(reach):
    x = torch.randn(4, 9, 2)
    lengths = torch.tensor([9, 6, 5, 4])
    reflected = reflect_frames(x, lengths, reach)
    for row, padded, length in zip(x, reflected, lengths.tolist(), strict=True):
        expected = F.pad(row[:length].t(), (reach, reach), mode="reflect").t()
        assert torch.equal(padded[: length + 2 * reach], expected)


def test_an_even_kernel_is_an_error():
    with pytest.raises(ValueError, match="kernel_size=4 must be odd; use 5"):
        ConvFrontend(80, kernel_size=4)


@pytest.mark.parametrize(
    ("kernel_size", "stride", "blocks", "separable"),
    [(3, 2, 2, False), (5, 3, 2, False), (3, 2, 3, False), (3, 2, 3, True)],
)
@pytest.mark.parametrize("steps", [1, 3])
@torch.no_grad()
def test_steps_of_constant_size_are_the_whole(kernel_size, stride, blocks, separable, steps):
    torch.manual_seed(0)
    options = {"separable": separable}
    frontend = ConvFrontend(13, [4] * blocks, kernel_size, stride, **options).eval()
    size = steps * frontend.subsampling
    lengths = torch.tensor([1, 2, 3, size, size + 1, size + 2, 2 * size, 3 * size - 1])
    x = torch.randn(len(lengths), 3 * size, 13)
    expected, expected_lengths = frontend(x, lengths)
    state, found, total = frontend.initial_step(len(lengths)), [], 0
    for start in range(0, x.shape[1], size):
        left = (lengths - start).clamp(0, size)
        y, frames, state = frontend.step(x[:, start : start + size], left, state)
        assert y.shape[1] == steps
        found.append(y)
        total = total + frames
    assert total.tolist() == expected_lengths.tolist()
    torch.testing.assert_close(torch.cat(found, 1), expected, atol=1e-6, rtol=0)
