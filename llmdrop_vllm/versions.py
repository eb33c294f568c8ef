"""This package's version, and which vLLM it was tested with."""

__version__ = "0.2.0"

# Minor versions that the suite was run on, of 0.33 in part (docs/method.md, "Limits"); the extras in pyproject.toml
# allow these.
TESTED_VLLM = ("0.32", "0.33")


def was_tested(vllm: str) -> bool:
    """Whether the suite was run on this version of vLLM, or on another of its minor version."""
    return ".".join(vllm.split(".")[:2]) in TESTED_VLLM
