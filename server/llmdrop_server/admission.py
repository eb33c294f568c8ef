"""The end of the queue: how many answers may be under way or waiting at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from llmdrop_server.limits import RequestError


@dataclass
class Admission:
    """`bound` is vLLM's --max-num-queued-reqs, None for no end. vLLM looks at it before a request is tokenized, so
    requests that come together pass it together, and those that stream then fail after they were told 200.
    """

    bound: int | None = None
    under_way: int = 0

    @contextmanager
    def place(self, answers: int) -> Iterator[None]:
        """Take so many places while in this context. Raises RequestError where that many are not free."""
        if self.bound is not None and answers > self.bound:
            raise RequestError(f"the request asks for {answers} answers; the queue holds {self.bound}")
        if self.bound is not None and self.under_way + answers > self.bound:
            raise RequestError(f"the queue of {self.bound} is full (--max-num-queued-reqs); try again later", 429)
        self.under_way += answers
        try:
            yield
        finally:
            self.under_way -= answers
