"""SpecAugment without asking the device, and augmentations one after the other."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modules.augmentation import Augmenter, SpectrogramDrop


class Questions(TorchDispatchMode):
    """Counts what makes a host wait for its device: numbers read, sizes that hang on data."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator._schema.name in ("aten::_local_scalar_dense", "aten::nonzero"):
            self.asked.append(operator)
        return operator(*args, **kwargs or {})


def stretches(dropped):
    """How many stretches of True each row (B, N) has, and the longest."""
    edges = torch.nn.functional.pad(dropped.long(), (1, 1)).diff(dim=1)
    lengths = [(row == -1).nonzero().flatten() - (row == 1).nonzero().flatten() for row in edges]
    return [len(x) for x in lengths], max(int(x.max()) for x in lengths if len(x))


def test_drops_as_many_and_as_long_as_told_and_nothing_else():
    torch.manual_seed(0)
    features = torch.rand(200, 300, 80) + 1
    for dim in (1, 2):
        drop = SpectrogramDrop(5, 9, 1, 4, dim=dim)
        counts, longest = set(), 0
        for _ in range(30):
            dropped = drop(features) == 0
            other = dropped.all(dim=3 - dim)
            assert torch.equal(other, dropped.any(dim=3 - dim))  # a stretch drops all of it
            number, length = stretches(other)
            # Two may touch or overlap, but few do; none is longer than they are together.
            counts.add(max(number))
            longest = max(longest, length)
        assert counts == {1, 2, 3, 4}
        assert 8 <= longest <= 4 * 8
        assert len({str(row.tolist()) for row in other}) > 50  # each utterance's its own


def test_a_count_of_zero_leaves_all():
    features = torch.rand(3, 20, 8) + 1
    assert torch.equal(SpectrogramDrop(2, 4, 0, 0)(features), features)


def test_an_augmenter_applies_all_with_its_probability_and_asks_nothing():
    torch.manual_seed(0)
    drops = [SpectrogramDrop(2, 4, 1, 3, dim=dim) for dim in (1, 2)]
    features, lengths = torch.rand(4, 50, 20) + 1, torch.ones(4)
    with Questions() as questions:
        result, same = Augmenter(augmentations=drops)(features, lengths)
        assert not questions.asked
        bool(result.sum())
        assert questions.asked  # so they are counted
    assert (result == 0).all(dim=2).any() and (result == 0).all(dim=1).any()
    assert same is lengths and features.all()
    sometimes = Augmenter(augment_prob=0.3, augmentations=drops)
    changed = sum(not torch.equal(sometimes(features, lengths)[0], features) for _ in range(300))
    assert 50 < changed < 140


def test_an_augmenter_hands_lengths_to_what_wants_them(monkeypatch):
    class Double(torch.nn.Module):
        def forward(self, x, lengths):
            return x * (1 + lengths.view(-1, 1))

    x, lengths = torch.ones(2, 3), torch.tensor([1.0, 0.5])
    augmenter = Augmenter(augmentations=[Double(), Double()])
    # What takes lengths is found out once, not for every batch.
    monkeypatch.setattr("modules.augmentation.lengths_arg_exists", None)
    result, _ = augmenter(x, lengths)
    assert torch.equal(result, torch.tensor([[4.0] * 3, [2.25] * 3]))


def test_what_an_augmenter_does_not_do_is_refused():
    """SpeechBrain's arguments would be taken, and have no effect."""
    for make in (
        lambda: Augmenter([], shuffle_augmentations=True),
        lambda: SpectrogramDrop(replace="mean"),
    ):
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            make()


def test_an_augmentation_may_change_the_lengths():
    class Half(torch.nn.Module):
        def forward(self, x, lengths):
            return x[:, ::2], lengths / 2

    x, lengths = Augmenter([Half(), Half()])(torch.ones(2, 8), torch.ones(2))
    assert x.shape == (2, 2) and lengths.tolist() == [0.25, 0.25]
