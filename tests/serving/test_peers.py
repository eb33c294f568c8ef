"""Ranks of several nodes: when one ends, in whatever way, the others end with a line that names it."""

import logging
import multiprocessing
import os
import signal
import socket
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from llmdrop_vllm.serving.peers import DOOR, go_in, logger, open_door

HOSTS = ["first", "second"]
IN_S = 30


def rank(number, port, ends, visitor, log):
    """A rank that works until it is ended, or ends itself without a word."""
    logging.getLogger("vllm.llmdrop").addHandler(logging.FileHandler(log))
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=IN_S))
    if number == 0:
        open_door(store, HOSTS)
    elif visitor:
        socket.create_connection(("127.0.0.1", int(store.get(DOOR).split()[0]))).sendall(bytes(20))
    else:
        go_in(store, "127.0.0.1", number, HOSTS)
    time.sleep(1)
    if number == ends:
        os._exit(0)
    time.sleep(2 if visitor else IN_S)
    os._exit(7)


def engine(number, *what):
    """What a rank works for, and waits for."""
    worker = multiprocessing.get_context("fork").Process(target=rank, args=(number, *what))
    worker.start()
    worker.join()
    time.sleep(IN_S)


@pytest.fixture
def run(tmp_path):
    """A function that gives the exit codes of two ranks, of which one ends; an engine of that name has the other."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("fork")

    def run(ends, visitor=False, name=None):
        ranks = [
            context.Process(
                target=engine if name and number != ends else rank,
                name=name,
                args=(number, store.port, ends, visitor, tmp_path / "log"),
            )
            for number in range(2)
        ]
        for each in ranks:
            each.start()
        for each in ranks:
            each.join()
        return [each.exitcode for each in ranks]

    return run


@pytest.mark.parametrize(("ends", "codes"), [(0, [0, 1]), (1, [1, 0])])
def test_the_other_rank_ends_too_and_says_why(run, ends, codes, tmp_path):
    assert run(ends) == codes
    said = (tmp_path / "log").read_text()
    assert f"llmdrop: rank {ends} on {HOSTS[ends]} has ended, and this rank cannot serve without it" in said


def test_an_engine_that_waits_for_the_rank_ends_with_it(run):
    """vLLM's waits for five minutes for an answer that was under way. Any other parent is none of our business."""
    assert run(1, name="EngineCore_DP0") == [-signal.SIGKILL, 0]


def test_a_stranger_comes_and_goes(run):
    assert run(1, visitor=True) == [7, 0]


def test_a_closed_door_is_a_warning(monkeypatch):
    warned = []
    monkeypatch.setattr(logger, "warning", lambda text, *values: warned.append(text % values))
    store = dist.HashStore()
    store.set(DOOR, f"1 {bytes(16).hex()}")
    go_in(store, "127.0.0.1", 1, HOSTS)
    assert ["port 1 of rank 0 on first is closed" in each for each in warned] == [True]
