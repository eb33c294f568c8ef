"""llm-compressor's environment: made once, made anew where it was interrupted or other versions are wanted."""

from pathlib import Path

import pytest

import llmdrop_vllm
from llmdrop_vllm.errors import InputError
from llmdrop_vllm.quantizing import environment as room
from llmdrop_vllm.quantizing.environment import READY, environment, pins


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """What would be run: a venv is only its directories."""
    monkeypatch.setenv("LLMDROP_CACHE", str(tmp_path))
    found = []

    def run(command):
        found.append(command[1:4])
        if command[2] == "venv":
            (Path(command[3]) / "lib" / "python3.11" / "site-packages").mkdir(parents=True)

    monkeypatch.setattr(room, "_run", run)
    return found


def test_it_is_made_once_and_sees_this_package(commands, tmp_path):
    assert environment() == environment() == tmp_path / "quantize" / "venv" / "bin" / "python"
    assert [each[:2] for each in commands] == [["-m", "venv"], ["-m", "pip"]]
    link = tmp_path / "quantize" / "venv" / "lib" / "python3.11" / "site-packages" / "llmdrop_vllm"
    assert link.resolve() == Path(llmdrop_vllm.__file__).parent.resolve()


def test_an_interrupted_one_and_one_of_other_versions_are_made_anew(commands, tmp_path, monkeypatch):
    environment()
    (tmp_path / "quantize" / "venv" / READY).unlink()
    (tmp_path / "quantize" / "venv" / "left").touch()
    environment()
    assert not (tmp_path / "quantize" / "venv" / "left").exists()
    monkeypatch.setattr(room, "PINS", ("llmcompressor==99",))
    environment()
    assert len(commands) == 6
    assert (tmp_path / "quantize" / "venv" / READY).read_text().split() == [*pins()]


def test_pips_last_words_say_why_it_cannot_be_made(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMDROP_CACHE", str(tmp_path))
    monkeypatch.setattr(room, "PINS", ("no-such-package-of-llmdrop==1",))
    monkeypatch.setattr(room, "pins", lambda: ("no-such-package-of-llmdrop==1",))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(InputError, match=r"cannot be made: -m pip install \.\.\.: ERROR: No matching distribution"):
        environment()
    assert not (tmp_path / "quantize" / "venv" / READY).exists()
