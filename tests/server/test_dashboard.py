"""The dashboard over real servers: each panel's query, in a Prometheus that read a masked and a full one under load."""

import json
import math
import re
import shutil
import subprocess
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlencode

import pytest
import yaml

from benchmarks.servers import SUMMARY, free_port, serving

DOCKER = Path(__file__).parents[2] / "docker"
DASHBOARD = json.loads((DOCKER / "grafana/dashboards/llmdrop.json").read_text())
PANELS = {panel["title"]: [target["expr"] for target in panel["targets"]] for panel in DASHBOARD["panels"]}
MASK = ["--hf-overrides", '{"drop_attn_list": [11, 7, 8, 10]}']
# Sixteen blocks of use, of which each request begins in one and ends in two: some of twelve are preempted.
SMALL_CACHE = ["--num-gpu-blocks-override", "17"]
REQUESTS = 12
# The full model drops nothing and wins nothing; a queue may be empty when it is looked at.
MAY_BE_ZERO = {"Attention dropped", "KV tokens won", "KV cache in use", "Requests running and waiting"}

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not shutil.which("prometheus"), reason="no prometheus on the PATH: apt-get install prometheus"),
]


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory):
    """Its URL, once it has read both servers before, under and after load."""
    top = tmp_path_factory.mktemp("prometheus")
    with ExitStack() as stack:
        servers = []
        for name, mask in (("masked", MASK), ("full", [])):
            (directory := top / name).mkdir()
            env = {"VLLM_PLUGINS": "llmdrop"}
            server = serving(directory, *mask, *SMALL_CACHE, command=("vllm", "serve"), env=env)
            servers.append(stack.enter_context(server).url)
        config = yaml.safe_load((DOCKER / "prometheus.yml").read_text())
        config["global"]["scrape_interval"] = "1s"
        config["scrape_configs"][0]["static_configs"] = [{"targets": [url.removeprefix("http://") for url in servers]}]
        (top / "prometheus.yml").write_text(yaml.safe_dump(config))
        url = f"127.0.0.1:{free_port()}"
        line = ["prometheus", f"--config.file={top / 'prometheus.yml'}", f"--storage.tsdb.path={top / 'data'}"]
        with (top / "log").open("w") as log:
            process = subprocess.Popen([*line, f"--web.listen-address={url}"], stdout=log, stderr=log)
        stack.callback(process.wait)
        stack.callback(process.kill)
        wait_for(lambda: len(query(url, "up == 1")) == 2, "both servers to be read", top / "log")
        with ThreadPoolExecutor(2 * REQUESTS) as pool:
            list(pool.map(ask, servers * REQUESTS))
        finished = f"sum(vllm:request_success_total) == {2 * REQUESTS}"
        wait_for(lambda: query(url, finished), "all requests to be counted", top / "log")
        yield url


def ask(server):
    body = {"model": "embedded", "prompt": "What is os.path.join?", "max_tokens": 200, "ignore_eos": True}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=600) as answer:
        assert json.load(answer)["usage"]["completion_tokens"] == 200


def query(url, expression):
    """Labels and value of each series; none while Prometheus does not answer yet."""
    try:
        with urllib.request.urlopen(f"http://{url}/api/v1/query?{urlencode({'query': expression})}") as answer:
            found = json.load(answer)["data"]["result"]
    except ConnectionError:
        return []
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{expression}: {error.read().decode()}") from None
    except urllib.error.URLError:
        return []
    return [(series["metric"], float(series["value"][1])) for series in found]


def wait_for(happened, what, log, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, f"waited for {what}; Prometheus says:\n{log.read_text()[-3000:]}"
        time.sleep(0.5)


@pytest.mark.parametrize("title", PANELS)
def test_each_panel_shows_both_masks(prometheus, title):
    for expression in PANELS[title]:
        assert "$model" in expression
        # As Grafana fills them in, over all that was read.
        found = query(prometheus, expression.replace("$__rate_interval", "10m").replace("$model", ".*"))
        values = {labels["mask"]: value for labels, value in found}
        assert values.keys() == {SUMMARY, "attention dropped in 0 of 12 layers, MLP in 0"}, expression
        assert {labels["model_name"] for labels, _ in found} == {"embedded"}
        assert all(map(math.isfinite, values.values())), (expression, values)
        assert title in MAY_BE_ZERO or min(values.values()) > 0, (expression, values)


def test_the_panels_say_what_the_mask_saves(prometheus):
    def of(title, series=0):
        found = query(prometheus, PANELS[title][series].replace("$model", "embedded"))
        return next(value for labels, value in found if labels["mask"] == SUMMARY)

    assert of("Attention dropped") == 4
    assert (of("Bytes per token"), of("Bytes per token", 1)) == (2048, 3072)
    assert of("KV tokens won") == pytest.approx(of("KV tokens") / 3, abs=128)


def test_the_alerts_of_the_operations_page_are_expressions_over_what_is_there(prometheus):
    page = (DOCKER.parent / "docs" / "operations.md").read_text()
    table = page.partition("| alert | expression |")[2].partition("\n\n")[0]
    alerts = re.findall(r"`([^`]+)`", table)
    assert len(alerts) > 4
    for alert in alerts:
        query(prometheus, alert)  # refuses what is no expression
        for name in re.findall(r"(?:vllm:|llmdrop_)\w+", alert):
            assert query(prometheus, name), f"nothing is named {name}"


def test_the_choice_of_models_is_filled(prometheus):
    asked = DASHBOARD["templating"]["list"][0]["query"]["query"]
    series, label = asked.removeprefix("label_values(").removesuffix(")").split(", ")
    assert {labels[label] for labels, _ in query(prometheus, series)} == {"embedded"}
