"""Config of a Nemotron-NAS checkpoint, written into it by llmdrop: engines read the block configs as attributes.

This file stands alone: it is loaded from the checkpoint where --trust-remote-code allows it.
"""

from typing import Any

from transformers import LlamaConfig

WIDTHS = ("intermediate_size", "num_key_value_heads")


class Block(dict[str, Any]):
    """A dict whose entries are attributes as well; it remains what JSON and pickle expect."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class NemotronNasConfig(LlamaConfig):
    """A Llama's config and, per layer, what its attention and its FFN are."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: Any = (), **kwargs: Any) -> None:
        # Published ones say null for what differs from layer to layer, which newer versions of Transformers refuse.
        super().__init__(**{key: value for key, value in kwargs.items() if key not in WIDTHS or value is not None})
        self.block_configs = [Block({key: Block(part) for key, part in block.items()}) for block in block_configs]
