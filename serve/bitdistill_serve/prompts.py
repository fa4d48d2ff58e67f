"""From a request to what the engine takes: texts and chats to token ids, parameters to `Sampling`.

The tokenizer works in a thread of its own, so that a long prompt does not hold up the event loop, and on a copy of its
own: the engine's thread decodes with the original at the same time.
"""

from __future__ import annotations

import asyncio
import copy
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from bitdistill_ray.decode.sampling import Sampling
from bitdistill_serve.batch import Generation
from bitdistill_serve.protocol import ApiError, ChatCompletionRequest, CompletionRequest, GenerationRequest

T = TypeVar("T")


class Prompts:
    """Prepares requests for a decoder with slots of `slot_tokens` tokens and a head of `vocab_size`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, slot_tokens: int, vocab_size: int) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self._slot_tokens, self._vocab_size = slot_tokens, vocab_size
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")

    async def completion(self, request: CompletionRequest) -> list[Generation]:
        """`n` generations for each prompt; those of one prompt are neighbours."""
        texts = [prompt for prompt in request.prompts if isinstance(prompt, str)]
        encoded = iter(await self._in_thread(lambda: [self._tokenizer(text)["input_ids"] for text in texts]))
        prompts = [next(encoded) if isinstance(prompt, str) else prompt for prompt in request.prompts]
        return self._generations(request, prompts, "prompt", request.max_tokens)

    async def chat(self, request: ChatCompletionRequest) -> list[Generation]:
        """`n` generations of the answer to the last message."""
        if not self._tokenizer.chat_template:
            raise ApiError(400, "This model has no chat template; use /v1/completions", param="messages")
        turns = [message.for_template() for message in request.messages]
        try:
            prompt = await self._in_thread(
                lambda: self._tokenizer.apply_chat_template(
                    turns, add_generation_prompt=True, tokenize=True, return_dict=False
                )
            )
        except TemplateError as error:  # a template refuses roles and orders that its model was not trained on
            raise ApiError(
                400, f"The model's chat template refuses these messages: {error}", param="messages"
            ) from error
        return self._generations(request, [prompt], "messages", request.limit or self._slot_tokens)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _generations(
        self, request: GenerationRequest, prompts: Sequence[Sequence[int]], param: str, max_tokens: int
    ) -> list[Generation]:
        if not prompts:
            raise ApiError(400, "There is no prompt", param=param)
        for prompt in prompts:
            self._check(prompt, param)
        sampling = Sampling(
            max_tokens=max_tokens,
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            min_p=request.min_p,
            repetition_penalty=request.repetition_penalty,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            seed=secrets.randbits(63) if request.seed is None else request.seed,
        )
        return [
            Generation(prompt=tuple(prompt), sampling=replace(sampling, seed=sampling.seed + choice), stops=stops)
            for stops in [tuple(request.stop)]
            for prompt in prompts
            for choice in range(request.n)
        ]

    def _check(self, prompt: Sequence[int], param: str) -> None:
        if not prompt:
            raise ApiError(400, "A prompt must have at least one token", param=param)
        if len(prompt) >= self._slot_tokens:
            raise ApiError(
                400,
                f"This server's maximum context length is {self._slot_tokens} tokens, of prompt and answer together; "
                f"the prompt has {len(prompt)}",
                param=param,
                code="context_length_exceeded",
            )
        outside = next((token for token in prompt if token >= self._vocab_size), None)
        if outside is not None:
            raise ApiError(400, f"Token {outside} is not in the vocabulary of {self._vocab_size}", param=param)
