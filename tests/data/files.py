"""Files of answers that nobody gave, for what reads them."""

from dataclasses import replace

from llmdrop_vllm.artifacts import ModelIdentity, Provenance
from llmdrop_vllm.data.answers import Answer, AnswersHeader


def header(**changes):
    """Of a file of answers, like every other but for the changes."""
    model = ModelIdentity(path="/models/tiny", architecture="LlamaForCausalLM", fingerprint="f00d")
    asked = {
        "prompts": "ours",
        "prompts_sha256": "ab12",
        "num_prompts": 4,
        "per_prompt": 1,
        "max_tokens": 8,
        "temperature": 0.8,
        "seed": 0,
        "held_out": 0.25,
        "provenance": Provenance(model=model, dtype="float32", versions={}, command="llmdrop answers"),
    }
    return AnswersHeader(**asked | changes)


def with_vocabulary(checkpoint, size):
    """A checkpoint whose config names another size."""
    return replace(checkpoint, decoder=replace(checkpoint.decoder, config={"vocab_size": size}))


def answer(number, prompt, reply, **more):
    return Answer(prompt_number=number, prompt=tuple(prompt), answer=tuple(reply), **more)


ANSWERS = (
    answer(2, [5, 6], [7, 8, 0], text="a\u2028b"),
    answer(0, [1], [2], held_out=True),
    answer(3, [9, 9, 9], []),
    answer(1, [3, 4, 5], [6, 7], finish_reason="length"),
    answer(4, [3, 4], [5, 6, 7], held_out=True),
)


def write_answers(path, answers=ANSWERS, **changes):
    lines = (each.model_dump_json() + "\n" for each in (header(**changes), *answers))
    path.write_text("".join(lines), encoding="utf-8")
    return path
