import xml.etree.ElementTree as ElementTree

from llmdrop_vllm.report import pictures
from llmdrop_vllm.report.findings import Findings
from llmdrop_vllm.report.pictures import draw
from tests.report.sweeps import scores, sweep

NAMES = ["quality", "divergence", "speedup", "kv_cache", "controls", "search", "importance", "drop_order", "redundancy"]


def left_out(findings):
    return {each.name for each in draw(findings) if not each.svg}


def test_the_same_records_give_the_same_bytes(monkeypatch):
    monkeypatch.setattr(
        pictures, "PICTURES", [each for each in pictures.PICTURES if each[0] in ("quality", "kv_cache")]
    )
    findings = Findings(sweep(counts=(1, 2, 4), names=["attention", "mlp"]), [])
    first = draw(findings)
    assert [each.name for each in first] == ["quality", "kv_cache"]
    assert draw(findings) == first
    for each in first:
        assert ElementTree.fromstring(each.svg).tag.endswith("svg")
        assert each.png.startswith(b"\x89PNG")
        assert "dc:date" not in each.svg


def test_of_the_full_model_alone_only_the_scores_are_pictures():
    assert left_out(Findings(sweep(keep=0), [scores()])) == {*NAMES} - {"importance", "redundancy"}


def test_of_one_point_without_anything_extra_there_is_a_picture_of_what_is_there():
    records = sweep(names=["attention"], counts=(1,), tasks=(), speed=False, divergence=False)
    assert left_out(Findings(records, [])) == {*NAMES} - {"quality", "kv_cache", "drop_order"}


def test_names_from_files_are_shown_as_they_are():
    """One that matplotlib would read as a formula, leave out of legends, and not find room for."""
    name = f"_$x^2 <b>& {'a' * 80}"
    records = sweep(names=["attention", "last"], counts=(1, 2), tasks=(), divergence=False)
    renamed = tuple(each.model_copy(update={"name": f"{name} {each.name}"}) for each in records.series)
    found = draw(Findings(records.model_copy(update={"series": renamed}), [scores(name)]))
    assert {each.name for each in found if not each.svg} == {"divergence", "search"}
