"""What is exported: normalisation, frontend, encoder and CTC head, whole or step by step."""

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from modules.errors import UserError
from modules.lengths import relative


class WholeGraph(nn.Module):
    """Features of whole utterances -> log-probabilities of CTC.

    features (B, T, n_mels), lengths (B,) in frames -> log_probs (B, T', V), frames (B,): T' and
    these are T and the lengths over the subsampling, rounded up.

    chunk : feature frames that the encoder sees at a time, which steps are a multiple of
    lookahead : of those of a step, the last ones that come again in the next
    """

    inputs, outputs = ("features", "lengths"), ("log_probs", "frames")
    streaming, lookahead = False, 0

    def __init__(self, recognizer):
        super().__init__()
        self.normalize = recognizer.normalize
        self.frontend, self.encoder = recognizer.model["frontend"], recognizer.model["encoder"]
        self.head = recognizer.model["ctc_head"]
        self.chunk_size = self.encoder.chunk_size
        self.chunk = self.frontend.subsampling * (self.chunk_size or 1)

    def forward(self, features, lengths):
        x = self.normalize(features, relative(lengths, features.shape[1]))
        x, frames = self.encoder(*self.frontend(x, lengths))
        return self.head(x).log_softmax(dim=-1), frames

    def states(self, batch_size):
        """Its states before the first frame: none."""
        return []


class StepGraph(WholeGraph):
    """The next features of utterances and a state of constant size -> log-probabilities, state.

    features (B, T, n_mels), T a multiple of `chunk` and `lookahead` more, whose results come with
    the next step; lengths (B,): fewer than T where an utterance ends, 0 where it has ended;
    states: zeros at first, then what the last step gave.
    All steps of an utterance give what `WholeGraph` gives for the whole.
    UserError for a model that needs the future, or a frontend that cannot run in steps.
    """

    streaming = True

    def __init__(self, recognizer):
        super().__init__(recognizer)
        if self.frontend.reach >= self.frontend.stride:
            raise UserError(
                f"a frontend whose kernels reach {self.frontend.reach} frames at a stride of "
                f"{self.frontend.stride} cannot be exported in steps; leave --streaming out"
            )
        if self.encoder.chunks is not None and not self.chunk_size:
            raise UserError(
                "this model is packaged with chunk_size=0, which hears whole recordings; package "
                "a run with a chunk, or leave --streaming out"
            )
        self.lookahead = self.frontend.subsampling * self.encoder.lookahead
        states, self.layout = tree_flatten(self.initial_state(1))
        names = [f"state_{i}" for i in range(len(states))]
        self.inputs = (*WholeGraph.inputs, *names)
        self.outputs = (*WholeGraph.outputs, *(f"next_{name}" for name in names))

    def initial_state(self, batch_size):
        return self.frontend.initial_step(batch_size), self.encoder.initial_state(batch_size)

    def states(self, batch_size):
        """Its states before the first frame, zeros."""
        return tree_flatten(self.initial_state(batch_size))[0]

    def forward(self, features, lengths, *states):
        frontend_state, state = tree_unflatten(states, self.layout)
        x = self.normalize(features, relative(lengths, features.shape[1]))
        x, frames, frontend_state = self.frontend.step(x, lengths, frontend_state, self.lookahead)
        ahead = self.lookahead // self.frontend.subsampling
        x, frames, state = self.encoder(x, frames, state, self.chunk_size, ahead)
        log_probs = self.head(x).log_softmax(dim=-1)
        return log_probs, frames, *tree_flatten((frontend_state, state))[0]


def example(graph, n_mels, batch_size=2):
    """Inputs to trace with: some chunks, as a number of one would be taken for a constant."""
    frames = max(64, 3 * graph.chunk) + graph.lookahead
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(batch_size, frames, n_mels, generator=generator)
    lengths = torch.full((batch_size,), frames)
    lengths[1:] -= 3
    return features, lengths, *graph.states(batch_size)
