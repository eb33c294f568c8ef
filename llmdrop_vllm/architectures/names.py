"""Where the decoder's layers stand in dotted names: of a checkpoint's tensors, of modules in vLLM and Transformers."""

import re

# What may stand before the number of a decoder layer. A name that leads through anything else, such as `visual`,
# `audio_tower`, `talker` or `mtp`, is of another part of the model, whose blocks have `self_attn` and `mlp` as well.
PARTS = (
    "model|transformer|decoder|gpt_neox|backbone|layers|draft_model"
    "|language_model|text_model|language|text|llm|thinker|openpangu"  # towers of wrappers
    r"|transformer\.encoder"  # ChatGLM
)
LEADING = rf"(?:(?:{PARTS})\.)*"
# A regular expression of everything before the number.
BEFORE_LAYER = rf"{LEADING}(?:layers|h|blocks)\."
IN_LAYER = re.compile(rf"{BEFORE_LAYER}(\d+)(?:\.|$)")


def within_decoder(name: str) -> str:
    """What is left of a dotted name behind the parts that lead to the decoder, which checkpoints of one wrapper may
    spell in several ways: `language_model.model.norm.weight` and `model.language_model.norm.weight` are one.
    """
    return re.sub(LEADING, "", name, count=1)


def layer_in(name: str) -> int | None:
    """The decoder layer that a dotted name leads into; None where it leads elsewhere."""
    found = IN_LAYER.match(name)
    return int(found[1]) if found else None


def is_layer_list(name: str) -> bool:
    """Whether a dotted name is that of the list of decoder layers."""
    return re.fullmatch(BEFORE_LAYER, f"{name}.") is not None
