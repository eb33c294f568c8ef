"""Rates, what comes at them, and what is said of runs; a tokenizer for weights that have none."""

import math

import pytest
from transformers import AutoTokenizer

from benchmarks import load
from benchmarks.contenders import Contender
from benchmarks.load_turns import Rate, Turns, comparisons, drop_options, summary
from benchmarks.shapes import find
from benchmarks.weights import write_tokenizer
from benchmarks.workloads import Workload
from llmdrop_vllm import DropMask, InputError


def test_rates_are_requests_per_second_or_shares_of_what_the_full_model_serves():
    assert Rate.parse("4").per_s(10) == 4
    assert Rate.parse("80%").per_s(10) == 8
    assert math.isinf(Rate.parse("inf").per_s(10))


@pytest.mark.parametrize("text", ["", "fast", "0", "-1", "nan", "%", "5%%"])
def test_what_is_no_rate_is_refused(text):
    with pytest.raises(InputError, match=f"--rates '{text}': expected requests per second, a share of saturation"):
        Rate.parse(text)


def turns():
    """The full model serves 4 requests per second, the other 8; requests come for 5 seconds."""
    full, half = (Contender("vllm", "any", DropMask(4, layers), "any") for layers in ((), (1, 2)))
    return Turns({full: None, half: None}, None, Workload("load", 1, 16, 16), 5, {full: 4.0, half: 8.0})


def test_requests_come_for_as_long_at_each_rate_and_a_few_at_least():
    assert turns().requests(6) == 30
    assert turns().requests(math.inf) == 20
    assert turns().requests(0.1) == 8


def test_a_run_takes_until_all_have_come_or_until_all_are_served():
    slow, fast, at_once = 10 / 2 + 10 / 2, 30 / 4 + 30 / 6, 20 / 4 + 20 / 8
    assert turns().predicted_s([2, 6, math.inf], repeats=3) == pytest.approx(3 * (slow + fast + at_once))


def run(scale, failures=0):
    times = {name: {"median": scale, "p95": 2 * scale} for name in ("ttft_s", "tpot_s", "e2e_s")}
    counts = {"requests_per_s": 1 / scale, "output_tokens_per_s": 32 / scale, "preemptions": 1, "queue_s": 0.5}
    return {**times, **counts, "failures": failures}


def test_medians_over_runs_and_all_failures():
    found = summary([run(1), run(4, failures=2), run(2, failures=1)])
    assert found["ttft_s"] == {"median": 2, "p95": 4}
    assert found["requests_per_s"] == 0.5
    assert found["failures"] == 3


def test_shorter_latencies_and_more_requests_are_both_above_one():
    found = comparisons([run(2), run(4)], [run(1), run(2)])
    assert {name: each["speedup"] for name, each in found.items()} == dict.fromkeys(found, 2)
    assert found["e2e_s p95"]["verdict"] == found["requests_per_s"]["verdict"] == "2.00x"


def test_runs_that_differ_more_among_themselves_are_no_difference():
    found = comparisons([run(1), run(1), run(1)], [run(2), run(0.5), run(1)])
    assert found["ttft_s median"]["verdict"] == "no difference"


def test_a_mask_on_the_command_line():
    assert drop_options(DropMask(8, attention=(6, 5), mlp=(3,))) == ["--drop-attention", "6,5,", "--drop-mlp", "3,"]
    assert drop_options(DropMask(8)) == []


def test_text_has_as_many_tokens_as_words_there_and_back(tmp_path):
    write_tokenizer(tmp_path, 100)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokens = [5, 99, 0, 5, 42]
    assert tokenizer.decode(tokens) == "w5w99w0w5w42"
    assert tokenizer.encode(tokenizer.decode(tokens)) == tokens
    assert len(tokenizer.decode([99] * 16)) == 16 * max(map(len, tokenizer.get_vocab()))  # vLLM's bound on characters
    assert (len(tokenizer), tokenizer.all_special_ids, tokenizer.num_special_tokens_to_add()) == (100, [], 0)


def test_by_default_the_full_model_has_room_for_four_requests_and_a_block_of_its_own():
    plan, workload, rates = load.make_plan(load.parse(["--device", "cpu", "--output-tokens", "200"]))
    blocks, token_bytes = 1 + 4 * 2, 8 * 2 * 768 * 4
    assert plan.settings.kv_bytes == blocks * 128 * token_bytes
    assert workload.tokens_per_sequence == 232
    assert plan.masks == {"attention 4": find("cpu-small").mask("attention", 4)}
    assert len(rates) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--shape llama-9", "unknown shape 'llama-9'"),
        ("--attention 8", "attention 8 does not fit cpu-small: expected 1 to 7 of 8"),
        ("--rates 1,,2", "--rates '': expected requests per second"),
        ("--output-tokens 1", "--output-tokens 1: expected 2 or more"),
        ("--prompt-tokens 40000", "has 40032 tokens, and the full model holds 32768"),
        ("--kv-gib 10000", "all servers need .* GiB of memory, and .* GiB are free"),
    ],
)
def test_bad_input_ends_with_one_line_before_anything_slow(options, message):
    with pytest.raises(SystemExit, match=f"load: error: .*{message}"):
        load.main(["--device", "cpu", *options.split()])
