"""The shipped YAML files: they load anywhere, have the published sizes, and form families."""

import functools
import json
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import yaml

from modules.options import RUN_OPTIONS

ROOT = Path(__file__).parents[1]
FILES = sorted(str(p.relative_to(ROOT / "hparams")) for p in ROOT.glob("hparams/*/*.yaml"))
RECIPES = [name for name in FILES if name.startswith(("CTC", "S2S"))]
# What else a file of the family could differ in.
OF_ONE_CORPUS = {
    "CTC/conmamba_digits_tiny.yaml",
    "CTC/conmamba_digits_small.yaml",
    "CTC/conmamba_hour_small.yaml",
    "CTC/conformer_hour_small.yaml",
}

# SPEC section 3: millions, with 5000 (S2S) or 31 (CTC) tokens.
PUBLISHED = {
    "S2S/conformer_small.yaml": 13.327,
    "S2S/conmamba_small.yaml": 14.076,
    "S2S/conmambamamba_small.yaml": 14.571,
    "S2S/conformer_large.yaml": 109.136,
    "S2S/conmamba_large.yaml": 115.188,
    "S2S/conmambamamba_large.yaml": 122.917,
    "CTC/conformer_large.yaml": 28.786,
    "CTC/conmamba_large.yaml": 31.556,
}
WANTED = {
    *PUBLISHED,
    "CTC/conmamba_small.yaml",
    "CTC/conformer_small.yaml",
    "CTC/conmamba_tiny.yaml",
    "CTC/conmamba_causal_small.yaml",
    "CTC/conmamba_causal_tiny.yaml",
    "CTC/conmamba_chunked_small.yaml",
    "CTC/conmamba_chunked_tiny.yaml",
    "CTC/conformer_tiny.yaml",
    "S2S/conmamba_tiny.yaml",
    "S2S/conmamba_causal_small.yaml",
    "S2S/conmamba_causal_tiny.yaml",
    "S2S/conmamba_chunked_small.yaml",
    "S2S/conmamba_chunked_tiny.yaml",
    "S2S/conmambamamba_tiny.yaml",
}
# Names that command lines of the published recipe use.
OLD_KEYS = (
    "data_folder output_folder train_splits dev_splits test_splits skip_prep skip_train no_lm "
    "number_of_epochs batch_size num_workers precision dynamic_batching max_batch_length_train "
    "max_batch_length_val grad_accumulation_factor max_grad_norm d_model num_encoder_layers d_ffn "
    "avg_checkpoints test_beam_size lm_weight use_wandb wandb_project resume "
    "gradient_checkpointing seed"
)
OLD_S2S_KEYS = {"lr_adam", "num_decoder_layers", "valid_beam_size", "ctc_weight_decode"}
OLD_MAMBA_KEYS = {"d_state", "expand", "d_conv"}

# What makes a variant: its mixer, its decoder, and how the published runs of that size differ.
VARIANT_KEYS = (
    "output_folder encoder decoder activation decoder_activation nhead d_state expand d_conv "
    "initialization scan_backend grad_accumulation_factor n_warmup_steps top_db compute_features "
    "chunks chunk_size lookahead chunkwise_prob chunk_size_min chunk_size_max "
    "alphabet output_neurons token_type pretrained_lm_tokenizer_path tokenizer"
)

LOAD_ALL = """
import json, socket, sys
def refuse(*args, **kwargs):
    raise AssertionError("loading a YAML file opened a connection")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
for name in ("wandb", "mamba_ssm", "causal_conv1d", "kenlm"):
    sys.modules[name] = None  # any import of it fails
from hyperpyyaml import load_hyperpyyaml
sizes = {}
for name in sys.argv[2:]:
    with open(f"{sys.argv[1]}/{name}") as f:
        hparams = load_hyperpyyaml(f)
    model = hparams.get("model")
    sizes[name] = sum(p.numel() for p in model.parameters()) if model is not None else None
print(json.dumps(sizes))
"""


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    """Every file loaded by a process that is in another folder and has no network: {file: n}."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD_ALL, str(ROOT / "hparams"), *FILES],
        capture_output=True,
        text=True,
        cwd=tmp_path_factory.mktemp("elsewhere"),
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@functools.cache
def nodes(name):
    """Top-level keys of a file, each with its value as text."""
    root = yaml.compose((ROOT / "hparams" / name).read_text())
    return {key.value: yaml.serialize(value) for key, value in root.value}


def test_all_are_there():
    assert set(FILES) >= WANTED


def test_every_file_loads_without_network_wandb_or_cuda_packages(sizes):
    assert set(sizes) == set(FILES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(sizes, name):
    assert round(sizes[name] / 1e6, 3) == PUBLISHED[name]


@pytest.mark.parametrize("name", RECIPES)
def test_old_keys(name):
    wanted = set(OLD_KEYS.split())
    wanted |= {"lr_model"} if name.startswith("CTC") else OLD_S2S_KEYS
    if "mamba" in name:
        wanted |= OLD_MAMBA_KEYS
    assert wanted <= nodes(name).keys()


def families():
    """Pairs of files of one recipe and size."""
    for a, b in combinations(sorted(set(RECIPES) - OF_ONE_CORPUS), 2):
        if a[:3] == b[:3] and a.rpartition("_")[2] == b.rpartition("_")[2]:
            yield a, b


@pytest.mark.parametrize(("a", "b"), families())
def test_files_of_one_size_differ_in_their_variant_alone(a, b):
    left, right = nodes(a), nodes(b)
    differing = {key for key in left.keys() | right.keys() if left.get(key) != right.get(key)}
    assert differing <= set(VARIANT_KEYS.split())


def test_families_cover_every_recipe():
    assert {name for pair in families() for name in pair} == set(RECIPES) - OF_ONE_CORPUS


@functools.cache
def code():
    files = [*ROOT.glob("modules/**/*.py"), *ROOT.glob("train_*.py")]
    return "\n".join(p.read_text() for p in files)


def read_in_code(key):
    """As hparams.key, hparams["key"], hparams.get("key") or getattr(hparams, "key").

    Keys that are SpeechBrain's run options are read by its Brain.
    """
    name = rf'["\']{key}["\']'
    pattern = rf"hparams\.{key}\b|\[{name}\]|\.get\({name}|hparams, {name}"
    return key in RUN_OPTIONS or re.search(pattern, code()) is not None


@pytest.mark.parametrize("name", FILES)
def test_every_key_is_used(name):
    values = nodes(name)
    unused = [
        key
        for key in values
        if not any(f"<{key}>" in text or f"<{key}[" in text for text in values.values())
        and not read_in_code(key)
        and "!apply" not in values[key]
    ]
    assert not unused
