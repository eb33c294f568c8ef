"""Two nodes on this machine serve one model, choose the same stages, refuse one another and end together."""

import json
import os
import signal
import subprocess
import urllib.request
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.servers import BIN, Served, free_port, serving
from llmdrop_vllm import InputError
from tests.tiny import golden, write_checkpoint

pytestmark = pytest.mark.processes
ROOT = Path(__file__).parents[2]
MASKED = "attention dropped in 4 of 8 layers [3,5-7], MLP in 0"
TIGHT_BYTES = 3_500_000  # six of the layers' MLPs leave little of it for a cache
END_S = 60


@pytest.fixture(scope="module")
def case():
    return golden("llama_attn_ints")  # 8 layers, attention kept in 0, 1, 2 and 4


@pytest.fixture(scope="module")
def model(case, tmp_path_factory):
    directory = write_checkpoint(tmp_path_factory.mktemp("dropped"), case["config"], seed=case["seed"])
    options = ["--served-model-name", "tiny", "--skip-tokenizer-init", "--dtype", "float32", "--max-model-len", "256"]
    return [str(directory), *options, "--gpu-memory-utilization", "0.2"]


@dataclass
class Node:
    """The second node, which has no server."""

    process: subprocess.Popen
    log: Path


@contextmanager
def second_node(directory, model, *options, env):
    log = directory / "second"
    with log.open("w") as out:
        line = [BIN / "vllm", "serve", *model, *options, "--node-rank", "1", "--headless"]
        process = subprocess.Popen(
            line, stdout=out, stderr=subprocess.STDOUT, env=os.environ | env, start_new_session=True
        )
    try:
        yield Node(process, log)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def both(*options):
    """Options and environment that both nodes have."""
    core = max(os.sched_getaffinity(0))
    env = {"VLLM_CPU_OMP_THREADS_BIND": f"{core}|{core}", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_HOST_IP": "127.0.0.1"}
    return ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port()), *options], env


@contextmanager
def two_nodes(directory, model, *options, second):
    """The first node's server and the second node, whose environment has `second` in addition."""
    options, env = both(*options)
    with (
        second_node(directory, model, *options, env=env | second) as other,
        serving(directory, *options, command=("vllm", "serve"), model=model, env=env) as served,
    ):
        yield served, other


def ask(served: Served, case) -> list[int]:
    body = {"model": "tiny", "prompt": case["prompt_token_ids"], "max_tokens": 12, "temperature": 0}
    body |= {"ignore_eos": True, "return_token_ids": True}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{served.url}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["choices"][0]["token_ids"]


def kill(process) -> None:
    os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def lent(tmp_path, monkeypatch):
    """A plugin of the test's own: memory for stages, whose cache has a fixed size on a CPU, and less patience."""
    (tmp_path / "lent-1.dist-info").mkdir()
    (tmp_path / "lent-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: lent\nVersion: 1\n")
    (tmp_path / "lent-1.dist-info" / "entry_points.txt").write_text("[vllm.general_plugins]\nlent = lent:lend\n")
    (tmp_path / "lent.py").write_text(
        "import os\nfrom llmdrop_vllm.serving import agreement, stages\n\n\ndef lend():\n"
        "    agreement.PATIENCE_S = int(os.environ['LENT_PATIENCE_S'])\n"
        "    for module in (agreement, stages):\n"
        "        module.stage_memory_bytes = lambda config: float(os.environ['LENT_BYTES'])\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "server")]))
    monkeypatch.setenv("LENT_BYTES", "1e9")
    monkeypatch.setenv("LENT_PATIENCE_S", "20")


def test_tensor_parallel_nodes_answer_as_one_and_the_second_ends_with_the_first(case, model, tmp_path):
    with two_nodes(tmp_path, model, "--tensor-parallel-size", "2", "--enforce-eager", second={}) as (served, other):
        assert ask(served, case) == case["greedy_token_ids"]
        assert MASKED in served.log.read_text()
        assert MASKED in other.log.read_text()
        kill(served.process)
        other.process.wait(timeout=END_S)
        assert "has ended, and this rank cannot serve without it" in other.log.read_text()


@pytest.mark.usefixtures("lent")
def test_pipeline_nodes_of_unequal_memory_choose_the_same_stages_and_the_first_ends_with_the_second(
    case, model, tmp_path
):
    second = {"LENT_BYTES": str(TIGHT_BYTES)}
    with two_nodes(tmp_path, model, "--pipeline-parallel-size", "2", second=second) as (served, other):
        assert ask(served, case) == case["greedy_token_ids"]
        assert f"{MASKED}; " in served.log.read_text()
        # By the first node's own memory the stages would be layers 0-1 and 2-7.
        assert "in pipeline stage 0 (layers 0-2)" in served.log.read_text()
        assert "in pipeline stage 1 (layers 3-7)" in other.log.read_text()
        kill(other.process)
        served.process.wait(timeout=END_S)
        assert "rank 1 on" in served.log.read_text()
        assert "has ended, and this rank cannot serve without it" in served.log.read_text()


@pytest.mark.usefixtures("lent")
def test_a_node_without_the_plugin_serves_nothing(model, tmp_path, monkeypatch):
    monkeypatch.setenv("LENT_PATIENCE_S", "5")
    options, env = both("--tensor-parallel-size", "2", "--enforce-eager")
    with second_node(tmp_path, model, *options, env=env | {"VLLM_PLUGINS": ""}) as other:
        with (
            pytest.raises(InputError, match="has ended with status"),
            serving(tmp_path, *options, command=("vllm", "serve"), model=model, env=env),
        ):
            pytest.fail("served")
        other.process.wait(timeout=END_S)
    assert "after 5 s, rank 1 has not said which mask it has" in (tmp_path / "log").read_text()
    assert MASKED not in other.log.read_text()


def test_servers_behind_vllms_own_load_balancer_answer_as_one(case, model, tmp_path):
    core = max(os.sched_getaffinity(0))
    env = {"VLLM_CPU_OMP_THREADS_BIND": f"{core}|{core}"}
    options = ["--data-parallel-size", "2", "--enforce-eager"]
    with serving(tmp_path, *options, command=("vllm", "serve"), model=model, env=env) as served:
        assert [ask(served, case) for _ in range(4)] == [case["greedy_token_ids"]] * 4
        assert served.log.read_text().count(f"{MASKED}; ") == 2
