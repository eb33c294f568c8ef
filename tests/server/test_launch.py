"""`llmdrop serve`: what it hands to vLLM, and what it refuses before vLLM is imported."""

import json
import os
import socket
import subprocess
import sys

import pytest

from llmdrop_server import COMPARISON_ENVIRONMENT, LIMITS_ENVIRONMENT, SCORES_ENVIRONMENT
from llmdrop_server.launch import main, parser, plugins, vllm_arguments
from llmdrop_server.vllm_options import read
from llmdrop_vllm import DropMask, InputError
from llmdrop_vllm.artifacts import write_record
from llmdrop_vllm.cli import main as cli_main
from llmdrop_vllm.embedded import MODEL
from llmdrop_vllm.mask_file import MaskFile
from tests.selection.scores import make_scores


@pytest.fixture
def scores(tmp_path):
    """Attention matters least in layers 2, 0, 1; MLPs in 1, 3, 0."""
    path = tmp_path / "scores.json"
    write_record(make_scores(attention=[0.9, 0.8, 0.95, 0.1], mlp=[0.3, 0.5, 0.1, 0.4]), path)
    return path


def arguments(*argv, model=str(MODEL)):
    ours, words = parser().parse_known_args([*([model] if model else []), *map(str, argv)])
    theirs = read(words)
    return vllm_arguments(ours, theirs, theirs.model)


def overrides(*argv):
    words = arguments(*argv)
    return json.loads(words[words.index("--hf-overrides") + 1]) if "--hf-overrides" in words else {}


def mask_of(*argv):
    entries = overrides(*argv)
    return entries["drop_attn_list"], entries["drop_mlp_list"]


def test_without_a_mask_nothing_is_overridden():
    assert overrides() == {}


def test_layers_keep_their_rank_order():
    assert mask_of("--drop-attention", "11,7,8", "--drop-mlp", "3,") == ([11, 7, 8], [3])


def test_a_number_is_how_many_the_scores_find_least_important(scores):
    assert mask_of("--drop-attention", "2", "--scores", scores) == ([2, 0], [])
    assert mask_of("--drop-attention", "1", "--drop-mlp", "2", "--scores", scores) == ([2], [1, 3])
    assert mask_of("--drop-attention", "3,", "--drop-mlp", "1", "--scores", scores) == ([3], [1])


def test_windows_come_on_top():
    windows = ("--window-attention", "3,5", "--window", "64")
    assert overrides(*windows) == {"llmdrop_windows": {"3": 64, "5": 64}}
    entries = overrides(*windows, "--drop-attention", "1,2")
    assert entries == {"drop_attn_list": [1, 2], "drop_mlp_list": [], "llmdrop_windows": {"3": 64, "5": 64}}


def test_scores_alone_drop_nothing(scores):
    assert overrides("--scores", scores) == {}


def test_a_mask_file_is_the_mask(tmp_path):
    write_record(MaskFile(num_hidden_layers=12, attention=(5, 4), mlp=(3,), method="by hand"), tmp_path / "mask.json")
    assert mask_of("--mask", tmp_path / "mask.json") == ([5, 4], [3])


def test_a_mask_goes_beside_the_users_overrides():
    entries = overrides("--drop-attention", "1,2", "--hf-overrides", '{"rope_theta": 1.0}')
    assert entries == {"rope_theta": 1.0} | DropMask(12, (1, 2)).to_config("runtime")


def test_a_mask_goes_beside_fewer_layers():
    """Its indices are judged by the engine, which knows how many layers are served."""
    entries = overrides("--drop-attention", "1,6", "--hf-overrides.num_hidden_layers", "4")
    assert entries == {"num_hidden_layers": 4} | DropMask(8, (1, 6)).to_config("runtime")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["--drop-attention", "8"],
            "the layer is written '8,'; for the 8 least important ones give --scores",
        ),
        (["--drop-attention", "a,b"], "expected layers like 25,26,24"),
        (["--drop-attention", "-1"], "expected layers like 25,26,24, or with --scores a number"),
        (["--drop-attention", "1,1"], "names layer 1 twice"),
        (["--window-attention", "1"], "give both"),
        (["--window-attention", "1", "--window", "0"], "a window of nothing is dropped attention"),
        (["--window-attention", "1,2", "--window", "8", "--drop-attention", "2,"], "say one of them"),
        (["--drop-attention", "1,", "--mask", "mask.json"], "exclude each other"),
        (["--mask", "nowhere.json"], "nowhere.json cannot be read"),
        (["--hf-overrides", "{"], "--hf-overrides is not JSON"),
        (["--hf-overrides", "[]"], "expected a JSON object"),
    ],
)
def test_a_mask_that_makes_no_sense_is_refused(argv, words):
    with pytest.raises(InputError, match=words):
        arguments(*argv)


def test_a_layer_that_the_scored_model_lacks_is_refused(scores):
    with pytest.raises(InputError, match="names layer 4; the model's 4 layers are 0 to 3"):
        arguments("--drop-attention", "4,", "--scores", scores)


def test_vllms_options_are_passed_on():
    words = arguments("--port", "8001", "--max-model-len", "512", "--dtype=float32")
    assert words[:2] == ["serve", str(MODEL)]
    assert words[-5:] == ["--port", "8001", "--max-model-len", "512", "--dtype=float32"]


