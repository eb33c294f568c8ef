"""Servers as processes: what they said last is in the error."""

import pytest

from benchmarks.servers import engine_cores, leave_a_core, serving
from llmdrop_vllm import InputError


def test_a_server_that_ends_says_why(tmp_path):
    dies = ("python", "-c", "raise SystemExit('no room for the weights')")
    message = r"(?s)python -c .* has ended with status 1; its log ends:\nno room for the weights"
    with pytest.raises(InputError, match=message), serving(tmp_path, command=dies, model=[]):
        pass


def test_an_engine_leaves_the_first_core_unless_the_user_has_bound_it(monkeypatch):
    name = "VLLM_CPU_OMP_THREADS_BIND"
    monkeypatch.delenv(name, raising=False)
    assert leave_a_core() == {name: ",".join(map(str, engine_cores()))}
    monkeypatch.setenv(name, "0-3")
    assert leave_a_core() == {name: "0-3"}
