"""The architecture, drawn from the code.

Names, dimensions and parameter counts are read from the modules that a YAML file makes; the order
of a layer's parts and the shapes between parts are recorded while one utterance runs through.
Where the lines go is drawn by hand.
"""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from hyperpyyaml import load_hyperpyyaml
from matplotlib.patches import FancyBboxPatch
from torch import nn

from figures.style import FAINT, INK

ROOT = Path(__file__).resolve().parents[1]
RECIPE = "hparams/S2S/conmambamamba_small.yaml"
SECONDS = 10  # of the utterance whose shapes are shown
STEP = 2.3  # from one line of text to the next
COLOURS = {  # fill, edge
    "signal": ("#f1f4f8", "#9aa5b1"),
    "convolution": ("#d8f0ea", "#2a9d8f"),
    "feedforward": ("#fdecc8", "#d69e2e"),
    "mixer": ("#d9e8fb", "#3b7dd8"),
    "head": ("#eadcf7", "#8756c4"),
    "norm": ("#ffffff", "#9aa5b1"),
}


# ---- Reading the code ----


def load(path=RECIPE):
    """The hparams of a recipe; its checkpointer makes its folder somewhere that goes away."""
    with tempfile.TemporaryDirectory() as scratch, open(ROOT / path, encoding="utf-8") as f:
        return load_hyperpyyaml(f, {"output_folder": scratch})


def name_of(module):
    return type(module).__name__


def parameters(module):
    """Parameters of a module as text: '4.74 M', '83 k'."""
    count = sum(p.numel() for p in module.parameters())
    return f"{count / 1e6:.2f} M" if count >= 1e6 else f"{count / 1e3:.0f} k"


def record(module, run):
    """The module's direct children in the order in which `run()` calls them."""
    calls = []
    hooks = [
        child.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, child in module.named_children()
    ]
    run()
    for hook in hooks:
        hook.remove()
    return calls


@torch.no_grad()
def read(hparams):
    """Run one utterance through the model: sizes, shapes, and the order of the layers' parts."""
    samples = torch.tensor([SECONDS * hparams["sample_rate"]])
    mels, lengths = hparams["compute_features"](torch.randn(1, int(samples)), samples)
    facts = {"samples": int(samples), "mels": mels.shape, "feature_frames": int(lengths)}
    x, lengths = hparams["frontend"](mels, lengths)
    memory, _ = hparams["encoder"](x, lengths)
    facts |= {"frontend": x.shape, "frames": int(lengths), "memory": memory.shape}
    layer = hparams["encoder"].layers[0]
    facts["encoder_layer"] = record(layer, lambda: layer(memory, lengths))
    step = hparams["decoder"].layers[0]
    state = step.start(memory, lengths)  # reads the memory; the parts' order is that of a step
    facts["decoder_layer"] = record(
        step, lambda: step.advance(memory[:, :3], torch.tensor([3]), state)
    )
    return facts


def describe(module):
    """One module's name, what is inside and its colour, read from its weights."""
    name = name_of(module)
    if isinstance(module, nn.LayerNorm):
        return name, [], "norm"
    if name == "FeedForward":
        wide, narrow = (m for m in module if isinstance(m, nn.Linear))
        activation = name_of(module[1])
        inside = f"{wide.in_features} → {wide.out_features}, {activation}, → {narrow.out_features}"
        return name, [inside], "feedforward"
    if name == "ConvModule":
        width = module.depthwise.kernel_size[0]
        first, last = module.pointwise_in, module.pointwise_out
        activation = name_of(module.activation)
        return (
            name,
            [
                f"{name_of(module.norm)}, {first.in_features} → {first.out_features}, GLU",
                f"depthwise {width}, {name_of(module.out_norm)},",
                f"{activation}, {last.in_features} → {last.out_features}",
            ],
            "convolution",
        )
    return name, [f"{parameters(module)} parameters"], "mixer"


# ---- Drawing ----


def box(ax, x, y, width, height, title, lines=(), kind="signal", size=9.2):
    """A rounded box centred at x, y with a title and lines below it."""
    fill, edge = COLOURS[kind]
    ax.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.9",
            facecolor=fill,
            edgecolor=edge,
            linewidth=1.1,
            zorder=2,
        )
    )
    top = y + STEP * len(lines) / 2
    ax.text(x, top, title, ha="center", va="center", fontsize=size, weight="bold", zorder=3)
    for i, line in enumerate(lines, start=1):
        ax.text(x, top - i * STEP, line, ha="center", va="center", fontsize=size - 1.2, zorder=3)


