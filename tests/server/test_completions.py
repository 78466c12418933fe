"""/v1/completions."""

from __future__ import annotations

from typing import Any

import httpx2
import openai
import pytest
from server_setup import StubEngine

from openbook.server.schema_completions import Completion


@pytest.fixture(autouse=True)
def _says_words(stub: StubEngine) -> None:
    stub.reply = lambda request: "\none two"


def complete(sdk: openai.OpenAI, **options: Any) -> Any:
    return sdk.completions.create(**{"model": "tiny", "prompt": "say", "max_tokens": 50, **options})


def refused(sdk: openai.OpenAI, **options: Any) -> tuple[str, str | None]:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(sdk, **options)
    body = caught.value.body
    assert isinstance(body, dict)
    return body["message"], body["param"]


def test_a_text_is_continued_from_its_first_line_break_on(sdk: openai.OpenAI, stub: StubEngine) -> None:
    answer = complete(sdk)
    assert answer.choices[0].text == "\none two"
    assert (answer.object, answer.model, answer.choices[0].finish_reason) == ("text_completion", "tiny", "stop")
    [request] = stub.requests
    tokenizer = stub.chat.tokenizer
    assert list(request.prompt_ids) == [*tokenizer.start_ids, *tokenizer.encode("say")] and request.is_text


def test_thinking_is_text_like_any(sdk: openai.OpenAI, stub: StubEngine) -> None:
    stub.reply = lambda request: "<think>a</think>b"
    assert complete(sdk).choices[0].text == "ab"  # control tokens are left out


def test_an_answer_is_what_the_description_says(http: httpx2.Client) -> None:
    body = {"model": "tiny", "prompt": "say", "echo": True, "logprobs": 2, "prompt_logprobs": 1}
    answer = http.post("/v1/completions", json=body).json()
    assert Completion.model_validate(answer).model_dump(mode="json", exclude_unset=True) == answer


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [("ab", ["ab"]), (["ab", "c"], ["ab", "c"]), ([97, 98], None), ([[97, 98], [99]], None)],
)
def test_prompts_of_all_kinds(sdk: openai.OpenAI, stub: StubEngine, prompt: Any, texts: list[str] | None) -> None:
    answer = complete(sdk, prompt=prompt, n=2)
    wanted = [stub.chat.tokenizer.encode(text) for text in texts] if texts else prompt
    wanted = wanted if isinstance(wanted[0], list) else [wanted]
    asked = sorted((request.id, list(request.prompt_ids)) for request in stub.requests)
    assert [ids for _, ids in asked] == wanted
    assert [choice.index for choice in answer.choices] == list(range(2 * len(wanted)))
    assert answer.usage.prompt_tokens == sum(len(ids) for ids in wanted)


def test_answers_to_several_prompts_keep_their_order(sdk: openai.OpenAI, stub: StubEngine) -> None:
    stub.reply = lambda request: f"{len(request.prompt_ids)}"
    prompts = ["a" * count for count in (5, 1, 3)]
    assert [choice.text for choice in complete(sdk, prompt=prompts).choices] == ["5", "1", "3"]
    found = {0: "", 1: "", 2: ""}
    for chunk in complete(sdk, prompt=prompts, stream=True):
        for choice in chunk.choices:
            found[choice.index] += choice.text
    assert found == {0: "5", 1: "1", 2: "3"}


def test_sixteen_tokens_unless_told_otherwise(sdk: openai.OpenAI, stub: StubEngine) -> None:
    sdk.completions.create(model="tiny", prompt="say")
    assert stub.requests[0].params.max_tokens == 16


@pytest.mark.parametrize("stream", [False, True])
def test_echo(sdk: openai.OpenAI, stream: bool) -> None:
    answer = complete(sdk, echo=True, stream=stream)
    chunks = list(answer) if stream else [answer]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "say\none two"


def test_the_prompt_alone(sdk: openai.OpenAI) -> None:
    choice = complete(sdk, echo=True, max_tokens=0, logprobs=0).choices[0]
    assert (choice.text, choice.finish_reason) == ("say", "length")
    assert choice.logprobs.tokens == ["s", "a", "y"]
    assert choice.logprobs.token_logprobs == [None, -1.0, -1.0]


def test_logprobs_with_echo(sdk: openai.OpenAI) -> None:
    logprobs = complete(sdk, echo=True, logprobs=1).choices[0].logprobs
    assert logprobs.tokens == ["s", "a", "y", "\n", "o", "n", "e", " ", "t", "w", "o", "<|end|>"]
    assert logprobs.text_offset == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert logprobs.top_logprobs[3] == {"\n": -0.5}


def test_logprobs_in_a_stream_add_up(sdk: openai.OpenAI) -> None:
    whole = complete(sdk, logprobs=1).choices[0].logprobs
    parts = [chunk.choices[0].logprobs for chunk in complete(sdk, logprobs=1, stream=True)]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [value for part in parts for value in getattr(part, name)] == getattr(whole, name)


def test_usage_at_the_end_of_a_stream(sdk: openai.OpenAI) -> None:
    *parts, last = complete(sdk, stream=True, stream_options={"include_usage": True})
    assert last.choices == [] and last.usage == complete(sdk).usage
    assert all(part.usage is None for part in parts)


def test_stop_strings(sdk: openai.OpenAI) -> None:
    assert complete(sdk, stop=[" two"]).choices[0].text == "\none"


@pytest.mark.parametrize(
    ("options", "message", "param"),
    [
        (
            {"suffix": "x"},
            "the parameter suffix is not supported: no model here fills in the middle; leave it out",
            "suffix",
        ),
        (
            {"best_of": 2},
            "the parameter best_of is not supported: ask for n answers and choose among them",
            "best_of",
        ),
        ({"prompt": ""}, "the prompt is empty: expected at least one token; give some text", "prompt"),
        ({"prompt": []}, "prompt is []: ", "prompt"),
        ({"prompt": [[]]}, "prompt[0] is []: ", "prompt[0]"),
        ({"prompt": [1, "a"]}, "prompt[1] is 'a': it should be a valid integer; correct that value", "prompt[1]"),
        ({"prompt": [-1]}, "prompt[0] is -1: it should be greater than or equal to 0; correct that value", "prompt[0]"),
        (
            {"max_tokens": 0},
            "max_tokens is 0 without echo: nothing would be answered; give 1 or more",
            "max_tokens",
        ),
        (
            {"prompt": ["a"] * 1000, "n": 3},
            "1000 prompts with n = 3 are more than 2048 texts: ask for fewer",
            "n",
        ),
        (
            {"echo": True, "logprobs": 1, "stream": True},
            "echo with logprobs does not go with stream: leave one out",
            "stream",
        ),
        (
            {"prompt": "x" * 40_000},
            "the prompt has 40,000 characters and the model's context is 512 tokens (at",
            "prompt",
        ),
    ],
)
def test_what_is_wrong_is_named(sdk: openai.OpenAI, options: dict[str, Any], message: str, param: str) -> None:
    found, where = refused(sdk, **options)
    assert found.startswith(message) and where == param
