"""A contender in a process of its own: receives commands and sends replies, both JSON.

`{"do": "load", "engine": ..., "options": {...}}` comes first and may come again; every other command is the name of a
method of the engine with its arguments. What the engine itself prints goes to a log.
"""

import gc
import importlib
import json
import os
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.memory import peak_bytes

COMMANDS = ("memory", "answer", "run", "stages_kv_tokens")


class Host:
    """Has at most one engine at a time."""

    def __init__(self) -> None:
        self.engine: Any = None

    def load(self, engine: str, options: dict[str, Any]) -> dict[str, Any]:
        """Replace the engine; imports do not count as load time."""
        from benchmarks.engines import ENGINES

        if engine == "vllm":
            importlib.import_module("vllm.entrypoints.llm")

        if self.engine is not None:
            self.engine.close()
            self.engine = None
            gc.collect()
        start = time.perf_counter()
        self.engine = ENGINES[engine](**options)
        return {"load_s": time.perf_counter() - start} | self.engine.memory()

    def handle(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The reply to a command."""
        if do == "load":
            return self.load(**arguments)
        assert do in COMMANDS, f"unknown command {do!r}"
        return {"result": getattr(self.engine, do)(**arguments), "peak_bytes": peak_bytes()}


def serve(connection: Connection, log: str, *, plugin: bool) -> None:
    """Answer until the other end is closed. Stock vLLM is what loads no plugins."""
    os.setsid()
    with Path(log).open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if not plugin:
        os.environ["VLLM_PLUGINS"] = ""
    host = Host()
    while True:
        try:
            command = json.loads(connection.recv_bytes())
        except EOFError:
            # Engines may hang in their destructors.
            os._exit(0)
        try:
            reply = host.handle(**command)
        except Exception as error:  # whatever it is, the parent must hear of it and decide
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        connection.send_bytes(json.dumps(reply).encode())
