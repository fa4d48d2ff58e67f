"""From a request to what the engine takes: texts and chats to tokens, parameters to `Sampling`, constraints compiled.

The tokenizer works in a thread of its own, so that a long prompt does not hold up the event loop, and on a copy of its
own: the engine's thread decodes with the original at the same time.  A text that is too long by its characters alone is
refused before the tokenizer sees it, for that would take seconds in which others wait.
"""

from __future__ import annotations

import asyncio
import copy
import json
import secrets
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from bitdistill_ray.decode.sampling import Sampling
from bitdistill_serve.errors import ApiError
from bitdistill_serve.generation import Generation
from bitdistill_serve.grammar import Grammar, Grammars
from bitdistill_serve.messages import Function, Message, Tool
from bitdistill_serve.requests import ChatCompletionRequest, ClassifyRequest, CompletionRequest, GenerationRequest
from bitdistill_serve.tool_calls import CallReader
from bitdistill_serve.tool_forms import HERMES, ToolForm

T = TypeVar("T")
PROBE = Tool(type="function", function=Function(name="probe")).for_template()


@dataclass(frozen=True, slots=True)
class Chat:
    """An answer to be: its choices, and what reads the calls in each, where there are tools."""

    generations: list[Generation]
    reader: Callable[[], CallReader] | None = None


@dataclass(frozen=True, slots=True)
class Room:
    """What a prompt and an answer may take."""

    slot_tokens: int
    prompt_tokens: int
    output_tokens: int


