"""A quantized checkpoint's scores are those of the plain weights that its numbers stand for, and its own."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmdrop_vllm import DropMask
from llmdrop_vllm.artifacts import Scores, read_record
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.checkpoints.dequantizing import dequantized
from llmdrop_vllm.cli import main
from llmdrop_vllm.data.calibration import load_calibration
from llmdrop_vllm.embedded import MODEL
from llmdrop_vllm.scoring import scoring
from llmdrop_vllm.scoring.layers import LayerStream
from tests.architectures.cases import CASES, model_of
from tests.checkpoints.files import token_file
from tests.quantized import PRESETS, quantize


def scores(directory, tokens):
    checkpoint = Checkpoint.open(directory)
    return scoring.score(checkpoint, load_calibration(checkpoint, tokens))


def written_out(source, directory, plain):
    """A dense checkpoint with the values that a quantized one's numbers stand for."""
    (directory).mkdir()
    (directory / "config.json").write_bytes((plain / "config.json").read_bytes())
    tensors = {}
    for name, tensor in dequantized(Checkpoint.open(source)).tensors.items():
        if name.endswith("weight"):
            tensor.read_into(content := bytearray(tensor.num_bytes))
            tensors[name] = torch.frombuffer(content, dtype=torch.bfloat16).view(tensor.shape)
    save_file(tensors, directory / "model.safetensors")
    assert tensors.keys() == load_file(plain / "model.safetensors").keys()
    return directory


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return token_file(tmp_path_factory.mktemp("tokens") / "tokens.json", (100, 60), vocab_size=2048)


@pytest.mark.parametrize("form", PRESETS)
def test_scores_are_those_of_the_plain_weights_and_rank_as_the_originals(form, tokens, tmp_path):
    model = quantize(MODEL, tmp_path / "model", form)
    found = scores(model, tokens)
    dense = scores(written_out(model, tmp_path / "dense", MODEL), tokens)
    assert found.similarity == dense.similarity
    assert found.block_similarity_by_gap == dense.block_similarity_by_gap
    assert found.provenance.model.fingerprint == Checkpoint.open(model).fingerprint
    assert found.provenance.model.fingerprint != dense.provenance.model.fingerprint
    original = scores(MODEL, tokens)
    assert found.similarity != original.similarity
    for kind in ("attention", "mlp", "block"):
        ranks = [np.argsort(np.argsort(getattr(each.similarity, kind))) for each in (found, original)]
        assert np.corrcoef(ranks)[0, 1] > 0.9


def test_a_mixtures_experts_are_unpacked_too(tmp_path):
    plain = CASES["Qwen3MoeForCausalLM"].save(model_of("Qwen3MoeForCausalLM"), tmp_path / "plain")
    model = quantize(plain, tmp_path / "model", "W4A16")
    names = Checkpoint.open(model).tensors
    assert "model.layers.2.mlp.experts.1.down_proj.weight_packed" in names
    tokens = token_file(tmp_path / "tokens.json", (40, 40))
    dense = written_out(model, tmp_path / "dense", plain)
    config = (dense / "config.json").read_text().replace('"float32"', '"bfloat16"')
    (dense / "config.json").write_text(config)
    assert scores(model, tokens).similarity == scores(dense, tokens).similarity


def test_one_layer_is_in_memory_at_a_time_and_takes_what_a_plain_one_does(tmp_path):
    def held(directory):
        stream = LayerStream(
            Checkpoint.open(directory).under(DropMask(12)),
            device=torch.device("cpu"),
            dtype=torch.bfloat16,
            attention="sdpa",
        )
        for index in (1, 2):
            with stream.layer(index):
                pass
        assert all(tensor.is_meta for tensor in stream.model.state_dict().values())
        return sum(map(len, stream.buffers.values()))

    assert held(quantize(MODEL, tmp_path / "model", "W4A16")) == held(MODEL)


def test_its_mask_is_applied_to_the_same_checkpoint(tokens, tmp_path, monkeypatch):
    model = str(quantize(MODEL, tmp_path / "model", "W4A16"))
    monkeypatch.chdir(tmp_path)
    assert main(["score", model, "--data", tokens, "--out", "scores.json"]) == 0
    assert main(["select", "scores.json", "--attention", "4", "--out", "mask.json"]) == 0
    assert main(["apply", model, "out", "--mask", "mask.json"]) == 0
    assert len(Checkpoint.open("out").mask.attention) == 4
    assert read_record(Scores, tmp_path / "scores.json").provenance.dtype == "bfloat16"


def test_what_healing_would_leave_is_not_asked_of_it(tokens, tmp_path, capsys):
    model = quantize(MODEL, tmp_path / "model", "W8A8")
    command = ["score", str(model), "--after-healing", "--data", tokens, "--out", str(tmp_path / "scores.json")]
    assert main(command) == 1
    assert "is quantized; heal in plain weights" in capsys.readouterr().err
    assert not (tmp_path / "scores.json").exists()
