"""Mamba-2 and subsampling by 8 in a package: streamed and exported as any other."""

import json
import shutil

import pytest
import torch

from inference import Recognizer
from inference.export import export
from inference.files import model_of
from inference.parts import build_parts
from inference.streaming_ctc import StreamingCTC
from tests.recipes.causal import causal_package, speech
from tests.test_streaming_recognizer import one_pass, packets


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A causal package of random weights with both."""
    folder = tmp_path_factory.mktemp("choices") / "package"
    shutil.copytree(causal_package(), folder)
    config = json.loads((folder / "config.json").read_text())
    mixer = {"factory": "modules.mamba2.Mamba2", "d_state": 4, "d_head": 16}
    config["parts"]["encoder"]["mixer"] = mixer
    config["parts"]["frontend"] |= {"channels": [8, 8, 8], "separable": True}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    torch.save(model_of(build_parts(config["parts"])).state_dict(), folder / "model.ckpt")
    return folder


@pytest.mark.parametrize("samples", [1, 1279, 24000])
def test_a_stream_is_one_pass(package, samples):
    recognizer, x = Recognizer.from_folder(package, device="cpu"), speech(4, gap=0.6)[0][:samples]
    assert recognizer.seconds_per_frame == 0.08
    for size in (160, 5120, "random", "all"):
        ctc = StreamingCTC(recognizer)
        results = [ctc.advance(torch.from_numpy(packet)) for packet in packets(x, size)]
        results.append(ctc.advance(torch.zeros(0), final=True))
        torch.testing.assert_close(torch.cat(results), one_pass(recognizer, x), atol=1e-4, rtol=0)


def test_its_steps_are_exported(package, tmp_path):
    _, found = export(package, "torchscript", tmp_path / "a.ts", streaming=True)
    assert found.largest < 1e-4
