"""A record of a healing that nobody did, for what reads it."""

from llmdrop_vllm.artifacts import DataIdentity, ModelIdentity, Provenance
from llmdrop_vllm.healing.records import HealedLayer, Healing, Training

MODEL = ModelIdentity(path="/models/tiny", architecture="LlamaForCausalLM", fingerprint="f00d")
DATA = DataIdentity(source="/data/answers.jsonl", sequences=64, tokens=6000, seq_len=None, seed=0, sha256="ab12")
TRAINING = Training(
    method="full weights",
    epochs=2.0,
    learning_rate=2e-4,
    tokens_seen=12000,
    kl_before=0.25,
    kl_after=0.15,
    tensors=("a",),
)


def layer(index, left, lost=True, mended=True):
    return HealedLayer(
        layer=index,
        target=index,
        lost=(f"attention {index}",) if lost else (),
        mends="mlp" if lost else "attention",
        tensors=("a",) if mended else (),
        columns=8,
        ridge=0.1 if mended else None,
        error_before=0.2,
        error_after=0.2 * left,
    )


def healing(**changes):
    layers = (layer(7, 0.6), layer(8, 0.9, lost=False), layer(9, 0.8), layer(11, 1.0, mended=False))
    provenance = Provenance(model=MODEL, data=DATA, versions={}, command="llmdrop heal")
    return Healing(
        **{"teacher": MODEL, "tokens": 5000, "held_out_tokens": 1000, "layers": layers, "provenance": provenance}
        | changes
    )
