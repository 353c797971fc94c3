"""Gradients of a step's batches, added up where the device decides which of them count."""

from modules.graphs import flat_gradients


class GradientSum:
    """The sum over a step's batches, without those whose loss is not finite.

    A gradient of NaN cannot be taken out of a sum again, and who asks before it is added waits for
    the device. So it is left out there.

    Arguments
    ---------
    parameters : iterable
        What is learnt.
    """

    def __init__(self, parameters):
        self.parameters = [p for p in parameters if p.requires_grad]
        self.flat, self.gradients, _ = flat_gradients(self.parameters)
        self.empty = True

    def add(self, good, flat=None):
        """Take the parameters' gradients away and add them, if `good`, a bool () on their device.

        flat: they all in one tensor, as `flat_gradients` lays them out, or None.
        """
        if self.empty:  # whatever the last step left
            self.flat.zero_()
            self.empty = False
        if flat is not None:
            self.flat.add_(flat.masked_fill_(~good, 0.0))
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            if flat is None and parameter.grad is not None:
                gradient.add_(parameter.grad.masked_fill(~good, 0.0))
            parameter.grad = None

    def give(self):
        """Let the parameters have the sum for their gradients."""
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient

    def forget(self):
        """Begin anew with the next batch."""
        self.empty = True
