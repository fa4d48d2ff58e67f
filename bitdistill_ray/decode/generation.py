"""Prompts to texts with continuous batching: a sequence that ends gives its slot to the next prompt at once.

Used where all prompts are known beforehand: the `write` stage, `bitdistill generate`, evaluation, benchmarks.  (The
serving engine has a loop of its own, in which requests come and go; both drive the same `Decoder` and `sample`.)

Each turn of the loop fills free slots, reads one chunk of the prompts that wait, and steps every sequence that is
past its prompt.  The chunk is small, so that running sequences never wait long, and shared by all waiting prompts, so
that many short prompts cost one pass over the weights.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

import torch
from torch import Tensor

from bitdistill_ray.decode.base import CapacityError, Decoder
from bitdistill_ray.decode.sampling import History, Sampling, sample

CPU_PREFILL, GPU_PREFILL = 256, 8192  # prompt tokens of one pass: more does not go faster, and others wait for it

OnToken = Callable[[int, int], None]
"""Called with (index of the prompt, token) for every generated token, in order; not with the token that stops."""


class FinishReason(StrEnum):
    """Why a text ended; the values are those of OpenAI's `finish_reason`."""

    STOP = "stop"  # the model wrote a stop token
    LENGTH = "length"  # max_tokens, or the slot is full


@dataclass(frozen=True, slots=True)
class GeneratedText:
    """The tokens written after a prompt, without the stop token, and why they ended."""

    ids: tuple[int, ...]
    finish_reason: FinishReason


@dataclass(slots=True)
class _Running:
    """A prompt in a slot."""

    index: int
    prompt: Sequence[int]
    sampling: Sampling
    ids: list[int] = field(default_factory=list)

    @property
    def history(self) -> History:
        return History(self.sampling, self.prompt, self.ids)


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling],
    *,
    stop_ids: Collection[int],
    max_batch: int | None = None,
    on_token: OnToken | None = None,
) -> list[GeneratedText]:
    """Continue every prompt; results are in the order of the prompts.

    One `Sampling` for all gives prompt i the seed `sampling.seed + i`.  `max_batch` bounds the sequences that run at
    the same time (default: the decoder's free slots).  Slots are freed also when an exception passes through.
    Raises CapacityError before anything runs when a prompt does not fit in a slot or no slot is free.
    """
    requests = _requests(decoder, prompts, sampling)
    results: dict[int, GeneratedText] = {}
    batch = min(decoder.free_slots, max_batch or decoder.slots)
    if requests and not batch:
        raise CapacityError("decoder", f"all {decoder.slots} slots are taken", "Free one, or load it with more slots")
    running: dict[int, _Running] = {}
    try:
        while requests or running:
            while requests and len(running) < batch:
                request = requests.popleft()
                running[decoder.admit(request.prompt)] = request
            for slots, logits_BV in (_prefill(decoder, running), _step(decoder, running)):
                if not slots:
                    continue
                tokens = sample(logits_BV, [running[slot].history for slot in slots])
                for slot, token in zip(slots, tokens, strict=True):
                    reason = _take(decoder, slot, running[slot], token, stop_ids, on_token)
                    if reason is not None:
                        request = running.pop(slot)
                        decoder.free(slot)
                        results[request.index] = GeneratedText(tuple(request.ids), reason)
    finally:
        for slot in running:
            decoder.free(slot)
    return [results[i] for i in range(len(prompts))]


def _requests(
    decoder: Decoder, prompts: Sequence[Sequence[int]], sampling: Sampling | Sequence[Sampling]
) -> deque[_Running]:
    if isinstance(sampling, Sampling):
        sampling = [replace(sampling, seed=sampling.seed + i) for i in range(len(prompts))]
    for i, prompt in enumerate(prompts):
        if len(prompt) >= decoder.slot_tokens:
            raise CapacityError(f"prompt {i}", f"{len(prompt)} tokens in a slot of {decoder.slot_tokens}",
                                "Shorten it, or load the decoder with a larger slot_tokens")  # fmt: skip
    return deque(_Running(i, *pair) for i, pair in enumerate(zip(prompts, sampling, strict=True)))


def _prefill(decoder: Decoder, running: dict[int, _Running]) -> tuple[list[int], Tensor]:
    """One chunk of every waiting prompt: the slots that are now ready, and the logits after their prompts."""
    tokens = CPU_PREFILL if decoder.device.type == "cpu" else GPU_PREFILL
    waiting = [slot for slot in running if decoder.pending(slot)]
    logits = decoder.prefill(waiting, max(1, tokens // len(waiting))) if waiting else []
    ready = [(slot, logits_V) for slot, logits_V in zip(waiting, logits, strict=True) if logits_V is not None]
    return [slot for slot, _ in ready], torch.stack([row for _, row in ready]) if ready else torch.empty(0)


def _step(decoder: Decoder, running: dict[int, _Running]) -> tuple[list[int], Tensor]:
    """One token more of every sequence past its prompt: their slots and logits."""
    slots = [slot for slot, request in running.items() if request.ids]
    logits_BV = decoder.step(slots, [running[slot].ids[-1] for slot in slots]) if slots else torch.empty(0)
    return slots, logits_BV


def _take(
    decoder: Decoder, slot: int, request: _Running, token: int, stop_ids: Collection[int], on_token: OnToken | None
) -> FinishReason | None:
    """Append a chosen token; returns why the text ends here, or None."""
    if token in stop_ids:
        return FinishReason.STOP
    request.ids.append(token)
    if on_token is not None:
        on_token(request.index, token)
    if len(request.ids) >= request.sampling.max_tokens or decoder.length(slot) >= decoder.slot_tokens:
        return FinishReason.LENGTH
    return None
