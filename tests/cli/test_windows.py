"""Windows from the command line, beside what is dropped."""

from llmdrop_vllm import DropMask
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.cli import main
from tests.tiny import TINY_LLAMA, write_checkpoint


def test_windows_come_on_top_and_go_with_what_is_given_instead(tmp_path):
    model, windows = write_checkpoint(tmp_path / "model", TINY_LLAMA), ["--window-attention", "3,1", "--window", "64"]
    for out, given in {"by hand": ["--mlp", "2"], "more": []}.items():
        assert main(["apply", str(model), f"{tmp_path}/{out}", *windows, *given]) == 0
    found = Checkpoint.open(tmp_path / "by hand")
    assert found.mask == DropMask(8, mlp=(2,), windows=((1, 64), (3, 64)))
    # The weights of windows alone are whole, and under names that nothing else loads.
    assert [path.name for path in (tmp_path / "more").glob("*.safetensors")] == ["model.dropped.safetensors"]
    assert main(["convert", f"{tmp_path}/more", f"{tmp_path}/said", "--dialect", "transformers"]) == 0
    said = Checkpoint.open(tmp_path / "said")
    assert said.mask.windows == found.mask.windows
    assert said.config["architectures"] == ["DroppedLlamaForCausalLM"]
    assert main(["apply", f"{tmp_path}/more", f"{tmp_path}/other", "--attention", "5"]) == 0
    assert Checkpoint.open(tmp_path / "other").mask == DropMask(8, attention=(5,))
