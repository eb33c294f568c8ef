"""What one row of the family table says: how a decoder layer names its sublayers and adds their outputs."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from llmdrop_vllm.masks.layer_types import NO_MIXER, RECURRENT, layer_types
from llmdrop_vllm.masks.mask import DropMask


@dataclass(frozen=True)
class Sublayer:
    """Attribute names inside the decoder layer: `x + post_norm(module(pre_norm(x)))`.

    `pre_norm` is None where the sublayer has none, or where it is shared with the other sublayer: then it stays.
    `output` is the module's last projection, a regular expression where kinds of layers differ, "weight|bias" where the
    module is a projection itself: with its weights zeroed the sublayer adds nothing. `also` names modules beside
    `module` that belong to the sublayer: what they return is added to what it returns, or is its input. `optional` are
    names that not every layer or config has. `inner` are norms and routers that stand between these where a layer has
    them, each with how many values it returns in Transformers, 0 for a tensor alone: no output of theirs is added to
    anything.

    `module` is the name in the checkpoint; `in_vllm` and `in_transformers` stand in for it where theirs differ.
    `vllm_tuple` and `transformers_tuple` are how many values the module returns there, 0 for a tensor alone.
    `transformers_adds_residual` is for modules that, in Transformers, get the residual stream as their second argument
    and return it with their output added. `vllm_fills` is for those that, in vLLM, write their output into their last
    argument, which nobody has initialised, and return nothing. `vllm_parts` are what the module's input comes through
    where vLLM's layer has no module for the whole, only its parts, each with how many values it returns.
    """

    module: str
    pre_norm: str | None
    output: str
    post_norm: str | None = None
    also: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    inner: tuple[tuple[str, int], ...] = ()
    in_vllm: str | None = None
    in_transformers: str | None = None
    vllm_tuple: int = 0
    transformers_tuple: int = 0
    transformers_adds_residual: bool = False
    vllm_fills: bool = False
    vllm_parts: tuple[tuple[str, int], ...] = ()

    @property
    def norms(self) -> tuple[str, ...]:
        """The norms that go when the sublayer is dropped."""
        return tuple(name for name in (self.pre_norm, self.post_norm) if name is not None)

    @property
    def names(self) -> tuple[str, ...]:
        """Everything that goes when the sublayer is dropped, as the checkpoint names it."""
        return self.module, *self.also, *dict(self.inner), *self.norms

    @property
    def output_ending(self) -> str:
        """A regular expression of how the names of the last projection's tensors end."""
        # The experts of some mixtures are one tensor, whose name ends where others' have `.weight`.
        return rf"(?:{self.output})(?:\.weight|\.bias|_bias)?"

    @property
    def vllm_modules(self) -> tuple[str, ...]:
        """All modules of the sublayer in vLLM's decoder layer, its own first."""
        return self.in_vllm or self.module, *dict(self.vllm_parts), *self.also, *dict(self.inner)

    @property
    def transformers_module(self) -> str:
        """The module's name in Transformers' decoder layer."""
        return self.in_transformers or self.module


def attention(
    module: str = "self_attn", pre_norm: str | None = "input_layernorm", output: str = "o_proj", **names: Any
) -> Sublayer:
    """An attention sublayer, by default Llama's; in Transformers it returns the attention weights beside its output."""
    return Sublayer(module, pre_norm, output, transformers_tuple=2, **names)


def mlp(
    module: str = "mlp", pre_norm: str | None = "post_attention_layernorm", output: str = "down_proj", **names: Any
) -> Sublayer:
    """An MLP sublayer, by default Llama's."""
    return Sublayer(module, pre_norm, output, **names)


ATTENTION, MLP = attention(), mlp()
Having = tuple[Sublayer, tuple[int, ...]]  # a kind of sublayer, and layers


