"""A checkpoint folder of SpeechBrain's Conformer recipe, whose names the published code shares."""

import subprocess
import sys
from pathlib import Path

import pytest
import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.lobes.models.convolution import ConvolutionFrontEnd
from speechbrain.lobes.models.transformer.TransformerASR import TransformerASR
from speechbrain.utils.checkpoints import Checkpointer

from modules.convert import convert_folder, read_alphabet, read_meta
from modules.errors import UserError

ROOT = Path(__file__).parents[1]
YAML = ROOT / "hparams/S2S/conformer_small.yaml"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """SpeechBrain's own modules and the CKPT+ folder that its checkpointer would write."""
    torch.manual_seed(0)
    frontend = ConvolutionFrontEnd(
        input_shape=(None, None, 80),
        num_blocks=2,
        num_layers_per_block=1,
        out_channels=[64, 32],
        kernel_sizes=[3, 3],
        strides=[2, 2],
        dilations=[1, 1],
        residuals=[False, False],
    )
    transformer = TransformerASR(
        input_size=640,
        tgt_vocab=5000,
        d_model=144,
        nhead=4,
        num_encoder_layers=12,
        num_decoder_layers=4,
        d_ffn=1024,
        activation=torch.nn.GELU,
        encoder_module="conformer",
        attention_type="RelPosMHAXL",
        normalize_before=True,
        causal=False,
    )
    heads = [sb.nnet.linear.Linear(input_size=144, n_neurons=5000) for _ in range(2)]
    model = torch.nn.ModuleList([frontend, transformer, *heads]).eval()
    folder = tmp_path_factory.mktemp("published") / "CKPT+2024-01-01+00-00-00+00"
    folder.mkdir()
    torch.save(model.state_dict(), folder / "model.ckpt")
    stats = {"count": 3, "glob_mean": torch.randn(80), "glob_std": torch.rand(80) + 0.5}
    torch.save({**stats, "spk_dict_mean": {}}, folder / "normalizer.ckpt")
    (folder / "CKPT.yaml").write_text("ACC: 0.91\nepoch: 110\nend-of-epoch: true\n")
    return model, folder, stats


def test_the_converted_run_gives_the_published_outputs(published, tmp_path):
    model, folder, stats = published
    output = tmp_path / "converted"
    command = [sys.executable, "-m", "modules.convert", str(folder), str(YAML), str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with open(output / "hyperparams.yaml", encoding="utf-8") as f:
        hparams = load_hyperpyyaml(f)
    checkpointer = Checkpointer(
        output / "save", {"model": hparams["model"], "normalizer": hparams["normalize"]}
    )
    found = checkpointer.recover_if_possible(max_key="ACC")
    assert found.meta["epoch"] == 110
    torch.testing.assert_close(hparams["normalize"].glob_mean, stats["glob_mean"])

    features, tokens = torch.randn(1, 101, 80), torch.randint(3, 5000, (1, 7))
    frontend, transformer, seq_head, ctc_head = model
    hparams["model"].eval()
    with torch.no_grad():
        x = frontend(features)
        memory, decoded = transformer(x, tokens, torch.ones(1), pad_idx=0)
        ours, lengths = hparams["frontend"](features, torch.tensor([101]))
        ours, lengths = hparams["encoder"](ours, lengths)
        out, _ = hparams["decoder"](tokens, torch.tensor([7]), ours, lengths)
        for got, want in [
            (ours, memory),
            (hparams["ctc_head"](ours), ctc_head(memory)),
            (hparams["seq_head"](out), seq_head(decoded)),
        ]:
            torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_what_does_not_fit_is_an_error_and_writes_nothing(published, tmp_path):
    _, folder, _ = published
    output = tmp_path / "converted"
    with pytest.raises(UserError, match=r"holds no model\.ckpt"):
        convert_folder(tmp_path, YAML, output)
    with pytest.raises(UserError, match="missing weight"):
        convert_folder(folder, ROOT / "hparams/S2S/conmamba_small.yaml", output)
    with pytest.raises(UserError, match="use an S2S file"):
        convert_folder(folder, ROOT / "hparams/CTC/conformer_small.yaml", output)
    assert not output.exists()


def test_a_wrong_weight_is_named(published, tmp_path):
    model, _, _ = published
    folder = tmp_path / "CKPT+2024"
    folder.mkdir()
    state = model.state_dict()
    torch.save({**state, "1.encoder.surprise": torch.ones(1)}, folder / "model.ckpt")
    with pytest.raises(UserError, match=r"encoder\.surprise"):
        convert_folder(folder, YAML, tmp_path / "out")
    torch.save({"weight": torch.ones(1)}, folder / "model.ckpt")
    with pytest.raises(UserError, match="not a checkpoint of the published recipes"):
        convert_folder(folder, YAML, tmp_path / "out")


def test_files_of_something_else_are_told(tmp_path):
    folder, shipped = tmp_path / "CKPT+2024", ROOT / "hparams/CTC/conmamba_tiny.yaml"
    folder.mkdir()
    torch.save([torch.ones(1)], folder / "model.ckpt")
    (tmp_path / "broken.yaml").write_text("a: [")
    (tmp_path / "thin.yaml").write_text("seed: 1")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for yaml_file, labels, message in (
        (tmp_path / "nowhere.yaml", None, "there is no file"),
        (tmp_path / "broken.yaml", None, "not a HyperPyYAML file"),
        (tmp_path / "thin.yaml", None, "'output_folder' not found"),
        (shipped, tmp_path / "bytes", "no label encoder's text"),
        (shipped, None, "holds no weights by name"),
    ):
        with pytest.raises(UserError, match=message):
            convert_folder(folder, yaml_file, tmp_path / "out", labels)
    assert not (tmp_path / "out").exists()
    (folder / "CKPT.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"CKPT\.yaml is no YAML file"):
        read_meta(folder)


def test_the_alphabet_comes_from_the_label_encoder(tmp_path):
    path = tmp_path / "label_encoder.txt"
    lines = ["'<blank>' => 0", "'<bos>' => 1", "'<eos>' => 2", "'T' => 4", '"\'" => 5', "' ' => 3"]
    path.write_text("\n".join([*lines, "================", "'starting_index' => 0"]))
    assert read_alphabet(path) == " T'"
    path.write_text("'<blank>' => 0\n'TH' => 3\n")
    with pytest.raises(UserError, match="one character an id"):
        read_alphabet(path)
