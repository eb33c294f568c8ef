"""What the family table covers of vLLM's text models, and why it leaves out the rest: a table of docs/families.md.

    python -m tests.architectures.survey            # print it
    python -m tests.architectures.survey --write    # put it into docs/families.md

Nothing is built or imported to find out: reasons are read in vLLM's model files, as syntax trees.
"""

import argparse
import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import vllm
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.model_executor.models import registry

from llmdrop_vllm.architectures.families import BY_ARCHITECTURE, FAMILIES
from llmdrop_vllm.architectures.family import Family, Sublayer
from llmdrop_vllm.architectures.refused import REFUSED, UNTRIED
from tests.architectures.cases import CASES

VERSION = vllm.__version__.partition("+")[0]
PAGE = Path(__file__).parents[2] / "docs" / "families.md"
TRANSFORMERS_BACKEND = {"TransformersForCausalLM", "TransformersMoEForCausalLM"}

FITS = "fits, no row yet"
NOT_LOOKED_AT = "not looked at yet"
NO_TRANSFORMERS_CLASS = "no class in Transformers"
# A class among the ancestors of vLLM's model class, or an attribute that a class of its file gives to `self` ([] where
# that is a list of modules). The first that is found is the reason.
SIGNS = {
    "IsAttentionFree": "state-space layers only, no attention",
    "IsHybrid": "attention mixed with state-space, linear-attention or convolution layers",
    "SupportsMultiModal": "images as well as text",
    "self_attn[]": "two attentions in one layer",
    "hc_attn_fn": "hyper-connections: several residual streams",
    "hc_attn_layer": "hyper-connections: several residual streams",
    "attn_sconv": "a short convolution, with a state, after each sublayer",
    "topk_indices_buffer": "sparse attention: an indexer with a cache of its own beside the attention",
    "is_kv_shared_layer": "layers that may read the KV cache of an earlier one",
    "loop_num": "layers that run more than once per token",
    "z_L_init": "layers that run more than once per token",
}
# What no sign says, read in vLLM's source.
CONFIG_LACKS = "vLLM reads config entries that Transformers' config class does not have"
ROUTER = "vLLM's router for CPUs cannot run the tiny model, with or without a mask"
# Architectures with a row and a Transformers class whose tiny model was tried.
UNVERIFIED = {
    "ApertusForCausalLM": (
        "vLLM keeps parameters of the activation in bfloat16: 5e-3 from Transformers, with or without a mask"
    ),
    "HYV3ForCausalLM": CONFIG_LACKS,
    "MiMoV2FlashForCausalLM": CONFIG_LACKS,
    "LagunaForCausalLM": ROUTER,
    "MiniMaxM2ForCausalLM": ROUTER,
}
REASONS = {
    **{name: why for name, why in {**REFUSED, **UNTRIED}.items() if name in registry._TEXT_GENERATION_MODELS},
    "DbrxForCausalLM": (
        "vLLM 0.32 loads none of its checkpoints, with or without a mask: its loader looks for the experts under a "
        "name that they no longer have (`KeyError: 'blocks.0.ffn.experts.w13_weight'`)"
    ),
    "MistralLarge3ForCausalLM": "its checkpoints name tensors otherwise than DeepSeek's, whose class it uses",
    "NanbeigeForCausalLM": "remote code by vLLM's Transformers backend, not looked at yet",
    "TeleChat2ForCausalLM": "the constructor edits the attention and the MLP of every layer",
}


OURS = "plain PyTorch is in its place"
# Verified with these parts left out of the comparison or made alike: what stock vLLM does otherwise than Transformers.
REMARKS = {
    "AXK1ForCausalLM": "mixtures in all layers: for a dense one, vLLM wants a norm that it does not use",
    "BloomForCausalLM": "vLLM computes GELU exactly, Transformers approximately: 4e-4 apart with or without a mask",
    "Ernie4_5_MoeForCausalLM": "vLLM's router for CPUs leaves out the correction of the experts' scores, here zero",
    "Gemma3nForCausalLM": "without tokens' own inputs of layers, which vLLM has in the wrapper only; masks by hand",
    **dict.fromkeys(("Lfm2ForCausalLM", "Lfm2MoeForCausalLM"), "vLLM's rotary kernel for CPUs is wrong there; " + OURS),
    "JambaForCausalLM": "vLLM has no kernel for its state-space layers on CPUs; " + OURS,
    "NemotronHForCausalLM": "dense MLPs: vLLM's mixtures for CPUs lack the activation of its experts",
    **dict.fromkeys(
        ("Qwen3NextForCausalLM", "Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM"),
        "vLLM's gated delta nets for CPUs compute in bfloat16 only; " + OURS,
    ),
    "PhiMoEForCausalLM": "vLLM leaves out the output head's bias, here zero",
}


