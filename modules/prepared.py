"""What a network computes from its weights alone, once for many batches without gradients.

Cast, stacked and padded anew in every replay of a CUDA graph, the weights of a small model take a
tenth of its kernels' time.
"""

import contextlib
import itertools

import torch
from torch.nn.utils.stateless import _reparametrize_module

from modules.casting import weights_of_products


class Prepared:
    """Runs a network, without gradients, on weights that `refresh` has prepared.

    A module that has `derive()`, which gives a tuple of tensors, finds what it gave in `derived`.
    Graphs that were recorded of it read the same memory, whatever the weights have become.

    Arguments
    ---------
    network : callable
        network(*tensors), run under the autocast that `refresh` is called under.
    modules : nn.Module
        All whose parameters it uses.
    """

    def __init__(self, network, modules):
        self.network, self.modules = network, modules
        self.names = [name for name, _ in weights_of_products(modules)]
        self.deriving = [m for m in modules.modules() if hasattr(m, "derive")]
        self.seen, self.half, self.copies, self.derived = None, False, [], []

    def __call__(self, *inputs):
        with self.weights_cast(), self.with_derived():
            return self.network(*inputs)

    def forget(self):
        """Let `refresh` prepare the weights: they may have changed unseen, by a fused optimizer."""
        self.seen = None

    @torch.no_grad()
    def refresh(self):
        """Prepare the weights, if any has been seen to change, or after `forget`."""
        parameters = list(self.modules.parameters())
        device = parameters[0].device.type
        half = torch.is_autocast_enabled(device)
        seen = [half, *((p.data_ptr(), p._version) for p in parameters)]
        if seen == self.seen:
            return
        self.half = half
        if half:
            weights = [self.modules.get_parameter(name) for name in self.names]
            if not self.copies:
                dtype = torch.get_autocast_dtype(device)
                self.copies = [torch.empty_like(w, dtype=dtype) for w in weights]
            torch._foreach_copy_(self.copies, weights)
        with self.weights_cast():
            derived = [module.derive() for module in self.deriving]
        if not self.derived:
            self.derived = [type(d)(*(x.clone() for x in d)) for d in derived]
            for x in itertools.chain(*self.derived):  # its sizes have nothing to do with a batch's
                torch._dynamo.mark_static(x)
        else:
            for old, new in zip(self.derived, derived, strict=True):
                torch._foreach_copy_(list(old), list(new))
        self.seen = seen

    def weights_cast(self):
        if not self.half:
            return contextlib.nullcontext()
        return _reparametrize_module(self.modules, dict(zip(self.names, self.copies, strict=True)))

    @contextlib.contextmanager
    def with_derived(self):
        for module, derived in zip(self.deriving, self.derived, strict=True):
            module.derived = derived
        try:
            yield
        finally:
            for module in self.deriving:
                module.derived = None
