"""Prompts that a chat model writes itself: its template up to where a user speaks, gone on with by the model, and
requests like those that it is shown."""

import json
from pathlib import Path

from llmdrop_vllm.artifacts import write_atomically
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.data.answers import read_answers
from llmdrop_vllm.data.tokens import load_tokenizer
from llmdrop_vllm.errors import InputError

MOST, SHORTEST = 850, 12  # prompts, and letters of one
DRAWN, LONGEST = 1600, 48  # to choose from, and tokens of one
MARK = "XYZZY"
ANOTHER = (
    "\n\n---\nWrite another request like the one above, in the same language, about something else. Write only it."
)


def beginning(checkpoint: Checkpoint, out: Path) -> list[str]:
    """Write the one prompt that begins a chat, and give `llmdrop answers`' options by which it is gone on with."""
    tokenizer = load_tokenizer(checkpoint, "its model's belongs there")
    token_ids = tokenizer(_around(checkpoint)[0], add_special_tokens=False)["input_ids"]
    write_atomically(out, json.dumps({"prompt": token_ids}) + "\n")
    options = {"--prompts": out, "--per-prompt": DRAWN, "--temperature": 1, "--max-tokens": LONGEST}
    return [str(part) for pair in options.items() for part in pair]


def like(checkpoint: Checkpoint, answers: Path, out: Path) -> None:
    """Of the prompts that are not held out, those in which a user speaks once, each with a wish for another like it."""
    tokenizer, (before, after) = load_tokenizer(checkpoint, "its model's belongs there"), _around(checkpoint)
    shown = (tokenizer.decode(each.prompt) for each in read_answers(answers)[1] if not each.held_out)
    said = dict.fromkeys(
        text.removeprefix(before).removesuffix(after)
        for text in shown
        if text.startswith(before) and text.endswith(after)
    )
    write_atomically(out, "".join(json.dumps(text + ANOTHER) + "\n" for text in said))


def _around(checkpoint: Checkpoint) -> tuple[str, str]:
    """What the chat template puts before what a user says, and after it."""
    tokenizer = load_tokenizer(checkpoint, "its model's belongs there")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": MARK}], tokenize=False, add_generation_prompt=True
    )
    before, found, after = chat.partition(MARK)
    if not found:
        raise InputError(f"{checkpoint.directory} has a chat template that changes what a user says")
    return before, after


def own_prompts(answers: Path, out: Path, most: int = MOST) -> None:
    """Of what the model wrote there, each prompt once that it came to the end of, a line each."""
    texts = (each.text.strip() for each in read_answers(answers)[1] if each.finish_reason == "stop")
    found = list(dict.fromkeys(text for text in texts if len(text) >= SHORTEST))[:most]
    write_atomically(out, "".join(json.dumps(text) + "\n" for text in found))