@dataclass(frozen=True)
class Entry:
    """One architecture's status: verified, else supported where it has rows in the family table, else without a row.

    With several rows, for layers of several layouts, all are verified or the architecture is not.
    """

    architecture: str
    rows: tuple[str, ...]
    verified: bool
    reason: str


def registered() -> dict[str, tuple[str, str]]:
    """Text-generation architectures with their module and class, and the table's names for pooling models."""
    backend = registry._TRANSFORMERS_SUPPORTED_MODELS.items()
    return {
        **registry._TEXT_GENERATION_MODELS,
        **{name: target for name, target in backend if target[1] in TRANSFORMERS_BACKEND},
        **{name: registry._VLLM_MODELS[name] for name in BY_ARCHITECTURE if name in registry._VLLM_MODELS},
    }


def survey() -> list[Entry]:
    return [_entry(architecture, target) for architecture, target in sorted(registered().items())]


def _entry(architecture: str, target: tuple[str, str]) -> Entry:
    rows = tuple(family.name for family in BY_ARCHITECTURE.get(architecture, ()))
    if not rows:
        return Entry(architecture, rows, False, _reason_without_row(architecture, target))
    if set(rows) <= verified_rows(architecture):
        return Entry(architecture, rows, True, "")
    return Entry(architecture, rows, False, _reason_unverified(architecture, target))


def verified_rows(architecture: str) -> set[str]:
    """The rows that the contract tests run with a model of this architecture."""
    return {case.family.name for case in CASES.values() if case.architecture == architecture}


def _reason_unverified(architecture: str, target: tuple[str, str]) -> str:
    cases = (case.architecture for case in CASES.values())
    same = (name for name in cases if target[1] not in TRANSFORMERS_BACKEND and registered().get(name) == target)
    if twin := next(same, None):
        return f"same class in vLLM as `{twin}`"
    return UNVERIFIED.get(architecture, NO_TRANSFORMERS_CLASS)


def _reason_without_row(architecture: str, target: tuple[str, str]) -> str:
    if architecture in REASONS:
        return REASONS[architecture]
    if target[1] in TRANSFORMERS_BACKEND:
        return NOT_LOOKED_AT if architecture in _transformers_classes() else NO_TRANSFORMERS_CLASS
    facts = facts_about(*target)
    for sign, reason in SIGNS.items():
        if sign in facts:
            return reason
    with_row = {registered()[name][1] for name in BY_ARCHITECTURE} - TRANSFORMERS_BACKEND
    return FITS if facts & with_row else NOT_LOOKED_AT


@cache
def _transformers_classes() -> frozenset[str]:
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return frozenset(name for entry in names for name in ((entry,) if isinstance(entry, str) else entry))


def facts_about(module: str, name: str) -> set[str]:
    """Names of a vLLM class and its ancestors, and the attributes assigned in their files and their models' files."""
    facts: set[str] = set()
    waiting = [(module if "." in module else f"vllm.model_executor.models.{module}", name)]
    for module, name in waiting:  # grows while it is read
        classes = {node.name: node for node in _tree(module).body if isinstance(node, ast.ClassDef)}
        imports = _imports(module)
        if name not in classes:
            follow = [name]
        else:
            bases = [ast.unparse(base).rpartition(".")[2] for base in classes[name].bases]
            facts |= {name, *bases, *_attributes(classes.values())}
            follow = bases + [imported for imported in imports if imported.endswith(("Model", "DecoderLayer"))]
        found = ((module, link) if link in classes else imports.get(link) for link in follow)
        waiting += [link for link in found if link is not None and link not in waiting]
    return facts


def _path(module: str) -> Path:
    path = Path(vllm.__file__).parent.parent.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(_path(module).read_text(encoding="utf-8"))


