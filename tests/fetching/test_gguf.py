"""A GGUF file becomes the checkpoint that it was made from."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.embedded import MODEL
from llmdrop_vllm.errors import CheckpointError
from llmdrop_vllm.fetching.fetch import fetch
from tests.fetching.files import write_gguf

TEXT = "def join(a, *p): return 2024"


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("gguf")
    return fetch(str(write_gguf(directory / "model.gguf")), directory / "out")


def test_weights_and_tokens_are_those_of_the_model(converted):
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert tokenizer(TEXT)["input_ids"] == AutoTokenizer.from_pretrained(MODEL)(TEXT)["input_ids"]
    token_ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    with torch.no_grad():
        ours, theirs = (
            AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32)(token_ids).logits
            for each in (converted, MODEL)
        )
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_it_is_an_ordinary_checkpoint_in_bfloat16(converted):
    checkpoint = Checkpoint.open(converted)
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {"BF16"}
    assert not checkpoint.is_quantized
    assert checkpoint.architecture == "LlamaForCausalLM"
    assert json.loads((converted / "generation_config.json").read_text())["eos_token_id"] == 0
    assert (converted / "chat_template.jinja").read_text() == (MODEL / "chat_template.jinja").read_text()
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in converted.iterdir())


def test_texts_begin_as_the_model_has_seen_them(tmp_path):
    """Transformers does not take this over from the file; Gemma 3 repeats one word for ever without it."""
    found = fetch(str(write_gguf(tmp_path / "model.gguf", add_bos=True)), tmp_path / "out")
    plain = AutoTokenizer.from_pretrained(MODEL)(TEXT)["input_ids"]
    tokenizer = AutoTokenizer.from_pretrained(found)
    assert tokenizer(TEXT)["input_ids"] == [1, *plain]
    assert tokenizer(TEXT, add_special_tokens=False)["input_ids"] == plain


def test_a_file_that_ends_early_is_refused_in_one_line(tmp_path):
    path = write_gguf(tmp_path / "model.gguf")
    path.write_bytes(path.read_bytes()[:200_000])
    with pytest.raises(CheckpointError, match=f"{path} cannot be converted: ") as caught:
        fetch(str(path), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
