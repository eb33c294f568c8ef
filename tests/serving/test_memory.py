"""A mask never costs memory: dropped sublayers are freed one by one while the model is built."""

import pytest

from tests.serving.engine_process import run_job
from tests.tiny import TINY_LLAMA, shapes, write_checkpoint

HIDDEN, INTERMEDIATE = 512, 2048
MLP_BYTES = 3 * HIDDEN * INTERMEDIATE * 4  # the larger sublayer, 12 MiB
WIDE = TINY_LLAMA | {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_attention_heads": 4,
    "head_dim": 128,
}


@pytest.mark.processes
def test_peak_is_that_of_the_kept_layers_alone(tmp_path):
    """16 layers with 14 dropped, every weight in the file, against a model that only ever had the two."""
    dropped = [*range(1, 15)]
    deep = WIDE | {"num_hidden_layers": 16, "drop_attn_list": dropped, "drop_mlp_list": dropped}
    job = {"prompt": [1, 2, 3], "tokens": 1, "enforce_eager": True, "num_gpu_blocks_override": 16}
    paths = [write_checkpoint(tmp_path / "dropped", deep)]
    paths.append(write_checkpoint(tmp_path / "two layers", WIDE | {"num_hidden_layers": 2}))

    def peak(path):
        return run_job({"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}, model=path, **job)["peak_bytes"]

    peaks = [peak(path) for path in paths]
    for _ in range(2):  # what else a process does can only add to its peak, by tens of megabytes on a busy machine
        if peaks[0] - peaks[1] >= 2 * MLP_BYTES:
            peaks[0] = min(peaks[0], peak(paths[0]))
    sizes = {name: 4 * shape[0] * (shape[1:] or (1,))[0] for name, shape in shapes(deep).items()}
    total_dropped = sum(size for name, size in sizes.items() if any(f".layers.{layer}." in name for layer in dropped))
    assert total_dropped > 8 * 2 * MLP_BYTES  # what the test could see, were nothing freed
    assert peaks[0] - peaks[1] < 2 * MLP_BYTES, f"{peaks[0]:,} bytes with a mask, {peaks[1]:,} without those layers"
