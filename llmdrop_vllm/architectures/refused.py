"""Architectures that no row can be written for: dropping a sublayer would change more than what it adds."""

from types import MappingProxyType

SHARED_INDEXER = "sparse attention: layers without an indexer attend to the tokens that an earlier layer's has picked"
OWN_INDEXER = "sparse attention: an indexer with a cache of its own beside the attention"
STREAMS = "hyper-connections: several residual streams"
BLOCKS = "attention over the residual streams of earlier blocks of layers: several residual streams"

REFUSED = MappingProxyType(
    {
        **dict.fromkeys(("DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM"), SHARED_INDEXER),
        **dict.fromkeys(("MiniMaxM3SparseForCausalLM", "MiniMaxM3SparseForConditionalGeneration"), OWN_INDEXER),
        **dict.fromkeys(
            ("DeepseekV4ForCausalLM", "DeepseekV41ForCausalLM", "DeepseekV4ForConditionalGeneration"), STREAMS
        ),
        "KimiK3ForConditionalGeneration": BLOCKS,
    }
)
