"""Neural language models: state carried or not, and the searches that they join."""

import json

import pytest
import torch

from benchmarks.language_models import models, search
from modules.errors import UserError
from modules.language_model import DESCRIPTION, fetch_language_model, load_language_model
from modules.lm.mamba_lm import MambaLM
from modules.search import JointBeamSearch
from tests.search.parts import LAYERS, check_equal, make_memory, make_parts
from tests.search.reference import ReferenceSearch


def make_mamba_lm(vocab=11, seed=0, spread=4.0):
    torch.manual_seed(seed)
    lm = MambaLM(vocab, d_model=8, d_ffn=16, num_layers=2, d_state=4, dropout=0.0)
    with torch.no_grad():
        lm.head.weight.mul_(spread)
    return lm.double().eval()


@pytest.mark.parametrize("pieces", [[1] * 9, [4, 1, 4], [9]])
def test_carried_state_equals_the_whole_sequence(pieces):
    lm = make_mamba_lm()
    tokens = torch.randint(0, 11, (3, 9))
    state, found = lm.start(3), []
    size = [t.shape for layer in state for t in layer]
    for piece in tokens.split(pieces, dim=1):
        logits, state = lm.advance(piece, state)
        found.append(logits)
    torch.testing.assert_close(torch.cat(found, dim=1), lm(tokens), atol=1e-10, rtol=0)
    assert [t.shape for layer in state for t in layer] == size


def test_padding_changes_nothing():
    lm = make_mamba_lm()
    tokens = torch.randint(1, 11, (1, 5))
    padded = torch.cat([tokens, torch.zeros(1, 4, dtype=torch.long)], dim=1)
    torch.testing.assert_close(lm(padded)[:, :5], lm(tokens), atol=1e-12, rtol=0)


class Whole(torch.nn.Module):
    """Hides the state; SpeechBrain's first tokens are floats."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm

    def forward(self, tokens):
        return self.lm(tokens.long())


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("ctc_weight", [0.0, 0.4])
def test_the_search_with_carried_state_is_the_reference(layer, ctc_weight):
    """SpeechBrain's search reads every hypothesis anew."""
    changed = 0
    for seed in range(3):
        parts = make_parts(LAYERS[layer], 11, seed)
        memory, lengths = make_memory(seed, lengths=(9, 5, 1))
        found = {}
        for kind in (JointBeamSearch, ReferenceSearch):
            search = kind(*parts, beam_size=5, ctc_weight=ctc_weight)
            found["without"] = search(memory, lengths)[0]
            lm = make_mamba_lm(seed=seed)
            lm = Whole(lm) if kind is ReferenceSearch else lm
            search.use_language_model(lm, 0.8, temperature=1.2)
            found[kind] = search(memory, lengths)
        check_equal(found[JointBeamSearch], found[ReferenceSearch])
        changed += found[JointBeamSearch][0] != found["without"]
    assert changed


def test_the_benchmark_scores_both():
    for lm in models(11, 8, 1).values():
        assert search(lm.eval(), 3, 4, "cpu") > 0


def write(folder, description, lm):
    folder.mkdir()
    torch.save(lm.state_dict(), folder / "lm.ckpt")
    text = description if isinstance(description, str) else json.dumps(description)
    (folder / DESCRIPTION).write_text(text)
    return folder


SMALL = {"vocab": 11, "d_model": 8, "d_ffn": 16, "num_layers": 2, "d_state": 4, "dropout": 0.0}
MAMBA = {"new": "modules.lm.mamba_lm.MambaLM", **SMALL}


def test_a_description_makes_the_model(tmp_path):
    described = MAMBA | {"activation": {"factory": "torch.nn.GELU"}}
    lm = load_language_model(None, write(tmp_path / "lm", described, make_mamba_lm()))
    assert isinstance(lm, MambaLM) and not lm.training


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("{", "describes no language model"),
        ('["new"]', "describes no language model"),
        (MAMBA | {"new": "os.system"}, "names os.system; known are"),
        (MAMBA | {"activation": {"factory": "os.system"}}, "does not fit its language model"),
        (MAMBA | {"d_model": "wide"}, "does not fit its language model"),
        (MAMBA | {"vocab": 10**15}, "does not fit its language model"),
        (MAMBA | {"vocab": 12}, "do not fit its description"),
    ],
)
def test_descriptions_that_do_not_fit(tmp_path, description, message):
    folder = write(tmp_path / "lm", description, make_mamba_lm())
    with pytest.raises(UserError, match=message):
        load_language_model(None, folder)


@pytest.mark.parametrize(
    "name", ["results/nowhere", "results/LM/mamba/3402", "./someone", "nobody"]
)
def test_a_mistyped_folder_is_not_asked_of_the_hub(tmp_path, monkeypatch, name):
    """Nor is the language model that an earlier command brought taken in its place."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "lm.ckpt").touch()
    with pytest.raises(UserError, match=f"{name} is no folder; give one with tokenizer.ckpt"):
        fetch_language_model(name, tmp_path)
