"""The Helm chart: rendered by Helm's own library, and held to Kubernetes' schemas."""

from pathlib import Path

import pytest
import yaml

from llmdrop_server.launch import parser
from llmdrop_vllm import __version__

helm = pytest.importorskip("helm_python", reason="helm-python-sdk is not installed")
kubernetes = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")

CHART = Path(__file__).parents[2] / "docker" / "helm" / "llmdrop"
IMAGE = {"image": {"repository": "registry.example/llmdrop-vllm"}}
EVERYTHING = {
    "model": {"claim": "llama", "name": "llama"},
    "mask": {"dropAttention": "33,32", "dropMlp": 7},
    "args": ["--tensor-parallel-size", 8],
    "env": [{"name": "HF_TOKEN", "value": "x"}],
    "envFrom": [{"secretRef": {"name": "s3"}}],
    "keysSecret": "keys",
    "imagePullSecrets": [{"name": "registry"}],
    "resources": {"limits": {"memory": "64Gi"}},
    "runtimeClassName": "nvidia",
    "nodeSelector": {"gpu": "h100"},
    "tolerations": [{"key": "gpu", "operator": "Exists"}],
}


def rendered(**values):
    """Kind to object."""
    with helm.Chart.load(CHART) as chart:
        files = chart.render(IMAGE | values, name="llama")
    objects = [each for text in files.values() for each in yaml.safe_load_all(text) if each]
    return {each["kind"]: each for each in objects}


def valid(thing):
    kubernetes.validate(thing, "1.33", strict=True)
    return thing


def server_of(pod):
    return pod["spec"]["containers"][0]


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["nothing else", "everything"])
def test_one_node_is_a_deployment_that_kubernetes_takes(values):
    found = rendered(**values)
    assert found.keys() == {"Deployment", "Service"}
    deployment, service = map(valid, found.values())
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()
    server = server_of(deployment["spec"]["template"])
    assert {mount["name"] for mount in server["volumeMounts"]} == {
        volume["name"] for volume in deployment["spec"]["template"]["spec"]["volumes"]
    }
    assert server["image"].endswith(f":{__version__}")
    assert server["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_the_words_are_those_of_llmdrop_serve():
    words = server_of(rendered(**EVERYTHING)["Deployment"]["spec"]["template"])["args"]
    ours, theirs = parser().parse_known_args(words)
    assert (ours.drop_attention, ours.drop_mlp, str(ours.api_key_file)) == ("33,32", "7", "/keys/keys")
    assert theirs == [
        *("/model", "--served-model-name", "llama", "--shutdown-timeout", "120", "--tensor-parallel-size", "8")
    ]


def test_several_nodes_are_one_group_of_which_the_first_answers():
    found = rendered(**EVERYTHING, nodes=2)
    assert found.keys() == {"LeaderWorkerSet", "Service"}
    group = found["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
    leader, worker = group["leaderTemplate"], group["workerTemplate"]
    for pod in (leader, worker):
        valid({"apiVersion": "v1", "kind": "Pod", **pod, "metadata": {"name": "llama", **pod["metadata"]}})
    assert server_of(worker)["args"] == [*server_of(leader)["args"], "--headless"]
    assert server_of(leader)["args"][-6:-4] == ["--nnodes", "2"]
    selector = found["Service"]["spec"]["selector"].items()
    assert selector <= leader["metadata"]["labels"].items()
    assert not selector <= worker["metadata"]["labels"].items()
    assert "readinessProbe" in server_of(leader)
    assert "livenessProbe" not in server_of(worker)


def test_helm_finds_nothing_to_warn_of():
    report = helm.lint(CHART, IMAGE)
    assert report["errors"] == []
    assert [each["error"] for each in report["messages"]] == ["icon is recommended"]


def test_an_image_must_be_said():
    with helm.Chart.load(CHART) as chart, pytest.raises(helm.HelmRenderError, match="image.repository"):
        chart.render({}, name="llama")
