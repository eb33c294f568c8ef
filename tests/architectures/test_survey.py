"""The survey in docs/families.md is the generated one, and leaves no architecture of vLLM's out."""

from collections import Counter

import pytest

from llmdrop_vllm.architectures.families import BY_ARCHITECTURE
from llmdrop_vllm.architectures.wrappers import WRAPPERS
from tests.architectures import survey, wrapper_survey
from tests.architectures.cases import CASES

ENTRIES = survey.survey()


def test_the_page_has_the_generated_survey():
    assert survey.on_page(survey.PAGE.read_text(encoding="utf-8")) == survey.table(ENTRIES), (
        "docs/families.md is out of date: run `python -m tests.architectures.survey --write` and read the diff"
    )


def test_every_architecture_of_the_registry_stands_in_the_table_once():
    assert Counter(entry.architecture for entry in ENTRIES) == Counter(list(survey.registered()))
    generated = survey.table(ENTRIES)
    assert not [name for name in survey.registered() if f"`{name}`" not in generated]


def test_an_architecture_has_exactly_one_status():
    for entry in ENTRIES:
        cases = {case.family.name for case in CASES.values() if case.architecture == entry.architecture}
        assert entry.verified == (bool(entry.rows) and cases == set(entry.rows)), entry
        assert bool(entry.rows) == (entry.architecture in BY_ARCHITECTURE), entry
        assert bool(entry.reason) != entry.verified, entry


def test_no_architecture_is_left_without_a_reason():
    unexplained = {survey.NOT_LOOKED_AT, survey.FITS}
    assert not [entry.architecture for entry in ENTRIES if entry.reason in unexplained], (
        "read the model in vLLM; give it a row, a sign or a reason"
    )


def test_every_typed_reason_is_for_a_registered_architecture_without_a_row():
    assert set(survey.REASONS) <= set(survey.registered())
    assert not set(survey.REASONS) & set(BY_ARCHITECTURE), (
        "these have a row now: take them out of REASONS, or of architectures/refused.py"
    )


def test_every_typed_remark_and_doubt_is_about_an_architecture_of_its_status():
    status = {entry.architecture: entry.verified for entry in ENTRIES if entry.rows}
    assert {status[name] for name in survey.REMARKS} == {True}
    assert {status[name] for name in survey.UNVERIFIED} == {False}


def test_every_architecture_of_the_family_table_is_one_of_vllm():
    assert set(BY_ARCHITECTURE) <= set(survey.registered())


def test_what_is_promised_of_architectures_wrappers_and_hybrids_is_verified():
    assert sum(entry.verified for entry in ENTRIES) >= 40
    assert len(wrapper_survey.VERIFIED) >= 30
    assert len(WRAPPERS.keys() & wrapper_survey.wrappers().keys()) >= 90
    recurrent = {entry.architecture for entry in ENTRIES if entry.verified and has_recurrent_mixers(entry.architecture)}
    assert len(recurrent) >= 8


def has_recurrent_mixers(architecture):
    return any(family.recurrent is not None for family in BY_ARCHITECTURE[architecture])


@pytest.mark.parametrize(
    ("module", "name", "fact"),
    [
        pytest.param("mamba", "MambaForCausalLM", "IsAttentionFree", id="a base"),
        pytest.param("qwen3_5", "Qwen3_5MoeForCausalLM", "IsHybrid", id="a base of a base"),
        pytest.param("sarvam", "SarvamMoEForCausalLM", "BailingMoeForCausalLM", id="a base from another file"),
        pytest.param("longcat_flash", "LongcatFlashForCausalLM", "self_attn[]", id="a list of modules"),
        pytest.param(
            "longcat_flash_ngram", "LongcatFlashNgramForCausalLM", "self_attn[]", id="a model from another file"
        ),
        pytest.param("vllm.models.deepseek_v4", "DeepseekV4ForCausalLM", "hc_attn_fn", id="one file per device"),
        pytest.param("vllm.models.qwen4_exp", "Qwen4ExpForCausalLM", "IsHybrid", id="an import in a function"),
    ],
)
def test_facts_are_read_from_vllms_model_files(module, name, fact):
    assert fact in survey.facts_about(module, name)
    assert fact not in survey.facts_about("llama", "LlamaForCausalLM")


def test_the_page_has_the_generated_table_of_wrappers():
    page = survey.PAGE.read_text(encoding="utf-8")
    assert survey.on_page(page, "wrappers") == wrapper_survey.table(), (
        "docs/families.md is out of date: run `python -m tests.architectures.wrapper_survey --write` and read the diff"
    )


def test_every_wrapper_of_the_registry_stands_in_the_table_once():
    names = wrapper_survey.wrappers()
    assert set(WRAPPERS) <= set(names)
    assert set(WRAPPERS) >= wrapper_survey.VERIFIED
    assert not set(wrapper_survey.REASONS) & set(WRAPPERS)
    generated = wrapper_survey.table()
    assert not [name for name in names if generated.count(f"`{name}`") != 1]


def test_at_least_thirty_wrappers_are_verified_and_ninety_supported():
    assert len(wrapper_survey.VERIFIED) >= 30
    assert len(WRAPPERS) >= 90
