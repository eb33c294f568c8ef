"""Programs that nobody has read: what they may do, and what the kernel refuses them."""

import time

import pytest

from llmdrop_vllm.errors import InputError
from llmdrop_vllm.evaluation import sandbox
from llmdrop_vllm.evaluation.sandbox import check_confinement, ends_well

HARMLESS = {
    "computes": "assert sum(range(10)) == 45",
    "imports": "import collections, decimal, hashlib, heapq, itertools, json, math, random, re, statistics, typing",
    "has threads": "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()",
    "prints and reads a file": "import os\nprint(open(os.__file__).read())",
    "catches its own error": "try:\n    1 / 0\nexcept ZeroDivisionError:\n    pass",
}
FAILING = {
    "a wrong answer": "assert 1 == 2",
    "a syntax error": "def f(:",
    "an endless loop": "while True: pass",
    "endless recursion": "def f(n):\n    return f(n) + 1\nf(0)",
    "more memory than there is for it": "x = bytearray(4 << 30)",
    "an exit before the end": "import sys\nsys.exit(0)",
    "an exit without ado": "import os\nos._exit(0)",
    "waiting for input": "input()",
    "a surrogate that cannot be printed is harmless, this is not": "raise SystemExit",
}
REFUSED = {
    "a fork bomb": "import os\nwhile True:\n    os.fork()",
    "another program": "import subprocess\nsubprocess.run(['true'])",
    "a process of multiprocessing": "import multiprocessing as m\np = m.Process(target=print)\np.start()",
    "a connection": "import socket\nsocket.create_connection(('127.0.0.1', 9))",
    "a socket of any kind": "import socket\nsocket.socketpair()",
    "killing its parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
    "killing everybody": "import os\nos.kill(-1, 9)",
    "a file where it stands": "open('written', 'w')",
    "a file in the home directory": "import os\nopen(os.path.expanduser('~/llmdrop-written'), 'w')",
    "appending": "open({canary!r}, 'a')",
    "removing": "import os\nos.unlink({canary!r})",
    "renaming": "import os\nos.rename({canary!r}, {canary!r} + '2')",
    "other rights": "import os\nos.chmod({canary!r}, 0)",
    "a directory": "import os\nos.mkdir({canary!r} + '2')",
    "wider bounds": "import resource as r\nr.setrlimit(r.RLIMIT_CPU, (99, 99))",
}


@pytest.mark.parametrize("what", HARMLESS)
def test_a_program_that_computes_comes_to_its_end(what):
    assert ends_well(HARMLESS[what])


@pytest.mark.parametrize("what", FAILING)
def test_a_program_that_fails_or_does_not_end_is_told_from_one_that_ends(what):
    begin = time.monotonic()
    assert not ends_well(FAILING[what], seconds=1)
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("what", REFUSED)
def test_what_reaches_beyond_the_process_is_refused(what, tmp_path):
    canary = tmp_path / "canary"
    canary.write_text("alive")
    program = REFUSED[what].replace("{canary!r}", repr(str(canary)))
    assert not ends_well(program, seconds=2)
    # The same again, with the refusal caught: the program goes on, and nothing has happened.
    caught = (
        "try:\n" + "".join(f"    {line}\n" for line in program.splitlines()) + "except (OSError, ValueError):\n    pass"
    )
    assert ends_well(caught, seconds=2) or "while" in program
    assert canary.read_text() == "alive"
    assert canary.stat().st_mode & 0o777
    assert [*tmp_path.iterdir()] == [canary]


def test_one_that_sleeps_is_ended_by_the_clock(monkeypatch):
    monkeypatch.setattr(sandbox, "GRACE_S", 0)
    begin = time.monotonic()
    assert not ends_well("import time\ntime.sleep(60)", seconds=1)
    assert time.monotonic() - begin < 10


def test_where_programs_cannot_be_confined_none_is_run(monkeypatch):
    check_confinement.cache_clear()
    monkeypatch.setattr(sandbox, "_run", lambda *args: True)  # as if nothing were refused
    with pytest.raises(InputError, match=r"a confined program can write a file here; .* needs Linux, libseccomp"):
        check_confinement()
    monkeypatch.setattr(sandbox.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="harmless program cannot be run in confinement here"):
        check_confinement()
