"""Bounds on requests: what is over one is refused by its name, what is within passes."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmdrop_server.limits import Limits, RequestError
from llmdrop_vllm import InputError

LIMITS = Limits()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
KEYS = st.sampled_from(
    ["n", "best_of", "stop", "prompt", "messages", "input", "tools", "structured_outputs", "sampling_params", "url"]
)


def check(request: object, limits: Limits = LIMITS, hosts: frozenset[str] = frozenset()) -> int:
    return limits.check_body(json.dumps(request).encode(), hosts)


def chat(*content: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": [*content]}]}


@pytest.mark.parametrize(
    ("request_body", "param", "bound"),
    [
        ({"n": 17}, "n", "16 (n)"),
        ({"best_of": 17.5}, "best_of", "16 (n)"),
        ({"n": "17"}, "n", "16 (n)"),
        ({"n": 10**400}, "n", "16 (n)"),
        ({"stop_sequences": ["x"] * 17}, "stop_sequences", "16 (stop)"),
        ({"sampling_params": {"n": 1000}}, "n", "16 (n)"),
        ({"stop": ["x"] * 17}, "stop", "16 (stop)"),
        ({"sampling_params": {"bad_words": ["x"] * 17}}, "bad_words", "16 (stop)"),
        ({"prompt": ["x"] * 129}, "prompt", "128 (prompts)"),
        ({"prompt": [[1]] * 129}, "prompt", "128 (prompts)"),
        ({"messages": [[{"role": "user"}]] * 129}, "messages", "128 (prompts)"),
        ({"messages": [{"role": "user"}] * 4097}, "messages", "4096 (messages)"),
        ({"messages": [[{"role": "user"}] * 4097]}, "messages", "4096 (messages)"),
        ({"questions": {str(i): {} for i in range(129)}}, "questions", "128 (prompts)"),
        ({"items": ["x"] * 129}, "items", "128 (prompts)"),
        ({"tools": [{}] * 129}, "tools", "128 (tools)"),
        ({"structured_outputs": {"regex": "a" * 16385}}, "structured_outputs.regex", "16,384 (grammar_bytes)"),
        ({"structured_outputs": {"grammar": "ä" * 8193}}, "structured_outputs.grammar", "16,384 (grammar_bytes)"),
        ({"sampling_params": {"structured_outputs": {"json": "a" * 65537}}}, "structured_outputs.json", "65,536"),
        ({"response_format": {"json_schema": {"schema": {"enum": ["a" * 65536]}}}}, "response_format", "schema_bytes"),
        ({"tools": [{"parameters": "a" * 65536}]}, "tools", "65,536 (schema_bytes)"),
    ],
)  # fmt: skip
def test_over_a_bound_the_refusal_names_entry_and_bound(request_body, param, bound):
    with pytest.raises(RequestError) as refused:
        check(request_body)
    assert (refused.value.status, refused.value.param) == (400, param)
    assert bound in refused.value.message


@pytest.mark.parametrize(
    "request_body",
    [
        {"n": 16, "stop": ["x"] * 16, "prompt": ["x"] * 128},
        {"prompt": [1] * 5000},
        {"prompt": "x" * 100_000},
        {"input": "x", "tools": []},
        {"structured_outputs": {"regex": "a" * 16384, "whitespace_pattern": None}},
        [1, 2],
        "text",
        None,
    ],
)
def test_within_the_bounds_a_request_passes(request_body):
    assert check(request_body) >= 1


@pytest.mark.parametrize(
    ("request_body", "answers"),
    [
        ({}, 1),
        ({"n": 4}, 4),
        ({"n": "4"}, 4),
        ({"n": None, "prompt": ["a", "b"]}, 2),
        ({"n": 3, "prompt": [[1, 2], [3]]}, 6),
        ({"prompt": [1, 2, 3]}, 1),
        ({"messages": [{"role": "user"}] * 3}, 1),
        ({"messages": [[{"role": "user"}]] * 3}, 3),
        ({"n": -5}, 1),
        ({"n": "nan"}, 1),
        ({"n": "four"}, 1),
    ],
)
def test_the_answers_that_a_request_asks_for_are_counted(request_body, answers):
    assert LIMITS.check_body(json.dumps(request_body).encode()) == answers


def test_an_empty_body_is_vllms_to_refuse():
    assert LIMITS.check_body(b"") == 1


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"prompt":', "not JSON"),
        (b"\xff", "not JSON"),
        (b'{"temperature": NaN}', "NaN is no JSON number"),
        (b'{"temperature": -Infinity}', "-Infinity is no JSON number"),
        (b'{"prompt": "a\\ud800"}', "half of a surrogate pair"),
        (b"[" * 100_000, "nested too deeply; the bound is 64 (depth)"),
        (b"[" * 65 + b"]" * 65, "nested too deeply; the bound is 64 (depth)"),
        (b"1" * 5000, "not JSON"),
    ],
)
def test_what_is_not_json_is_refused(body, words):
    with pytest.raises(RequestError, match=words.replace("(", r"\(").replace(")", r"\)")) as refused:
        LIMITS.check_body(body)
    assert refused.value.status == 400


def test_nesting_up_to_the_bound_and_whole_surrogate_pairs_pass():
    assert LIMITS.check_body(b"[" * 64 + b"]" * 64) == 1
    assert LIMITS.check_body(b'{"prompt": "\\ud83d\\ude00"}') == 1


@pytest.mark.parametrize(
    "content",
    [
        {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}},
        {"type": "image_url", "image_url": "https://example.org/a.png"},
        {"type": "audio_url", "audio_url": {"url": "file:///etc/passwd"}},
        {"type": "video_url", "video_url": {"url": "https://media.example@evil.example/a"}},
        {"type": "image_url", "image_url": {"url": "http://["}},
        {"type": "image_url", "image_url": {"url": "HTTP://EVIL.EXAMPLE/a"}},
    ],
)
def test_nothing_is_fetched_from_hosts_that_are_not_allowed(content):
    with pytest.raises(RequestError, match="this server fetches nothing from there"):
        check(chat(content), hosts=frozenset({"media.example"}))


@pytest.mark.parametrize("url", ["data:image/png;base64,AAAA", "https://media.example/a.png"])
def test_data_urls_and_allowed_hosts_pass(url):
    assert check(chat({"type": "image_url", "image_url": {"url": url}}), hosts=frozenset({"media.example"})) == 1


def test_text_that_speaks_of_an_address_passes():
    assert check(chat({"type": "text", "text": "http://example.org is an address"})) == 1


# Beside other tests, two cores can be too slow for its patience.
@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(KEYS, JSON))
def test_any_json_passes_or_is_refused_with_a_status(request_body):
    try:
        LIMITS.check_body(json.dumps(request_body).encode())
    except RequestError as refused:
        assert refused.status == 400  # noqa: PT017 - most pass


def test_bounds_are_set_by_name():
    limits = Limits.parse('{"n": 2, "body_bytes": 1000}')
    assert (limits.n, limits.body_bytes, limits.stop) == (2, 1000, LIMITS.stop)
    with pytest.raises(RequestError, match="the bound is 2"):
        check({"n": 3}, limits)


@pytest.mark.parametrize(
    ("text", "words"), [('{"m": 2}', "limit m: "), ('{"n": 0}', "limit n: "), ("x", "limit LLMDROP")]
)
def test_a_bound_that_does_not_exist_or_makes_no_sense_is_refused_by_name(text, words):
    with pytest.raises(InputError, match=words):
        Limits.parse(text)
