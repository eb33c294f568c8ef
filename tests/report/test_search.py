"""The picture of a search."""

from dataclasses import replace

import pytest

from llmdrop_vllm.artifacts import DataIdentity, ModelIdentity, Provenance
from llmdrop_vllm.data.growing import appended
from llmdrop_vllm.errors import DataError, InputError
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.report.findings import Findings
from llmdrop_vllm.report.quality import search
from llmdrop_vllm.report.style import NothingToShow
from llmdrop_vllm.search.trials import Searched, SearchHeader, Trial
from tests.report.sweeps import sweep
from tests.report.test_quality import drawn

DATA = DataIdentity(source="a", sequences=2, tokens=30, seq_len=None, seed=0, sha256="")
# Cosine's mask of two first; then one that lost as much and one that lost less, and what was judged otherwise.
TRIALS = (
    ((3,), {0: 0.1, 1: 0.4}, {}),
    ((3, 1), {0: 0.4, 1: 1.0}, {}),
    ((5,), {0: 0.2}, {}),
    ((5,), {1: 0.2}, {}),
    ((3, 5), {0: 0.3, 1: 0.6}, {}),
    ((3, 5), {0: 0.01, 1: 0.01}, {"mended": DropMask(12, attention=(3,))}),
    ((3, 5), {0: 0.9}, {"held_out": True}),
    ((7, 5), {0: 0.01}, {}),  # on a part of the answers
)


def searched(tmp_path, fingerprint):
    model = ModelIdentity(path="/models/tiny", architecture="A", fingerprint=fingerprint)
    header = SearchHeader(
        answers=DATA,
        held_out=DATA,
        tokens=(20, 10),
        to_heal=None,
        start=DropMask(12),
        provenance=Provenance(model=model),
    )
    path = tmp_path / "trials.jsonl"
    with appended(path, header, Trial) as file:
        file.append(Trial(attention=attention, mlp=(), kl=kl, **more) for attention, kl, more in TRIALS)
    return Searched.read(path)


def test_it_shows_all_that_was_judged_alike_with_the_best_and_cosines(tmp_path):
    base = sweep()
    found = searched(tmp_path, base.request.fingerprint)
    assert {mask.attention: kl for mask, kl in found.masks} == pytest.approx(
        {(3,): 0.2, (3, 1): 0.6, (5,): 0.2, (3, 5): 0.4}
    )
    figure, alt = search(Findings(base, [], searched=found))
    curves = drawn(figure.axes[0])
    assert curves["by cosine"][0] == [1, 2]
    assert curves["by cosine"][1] == pytest.approx([0.2, 0.6])
    assert curves["best of the search"][1] == pytest.approx([0.2, 0.4])
    assert "4 masks; the best without 2 sublayers has a KL of 0.400, by cosine 0.600." in alt


def test_of_a_number_that_cosines_mask_alone_was_judged_of_there_is_no_best(tmp_path):
    base = sweep()
    found = searched(tmp_path, base.request.fingerprint)
    more = replace(found, masks=(*found.masks, (DropMask(12, attention=(3, 1, 5)), 0.9)))
    curves = drawn(search(Findings(base, [], searched=more))[0].axes[0])
    assert curves["best of the search"][0] == [1, 2]


def test_without_a_search_there_is_nothing_to_show():
    with pytest.raises(NothingToShow, match="--search"):
        search(Findings(sweep(), []))


def test_of_a_search_that_judged_nothing_there_is_nothing_to_show(tmp_path):
    base = sweep()
    begun = replace(searched(tmp_path, base.request.fingerprint), masks=())
    with pytest.raises(NothingToShow, match="no mask on all its answers"):
        search(Findings(base, [], searched=begun))


def test_masks_with_windows_are_not_drawn_by_what_is_gone(tmp_path):
    base = sweep()
    found = searched(tmp_path, base.request.fingerprint)
    more = replace(found, masks=(*found.masks, (DropMask(12, windows=((3, 64),)), 0.1)))
    with pytest.raises(NothingToShow, match="for windows too"):
        search(Findings(base, [], searched=more))


def test_a_search_of_another_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="the search is of /models/tiny with the weights beef"):
        Findings(sweep(), [], searched=searched(tmp_path, "beef"))


def test_a_file_that_is_none_is_named(tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_text("{}\n")
    with pytest.raises(DataError, match="other.jsonl, line 1: .*expected what `llmdrop search` writes"):
        Searched.read(path)
