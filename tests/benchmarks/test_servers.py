"""Servers as processes: what they said last is in the error."""

import pytest

from benchmarks.servers import serving
from llmdrop_vllm import InputError


def test_a_server_that_ends_says_why(tmp_path):
    dies = ("python", "-c", "raise SystemExit('no room for the weights')")
    message = r"(?s)python -c .* has ended with status 1; its log ends:\nno room for the weights"
    with pytest.raises(InputError, match=message), serving(tmp_path, command=dies, model=[]):
        pass
