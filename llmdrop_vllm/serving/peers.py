"""Nodes that serve one model with a mask end together: when one is gone, the others say so and end.

vLLM watches the workers of its own node. While nothing is asked it does not notice that another node is gone: the first
one says that it is healthy, and the others wait for it for ever. So each rank there holds a connection to rank 0, which
ends with its process, whatever that is busy with.
"""

import os
import secrets
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import parent_process
from threading import Thread

import torch.distributed as dist
from vllm.logger import init_logger

DOOR = "door"
TOKEN_BYTES = 16
ENGINE = "EngineCore"  # what vLLM calls the process that workers of the first node work for
CONNECT_S = 10
# A machine without power closes nothing. In seconds until it is asked, and between the questions; and how many.
KEEPALIVE = {socket.TCP_KEEPIDLE: 15, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 5}
logger = init_logger("vllm.llmdrop")


def open_door(store: dist.Store, hosts: Sequence[str]) -> None:
    """On rank 0: end when one of the ranks that have come in is gone; `hosts` are those of all ranks."""
    door, token = socket.create_server(("", 0)), secrets.token_bytes(TOKEN_BYTES)
    store.set(DOOR, f"{door.getsockname()[1]} {token.hex()}")

    def come_in(visitor: socket.socket) -> None:
        """Whoever does not know what is in the store is none of the ranks, and may go as it came."""
        with suppress(OSError):
            said = visitor.recv(TOKEN_BYTES + 4, socket.MSG_WAITALL)
            if secrets.compare_digest(said[:TOKEN_BYTES], token):
                rank = int.from_bytes(said[TOKEN_BYTES:])
                _end_with(visitor, f"rank {rank} on {hosts[rank]}")
        visitor.close()

    def receive() -> None:
        while True:
            _in_background(come_in, door.accept()[0])

    _in_background(receive)


def go_in(store: dist.Store, address: str, rank: int, hosts: Sequence[str]) -> None:
    """On a rank of another node: end when rank 0, at that address, is gone. Without a way there a warning says so."""
    port, token = store.get(DOOR).decode().split()
    first = f"rank 0 on {hosts[0]}"
    try:
        connection = socket.create_connection((address, int(port)), CONNECT_S)
        connection.settimeout(None)
        connection.sendall(bytes.fromhex(token) + rank.to_bytes(4))
    except OSError as error:
        logger.warning("port %s of %s is closed (%s): should one of the nodes fail, end the others", port, first, error)
        return
    _in_background(_end_with, connection, first)


def _end_with(connection: socket.socket, who: str) -> None:
    """End this process when the other end of the connection has; nothing is ever said there."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE.items():
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    with suppress(OSError):
        connection.recv(1)
    logger.error("llmdrop: %s has ended, and this rank cannot serve without it: it ends too", who)
    engine = parent_process()
    if engine is not None and engine.name.startswith(ENGINE) and engine.pid is not None:
        # It may be waiting for an answer of the rank that is gone, for five minutes, and hears no gentler signal.
        os.kill(engine.pid, signal.SIGKILL)
    os._exit(1)  # other threads may wait for what is gone, and would not hear of an exception here


def _in_background(run: Callable[..., None], *args: object) -> None:
    Thread(target=run, args=args, name="llmdrop-peers", daemon=True).start()