@dataclass(frozen=True)
class Family:
    """One decoder-layer layout and the architectures that share it.

    `when` is for architectures with several layouts: the values that config entries must have for this one, None
    standing for a config that does not say.

    `parallel` layers give attention and MLP the same input: `x + attention(norm(x)) + mlp(norm(x))`. `scales_outputs`
    is for layers that, in vLLM, multiply what a sublayer returned before the next norm adds it to the residual stream,
    `transformers_layer_tuple` for those that, in Transformers, return the stream as the first of several values,
    `unlike_attention` for those whose attention has other parts in layers of another type. `then` is the module that
    the stream goes into behind both sublayers where a layer adds something else to it, such as a token's own input.
    `streams` names what keeps several residual streams, which importance and healing are not measured in.

    In hybrids some layers have a recurrent mixer where others have attention, and both are what a mask calls attention:
    `recurrent` is that sublayer. `alone` is for layers that have a mixer or an MLP, and not both. `layers` is what the
    config at hand has: see `layer_types`.
    """

    name: str
    architectures: str  # separated by whitespace
    attention: Sublayer = ATTENTION
    mlp: Sublayer = MLP
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict, hash=False)
    parallel: bool = False
    scales_outputs: bool = False
    transformers_layer_tuple: bool = False
    unlike_attention: bool = False
    then: str | None = None
    streams: str | None = None
    recurrent: Sublayer | None = None
    alone: bool = False
    layers: tuple[str, ...] = ()

    def of(self, config: Mapping[str, Any]) -> Self:
        """The row for layers as these entries of a config have them."""
        if self.recurrent is None and not self.unlike_attention:
            return self
        types = layer_types(config, depth := config.get("num_hidden_layers")) or ()
        if shared := config.get("num_kv_shared_layers"):  # these have no keys and values
            types = (*types[: depth - shared], *(f"{each}, shared" for each in types[depth - shared :]))
        return replace(self, layers=types)

    def sublayers(self, mask: DropMask) -> Iterator[Having]:
        """Each kind of sublayer with the layers that go without it."""
        yield from self.mixers(mask.attention)
        yield from self.mlps(mask.mlp)

    def absent(self, mask: DropMask) -> tuple[set[int], set[int]]:
        """Layers that go without attention and without an MLP under a mask, those that never had one among them."""
        layers = range(mask.num_hidden_layers)
        return (
            {*mask.attention} | {layer for layer in layers if self.mixer(layer) is None},
            {*mask.mlp} | {layer for layer in layers if self.mlp_of(layer) is None},
        )

    def mixers(self, layers: Iterable[int]) -> Iterator[Having]:
        """Each kind of what a mask calls attention, with those of the layers that have it."""
        for kind in filter(None, (self.attention, self.recurrent)):
            yield kind, tuple(layer for layer in layers if self.mixer(layer) is kind)

    def mlps(self, layers: Iterable[int]) -> Iterator[Having]:
        """The MLP, with those of the layers that have it."""
        yield self.mlp, tuple(layer for layer in layers if self.mlp_of(layer) is not None)

    def alike(self, layers: Iterable[int]) -> list[set[int]]:
        """Layers put together whose attention has the same parts."""
        if not self.layers:
            return [{*layers}]
        return [{layer for layer in layers if self.layers[layer] == each} for each in dict.fromkeys(self.layers)]

    def mixer(self, layer: int) -> Sublayer | None:
        """What a mask calls a layer's attention; None for a layer without one."""
        kind = self.layers[layer] if self.layers else ""
        return {NO_MIXER: None, RECURRENT: self.recurrent}.get(kind, self.attention)

    def mlp_of(self, layer: int) -> Sublayer | None:
        """A layer's MLP; None for a layer that is a mixer alone."""
        return None if self.alone and self.layers and self.layers[layer] != NO_MIXER else self.mlp

    def fits(self, config: Mapping[str, Any]) -> bool:
        """Whether layers built from these entries of a config have the layout."""
        return all(config.get(key) in values for key, values in self.when.items())

    def describe_when(self) -> str:
        """For people: `parallel_attn true or unset`; empty where every config fits."""
        return ", ".join(
            f"{key} {' or '.join('unset' if value is None else str(value).lower() for value in values)}"
            for key, values in self.when.items()
        )
