"""Checkpoints that several files of tests begin with."""

from pathlib import Path

import pytest

from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.data.calibration import load_calibration
from llmdrop_vllm.data.tokens import Calibration
from tests.checkpoints.files import split, token_file
from tests.tiny import TINY_LLAMA, write_checkpoint


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Calibration]:
    """An untouched checkpoint of 8 layers, and token ids in sequences of different lengths."""
    directory = tmp_path_factory.mktemp("tiny")
    checkpoint = Checkpoint.open(write_checkpoint(directory / "model", TINY_LLAMA))
    return checkpoint, load_calibration(checkpoint, token_file(directory / "data.json", (20, 20, 20, 33, 7)))


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """A directory with nothing in it but `model`, in two shards and with one file beside them."""
    split(write_checkpoint(tmp_path / "model", TINY_LLAMA), (("model.layers.",),))
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    return tmp_path
