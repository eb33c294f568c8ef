"""The probe: an engine that answers, one that sleeps, is stuck, has died, or dies while it is asked."""

import asyncio

import pytest

from llmdrop_server.health import Ending, Probe


class Engine:
    """Answers `is_sleeping` after a while, or not."""

    def __init__(self, sleeping=False, seconds=0.0, error=None):
        self.sleeping, self.seconds, self.error = sleeping, seconds, error
        self.errored = False
        self.questions = 0

    async def is_sleeping(self):
        self.questions += 1
        await asyncio.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        return self.sleeping

    def shutdown(self, timeout=None):
        self.errored = True


def ask(engine, kind="health", ending=None, deadline_s=5.0):
    return asyncio.run(getattr(Probe(engine, ending or Ending(), deadline_s), kind)())


@pytest.mark.parametrize("kind", ["health", "readiness"])
def test_an_engine_that_answers_is_well(kind):
    assert (ask(Engine(), kind).status, ask(Engine(), kind).reason) == ("ok", None)


def test_a_sleeping_engine_is_healthy_and_not_ready():
    assert ask(Engine(sleeping=True)).status == "ok"
    assert ask(Engine(sleeping=True), "readiness").reason == "the engine sleeps"


def test_a_stuck_engine_is_given_the_deadline_and_asked_once():
    engine = Engine(seconds=60)

    async def ask_thrice():
        probe = Probe(engine, Ending(), deadline_s=0.05)
        return await asyncio.gather(probe.health(), probe.readiness(), probe.health())

    for status in asyncio.run(ask_thrice()):
        assert (status.status, status.reason) == ("unavailable", "the engine has not answered for 0.05 s")
    assert engine.questions == 1


def test_an_engine_that_recovers_is_well_again():
    engine = Engine(seconds=0.1)

    async def stuck_then_well():
        probe = Probe(engine, Ending(), deadline_s=0.01)
        first = await probe.health()
        await asyncio.sleep(0.2)
        engine.seconds = 0
        return first.status, (await probe.health()).status

    assert asyncio.run(stuck_then_well()) == ("unavailable", "ok")


def test_a_dead_engine_is_not_asked():
    engine = Engine()
    engine.errored = True
    assert ask(engine).reason == "the engine has died"
    assert engine.questions == 0


def test_an_engine_that_dies_while_it_is_asked_is_not_waited_for():
    engine = Engine(seconds=60)

    async def die():
        asking = asyncio.ensure_future(Probe(engine, Ending(), deadline_s=60).health())
        await asyncio.sleep(0.02)
        engine.errored = True
        return await asyncio.wait_for(asking, 5)

    assert asyncio.run(die()).reason == "the engine has died"


def test_an_error_is_named_without_its_text():
    assert ask(Engine(error=RuntimeError("/secret/path"))).reason == "the engine answered with RuntimeError"


def test_an_ending_server_is_not_ready():
    assert ask(Engine(), "readiness", Ending(started=True)).reason == "the server is about to end"


@pytest.mark.parametrize("dead", [True, False])
def test_an_engine_told_to_end_is_not_one_that_has_died(dead):
    engine, ending = Engine(), Ending()
    ending.watch(engine)
    engine.errored = dead
    engine.shutdown(timeout=1)
    engine.shutdown()
    assert engine.errored
    assert (ending.started, ending.engine_died) == (True, dead)
