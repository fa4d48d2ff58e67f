"""Tools over HTTP, as OpenAI's client sees them: calls that must be made, calls of the model's own, and refusals."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel
from transformers import PreTrainedModel

from bitdistill_ray.decode.torch_decoder import TorchDecoder
from bitdistill_serve.tool_forms import MOST_CALLS
from tests.serve.in_process import CHAT, Json, ask, error, events, serving
from tests.serve.references import greedy, prompt_ids
from tests.serve.tool_templates import FAMILIES, LLAMA3, QWEN3, SMOLLM2, TOLD_ONLY, XML, tokenizer_with, written
from tests.tiny_models import tiny_model, tiny_tokenizer

WEATHER: Json = {
    "name": "get_weather",
    "description": "How it is outside",
    "parameters": {
        "type": "object",
        "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city", "days"],
        "additionalProperties": False,
        "$defs": {"city": {"enum": ["Rome", "Oslo"]}},
    },
}
NOW: Json = {"name": "what_time"}
TOOLS: list[Any] = [{"type": "function", "function": function} for function in (WEATHER, NOW)]
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}
MANY: Json = CHAT | {"tools": TOOLS, "max_tokens": 400, "temperature": 1}
ROME = ("get_weather", {"city": "Rome", "days": 2})


@cache
def long_model() -> PreTrainedModel:
    return tiny_model(max_position_embeddings=4096)


def roomy(template: str) -> Json:
    """Options of a server with that template, whose slots hold tools and calls."""
    decoder = TorchDecoder(long_model(), slots=4, slot_tokens=2048)
    return {"tokenizer": tokenizer_with(template), "decoder": decoder}


@asynccontextmanager
async def client(template: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with serving(**roomy(template)) as (http, _):
        yield openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=http, max_retries=0)


def choice_of(template: str, body: Json) -> Json:
    answer = ask("/v1/chat/completions", body, **roomy(template))
    assert answer.status_code == 200, answer.text
    choice: Json = answer.json()["choices"][0]
    return choice


def check(function: Any) -> None:
    arguments = json.loads(function["arguments"])
    if function["name"] == "what_time":
        assert arguments == {}
    else:
        assert function["name"] == "get_weather"
        assert arguments["city"] in ("Rome", "Oslo")
        assert 1 <= arguments["days"] <= 9
        assert len(arguments) == 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("wanted", ["required", NAMED])
def test_a_call_that_must_be_made_is_valid_by_construction(family: str, wanted: Any) -> None:
    names = set()
    for seed in range(4):
        liked = str(prompt_ids("gw"[seed % 2])[0])  # the beginning of one name or the other
        body = MANY | {"tool_choice": wanted, "seed": seed, "parallel_tool_calls": False, "logit_bias": {liked: 20}}
        choice = choice_of(FAMILIES[family], body)
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] is None
        [call] = choice["message"]["tool_calls"]
        assert (call["type"], call["id"][:5], len(call["id"])) == ("function", "call_", 29)
        check(call["function"])
        names.add(call["function"]["name"])
    assert names == ({"get_weather"} if wanted == NAMED else {"get_weather", "what_time"})


@pytest.mark.parametrize("template", [QWEN3, SMOLLM2, TOLD_ONLY])
def test_several_calls_in_one_answer_stream_by_index(template: str) -> None:
    goes_on = {str(prompt_ids(",")[0]): 30} if template == SMOLLM2 else {"0": -100}
    body = MANY | {"tool_choice": "required", "seed": 3, "max_tokens": 1500, "logit_bias": goes_on}
    calls = choice_of(template, body)["message"]["tool_calls"]
    assert 1 < len(calls) <= MOST_CALLS
    assert len({call["id"] for call in calls}) == len(calls)
    streamed = events(ask("/v1/chat/completions", body | {"stream": True}, **roomy(template)))
    choices = [chunk["choices"][0] for chunk in streamed]
    deltas = [call for choice in choices for call in choice["delta"].get("tool_calls", [])]
    assert [delta["index"] for delta in deltas] == list(range(len(calls)))
    assert [delta["function"] for delta in deltas] == [call["function"] for call in calls]
    for call in calls:
        check(call["function"])
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert choices[-1]["delta"] == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_of_the_models_own_accord_is_read(family: str) -> None:
    """The text is what the template writes of calls; a constraint stands for a model that would write it."""
    calls = [ROME] if family == "llama3" else [ROME, ("what_time", {})]
    said = "" if family == "llama3" else "Let me see.\n"
    text = said + written(FAMILIES[family], calls)
    body = CHAT | {"tools": TOOLS, "max_tokens": 400, "guided_choice": [text], "logprobs": True}
    choice = choice_of(FAMILIES[family], body)
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == (said.strip() or None)
    made = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in
            choice["message"]["tool_calls"]]  # fmt: skip
    assert made == calls
    assert "".join(token["token"] for token in choice["logprobs"]["content"]) == text
    first = ask("/v1/chat/completions", body | {"parallel_tool_calls": False}, **roomy(FAMILIES[family])).json()
    assert len(first["choices"][0]["message"]["tool_calls"]) == 1
    if family == "qwen3":  # it ends with the first call's tag
        assert first["usage"]["completion_tokens"] < len(prompt_ids(said + written(QWEN3, calls[:1]))) + 2


def test_a_strict_function_that_is_called_of_the_models_own_accord_gets_valid_arguments() -> None:
    tools = [{"type": "function", "function": WEATHER | {"strict": True}}, TOOLS[1]]
    begins = str(prompt_ids("{")[0])
    choice = choice_of(LLAMA3, MANY | {"tools": tools, "seed": 5, "logit_bias": {begins: 60}})
    assert choice["finish_reason"] == "tool_calls"
    check(choice["message"]["tool_calls"][0]["function"])
    free = choice_of(LLAMA3, MANY | {"tools": tools, "max_tokens": 8, "logit_bias": {begins: -100}})
    assert free["message"]["content"]


def test_a_call_cut_by_the_limit_stays_text() -> None:
    text = written(QWEN3, [ROME])
    choice = choice_of(QWEN3, CHAT | {"tools": TOOLS, "max_tokens": 20, "guided_choice": [text]})
    assert choice["finish_reason"] == "length"
    assert "tool_calls" not in choice["message"]
    assert text.startswith(choice["message"]["content"])


def test_tools_that_may_not_be_called_are_not_told_and_not_read() -> None:
    plain = choice_of(QWEN3, CHAT)
    assert choice_of(QWEN3, CHAT | {"tools": TOOLS, "tool_choice": "none"}) == plain
    text = written(QWEN3, [ROME])
    choice = choice_of(QWEN3, MANY | {"tool_choice": "none", "guided_choice": [text]})
    assert (choice["message"], choice["finish_reason"]) == ({"role": "assistant", "content": text}, "stop")


def test_the_template_gets_the_tools_and_what_they_answered() -> None:
    template = (
        "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}{{ m | tojson }}{% endfor %}"
        "<tool_call>"
    )
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Rome"}'}}
    answered = {"role": "tool", "tool_call_id": "call_1", "content": "22 degrees"}
    turns = [*CHAT["messages"], {"role": "assistant", "tool_calls": [call]}, answered]
    tools = [{"type": "function", "function": NOW | {"strict": True}}]
    choice = choice_of(template, CHAT | {"tools": tools, "messages": turns})
    taken = [
        {"type": "function", "function": {"name": "what_time", "parameters": {}}},
        turns[0],
        {"role": "assistant", "content": "",
         "tool_calls": [call | {"function": {"name": "get_weather", "arguments": {"city": "Rome"}}}]},
        {"role": "tool", "content": "22 degrees", "tool_call_id": "call_1"},
    ]  # fmt: skip
    prompt = "".join(map(json.dumps, taken)) + "<tool_call>"
    assert choice["message"]["content"] == str(tiny_tokenizer().decode(greedy(long_model(), prompt_ids(prompt), 8)))


def test_openais_client_reads_the_calls() -> None:
    class GetWeather(BaseModel):
        model_config = {"extra": "forbid"}
        city: Literal["Rome", "Oslo"]

    async def scenario() -> None:
        async with client(QWEN3) as ai:
            messages: Any = CHAT["messages"]
            parsed = await ai.chat.completions.parse(
                model="tiny", messages=messages, tools=[openai.pydantic_function_tool(GetWeather)],
                tool_choice="required", parallel_tool_calls=False, seed=1, max_tokens=200,
            )  # fmt: skip
            [call] = parsed.choices[0].message.tool_calls or []
            assert isinstance(call.function.parsed_arguments, GetWeather)

            async with ai.chat.completions.stream(
                model="tiny", messages=messages, tools=TOOLS, tool_choice=NAMED, seed=2, max_tokens=400,
                parallel_tool_calls=False,
            ) as stream:  # fmt: skip
                final = await stream.get_final_completion()
            assert final.choices[0].finish_reason == "tool_calls"
            message = final.choices[0].message
            [made] = message.tool_calls or []
            check(made.function.model_dump())
            history: Any = [*messages, message.model_dump(exclude_none=True),
                            {"role": "tool", "tool_call_id": made.id, "content": "22 degrees"}]  # fmt: skip
            for turn in history[1].get("tool_calls", []):
                turn.pop("index", None)
                turn["function"].pop("parsed_arguments", None)
            history[1].pop("parsed", None)
            after = await ai.chat.completions.create(
                model="tiny", messages=history, tools=TOOLS, temperature=0, max_tokens=8
            )
            assert after.usage is not None
            assert after.usage.prompt_tokens > (parsed.usage.prompt_tokens if parsed.usage else 0)

    asyncio.run(scenario())


DEEP: Json = {"type": "object", "properties": {"a": json.loads('{"items":' * 400 + "{}" + "}" * 400)}}


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"tool_choice": "required", "tools": []}, "tool_choice", "not among the tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice", "not among the tools"),
        ({"tool_choice": "any"}, "tool_choice", ""),
        ({"tool_choice": "required", "guided_regex": "a"}, "tool_choice", "one constraint"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice", "one constraint"),
        (
            {"guided_regex": "a", "tools": [{"type": "function", "function": NOW | {"strict": True}}]},
            "tools",
            "one",
        ),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools", "different names"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "pattern"),
        (
            {"tools": [{"type": "function", "function": NOW | {"parameters": {"type": "string"}}}]},
            "tools.0.function",
            "type object",
        ),
        (
            {"tool_choice": "required", "tools": [{"type": "function", "function": NOW | {"parameters": {"not": 1}}}]},
            "tools",
            "",
        ),
        ({"tool_choice": "required", "tools": [{"type": "function", "function": NOW | {"parameters": DEEP}}]}, "t", ""),
        (
            {"messages": [{"role": "assistant", "tool_calls": [
                {"id": "1", "function": {"name": "what_time", "arguments": "[1"}}]}]},
            "messages.0.tool_calls.0.function",
            "JSON object",
        ),
    ],
)  # fmt: skip
def test_a_wrong_use_of_tools_is_named(change: Json, param: str, says: str) -> None:
    refused = error(ask("/v1/chat/completions", MANY | change, **roomy(QWEN3)), 400)
    assert (refused["param"] or "").startswith(param), refused
    assert says in refused["message"], refused


def test_a_template_without_tools_or_with_another_form_names_the_remedy() -> None:
    refused = error(ask("/v1/chat/completions", MANY), 400)
    assert refused["param"] == "tools"
    assert "chat_template.jinja" in refused["message"]
    unseen = tokenizer_with(QWEN3)
    unseen.add_special_tokens({"additional_special_tokens": ["<tool_call>"]})  # it would have no text to be read
    for tokenizer in (tokenizer_with(XML), unseen):
        refused = error(ask("/v1/chat/completions", MANY, tokenizer=tokenizer), 400)
        assert refused["param"] == "tools"
        assert "tool_choice none" in refused["message"]
    assert "tool_calls" not in choice_of(XML, MANY | {"tool_choice": "none", "max_tokens": 8})["message"]


def test_calls_are_counted() -> None:
    async def scenario() -> None:
        async with serving(**roomy(QWEN3)) as (http, _):
            await http.post("/v1/chat/completions", json=MANY | {"tool_choice": NAMED, "parallel_tool_calls": False})
            assert 'bitdistill_serve_tool_calls_total{model="tiny"} 1.0' in (await http.get("/metrics")).text

    asyncio.run(scenario())
