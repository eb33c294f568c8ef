"""The family table: for each architecture, how its decoder layer names its sublayers and adds their outputs.

The names are the same in vLLM, in Transformers and in the checkpoint's tensor names, so one row serves them all.
Supporting a new architecture is one more row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmdrop_vllm.mask import DropMask


@dataclass(frozen=True)
class Sublayer:
    """Attribute names inside the decoder layer: `x + module(pre_norm(x))`.

    `output` is the module's last projection: with its weights zeroed the sublayer adds nothing.
    """

    module: str
    pre_norm: str
    output: str

    @property
    def names(self) -> tuple[str, str]:
        """Everything that goes when the sublayer is dropped."""
        return self.module, self.pre_norm


@dataclass(frozen=True)
class Family:
    """One decoder-layer layout and the architectures that share it.

    vLLM fuses the residual add into the next norm in all of them: a norm takes (x, residual) and returns both.
    """

    name: str
    architectures: tuple[str, ...]
    attention: Sublayer = Sublayer("self_attn", "input_layernorm", "o_proj")
    mlp: Sublayer = Sublayer("mlp", "post_attention_layernorm", "down_proj")

    def sublayers(self, mask: "DropMask") -> Iterator[tuple[Sublayer, tuple[int, ...]]]:
        """Each sublayer with the layers that go without it."""
        yield self.attention, mask.attention
        yield self.mlp, mask.mlp


FAMILIES = (
    Family(
        "llama",
        (
            "LlamaForCausalLM",
            "LLaMAForCausalLM",
            "LlamaModel",
            "InternLM3ForCausalLM",
            "IQuestCoderForCausalLM",
            "MistralForCausalLM",
            "Ministral3ForCausalLM",
            "MistralModel",
            "TeleChat3ForCausalLM",
        ),
    ),
)

EXPLICIT_PREFIX = "Dropped"
BY_ARCHITECTURE = MappingProxyType({name: family for family in FAMILIES for name in family.architectures})


def family_of(architecture: str) -> Family | None:
    """The row for an architecture name, plain or explicit (`DroppedLlamaForCausalLM`); None where there is none."""
    return BY_ARCHITECTURE.get(architecture.removeprefix(EXPLICIT_PREFIX))
