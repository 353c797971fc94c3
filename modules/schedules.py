"""Learning rate schedules that SpeechBrain has not."""

import logging
import math

from speechbrain.nnet.schedulers import NoamScheduler

from modules.errors import UserError

logger = logging.getLogger(__name__)


class CosineScheduler(NoamScheduler):
    """Linear warm-up to `lr_initial`, then half a cosine down to 0 (Loshchilov & Hutter 2017).

    Arguments
    ---------
    lr_initial : float
        The highest rate.
    n_warmup_steps, total_steps : int
        Steps until it is reached, and until the rate is 0. UserError unless there are more of the
        latter.
    """

    def __init__(self, lr_initial, n_warmup_steps, total_steps):
        super().__init__(lr_initial, n_warmup_steps)
        if total_steps <= n_warmup_steps:
            raise UserError(
                f"total_steps={total_steps} must be more than n_warmup_steps={n_warmup_steps}: the "
                "number of steps of the whole training, as the log counts them"
            )
        self.total_steps = total_steps

    def _get_lr_scale(self):
        if self.n_steps < self.n_warmup_steps:
            return self.n_steps / self.n_warmup_steps
        if self.n_steps == self.total_steps + 1:
            logger.warning(
                "The learning rate has come to 0 at total_steps=%d and training goes on: nothing "
                "more is learnt; give as many total_steps as number_of_epochs has",
                self.total_steps,
            )
        done = (self.n_steps - self.n_warmup_steps) / (self.total_steps - self.n_warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
