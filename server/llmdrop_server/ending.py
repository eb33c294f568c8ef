"""How the server ends: whether it was told to, or the engine has died."""

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.datastructures import State
from vllm.entrypoints.launchers.launcher import terminate_if_errored

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

POLL_S = 0.2
# How long clients are told that the engine has died before the server ends and a supervisor may start another.
LAST_WORDS_S = 2.0


@dataclass
class Ending:
    """`started`: requests in flight are being finished, and no new ones are served."""

    started: bool = False
    engine_died: bool = False

    def watch(self, engine: "EngineClient") -> None:
        """Learn of the end from vLLM's call of `shutdown`, the first thing that it does about a signal, and the last
        after an engine's death; afterwards an engine that was told to end looks like one that has died.
        """
        shutdown = engine.shutdown

        def watched(*args: Any, **kwargs: Any) -> None:
            if not self.started:
                self.started, self.engine_died = True, engine.errored
            shutdown(*args, **kwargs)

        engine.shutdown = watched

    async def follow(self, engine: "EngineClient", state: State) -> None:
        """End the server soon after its engine has died; vLLM itself looks every five seconds."""
        while not engine.errored:
            await asyncio.sleep(POLL_S)
        await asyncio.sleep(LAST_WORDS_S)
        terminate_if_errored(state.server, engine)
