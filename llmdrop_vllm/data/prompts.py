"""Prompts to ask a model: ours, a file's, or logged OpenAI requests; and the token ids that each is asked with.

A file has one a line: a string, which is a question; a chat as a list of messages; or a request, bare or as the body of
a line of OpenAI's batch format: a chat where it has "messages", else texts or token ids to complete in its "prompt".
"""

import codecs
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic_core import from_json

from llmdrop_vllm.errors import DataError, refusing

PROMPTS = Path(__file__).with_name("prompts.jsonl")
ACCEPTED = 'a string, a list of messages, or an OpenAI request with "messages" or "prompt"'


@dataclass(frozen=True)
class Chat:
    """Messages, of which the last is to be answered; `options` are the chat template's, tools among them."""

    messages: tuple[Mapping[str, Any], ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, question: str) -> Self:
        """A question by itself."""
        return cls(({"role": "user", "content": question},))

    @property
    def question(self) -> str | None:
        """Its text, where there is nothing else: what a model without a chat template can be asked."""
        return None if len(self.messages) > 1 or self.options else str(self.messages[0]["content"])

    def token_ids(self, tokenizer: Any) -> list[int]:
        """As the model is asked. Raises DataError for what its chat template does not take."""
        if tokenizer.chat_template is None:
            if self.question is None:
                raise DataError("the tokenizer has no chat template")
            return Completion(self.question).token_ids(tokenizer)
        ours = {"tokenize": False, "add_generation_prompt": True}
        try:
            text = tokenizer.apply_chat_template([*self.messages], **{**self.options, **ours})
        except Exception as error:  # whatever a template raises, or runs into
            raise DataError(f"the chat template does not take it: {error}") from error
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@dataclass(frozen=True)
class Completion:
    """A text to go on with, or its token ids."""

    start: str | tuple[int, ...]

    def token_ids(self, tokenizer: Any) -> list[int]:
        """As the model is asked."""
        return list(tokenizer(self.start)["input_ids"] if isinstance(self.start, str) else self.start)


Prompt = Chat | Completion


def read_prompts(path: Path = PROMPTS) -> tuple[Prompt, ...]:
    """All of a file. Raises DataError naming the line that cannot be used."""
    found: list[Prompt] = []
    with refusing(f"{path} cannot be read", DataError), path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line := line.removeprefix(codecs.BOM_UTF8).strip():
                found += _prompts(line, f"{path}, line {number}")
    if not found:
        raise DataError(f"{path} holds no prompt; expected one a line: {ACCEPTED}")
    return tuple(found)


def _prompts(line: bytes, where: str) -> Iterator[Prompt]:
    try:
        value = from_json(line)
    except ValueError as error:
        problem = str(error).replace("at line 1 column", "at column")
        raise DataError(f"{where}: {problem}; expected JSON: {ACCEPTED}") from None
    if isinstance(value, dict) and isinstance(value.get("body"), dict):
        value = value["body"]
    try:
        match value:
            case str() if value.strip():
                yield Chat.of(value)
            case list():
                yield _ChatRequest.model_validate({"messages": value}).chat
            case {"messages": _}:
                yield _ChatRequest.model_validate(value).chat
            case {"prompt": prompt}:
                yield from map(Completion, _starts(prompt, where))
            case _:
                raise DataError(f"{where}: {json.dumps(value):.60}; expected {ACCEPTED}")
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, first["loc"])) or "the request"
        if first["type"] == "model_type":  # pydantic names its class
            found = f"{json.dumps(first['input']):.60} is no message"
            raise DataError(f"{where}: {at}: {found}; expected {ACCEPTED}") from None
        raise DataError(f"{where}: {at}: {first['msg'].removeprefix('Value error, ')}") from None


def _text(content: object) -> object:
    """A message's content, its parts a line each, as servers hand them to templates that take no parts."""
    if not isinstance(content, list):
        return "" if content is None else content
    return "\n".join(map(_part, content))


def _part(part: object) -> str:
    match part:
        case str(text) | {"type": "text" | "input_text" | "output_text", "text": str(text)}:
            return text
        case {"type": "refusal", "refusal": str(text)}:
            return text
    kind = part.get("type") if isinstance(part, dict) else part
    raise ValueError(f"a part of type {kind!r}; expected text, which is all that can be asked")


def _arguments(found: object) -> object:
    """Of a call, as templates want them. What is no object of JSON is taken for none, as servers do, or a model's slip
    would make all of its log unusable.
    """
    try:
        found = from_json(found) if isinstance(found, str) else found
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}


def _starts(prompt: object, where: str) -> list[str | tuple[int, ...]]:
    """The texts and token ids of a completions request."""
    several = isinstance(prompt, list) and not all(isinstance(each, int) for each in prompt)
    try:
        return _STARTS.validate_python(prompt if several else [prompt])
    except ValidationError:
        found = f"{json.dumps(prompt):.60}; expected text, token ids, or a list of either"
        raise DataError(f"{where}: prompt: {found}") from None


_Start = (
    Annotated[str, Field(strict=True, min_length=1)]
    | Annotated[tuple[Annotated[int, Field(strict=True, ge=0)], ...], Field(min_length=1)]
)
_STARTS = TypeAdapter(Annotated[list[_Start], Field(min_length=1)])


class _Open(BaseModel):
    """Templates see whatever else is there."""

    model_config = ConfigDict(strict=True, extra="allow")


class _Function(_Open):
    name: str
    arguments: Annotated[dict[str, Any], BeforeValidator(_arguments)] = Field(default_factory=dict)


class _ToolCall(_Open):
    function: _Function


class _Message(_Open):
    role: Annotated[str, Field(min_length=1)]
    content: Annotated[str, BeforeValidator(_text)] = ""
    tool_calls: Annotated[list[_ToolCall] | None, BeforeValidator(lambda calls: calls or None)] = None


class _ChatRequest(BaseModel):
    """What a chat template is given of it; how to sample is the command's."""

    model_config = ConfigDict(strict=True, extra="ignore")
    messages: Annotated[list[_Message], Field(min_length=1)]
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_last(self) -> Self:
        if (role := self.messages[-1].role) == "assistant":
            raise ValueError(f"the last message is of role {role!r}; expected one to be answered")
        return self

    @property
    def chat(self) -> Chat:
        """The prompt."""
        options: dict[str, Any] = {"tools": self.tools, "documents": self.documents}
        if self.reasoning_effort is not None:  # as vLLM tells templates
            thinks = self.reasoning_effort != "none"
            options |= {"reasoning_effort": self.reasoning_effort, "enable_thinking": thinks}
        options |= self.chat_template_kwargs or {}
        messages = tuple(each.model_dump(exclude_none=True) for each in self.messages)
        return Chat(messages, {name: value for name, value in options.items() if value is not None})
