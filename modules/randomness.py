"""Random numbers that come out the same in a run that was stopped and continued."""

import contextlib
import hashlib
import random

import numpy as np
import torch


def generator_states():
    """The states of all generators that training draws from: python, numpy, PyTorch's; plain data.

    Of several CUDA devices only the current one's is meant: a process has one.
    """
    kind, keys, *rest = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "cpu": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():  # a run on the CPU leaves the GPU alone
        states["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_generator_states(states):
    """Put the generators back; those of a device that is not here any more are left out."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states["cuda"])
    if "mps" in states and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"])


@contextlib.contextmanager
def seeded(*key):
    """Draw on the CPU from generators that a key alone decides, and leave the others as they were.

    An utterance's augmentation by (seed, epoch, id) is the same in whichever process, and after
    whatever else, it is read.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    number = int.from_bytes(digest[:8], "little") >> 1
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.default_generator.manual_seed(number)  # torch.manual_seed would seed CUDA as well
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
