"""Files are written whole or not at all, and what cannot be written is said in one way."""

from pathlib import Path

import pytest

from llmdrop_vllm.artifacts import write_atomically
from llmdrop_vllm.errors import OutputError


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("old")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize(
    ("name", "problem"),
    [("x" * 250, "File name too long"), ("file/inside", "Not a directory"), ("no/such", "No such file or directory")],
)
def test_a_place_that_cannot_be_written_to_is_named(name, problem, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=f"{name} cannot be written: {problem}"):
        write_atomically(tmp_path / name, "new")
