"""Libraries that report on every step, kept quiet while they work for us."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def only_from(level: int, *loggers: str) -> Iterator[None]:
    """Within this context, these loggers pass on nothing below `level`.

    Not by an environment variable, which processes started meanwhile would inherit.
    """
    before = {name: logging.getLogger(name).level for name in loggers}
    for name in before:
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        for name, own in before.items():
            logging.getLogger(name).setLevel(own)
