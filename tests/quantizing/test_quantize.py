"""Quantized for real, by llm-compressor: needs its environment, which `make quantize-setup` makes."""

import json

import pytest
import torch

from llmdrop_vllm.artifacts import HEAL_FILE
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.cli import main
from llmdrop_vllm.embedded import MODEL
from llmdrop_vllm.fetching.fetch import cache_directory
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.quantizing import quantize as room
from llmdrop_vllm.quantizing.environment import READY
from llmdrop_vllm.quantizing.schemes import Scheme
from llmdrop_vllm.writing.plan import plan_surgery
from llmdrop_vllm.writing.write import write_checkpoint as write
from tests.engines import engine, greedy, kv_tokens

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(
        not (cache_directory() / "quantize" / "venv" / READY).is_file(), reason="make quantize-setup was not run"
    ),
]
# On a CPU without AVX-512 it was 0.27; presumably 8-bit products saturate there, which was not looked into.
INT8 = 0.1 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 0.5
MASK = DropMask(12, attention=(11, 7), mlp=(6,))
PROMPT = [*range(3, 60)]


@pytest.fixture(scope="module")
def dropped(tmp_path_factory):
    """The embedded model without three sublayers, healed, and what it computes."""
    home = tmp_path_factory.mktemp("dropped")
    write(plan_surgery(MODEL, MASK), home / "unhealed")
    out, text = home / "model", ["--samples", "8", "--seq-len", "64"]
    assert main(["heal", str(home / "unhealed"), str(out), "--teacher", str(MODEL), *text]) == 0
    with engine(out, dtype="bfloat16") as llm:
        return out, greedy(llm, PROMPT)[2], kv_tokens(llm)


@pytest.mark.parametrize(
    ("scheme", "options", "bits", "furthest"),
    [("w8a8", [], 8, INT8), ("w4a16", ["--samples", "8", "--seq-len", "128"], 4, 1.0), ("fp8", [], 8, 0.2)],
)
def test_a_dropped_model_is_quantized_and_served(scheme, options, bits, furthest, dropped, tmp_path, capsys):
    source, expected, tokens = dropped
    data = options or ([] if scheme == "fp8" else ["--data", "none"])
    assert main(["quantize", str(source), str(tmp_path / "out"), "--scheme", scheme, *data]) == 0
    assert f"in {10 * 4 + 11 * 3} linear layers, " in capsys.readouterr().out
    found, before = Checkpoint.open(tmp_path / "out"), Checkpoint.open(source)
    assert (found.mask, found.is_quantized, found.is_stripped) == (MASK, True, True)
    assert found.config["architectures"] == before.config["architectures"]
    sizes = [sum(each.num_bytes for each in model.tensors.values()) for model in (found, before)]
    assert sizes[0] < sizes[1] * (0.7 if bits == 8 else 0.55)
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", HEAL_FILE):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    record = json.loads((tmp_path / "out" / "llmdrop_quantize.json").read_text())
    assert (record["scheme"], bool(record["data"])) == (scheme, bool(options))
    with engine(tmp_path / "out", dtype="bfloat16") as llm:
        served = greedy(llm, PROMPT)[2]
        assert kv_tokens(llm) == tokens
    apart = (torch.tensor(served) - torch.tensor(expected)).abs()
    assert 0 < apart.mean() < furthest
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_llm_compressor_cannot_do_leaves_nothing_behind(dropped, tmp_path, capsys, monkeypatch):
    source, _, _ = dropped
    monkeypatch.setattr(room, "SCHEMES", {"fp8": Scheme("NO_SUCH_PRESET", "nothing", calibrated=False)})
    assert main(["quantize", str(source), str(tmp_path / "out"), "--scheme", "fp8"]) == 1
    assert "llm-compressor has ended with status 1" in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == []
