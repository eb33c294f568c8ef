"""Whether the engine answers: asked, not assumed, and with a deadline; and how the server ends."""

import asyncio
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import State
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.launchers.launcher import terminate_if_errored

from llmdrop_server.schemas import Status

DEADLINE_S, SLICE_S = 10.0, 0.1
POLL_S = 0.2
# How long clients are told that the engine has died before the server ends and a supervisor may start another.
LAST_WORDS_S = 2.0


@dataclass
class Ending:
    """`started`: requests in flight are being finished, and no new ones are served."""

    started: bool = False
    engine_died: bool = False

    def watch(self, engine: EngineClient) -> None:
        """Learn of the end from vLLM's call of `shutdown`, the first thing that it does about a signal, and the last
        after an engine's death; afterwards an engine that was told to end looks like one that has died.
        """
        shutdown = engine.shutdown

        def watched(*args: Any, **kwargs: Any) -> None:
            if not self.started:
                self.started, self.engine_died = True, engine.errored
            shutdown(*args, **kwargs)

        engine.shutdown = watched

    async def follow(self, engine: EngineClient, state: State) -> None:
        """End the server soon after its engine has died; vLLM itself looks every five seconds."""
        while not engine.errored:
            await asyncio.sleep(POLL_S)
        await asyncio.sleep(LAST_WORDS_S)
        terminate_if_errored(state.server, engine)


class Probe:
    """Asks the engine's own process something cheap. It answers between two steps, so a dead one is told from one that
    is busy only by the deadline, and at once where its process has ended.
    """

    def __init__(self, engine: EngineClient, ending: Ending, deadline_s: float = DEADLINE_S) -> None:
        self.engine = engine
        self.ending = ending
        self.deadline_s = deadline_s
        # One question at a time, however many ask: a stuck engine must not collect unanswered ones.
        self.question: asyncio.Task[bool] | None = None
        self.asked_s = 0.0

    async def health(self) -> Status:
        """`unavailable` with a reason where the engine is dead or does not answer in time."""
        return (await self._ask())[0]

    async def readiness(self) -> Status:
        """As `health`, and unavailable too where no request would be served: asleep, or about to end."""
        status, sleeping = await self._ask()
        return Status(status="unavailable", reason="the engine sleeps") if sleeping else status

    async def _ask(self) -> tuple[Status, bool]:
        if self.ending.started:  # by then the engine answers nobody
            return Status(status="unavailable", reason="the server is about to end"), False
        if self.engine.errored:
            return Status(status="unavailable", reason="the engine has died"), False
        now = asyncio.get_running_loop().time()
        if self.question is None or self.question.done():
            self.question, self.asked_s = asyncio.ensure_future(self.engine.is_sleeping()), now
        while not self.question.done() and not self.engine.errored and now < self.asked_s + self.deadline_s:
            # In slices: a process that was killed while it was asked never answers.
            await asyncio.wait({self.question}, timeout=SLICE_S)
            now = asyncio.get_running_loop().time()
        if self.engine.errored:
            return Status(status="unavailable", reason="the engine has died"), False
        if not self.question.done():
            return Status(status="unavailable", reason=f"the engine has not answered for {self.deadline_s:g} s"), False
        if (error := self.question.exception()) is not None:
            # The message may hold paths of this machine.
            return Status(status="unavailable", reason=f"the engine answered with {type(error).__name__}"), False
        return Status(status="ok"), self.question.result()