def test_streams_are_drained_and_the_queue_ends_unless_the_user_says_otherwise():
    words = arguments()
    assert words[words.index("--shutdown-timeout") + 1] == "30"
    assert words[words.index("--max-num-queued-reqs") + 1] == "1024"
    assert arguments("--shutdown-timeout=5").count("--shutdown-timeout") == 0
    assert arguments("--max_num_queued_reqs", "7").count("--max-num-queued-reqs") == 0


def test_keys_come_from_a_file(tmp_path):
    (tmp_path / "keys").write_text("one\n\n two \n")
    words = arguments("--api-key-file", tmp_path / "keys")
    assert words[words.index("--api-key") + 1 :][:2] == ["one", "two"]


def test_the_plugin_shuts_out_no_other_plugin():
    found = plugins(None)
    assert "llmdrop" in found
    assert {"lora_filesystem_resolver", "lora_hf_hub_resolver"} <= {*found}  # vLLM's own


def test_plugins_that_the_user_names_stay_and_no_other_comes():
    assert plugins("mine") == ["mine", "llmdrop"]
    assert plugins("llmdrop") == ["llmdrop"]


@pytest.fixture
def refused(monkeypatch, capsys):
    """Runs `main` where vLLM must not be reached, and returns its one line."""

    def run(*argv):
        monkeypatch.setattr("llmdrop_server.launch._run_vllm", lambda _: pytest.fail("vLLM was reached"))
        assert main([*map(str, argv)]) == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        return lines[0]

    return run


def test_a_model_that_is_not_there(refused):
    line = refused("./nowhere")
    expected = "is not a directory; expected a checkpoint directory or a hub id like org/name"
    assert line == f"llmdrop: error: ./nowhere {expected}"


def test_a_tokenizer_that_was_not_saved(refused, tmp_path):
    """As `save_pretrained` of a model leaves it."""
    (tmp_path / "config.json").write_text("{}")
    assert f"{tmp_path} has no tokenizer; copy its files from the model" in refused(str(tmp_path))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        where = ("--host", "127.0.0.1", "--port", str(taken.getsockname()[1]))
        for others in (("--tokenizer", "another"), ("--skip-tokenizer-init",)):
            assert "cannot be listened on" in refused(str(tmp_path), *where, *others)
        (tmp_path / "vocab.json").write_text("{}")
        assert "cannot be listened on" in refused(str(tmp_path), *where)


def test_no_engine(refused, monkeypatch):
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'llmdrop-vllm[cuda]'" in refused(MODEL)


def test_a_port_in_use(refused):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = refused(MODEL, "--host", "127.0.0.1", "--port", port)
    assert line == f"llmdrop: error: 127.0.0.1:{port} cannot be listened on: Address already in use"


@pytest.mark.parametrize("port", ["70000", "-5"])
def test_a_port_that_does_not_exist(refused, port):
    assert "cannot be listened on" in refused(MODEL, f"--port={port}")


@pytest.mark.parametrize("option", ["--api-key-file", "--comparison", "--ssl-keyfile", "--ssl-certfile"])
def test_a_file_that_cannot_be_read(refused, option, tmp_path):
    assert refused(MODEL, option, tmp_path / "none").endswith("none cannot be read: No such file or directory")
    assert refused(MODEL, option, tmp_path).endswith("cannot be read: Is a directory")


def test_a_key_file_without_a_key(refused, tmp_path):
    (tmp_path / "keys").write_text("\n")
    assert refused(MODEL, "--api-key-file", tmp_path / "keys").endswith("holds no key; expected one per line")


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ("m=4", "limit m: "),
        ("n=x", "limit n: Input should be a valid integer"),
        ("n", "limit n: Input should be a valid integer"),
        ("body_seconds=x", "limit body_seconds: Input should be a valid number"),
    ],
)
def test_a_bound_that_does_not_exist_or_is_no_number(refused, limit, words):
    assert words in refused(MODEL, "--limit", limit, "--port", "0")


def test_what_the_plugin_must_know_is_in_the_environment(monkeypatch, scores):
    ours = (LIMITS_ENVIRONMENT, SCORES_ENVIRONMENT, COMPARISON_ENVIRONMENT)
    for name in (*ours, "VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "VLLM_PLUGINS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr("llmdrop_server.launch._run_vllm", lambda words: 0)
    limits, files = ["--limit", "n=4", "--limit", "body_seconds=2.5"], ["--scores", scores, "--comparison", scores]
    assert main([str(MODEL), "--port", "0", *limits, *map(str, files)]) == 0
    assert json.loads(os.environ[LIMITS_ENVIRONMENT]) == {"n": 4, "body_seconds": 2.5}
    assert os.environ[SCORES_ENVIRONMENT] == os.environ[COMPARISON_ENVIRONMENT] == str(scores)
    assert "llmdrop" in os.environ["VLLM_PLUGINS"].split(",")
    assert os.environ["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"] == "75"


def test_a_mistake_is_told_without_importing_vllm_or_torch():
    code = "import sys; from llmdrop_server.launch import main; main(['./nowhere']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_help_names_the_mask_options_and_the_bounds():
    done = subprocess.run(
        [sys.executable, "-m", "llmdrop_server", "--help"], capture_output=True, text=True, check=True
    )
    for word in ("--drop-attention", "--scores", "--limit", "grammar_bytes", "vllm serve --help=all"):
        assert word in done.stdout


def test_llmdrop_serve_is_the_same_command(capsys):
    assert cli_main(["serve", "./nowhere"]) == 1
    assert "nowhere is not a directory" in capsys.readouterr().err
