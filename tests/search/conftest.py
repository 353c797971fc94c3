"""Every search test runs on one thread, and those that take `layer` run with both decoders."""

import pytest
import torch

from tests.search.parts import LAYERS


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny tensors: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=LAYERS)
def layer(request):
    return LAYERS[request.param]
