"""Architectures without a row for which the reason is known: those that no row can be written for, since dropping a
sublayer would change more than what it adds, and those that one is still to be written for.
"""

from collections.abc import Mapping

SHARED_INDEXER = "sparse attention: layers without an indexer attend to the tokens that an earlier layer's has picked"
OWN_INDEXER = "sparse attention: an indexer with a cache of its own beside the attention"
STREAMS = "hyper-connections: several residual streams"
SHARED_WEIGHTS = "several layers have one attention and one MLP together, whose weights would still be needed"
BLOCKS = "attention over the residual streams of earlier blocks of layers: several residual streams"

REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM"), SHARED_INDEXER),
    **dict.fromkeys(("MiniMaxM3SparseForCausalLM", "MiniMaxM3SparseForConditionalGeneration"), OWN_INDEXER),
    **dict.fromkeys(("DeepseekV4ForCausalLM", "DeepseekV41ForCausalLM", "DeepseekV4ForConditionalGeneration"), STREAMS),
    "KimiK3ForConditionalGeneration": BLOCKS,
    "Zamba2ForCausalLM": SHARED_WEIGHTS,
}
UNTRIED: Mapping[str, str] = {
    "KimiLinearForCausalLM": "its delta attention has not been tried",
    "OlmoHybridForCausalLM": (
        "vLLM 0.32 loads none of its checkpoints, with or without a mask: its loader of the three convolutions of "
        "a recurrent mixer is not told which of them it gets, see vllm-project/vllm#55858"
    ),
}
