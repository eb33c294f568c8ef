"""`vllm serve` of wrappers without some of their towers' sublayers: images and text over HTTP, and no plugin."""

import base64
import io
import json
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.servers import serving
from llmdrop_vllm import hf
from llmdrop_vllm.cli import main
from llmdrop_vllm.errors import InputError
from tests.architectures.wrapper_cases import WRAPPER_CASES
from tests.engines import engine
from tests.serving.test_images import llava

pytestmark = pytest.mark.processes
TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image> {% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
)
ARGUMENTS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--served-model-name", "wrapper")
PROMPT = [*range(3, 43)]
# The data type, and how far from float32 log-probabilities may be on average: vLLM's gated delta nets for CPUs compute
# in bfloat16 only.
TOWERS = {"Qwen3VLForConditionalGeneration": ("float32", 1e-5), "Qwen3_5ForConditionalGeneration": ("bfloat16", 5e-2)}


@pytest.fixture(scope="module")
def dropped(tmp_path_factory):
    """A tiny LLaVA of which `llmdrop apply` took three attentions and an MLP."""
    directory = tmp_path_factory.mktemp("wrapper")
    full = llava(directory / "full")
    (full / "chat_template.jinja").write_text(TEMPLATE)
    assert main(["apply", str(full), str(directory / "out"), "--attention", "4,0,2", "--mlp", "1,"]) == 0
    return directory / "out"


def question(seed):
    """A chat about a picture, as clients send it."""
    picture = Image.fromarray(np.random.default_rng(seed).integers(0, 255, (56, 56, 3), dtype=np.uint8))
    picture.save(content := io.BytesIO(), "PNG")
    url = f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "a b c"}]
    return [{"role": "user", "content": parts}]


def posted(url, path, **body):
    """What the server answers to a request for eight tokens."""
    body = {"model": "wrapper", "max_tokens": 8, "temperature": 0, "ignore_eos": True} | body
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/{path}", json.dumps(body).encode(), headers)
    (choice,) = json.load(urllib.request.urlopen(request))["choices"]
    return choice


def asked(url, messages):
    choice = posted(url, "chat/completions", messages=messages, logprobs=True)
    return choice["message"]["content"], [each["logprob"] for each in choice["logprobs"]["content"]]


def test_an_image_over_http_is_seen_as_in_an_engine(dropped, tmp_path):
    from vllm import SamplingParams

    with serving(
        tmp_path, *ARGUMENTS, command=("vllm", "serve"), model=[str(dropped)], env={"VLLM_PLUGINS": "llmdrop"}
    ) as served:
        found = [asked(served.url, question(seed)) for seed in (0, 1)]
        mask = json.load(urllib.request.urlopen(f"{served.url}/v1/drop"))["mask"]
    assert (mask["attention"], mask["mlp"]) == ([4, 0, 2], [1])
    assert found[0][1] != pytest.approx(found[1][1], abs=1e-4)  # the picture is seen
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0)
    with engine(dropped, skip_tokenizer_init=False, max_model_len=256) as llm:
        for seed, (text, logprobs) in enumerate(found):
            (expected,) = llm.chat(question(seed), sampling, use_tqdm=False)[0].outputs
            assert text == expected.text
            chosen = zip(expected.token_ids, expected.logprobs, strict=True)
            assert logprobs == pytest.approx([each[token].logprob for token, each in chosen], abs=1e-4)


def test_without_the_plugin_vllm_refuses_it(dropped, tmp_path):
    refused_by_stock_vllm("LlavaForConditionalGeneration", dropped, tmp_path)


def refused_by_stock_vllm(name, directory, tmp_path):
    without = {"command": ("vllm", "serve"), "model": [str(directory)], "env": {"VLLM_PLUGINS": ""}}
    with (
        pytest.raises(InputError, match=f"Dropped{name}'?\\]? are not supported"),
        serving(tmp_path, *ARGUMENTS, **without),
    ):
        pass


@pytest.mark.parametrize("name", TOWERS)
def test_text_over_http_is_answered_as_transformers_does_and_refused_without_the_plugin(name, tmp_path):
    """Dropped by the command; the tower of Qwen3.5 is a hybrid."""
    pytest.importorskip("torchvision", reason="vLLM's multimodal models import it")
    model, out = WRAPPER_CASES[name].write(tmp_path / "model"), tmp_path / "out"
    (data := tmp_path / "ids.json").write_text(json.dumps(np.random.default_rng(0).integers(3, 256, (4, 64)).tolist()))
    assert main(["drop", str(model), str(out), "--attention", "2", "--mlp", "1", "--data", str(data)]) == 0

    dtype, nats = TOWERS[name]
    text_only = ("--skip-tokenizer-init", "--language-model-only")  # it has no tokenizer and no processor
    stock = {"command": ("vllm", "serve"), "model": [str(out)], "env": {"VLLM_PLUGINS": "llmdrop"}}
    with serving(tmp_path, *ARGUMENTS, "--dtype", dtype, *text_only, **stock) as served:
        choice = posted(served.url, "completions", prompt=PROMPT, prompt_logprobs=0, return_token_ids=True)
        mask = json.load(urllib.request.urlopen(f"{served.url}/v1/drop"))["mask"]
    assert (len(mask["attention"]), len(mask["mlp"]), len(choice["token_ids"])) == (2, 1, 8)
    tokens = [*PROMPT, *choice["token_ids"]]
    answered = [next(iter(each.values()))["logprob"] for each in choice["prompt_logprobs"][1:]]
    dropped, full = (logprobs(directory, tokens) for directory in (out, model))
    expected, others = (each[range(len(PROMPT) - 1), PROMPT[1:]] for each in (dropped, full))
    assert (torch.tensor(answered) - expected).abs().mean() < nats
    assert (torch.tensor(answered) - others).abs().mean() > 10 * nats
    greedy = dropped[range(len(PROMPT) - 1, len(tokens) - 1)]
    assert (greedy.max(-1).values - greedy[range(8), choice["token_ids"]]).max() < 10 * nats

    refused_by_stock_vllm(name, out, tmp_path)


def logprobs(directory, tokens):
    """Transformers', in float32: [tokens, vocabulary]."""
    model = hf.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
