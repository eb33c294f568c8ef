"""What several files here begin with."""

from pathlib import Path

import pytest

from tests.checkpoints import TINY_LLAMA, write_checkpoint
from tests.surgery.files import split


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """A directory with nothing in it but `model`, in two shards and with one file beside them."""
    split(write_checkpoint(tmp_path / "model", TINY_LLAMA), (("model.layers.",),))
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    return tmp_path
