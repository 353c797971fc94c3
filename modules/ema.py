"""A moving average of the weights, which is validated, saved as the model, tested and packaged."""

import contextlib

import torch
from speechbrain.utils.checkpoints import (
    mark_as_loader,
    mark_as_saver,
    register_checkpoint_hooks,
)
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


@register_checkpoint_hooks
class WeightAverage:
    """Averages the parameters of a model after each step, and changes places with them.

    While `shown` the model holds the average, and the weights that are trained are kept here. All
    checkpoints are written so: their model is the average, and beside it are the weights. Without
    an average, what is loaded of such a checkpoint goes on from those weights, which are the ones
    that the optimizer's state belongs to.

    Arguments
    ---------
    model : nn.Module
    decay : float
        What the average keeps of itself in a step: 0.999 is a mean over about 1,000 steps. 0: there
        is no average, and nothing is saved.
    """

    def __init__(self, model, decay):
        self.decay, self.shown = decay, False
        self.weights = nn.ParameterList(model.parameters())
        if decay:
            self.average = AveragedModel(self.weights, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def update(self, *_):
        """After a step of the optimizer, as a hook of which it may be."""
        self.average.update_parameters(self.weights)

    @torch.no_grad()
    def show(self, shown=True):
        """Put the average, or the trained weights, into the model."""
        if not self.decay or shown == self.shown or not self.average.n_averaged:
            return
        for weight, average in zip(self.weights, self.average.parameters(), strict=True):
            held = weight.clone()
            weight.copy_(average)
            average.copy_(held)
        self.shown = shown

    @contextlib.contextmanager
    def showing(self):
        """Show the average within, and afterwards what was there."""
        before = self.shown
        self.show()
        try:
            yield
        finally:
            self.show(before)

    @mark_as_saver
    def save(self, path):
        if self.decay:
            torch.save({"shown": self.shown, **self.average.state_dict()}, path)

    @mark_as_loader
    def load(self, path, end_of_epoch):
        """After the model, which is changed where there is no average any more."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        shown = state.pop("shown")
        if self.decay:
            self.shown = shown
            self.average.load_state_dict(state)
        elif shown:
            self.put(state)

    @torch.no_grad()
    def put(self, state):
        """Give the model the weights beside an average, as its state has them."""
        for i, weight in enumerate(self.weights):
            weight.copy_(state[f"module.{i}"])