def arrow(ax, *points, head=True, colour=INK):
    """A line through points, with a head at the last."""
    xs, ys = zip(*points[:-1], strict=True) if len(points) > 2 else ([], [])
    if len(points) > 2:
        ax.plot(xs, ys, color=colour, linewidth=1.0, zorder=1, solid_joinstyle="round")
    ax.annotate(
        "",
        points[-1],
        points[-2],
        arrowprops={
            "arrowstyle": "-|>,head_width=0.16,head_length=0.34" if head else "-",
            "color": colour,
            "linewidth": 1.0,
            "shrinkA": 0,
            "shrinkB": 0,
        },
        zorder=1,
    )


def circle(ax, x, y, sign):
    """Where two signals meet: + or ×."""
    ax.text(
        x,
        y,
        sign,
        ha="center",
        va="center",
        fontsize=9,
        zorder=4,
        bbox={"boxstyle": "circle,pad=0.12", "facecolor": "white", "edgecolor": INK, "lw": 1.0},
    )


def label(ax, x, y, text, ha="center", size=8, colour=FAINT, **more):
    ax.text(x, y, text, ha=ha, va="center", fontsize=size, color=colour, zorder=3, **more)


def panel(ax, left, bottom, width, height, title, subtitle):
    """A frame with a heading."""
    ax.add_patch(
        FancyBboxPatch(
            (left, bottom),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=1.2",
            facecolor="#fbfcfd",
            edgecolor="#d5dbe2",
            linewidth=1.0,
            zorder=0,
        )
    )
    ax.text(left + 1.8, bottom + height - 2.6, title, fontsize=11, weight="bold", va="center")
    label(ax, left + 1.8, bottom + height - 5.6, subtitle, ha="left", size=8.5)


def draw_chain(ax, hparams, facts):
    """The first row: from audio to words, with the shape and the parameters of every part."""
    d_model = facts["memory"][-1]
    encoder, decoder, front = (hparams[k] for k in ("encoder", "decoder", "frontend"))
    heads = {name: hparams[name] for name in ("ctc_head", "seq_head")}
    vocabulary = heads["ctc_head"].out_features
    y, low, high = 86.5, 68, 12
    window = f"{hparams['win_length']} ms every {hparams['hop_length']} ms"
    channels = ", ".join(str(hparams[f"cnn_channels_{i + 1}"]) for i in range(len(front.blocks)))
    chain = [
        (14, "Audio", [f"{hparams['sample_rate'] // 1000} kHz, mono"], "signal"),
        (18.5, name_of(hparams["compute_features"]),
         [f"{hparams['n_mels']} log-mel bands", window], "signal"),
        (18.5, "Normalisation", ["global statistics;", "SpecAugment in training"], "signal"),
        (17.5, name_of(front), [f"{len(front.blocks)} blocks, stride {front.stride}",
         f"channels {channels}", parameters(front)], "convolution"),
        (20, name_of(encoder), [f"Linear {encoder.input_layer[0].in_features} → {d_model}",
         f"{len(encoder.layers)} × {name_of(encoder.layers[0])}", parameters(encoder)], "mixer"),
        (17, "ctc_head", [f"Linear {d_model} → {vocabulary}", parameters(heads["ctc_head"])],
         "head"),
    ]  # fmt: skip
    shapes = ["(B, N)", f"(B, T, {facts['mels'][-1]})", f"(B, T, {facts['mels'][-1]})",
              f"(B, T/4, {facts['frontend'][-1]})", f"(B, T/4, {d_model})"]  # fmt: skip
    gap, left, centres = 5, 1, {}
    for i, (width, title, lines, kind) in enumerate(chain):
        centres[title] = left + width / 2
        box(ax, centres[title], y, width, high, title, lines, kind)
        left += width
        if i < len(shapes):
            arrow(ax, (left, y), (left + gap, y))
            label(ax, left + gap / 2, y + high / 2 + 1.8, shapes[i])
        left += gap
    middle, column = centres[name_of(encoder)], centres["ctc_head"]
    box(ax, middle, low, 22, high, name_of(decoder),
        [f"embedding {decoder.embedding.num_embeddings} × {d_model}",
         f"{len(decoder.layers)} × {name_of(decoder.layers[0])}", parameters(decoder)],
        "mixer")  # fmt: skip
    box(ax, column, low, 17, high, "seq_head",
        [f"Linear {d_model} → {vocabulary}", parameters(heads["seq_head"])], "head")  # fmt: skip
    arrow(ax, (middle, y - high / 2), (middle, low + high / 2))
    label(ax, middle - 1, (y + low) / 2, f"memory (B, T/4, {d_model})", ha="right")
    arrow(ax, (middle + 11, low), (column - 8.5, low))
    label(ax, (middle + column) / 2 + 1.2, low + high / 2 + 1.8, f"(B, U, {d_model})")
    arrow(ax, (middle - 17, low), (middle - 11, low))
    label(ax, middle - 17.6, low + 1.3, "tokens (B, U)", ha="right", size=9, colour=INK)
    label(ax, middle - 17.6, low - 1.3, "bos and what came before", ha="right")
    search, between = column + 19, (y + low) / 2
    box(ax, search, between, 17, 11.5, name_of(hparams["test_search"]),
        ["CTC prefix score", f"+ decoder, beam {hparams['test_beam_size']}"], size=9)  # fmt: skip
    for height, side, frames in ((y, 1, "T/4"), (low, -1, "U")):
        arrow(ax, (column + 8.5, height), (search, height), (search, between + side * 5.75))
        label(ax, search - 1, height + side * 1.7, f"(B, {frames}, {vocabulary})")
    arrow(ax, (search + 8.5, between), (search + 12, between))
    label(ax, search + 12.6, between, "words", ha="left", size=10, colour=INK, weight="bold")
    total = sum(p.numel() for p in hparams["model"].parameters())
    for line, (text, size, colour) in enumerate([
        (RECIPE, 9, INK),
        (f"{total / 1e6:.3f} M parameters, D = {d_model}", 9, INK),
        (f"{SECONDS} s of audio: N = {facts['samples']:,}, T = {facts['feature_frames']:,}, "
         f"T/4 = {facts['frames']:,}", 8, FAINT),
    ]):  # fmt: skip
        label(ax, 1, low + 3 - 2.7 * line, text, ha="left", size=size, colour=colour)


