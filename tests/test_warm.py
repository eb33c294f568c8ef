"""A process that is forked from a zygote is what it would be if it had been started."""

import json
import os
import signal
import subprocess
import sys
from contextlib import nullcontext

import pytest

from tests import warm

SCRIPT = f"""#!{sys.executable}
import json, os, sys, time

told = {{
    "argv": sys.argv,
    "path": sys.path,
    "name": __name__,
    "directory": os.getcwd(),
    "environment": dict(os.environ),
    "parent": os.getppid(),
    "session": os.getsid(0) == os.getpid(),
    "cores": sorted(os.sched_getaffinity(0)),
    "read": sys.stdin.read(),
}}
os.write(int(os.environ["TELLS"]), b"passed")
print(json.dumps(told), flush=True)
if "wait" in sys.argv:
    time.sleep(60)
print("ends", file=sys.stderr)
sys.exit(7)
"""


@pytest.fixture(params=[warm.cold, nullcontext], ids=["cold", "warm"])
def started(request, tmp_path, monkeypatch):
    """Start a script with words, in both ways."""
    script = tmp_path / "script"
    script.write_text(SCRIPT)
    script.chmod(0o755)
    monkeypatch.setattr(warm, "COMMANDS", {str(script)})
    told, tells = os.pipe()

    def start(*words):
        environment = os.environ | {"TELLS": str(tells), "PYTHONPATH": str(tmp_path / "lib")}
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        with request.param():
            return subprocess.Popen(
                [script, *words],
                env=environment,
                cwd=tmp_path,
                start_new_session=True,
                pass_fds=[tells],
                text=True,
                **pipes,
            )

    yield start
    os.close(tells)
    assert os.read(told, 99) == b"passed"
    os.close(told)


def test_it_has_its_words_environment_directory_descriptors_and_parent_and_ends_with_its_status(started, tmp_path):
    process = started("a b", "--c")
    out, err = process.communicate("from here")
    assert (process.returncode, err.splitlines()[-1]) == (7, "ends")
    told = json.loads(out)
    assert told["argv"] == [str(tmp_path / "script"), "a b", "--c"]
    assert told["path"][:2] == [str(tmp_path), str(tmp_path / "lib")]
    assert (told["name"], told["directory"], told["read"]) == ("__main__", str(tmp_path), "from here")
    environment = told["environment"]
    assert environment.pop("TELLS").isdigit()
    assert environment == os.environ | {"PYTHONPATH": str(tmp_path / "lib")}
    assert (told["parent"], told["session"]) == (os.getpid(), True)
    assert told["cores"] == sorted(os.sched_getaffinity(0))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signals_end_it(started, number):
    process = started("wait")
    process.stdin.close()
    assert json.loads(process.stdout.readline())
    process.send_signal(number)
    assert process.wait(20) == -number
    for pipe in (process.stdout, process.stderr):
        pipe.close()