def _imports(module: str) -> dict[str, tuple[str, str]]:
    """Each name imported from a vLLM model file. Of several sources, one per kind of device, the NVIDIA one counts."""
    package = module.split(".") if _path(module).name == "__init__.py" else module.split(".")[:-1]
    found: dict[str, tuple[str, str]] = {}
    for node in ast.walk(_tree(module)):
        if not isinstance(node, ast.ImportFrom):
            continue
        parents = package[: len(package) - node.level + 1] if node.level else []
        source = ".".join([*parents, *filter(None, [node.module])])
        if not source.startswith(("vllm.model_executor.models.", "vllm.models.")):
            continue
        for alias in node.names:
            local = alias.asname or alias.name
            if local not in found or ".nvidia." in source:
                found[local] = (source, alias.name)
    return found


def _attributes(classes: Iterable[ast.ClassDef]) -> Iterator[str]:
    for node in (node for each in classes for node in ast.walk(each)):
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        is_list = isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "nn.ModuleList"
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if isinstance(target, ast.Attribute):
                yield target.attr + "[]" * is_list


def table(entries: list[Entry]) -> str:
    rows = []
    for family in FAMILIES:
        ours = [entry for entry in entries if family.name in entry.rows]
        name = _name(family)
        mixers = (_layout(each) for each in (family.attention, family.recurrent) if each is not None)
        attention = " or ".join(dict.fromkeys(mixers))
        cells = (_names(ours, verified=True), _unverified([entry for entry in ours if not entry.verified]))
        rows.append((name, attention, _layout(family.mlp), *cells))
    supported = markdown(("row", "attention", "MLP", "verified", "supported, not verified"), rows)
    remarks = [(f"`{name}`", remark) for name, remark in REMARKS.items()]
    without_row = by_reason([entry for entry in entries if not entry.rows])
    return "\n".join(
        (
            summary(entries) + "\n",
            supported,
            markdown(("verified", "but"), remarks),
            markdown(("no row, because", "architectures"), without_row),
        )
    )


def summary(entries: list[Entry]) -> str:
    verified = sum(entry.verified for entry in entries)
    without_row = sum(not entry.rows for entry in entries)
    return (
        f"Of the {len(entries)} text architectures of vLLM {VERSION}, {verified} are verified, "
        f"{len(entries) - verified - without_row} are supported but not verified, {without_row} have no row."
    )


def _name(family: Family) -> str:
    condition = f", where {family.describe_when()}" if family.when else ""
    return family.name + " (parallel)" * family.parallel + condition


def _layout(sublayer: Sublayer) -> str:
    modules = " + ".join(f"`{name}`" for name in (sublayer.module, *sublayer.also))
    pre, post = (f"`{name}`" if name else "" for name in (sublayer.pre_norm, sublayer.post_norm))
    return " → ".join(filter(None, (pre, modules, post)))


def _unverified(entries: list[Entry]) -> str:
    return "; ".join(f"{reason}: {names}" for reason, names in by_reason(entries))


def by_reason(entries: list[Entry]) -> list[tuple[str, str]]:
    groups = defaultdict(list)
    for entry in entries:
        groups[entry.reason].append(entry)
    return [(reason, _names(group)) for reason, group in sorted(groups.items())]


def _names(entries: list[Entry], verified: bool = False) -> str:
    return ", ".join(f"`{entry.architecture}`" for entry in entries if entry.verified == verified)


def markdown(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, ["---"] * len(header), *rows))


def on_page(page: str, name: str = "survey") -> str:
    """The page's part between the markers of this name."""
    return page.partition(f"<!-- {name} -->\n")[2].partition(f"<!-- /{name} -->")[0]


def main(name: str, generated: str) -> None:
    """Print a table, or put it into the page between the markers of this name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/families.md")
    if not parser.parse_args().write:
        print(generated, end="")
        return
    page = PAGE.read_text(encoding="utf-8")
    old = f"<!-- {name} -->\n{on_page(page, name)}<!-- /{name} -->"
    if old not in page:
        parser.error(f"{PAGE} has no <!-- {name} --> ... <!-- /{name} -->")
    PAGE.write_text(page.replace(old, f"<!-- {name} -->\n{generated}<!-- /{name} -->"), encoding="utf-8")


if __name__ == "__main__":
    main("survey", table(survey()))