def draw_stack(ax, layer, calls, x, top, width, gap, halved=(), memory=None):
    """A layer's residual branches from top to bottom, in the order in which they ran.

    gap: between one sum and the next box; halved: the branches that count half; memory: the
    branch that also reads the memory.
    """
    y, norm = top, None
    label(ax, x, y, "x (B, T, D)" if memory is None else "x (B, U, D)", size=9, colour=INK)
    y -= 1.4
    for name in calls:
        module = getattr(layer, name)
        title, lines, kind = describe(module)
        if kind == "norm":
            norm = module
            continue
        if norm is not None:
            lines, norm = [name_of(norm), *lines], None
        height = 3.4 + STEP * len(lines)
        start, y = y, y - gap - height / 2
        box(ax, x, y, width, height, f"{name}: {title}", lines, kind)
        arrow(ax, (x, start), (x, y + height / 2))
        if name == memory:
            arrow(ax, (x - width / 2 - 6, y), (x - width / 2, y))
            label(ax, x - width / 2 - 3.6, y + 1.5, "memory")
        below = y - height / 2
        y = below - 2.5
        arrow(ax, (x, below), (x, y), head=False)
        side = x + width / 2 + 2.4
        arrow(ax, (x, start - gap / 3), (side, start - gap / 3), (side, y), (x + 1.2, y))
        circle(ax, x, y, "+")
        if name in halved:
            label(ax, x - 1.0, y + 1.5, "× ½", ha="right", colour=INK)
        y -= 1.1
    if norm is not None:
        box(ax, x, y - gap + 0.2, width, 2.9, name_of(norm), kind="norm", size=8)
        arrow(ax, (x, y), (x, y - gap + 1.65))
        y -= gap + 1.25
    arrow(ax, (x, y), (x, y - 2.4))


