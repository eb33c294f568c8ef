"""Nemotron-NAS checkpoints (DeciLMForCausalLM): Llamas whose config says layer by layer what is there.

vLLM, SGLang, TensorRT-LLM and llama.cpp read them without any plugin. A Llama or Mistral with dropped sublayers is one
of them under another name; here it gets that name, and its own name back.
"""

from collections.abc import Mapping
from typing import Any

from llmdrop_vllm.errors import CheckpointError, MaskError
from llmdrop_vllm.masks.dialects import block_entry
from llmdrop_vllm.masks.mask import DropMask

ARCHITECTURE, MODEL_TYPE = "DeciLMForCausalLM", "nemotron-nas"
# What the model was called before, in the config of a checkpoint that was renamed.
SOURCE = "llmdrop_source"
RENAMED_KEYS = ("architectures", "model_type", "auto_map")
# The engines build these checkpoints with Llama's defaults, so entries that the config leaves out must be said.
EXPLICIT_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "hidden_act"),
    *("max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
)
MODEL_TYPES = ("llama", "mistral")
LLAMA_3_VOCABULARY = 128_256
FFN_MULTIPLE = 256  # the engines round an FFN's width up to it


def renamed(entries: Mapping[str, Any], mask: DropMask, config: Any, config_class: str) -> dict[str, Any]:
    """The entries of a Llama or Mistral as a Nemotron-NAS config with this mask.

    `config` is the model's Transformers config, which knows the defaults; `config_class` the `module.Class` in the
    checkpoint that reads block configs. Raises MaskError for what DeciLMForCausalLM cannot express.
    """
    _check_expressible(entries.get("model_type"), config)
    source = {key: entries[key] for key in RENAMED_KEYS if key in entries}
    names = {"architectures": [ARCHITECTURE], "model_type": MODEL_TYPE, "auto_map": {"AutoConfig": config_class}}
    explicit = {key: getattr(config, key) for key in EXPLICIT_KEYS}
    # A key that is present and null means the default as well.
    said = {key: value for key, value in entries.items() if value is not None or key not in EXPLICIT_KEYS}
    return explicit | said | names | _block_configs(mask, config) | {SOURCE: source}


def plain(entries: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a Nemotron-NAS config under the model's own architecture; any other config's are as they are.

    A checkpoint that does not say what it was is a Llama, if its kept sublayers are of one width.
    """
    if entries.get("model_type") != MODEL_TYPE:
        return dict(entries)
    if (source := entries.get(SOURCE)) is None:
        source = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | _widths(entries)
    elif not (isinstance(source, Mapping) and {"architectures", "model_type"} <= set(source) <= set(RENAMED_KEYS)):
        raise CheckpointError(f"{SOURCE} is {source!r}; expected an object with {', '.join(RENAMED_KEYS)}")
    return {key: value for key, value in entries.items() if key not in (*RENAMED_KEYS, SOURCE)} | dict(source)


def warnings(mask: DropMask, config: Any) -> list[str]:
    """What some of the engines that read Nemotron-NAS checkpoints cannot do with this one."""
    found = []
    gone = set(mask.attention) & set(mask.mlp)
    first = min(set(range(mask.num_hidden_layers)) - gone, default=0)
    if first in mask.attention:
        found.append(f"vLLM without the plugin and SGLang crash: the first kept sublayer, in layer {first}, is an MLP")
    if alone := sorted(set(mask.mlp) - set(mask.attention)):
        found.append(f"llama.cpp ignores the attention of layers without an MLP: {', '.join(map(str, alone))}")
    if config.intermediate_size % FFN_MULTIPLE:
        found.append(
            f"only vLLM can read it: SGLang, TensorRT-LLM and llama.cpp know FFN widths that are multiples of "
            f"{FFN_MULTIPLE}, and intermediate_size is {config.intermediate_size}"
        )
    if (head_dim := getattr(config, "head_dim", None)) not in (None, config.hidden_size // config.num_attention_heads):
        found.append(f"llama.cpp takes hidden_size / num_attention_heads for the head size, and head_dim is {head_dim}")
    if config.vocab_size != LLAMA_3_VOCABULARY:
        found.append(f"llama.cpp's converter takes the vocabulary of Llama 3 only ({LLAMA_3_VOCABULARY:,} tokens)")
    if getattr(config, "attention_bias", False):
        found.append("TensorRT-LLM ignores attention biases")
    if getattr(config, "mlp_bias", False):
        found.append("SGLang and TensorRT-LLM ignore MLP biases")
    return found


def _check_expressible(model_type: object, config: Any) -> None:
    reasons = []
    if model_type not in MODEL_TYPES:
        reasons.append(f"model_type is {model_type!r}; expected one of {', '.join(MODEL_TYPES)}")
    if (activation := getattr(config, "hidden_act", None)) != "silu":
        reasons.append(f"hidden_act is {activation!r}; expected 'silu'")
    if window := getattr(config, "sliding_window", None):
        reasons.append(
            f"sliding_window is {window}, and not every engine would heed it; for contexts of up to {window} tokens, "
            "set it to null in config.json"
        )
    if set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
        reasons.append("layer_types has other attention than 'full_attention'")
    if reasons:
        raise MaskError(f"the dialect nemotron-nas cannot express this model: {'; '.join(reasons)}")


def _block_configs(mask: DropMask, config: Any) -> dict[str, Any]:
    """The mask's entries, with the widths of what is kept."""
    width, group = config.intermediate_size, config.num_attention_heads // config.num_key_value_heads
    ffn = {"intermediate_size": width} if width % FFN_MULTIPLE else {"ffn_mult": 3 * width / (2 * config.hidden_size)}
    kept = {"attention": {"n_heads_in_group": group}, "ffn": ffn}
    gone = {"attention": {"n_heads_in_group": None}, "ffn": {"ffn_mult": None}}
    entries = mask.to_config("nemotron-nas")
    for block in entries["block_configs"]:
        for part, settings in block.items():
            settings |= {"replace_with_linear": False} | (gone if settings["no_op"] else kept)[part]
    return entries


def _widths(entries: Mapping[str, Any]) -> dict[str, int]:
    """num_key_value_heads and intermediate_size of a config that says them layer by layer."""
    try:
        hidden, heads, blocks = entries["hidden_size"], entries["num_attention_heads"], entries["block_configs"]
        attention, ffn = (
            [settings for block in blocks if not block_entry(settings := block_entry(block, part), "no_op")]
            for part in ("attention", "ffn")
        )
        kv_heads = {heads // block_entry(settings, "n_heads_in_group") for settings in attention}
        widths = {_intermediate_size(settings, hidden) for settings in ffn}
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"block_configs or the widths it refers to are incomplete: {error!r}") from None
    return {
        "num_key_value_heads": _only("key-value heads", kv_heads, heads),
        "intermediate_size": _only("FFN widths", widths, entries.get("intermediate_size") or FFN_MULTIPLE),
    }


def _intermediate_size(settings: Any, hidden: int) -> int:
    """The engines compute int(2 * ffn_mult * hidden / 3), rounded up to a multiple of 256."""
    if (ffn_mult := block_entry(settings, "ffn_mult")) is None:
        return int(block_entry(settings, "intermediate_size"))
    return -(-int(2 * ffn_mult * hidden / 3) // FFN_MULTIPLE) * FFN_MULTIPLE


def _only(what: str, values: set[int], default: int) -> int:
    if len(values) > 1:
        found = ", ".join(map(str, sorted(values)))
        raise CheckpointError(f"block_configs has {what} {found}; a Llama has one for all layers")
    return next(iter(values), default)
