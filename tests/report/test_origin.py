from llmdrop_vllm.report.findings import Findings
from llmdrop_vllm.report.origin import provenance_section
from tests.report.sweeps import FINGERPRINT, scores, sweep


def test_it_says_what_it_takes_to_measure_again():
    records = sweep()
    text = provenance_section(Findings.of(records, [scores(), scores("c4", tilt=0.8)]))
    for expected in (
        records.provenance.model.path,
        FINGERPRINT,
        records.provenance.command,
        "torch 2.13.0",
        "wikitext: 64 sequences of up to 512, 32,768 tokens, seed 0, sha256 ab12",
        "arc_easy, boolq, gsm8k",
        "4 requests at once, 256 prompt tokens and 128 output tokens each",
        "Scores: c4",
    ):
        assert expected in text
    assert text.count("<dd>yes</dd>") == 1


def test_what_was_not_asked_for_is_said():
    text = provenance_section(Findings.of(sweep(tasks=(), speed=False, divergence=False), [scores(None)]))
    assert text.count("not asked for") == 2
    assert "<dd>unknown</dd>" in text