def draw_bimamba(ax, mixer, left, top, width):
    """BiMamba: two directions between shared projections, gated by z."""
    ssm = mixer.forward_ssm
    inner, states = ssm.A_log.shape
    centre = left + width / 2 - 3
    columns = {"forward_ssm": centre - 14, "backward_ssm": centre + 14}
    label(ax, centre, top, "u (B, T, D)", size=9, colour=INK)
    y = top - 6
    arrow(ax, (centre, top - 1.4), (centre, y + 2.2))
    box(ax, centre, y, 26, 4.4, f"in_proj  {mixer.in_proj.in_features} → 2 × {inner}", kind="head")
    fork = y - 5.2
    arrow(ax, (centre, y - 2.2), (centre, fork), head=False)
    label(ax, centre - 0.8, y - 3.8, "x", ha="right", colour=INK, style="italic", size=9.5)
    label(ax, centre + 15, y + 1.5, "z", colour=INK, style="italic", size=9.5)
    rows = [
        (f"conv1d, width {ssm.conv1d.kernel_size[0]}", [f"{inner} channels, causal, SiLU"],
         "convolution"),
        (f"x_proj  {ssm.x_proj.in_features} → {ssm.dt_rank} + {states} + {states}",
         ["dt, B, C", f"dt_proj {ssm.dt_proj.in_features} → {ssm.dt_proj.out_features}, softplus"],
         "head"),
        ("selective_scan", ["h ← exp(dt A) h + dt B x", f"y = C h + D x;  A ({inner}, {states})"],
         "mixer"),
    ]  # fmt: skip
    for name, x in columns.items():
        assert isinstance(getattr(mixer, name), type(ssm))
        side, ha = (-1, "right") if x < centre else (1, "left")
        order = "last to first" if getattr(mixer, name).reverse else "first to last"
        arrow(ax, (centre, fork), (x, fork), (x, fork - 5))
        label(ax, x + side, fork - 1.6, name, ha=ha, colour=INK, weight="bold", size=9)
        label(ax, x + side, fork - 3.7, f"{order} frame", ha=ha)
        at = fork - 5
        for title, lines, kind in rows:
            if at < fork - 5:
                arrow(ax, (x, at), (x, at - 1.8))
                at -= 1.8
            height = 3.4 + STEP * len(lines)
            box(ax, x, at - height / 2, 26, height, title, lines, kind)
            at -= height
        meet = at - 2.6
        arrow(ax, (x, at), (x, meet), (centre + side * 1.3, meet))
    circle(ax, centre, meet, "+")
    label(ax, centre - 1.0, meet - 2.3, "× ½", ha="right", colour=INK)
    y_gate, gate = meet - 4.8, columns["backward_ssm"] + 17
    arrow(ax, (centre, meet - 1.1), (centre, y_gate + 1.2))
    circle(ax, centre, y_gate, "×")
    arrow(ax, (centre + 13, y), (gate, y), (gate, y_gate), (centre + 1.3, y_gate))
    box(ax, gate, meet + 12, 7, 3.6, "SiLU", kind="norm")
    out = y_gate - 5.2
    arrow(ax, (centre, y_gate - 1.1), (centre, out + 2.2))
    box(ax, centre, out, 26, 4.4,
        f"out_proj  {mixer.out_proj.in_features} → {mixer.out_proj.out_features}",
        kind="head")  # fmt: skip
    arrow(ax, (centre, out - 2.2), (centre, out - 5))


def draw_architecture():
    """The whole figure: signal chain above; encoder layer, mixer and decoder layer below."""
    hparams = load()
    hparams["model"].eval()
    facts = read(hparams)
    layer, decoder_layer = hparams["encoder"].layers[0], hparams["decoder"].layers[0]
    figure, ax = plt.subplots(figsize=(13.2, 9.28))
    figure.subplots_adjust(0, 0, 1, 1)
    ax.set(xlim=(-0.5, 162.5), ylim=(-18.6, 96))
    ax.set_axis_off()
    draw_chain(ax, hparams, facts)
    for left, width, module in ((0, 45, layer), (47, 72, layer.mixer), (121, 41, decoder_layer)):
        panel(ax, left, -17.6, width, 76.6, name_of(module), f"{parameters(module)} parameters")
    draw_stack(ax, layer, facts["encoder_layer"], 22, 50, 32, 2.6, halved=("ffn1", "ffn2"))
    draw_bimamba(ax, layer.mixer, 47, 51.5, 72)
    draw_stack(ax, decoder_layer, facts["decoder_layer"], 142, 48, 26, 6.2, memory="cross_mamba")
    return figure
