"""An image through a masked wrapper: its vision tower and processor, and a decoder without the dropped sublayers."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    LlavaProcessor,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)
from vllm import LLM, SamplingParams

from llmdrop_vllm import DropMask
from llmdrop_vllm.writing.plan import plan_surgery
from llmdrop_vllm.writing.write import write_checkpoint
from tests.architectures.cases import LAYERS
from tests.architectures.wrapper_cases import WRAPPER_CASES
from tests.engines import engine
from tests.words import WORDS, tokenizer

pytest.importorskip("torchvision", reason="vLLM's multimodal models import it")
MASK = DropMask(LAYERS, attention=(4, 0, 2), mlp=(4, 1))
PROMPTS = {"llava": "<image> a b c", "qwen": "<|vision_start|> <|image_pad|> <|vision_end|> a b c"}


def llava(directory: Path) -> Path:
    case = WRAPPER_CASES["LlavaForConditionalGeneration-llama"]
    case.with_overrides(image_token_index=3).write(directory)
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    LlavaProcessor(
        CLIPImageProcessor(**size),
        tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(directory)
    return directory


def qwen(directory: Path) -> Path:
    case = WRAPPER_CASES["Qwen2_5_VLForConditionalGeneration"]
    ids = {"vision_start_token_id": 4, "vision_end_token_id": 5, "image_token_id": 6, "video_token_id": 7}
    case.with_overrides(**ids).write(directory)
    pixels = {"min_pixels": 56 * 56, "max_pixels": 56 * 56}
    text = tokenizer()
    text.image_token, text.image_token_id, text.video_token, text.video_token_id = WORDS[6], 6, WORDS[7], 7
    Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**pixels), text, Qwen2VLVideoProcessor(**pixels), chat_template="{{ messages }}"
    ).save_pretrained(directory)
    return directory


def answer(llm: LLM, prompt: str, seed: int) -> tuple[list[int], list[float]]:
    picture = Image.fromarray(np.random.default_rng(seed).integers(0, 255, (56, 56, 3), dtype=np.uint8))
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0)
    request = {"prompt": prompt, "multi_modal_data": {"image": picture}}
    (output,) = llm.generate([request], sampling, use_tqdm=False)[0].outputs
    logprobs = [each[token].logprob for token, each in zip(output.token_ids, output.logprobs, strict=True)]
    return list(output.token_ids), logprobs


@pytest.mark.parametrize("make", [llava, qwen])
def test_an_image_through_a_dropped_wrapper_is_seen_as_with_the_projections_zeroed(make, tmp_path):
    full = make(tmp_path / "full")
    found = {}
    for name, options in {"dropped": {}, "portable": {"portable": True}}.items():
        write_checkpoint(plan_surgery(full, MASK, **options), tmp_path / name)
        limits = {"limit_mm_per_prompt": {"image": 1, "video": 0}}
        with engine(tmp_path / name, skip_tokenizer_init=False, max_model_len=256, **limits) as llm:
            found[name] = [answer(llm, PROMPTS[make.__name__], seed) for seed in (0, 1)]
    for ours, expected in zip(found["dropped"], found["portable"], strict=True):
        assert ours[0] == expected[0]
        assert ours[1] == pytest.approx(expected[1], abs=1e-4)
    # The picture is seen: another gives other numbers.
    assert found["dropped"][0][1] != pytest.approx(found["dropped"][1][1], abs=1e-4)
