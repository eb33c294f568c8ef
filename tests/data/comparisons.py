"""A recording that nobody made, for what shows it."""

from llmdrop_vllm.artifacts import ModelIdentity, Provenance
from llmdrop_vllm.data.comparison import Comparison, Form, Said
from llmdrop_vllm.masks.mask import DropMask

QUESTIONS = ("What is the capital of France?", "Why is the sky blue?")
FULL = ("The capital of France is Paris, on the Seine.", "Air scatters blue light more than red light.")
DROPPED = ("The capital of France is Paris, Paris, Paris,", "Blue, because it is blue.")
HEALED = ("The capital of France is Paris, a city on the Seine.", FULL[1])
GONE = DropMask(12, attention=(11, 7, 8, 10))
HEALING = "4 layers healed on 60,000 tokens of answers, leaving 60% to 80% of each one's error"


def form(name, texts=FULL, mask=GONE, fingerprint="f00d", healing=None, **sizes):
    cut = "length" if name == "dropped" else "stop"
    answers = tuple(Said.beside(full, text, len(text), cut) for full, text in zip(FULL, texts, strict=True))
    sizes = {"weight_bytes": 9_445_248, "kv_bytes_per_token": 2048} | sizes
    return Form(
        name=name,
        fingerprint=fingerprint,
        mask=mask,
        summary=mask.summary(),
        healing=healing,
        answers=answers,
        **sizes,
    )


def comparison(**changes):
    """Of the embedded model's shape."""
    forms = (
        form("full", mask=DropMask(12), weight_bytes=10_233_216, kv_bytes_per_token=3072),
        form("dropped", DROPPED),
        form("healed", HEALED, fingerprint="beef", healing=HEALING),
    )
    model = ModelIdentity(path="/models/healed", architecture="LlamaForCausalLM", fingerprint="beef")
    found = {
        "date": "2026-11-27",
        "prompts": "ours",
        "max_tokens": 48,
        "kv_dtype": "bfloat16",
        "questions": QUESTIONS,
        "forms": forms,
        "provenance": Provenance(model=model, dtype="float32", command="llmdrop compare healed --full model"),
    }
    return Comparison(**found | changes)