class Prompts:
    """Prepares requests for a decoder with a head of `vocab_size`, whose texts end at any of `stop_ids`."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, room: Room, *, vocab_size: int, stop_ids: Iterable[int]
    ) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self._room, self._vocab_size = room, vocab_size
        self._most_characters = room.slot_tokens * max(map(len, tokenizer.get_vocab()))
        self._grammars = Grammars(self._tokenizer, vocab_size=vocab_size, stop_ids=stop_ids)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")

    async def completion(self, request: CompletionRequest) -> list[Generation]:
        """`n` generations for each prompt; those of one prompt are neighbours."""
        prompts, grammar = await self._in_thread(
            lambda: (self._encoded(request.prompts), self._grammars.compile(request))
        )
        scored = request.echo and request.logprobs is not None
        return self._generations(request, prompts, "prompt", request.max_tokens, grammar, request.stops, scored=scored)

    async def chat(self, request: ChatCompletionRequest) -> Chat:
        """`n` generations of the answer to the last message."""

        def prepared() -> tuple[list[int], Grammar | None, ToolForm | None]:
            prompt = self._templated(request.messages, [tool.for_template() for tool in request.offered])
            form = self._form() if request.offered else None
            if form is None or not (request.must_call or request.may_call_strictly):
                return prompt, self._grammars.compile(request), form
            write = form.must if request.must_call else form.may
            lark = write(request.must_call or request.may_call_strictly, several=request.parallel_tool_calls)
            return prompt, self._grammars.of_calls(lark), form

        prompt, grammar, form = await self._in_thread(prepared)
        limit, stops = request.limit or self._room.slot_tokens, request.stops
        if form is None:
            return Chat(self._generations(request, [prompt], "messages", limit, grammar, stops))
        if form.tag is not None and not request.must_call and not request.parallel_tool_calls:
            stops = (*stops, form.tag.close)
        functions = [tool.function for tool in request.offered]
        most = None if request.parallel_tool_calls else 1
        return Chat(
            self._generations(request, [prompt], "messages", limit, grammar, stops),
            lambda: form.reader(functions, most=most),
        )

    async def classify(self, request: ClassifyRequest) -> list[Generation]:
        """A generation for each label of each input, that writes nothing: the input, then the label."""

        def tokens() -> tuple[list[list[int]], list[list[int]]]:
            labels = self._tokenizer(request.labels, add_special_tokens=False)["input_ids"]
            prompts = self._encoded(request.inputs) if request.messages is None else [self._templated(request.messages)]
            return prompts, labels

        prompts, labels = await self._in_thread(tokens)
        param = "input" if request.messages is None else "messages"
        for label, ids in zip(request.labels, labels, strict=True):
            if not ids:
                raise ApiError(400, f"The label {label!r} has no tokens", param="labels")
        for prompt in prompts:
            self._check([*prompt, *max(labels, key=len)] if prompt else [], param)
        return [
            Generation(prompt=(*prompt, *label), sampling=Sampling(), score_from=len(prompt), writes=False,
                       common=len(prompt))
            for prompt in prompts
            for label in labels
        ]  # fmt: skip

    async def texts(self, prompts: Sequence[str | list[int]]) -> list[str]:
        """The prompts in words, for `echo`."""
        return await self._in_thread(lambda: [p if isinstance(p, str) else self._decode(p) for p in prompts])

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _encoded(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        for prompt in prompts:
            self._check_characters(len(prompt) if isinstance(prompt, str) else 0, "prompt")
        return [self._tokenizer(p)["input_ids"] if isinstance(p, str) else p for p in prompts]

    def _templated(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> list[int]:
        template = self._tokenizer.chat_template
        if not template:
            raise ApiError(400, "This model has no chat template; use /v1/completions", param="messages")
        turns = [message.for_template() for message in messages]
        self._check_characters(sum(len(turn["content"]) for turn in turns), "messages")
        self._check_characters(len(json.dumps(tools)), "tools")
        if tools and "tools" not in str(template):
            raise ApiError(400, "This model's chat template takes no tools: send the request without them, or put a "
                           "template that writes them (chat_template.jinja) into the model's folder",
                           param="tools")  # fmt: skip
        try:
            ids = self._apply(turns, tools, asked=True, tokenize=True)
        except (TemplateError, TypeError, ValueError) as error:  # it refuses what its model was not trained on
            raise ApiError(
                400, f"The model's chat template refuses these messages: {error}", param="messages"
            ) from error
        return [int(token) for token in ids]

    def _form(self) -> ToolForm:
        """How the chat template writes calls.  Raises ApiError for a way that is not known here."""
        if self._written is None:
            raise ApiError(400, "This model's chat template does not write calls of tools as JSON (as those of Qwen, "
                           "Llama 3 and SmolLM2 do), and this server reads no other: send the request with tool_choice "
                           "none, or put another template into the model's folder", param="tools")  # fmt: skip
        return self._written

    @cached_property
    def _written(self) -> ToolForm | None:
        form = ToolForm.of(lambda turns: str(self._apply(turns, (PROBE,), asked=False, tokenize=False)))
        form = form or (HERMES if "<tool_call>" in str(self._tokenizer.chat_template) else None)
        unseen = set(self._tokenizer.all_special_tokens)  # which have no text
        return None if form and form.tag and {form.tag.open, form.tag.close} & unseen else form

    def _apply(self, turns: Sequence[Any], tools: Sequence[Any], *, asked: bool, tokenize: bool) -> Any:
        return self._tokenizer.apply_chat_template(
            list(turns),
            tools=list(tools) or None,
            add_generation_prompt=asked,
            tokenize=tokenize,
            return_dict=False,
        )

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _generations(
        self,
        request: GenerationRequest,
        prompts: Sequence[Sequence[int]],
        param: str,
        max_tokens: int,
        grammar: Grammar | None,
        stops: tuple[str, ...],
        *,
        scored: bool = False,
    ) -> list[Generation]:
        if not prompts:
            raise ApiError(400, "There is no prompt", param=param)
        for prompt in prompts:
            self._check(prompt, param)
        biases = tuple((int(token), bias) for token, bias in request.logit_bias.items())
        if outside := [token for token, _ in biases if token >= self._vocab_size]:
            raise ApiError(
                400, f"Token {outside[0]} is not in the vocabulary of {self._vocab_size}", param="logit_bias"
            )
        sampling = Sampling(
            max_tokens=max(1, min(max_tokens, self._room.output_tokens)),
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            min_p=request.min_p,
            repetition_penalty=request.repetition_penalty,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            logit_bias=biases,
            seed=secrets.randbits(63) if request.seed is None else request.seed,
        )
        return [
            Generation(
                prompt=tuple(prompt),
                sampling=replace(sampling, seed=sampling.seed + choice),
                stops=stops,
                logprobs=request.alternatives,
                score_from=1 if scored and choice == 0 else None,
                ignore_eos=request.ignore_eos,
                writes=max_tokens > 0,
                common=len(prompt) if request.n > 1 and not scored else 0,
                grammar=grammar,
            )
            for prompt in prompts
            for choice in range(request.n)
        ]

    def _check_characters(self, characters: int, param: str) -> None:
        if characters > self._most_characters:
            raise ApiError(
                400,
                f"This server's maximum context length is {self._room.slot_tokens} tokens, and no text of {characters} "
                "characters fits in it",
                param=param,
                code="context_length_exceeded",
            )

    def _check(self, prompt: Sequence[int], param: str) -> None:
        if not prompt:
            raise ApiError(400, "A prompt must have at least one token", param=param)
        if len(prompt) >= self._room.slot_tokens:
            raise ApiError(
                400,
                f"This server's maximum context length is {self._room.slot_tokens} tokens, of prompt and answer "
                f"together; the prompt has {len(prompt)}",
                param=param,
                code="context_length_exceeded",
            )
        if len(prompt) > self._room.prompt_tokens:
            raise ApiError(
                400,
                f"This server takes prompts of {self._room.prompt_tokens} tokens at most; this one has {len(prompt)}",
                param=param,
                code="context_length_exceeded",
            )
        outside = next((token for token in prompt if token >= self._vocab_size), None)
        if outside is not None:
            raise ApiError(400, f"Token {outside} is not in the vocabulary of {self._vocab_size}", param=param)
