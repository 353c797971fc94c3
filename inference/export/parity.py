"""Whether an exported file computes what the model does in PyTorch; else it is not kept."""

from dataclasses import dataclass

import torch

from modules.errors import UserError

# Frames of the utterances of a batch. 99 of 150 and 252 of 333 are among the few whose quotient in
# float32, times the second number, is more than the first.
CASES = ([9], [61, 40], [150, 1, 99], [333, 252, 8, 200])
LIMIT = 1e-3  # of the largest difference of log-probabilities, float32
LIMIT_INT8 = 0.1  # of the probability that a frame gives to other tokens, on average


@dataclass(frozen=True)
class Parity:
    """Differences from PyTorch.

    largest : of log-probabilities; moved : probability that a frame gives to other tokens, on
    average, in [0, 1]; same_best : the share of frames whose best token is the same
    """

    largest: float
    moved: float
    same_best: float
    frames: int

    def __str__(self):
        return (
            f"log-probabilities differ by {self.largest:.1e} at most; a frame moves "
            f"{self.moved:.1e} of its probability; {100 * self.same_best:.2f} % of "
            f"{self.frames} frames have the same best token"
        )


@torch.no_grad()
def check(whole, graph, run, n_mels, int8):
    """Compare a file with the model at several sizes of batch, times and lengths -> Parity.

    whole : the model's WholeGraph, in PyTorch; it hears each utterance alone, without padding
    graph : what was exported; run(*tensors) -> its outputs, computed by the file
    The padding of the file's batches holds large numbers. UserError where it differs too much.
    """
    found, expected = [], []
    for case, lengths in enumerate([*CASES, [2 * graph.chunk + 13, graph.chunk + 1]]):
        x = speechlike(len(lengths), max(lengths), n_mels, whole.normalize, seed=case)
        counts = torch.tensor(lengths)
        alone = [whole(x[i : i + 1, :n], counts[i : i + 1])[0][0] for i, n in enumerate(lengths)]
        padding = torch.arange(x.shape[1]) >= counts[:, None]
        x = x.masked_fill(padding[:, :, None], 1e3)
        if graph.streaming:
            for size in (graph.chunk, max(32, 2 * graph.chunk)):
                found += in_steps(graph, run, x, counts, size)
                expected += alone
        else:
            found += at_once(run, x, counts)
            expected += alone
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if ours.shape != theirs.shape:
            raise UserError(
                f"the exported file gives {tuple(ours.shape)} where the model gives "
                f"{tuple(theirs.shape)} (utterance {number} of the check); it is not kept"
            )
    parity = compare(torch.cat(found), torch.cat(expected))
    within = parity.moved <= LIMIT_INT8 if int8 else parity.largest <= LIMIT
    if not within:  # NaN too
        limit = f"to move {LIMIT_INT8}" if int8 else f"{LIMIT} at most"
        raise UserError(
            f"the exported file does not compute what the model does, so it is not kept: {parity}; "
            f"allowed is {limit}"
        )
    return parity


def speechlike(batch_size, frames, n_mels, normalize, seed):
    """Random features with the statistics of the training, if the model knows them."""
    x = torch.randn(batch_size, frames, n_mels, generator=torch.Generator().manual_seed(seed))
    if normalize.norm_type == "global":
        x = x * normalize.glob_std + normalize.glob_mean
    return x


def at_once(run, x, lengths):
    log_probs, frames = run(x, lengths)[:2]
    return [y[:n] for y, n in zip(log_probs, frames.tolist(), strict=True)]


def in_steps(graph, run, x, lengths, size):
    """The results of a graph that keeps a state, `size` frames at a time."""
    states, heard = graph.states(len(x)), size + graph.lookahead
    parts = [[] for _ in lengths]
    for start in range(0, x.shape[1], size):
        piece = x[:, start : start + heard]
        piece = torch.nn.functional.pad(piece, (0, 0, 0, heard - piece.shape[1]), value=1e3)
        left = (lengths - start).clamp(0, heard)
        log_probs, frames, *states = run(piece, left, *states)
        for part, y, n in zip(parts, log_probs, frames.tolist(), strict=True):
            part.append(y[:n])
    return [torch.cat(part) for part in parts]


def compare(ours, theirs):
    """Log-probabilities (T, V) twice -> Parity."""
    return Parity(
        largest=(ours - theirs).abs().max().item(),
        moved=(ours.exp() - theirs.exp()).abs().sum(-1).mean().item() / 2,
        same_best=(ours.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
        frames=len(ours),
    )
