"""A checkpoint appears whole or not at all, whatever ends the process."""

import os
import shutil
import signal
import sys
import traceback
from pathlib import Path

import pytest

from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.errors import CheckpointError, OutputError
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.writing import staging
from llmdrop_vllm.writing.plan import plan_surgery
from llmdrop_vllm.writing.write import write_checkpoint as write
from tests.checkpoints.files import MASK, SMALL, content, put_nan, split
from tests.tiny import write_checkpoint


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, OSError(28, "No space left on device"), FileNotFoundError(2, "?")]
)
def test_an_interrupted_run_leaves_nothing_behind(error, parent):
    def fail(_):
        raise error

    plan, before = plan_surgery(parent / "model", MASK), content(parent)
    with pytest.raises((KeyboardInterrupt, OutputError)):
        write(plan, parent / "a" / "b" / "out", progress=fail)
    assert content(parent) == before
    write(plan, parent / "a" / "b" / "out")


@pytest.mark.parametrize("atomic", [True, False])
def test_overwriting_replaces_all_of_the_old_checkpoint(atomic, parent, monkeypatch):
    if not atomic:
        monkeypatch.setattr(staging, "_exchange", lambda *_: False)
    write_checkpoint(parent / "out", SMALL)
    (parent / "out" / "left-over").write_text("")
    plan = plan_surgery(parent / "model", MASK)
    write(plan, parent / "out", overwrite=True)
    write(plan, parent / "fresh")
    assert content(parent / "out") == content(parent / "fresh")
    assert sorted(path.name for path in parent.iterdir()) == ["fresh", "model", "out"]


def test_the_new_checkpoint_is_on_the_disk_before_the_old_one_goes(parent, monkeypatch):
    """A power cut after that must not find neither."""
    write_checkpoint(parent / "out", SMALL)
    synced, exchange = set(), staging._exchange
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))

    def check(partial, out):
        assert synced == {path.stat().st_ino for path in (partial, *partial.rglob("*"))}
        return exchange(partial, out)

    monkeypatch.setattr(staging, "_exchange", check)
    write(plan_surgery(parent / "model", MASK), parent / "out", overwrite=True)
    assert len(synced) == 1 + len(content(parent / "out"))


def test_a_failed_overwrite_leaves_the_old_checkpoint(parent):
    write_checkpoint(parent / "out", SMALL)
    put_nan(parent / "model")
    before = content(parent)
    with pytest.raises(CheckpointError, match="holds NaN"):
        write(plan_surgery(parent / "model", MASK), parent / "out", overwrite=True)
    assert content(parent) == before


def test_two_processes_do_not_write_the_same_place(parent):
    plan, refused = plan_surgery(parent / "model", MASK), []

    def second(_):
        with pytest.raises(OutputError, match="in use: another process is writing"):
            write(plan, parent / "out", overwrite=True)
        refused.append(True)

    write(plan, parent / "out", progress=second)
    assert refused
    assert Checkpoint.open(parent / "out").mask == MASK


def test_what_others_put_there_meanwhile_is_never_replaced_unasked(parent):
    """Writing takes minutes, and another tool may make a directory of the same name."""

    def meanwhile(_):
        (parent / "out").mkdir(exist_ok=True)
        (parent / "out" / "precious").write_text("mine")

    with pytest.raises(OutputError, match="out exists"):
        write(plan_surgery(parent / "model", MASK), parent / "out", progress=meanwhile)
    assert content(parent / "out") == {"precious": b"mine"}
    assert sorted(path.name for path in parent.iterdir()) == ["model", "out"]


MOMENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "ctypes.dlsym", "progress"}


def killed_at(moment: int, run) -> bool:
    """Run in a child process that gets SIGKILL before its n-th step in the file system; False if it ended before."""
    child = os.fork()
    if child == 0:
        steps = 0

        def count(event, _):
            nonlocal steps
            if event in MOMENTS:
                steps += 1
                if steps > moment:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        try:
            run()
            os._exit(0)
        finally:
            traceback.print_exc()
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


@pytest.mark.parametrize("place", ["free", "taken", "taken, without an atomic exchange"])
def test_kill_9_at_any_moment_leaves_no_checkpoint_or_a_whole_one(place, tmp_path, monkeypatch):
    """A child is killed before each of its steps in turn; after every one of them the next run finds its way."""
    if place.endswith("exchange"):
        monkeypatch.setattr(staging, "_exchange", lambda *_: False)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # slow, and of no matter to a killed process
    small, out = SMALL | {"num_hidden_layers": 2}, tmp_path / "out"
    model = split(write_checkpoint(tmp_path / "model", small), (("model.layers.",),))
    (model / "tokenizer.json").write_text("{}")
    plan = plan_surgery(model, DropMask(2, attention=(1,), mlp=(0,)))
    old = content(write_checkpoint(tmp_path / "old", small))
    overwrite = place != "free"

    def run():
        write(plan, out, overwrite=overwrite, progress=lambda _: sys.audit("progress"))

    write(plan, out)
    new, before = content(out), content(model)
    moments, states = 0, set()
    while True:
        shutil.rmtree(out, ignore_errors=True)
        if overwrite:
            shutil.copytree(tmp_path / "old", out)
        if not killed_at(moments, run):
            break
        found = content(out) if out.exists() else None
        whole = {"none": None, "new": new, "old": old}
        states.add(next(name for name, expected in whole.items() if found == expected))
        assert content(model) == before
        write(plan, out, overwrite=True)
        assert content(out) == new
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "old", "out"]
        moments += 1
    assert content(out) == new
    assert moments > 20
    # Nothing follows the rename to a free place that a process could be killed before.
    expected = {"free": {"none"}, "taken": {"old", "new"}}
    assert states == expected.get(place, {"old", "none", "new"})


def test_the_next_run_restores_what_a_killed_one_had_moved_away(parent):
    """Between the two renames, where there is no atomic exchange; without --overwrite, too, the old one is back."""
    old = content(write_checkpoint(parent / ".out.llmdrop-replaced", SMALL))
    Path(parent / ".out.llmdrop-partial").mkdir()
    with pytest.raises(OutputError, match="out exists"):
        write(plan_surgery(parent / "model", MASK), parent / "out")
    assert content(parent / "out") == old
    assert sorted(path.name for path in parent.iterdir()) == ["model", "out"]
