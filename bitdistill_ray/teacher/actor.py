"""One frozen teacher, alone in its process: it answers a batch of tokens with TeacherSignals.

A teacher that is given several GPUs spreads its layers over them, as many bytes on each: one question at a time passes
through all of them, so more actors of one GPU answer more wherever the model fits.

Every call is a pure function of its arguments and the weights, so that a request may be repeated, on this teacher or on
another, whenever a process or a node is lost.  The answer carries a digest of its question; the tensor it sends for
`hidden` is the one that its own LM head consumes (after the final norm).

    pool.py starts these as Ray actors; client.py is the student's side.    S top-k entries
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from bitdistill_ray import env
from bitdistill_ray.config import Dtype, StorageConfig
from bitdistill_ray.core import Payload, TeacherSignals, TokenBatch, TopK
from bitdistill_ray.data.batch import BatchArrays, token_batch
from bitdistill_ray.decode.generation import generate
from bitdistill_ray.decode.loading import stop_ids
from bitdistill_ray.decode.sampling import Sampling
from bitdistill_ray.decode.torch_decoder import TorchDecoder
from bitdistill_ray.errors import BitdistillError
from bitdistill_ray.hardware import compute_dtype, local_device, local_devices
from bitdistill_ray.losses.gamma import GammaEstimate, estimate_gamma
from bitdistill_ray.losses.objective import GammaMode
from bitdistill_ray.losses.teacher_view import Head
from bitdistill_ray.model.heads import LMHead
from bitdistill_ray.model.identity import ModelIdentity, identity
from bitdistill_ray.model.load import load_model
from bitdistill_ray.runs import storage_opener
from bitdistill_ray.teacher import wire
from bitdistill_ray.teacher.draws import sampled
from bitdistill_ray.teacher.request import Load, SignalRequest
from bitdistill_ray.teacher.scorer import Scorer


@dataclass(frozen=True, slots=True)
class Written:
    """One text that a teacher wrote: the prompt as the model saw it, what it added, and why it stopped."""

    prompt: str
    response: str
    response_ids: tuple[int, ...]
    finish_reason: str


class Teacher:
    """A frozen causal LM.  Wrap with `ray.remote` to serve it; it is as well an ordinary object in tests."""

    def __init__(
        self,
        source: str,
        *,
        dtype: Dtype = Dtype.AUTO,
        threads: int | None = None,
        storage: StorageConfig | None = None,
        spread: bool = False,
    ) -> None:
        self.began, self.busy_s, self.requests, self.tokens = time.monotonic(), 0.0, 0, 0
        torch.set_num_threads(threads or env.cpu_count())
        self.devices = local_devices() if spread else [local_device()]
        self.device = self.devices[0]
        self.dtype, self.why = compute_dtype(dtype, self.device)
        self.source = source
        self.refusal: BitdistillError | None = None
        try:
            self.model, self.tokenizer = load_model(
                source,
                dtype=self.dtype,
                device=self.device,
                spread="balanced" if len(self.devices) > 1 else None,
                storage=storage_opener(storage or StorageConfig()),
            )
        except BitdistillError as refusal:
            self.refusal = refusal  # an actor whose constructor raises loses its message; the handshake carries it
            return
        self.model.eval().requires_grad_(requires_grad=False)
        self._lm_head = LMHead(self.model)
        self._scorer = Scorer(self.model, self.device, spread=len(self.devices) > 1)

    def handshake(self) -> ModelIdentity:
        """Who this is: hashes of weights, configuration and vocabulary.  Students compare before they train.

        Raises whatever BitdistillError kept the model from loading.
        """
        if self.refusal is not None:
            raise self.refusal
        return identity(self.model, self.tokenizer)

    def describe(self) -> str:
        """One line for the log."""
        places, dtype = ", ".join(map(str, self.devices)), str(self.dtype).removeprefix("torch.")
        return f"{self.source} on {places} in {dtype} ({self.why}), passes {self._scorer.how}"

    def load(self) -> Load:
        """What this teacher did so far, answered after the questions that came before.

        Raises whatever BitdistillError kept the model from loading.
        """
        if self.refusal is not None:
            raise self.refusal
        return Load(requests=self.requests, tokens=self.tokens, busy_s=self.busy_s, up_s=time.monotonic() - self.began)

    def frozen_head(self) -> wire.Message:
        """The LM head's tensors, for the frozen copy on the student's side."""
        message: wire.Message = {}
        for name, tensor in self._lm_head.frozen_copy().state_dict().items():
            wire.put(message, name, tensor)
        return message

    @torch.no_grad()
    def score(self, arrays: BatchArrays, request: SignalRequest) -> wire.Message:
        """Answer a batch as the feeder hands it out; `wire.decode_signals` reads the result."""
        with self._working(arrays["ids"].size):
            signals = self.signals(token_batch(arrays).to(self.device), request)
            return {**wire.encode_signals(signals), "digest": wire.batch_digest(arrays)}

    @torch.no_grad()
    def confidence(self, arrays: BatchArrays, mode: GammaMode) -> GammaEstimate:
        """What CAKLD's scalar gamma is averaged from, on one batch."""
        with self._working(arrays["ids"].size):
            batch = token_batch(arrays).to(self.device)
            signals = self.signals(batch, SignalRequest())
            return estimate_gamma([(signals, batch.labels_BT)], mode, teacher_head=self.head)

    @torch.no_grad()
    def signals(self, batch: TokenBatch, request: SignalRequest) -> TeacherSignals:
        """The same on tensors, without the wire."""
        layer = None if request.attention_layer is None else request.attention_layer % self.layers()
        states_layers = tuple(number % self.layers() for number in request.states_layers)
        hidden_BTD, attention, states = self._scorer(batch, layer, states_layers)
        signals = TeacherSignals(sequence_ids=batch.sequence_ids, attention=attention, states=states)
        match request.payload:
            case Payload.HIDDEN:
                signals.hidden_BTD = hidden_BTD
            case Payload.LOGITS:
                signals.logits_BTV = self.head(hidden_BTD)
            case Payload.TOPK:
                signals.topk = likeliest(hidden_BTD, self.head, request.topk)
            case Payload.SAMPLED:
                signals.sampled = sampled(hidden_BTD, self.head, batch, request.samples)
        return signals

    def write(self, prompts: Sequence[str], samplings: Sequence[Sampling], *, batch: int) -> list[Written]:
        """Continue each prompt under its own sampling, `batch` at a time, in continuous batches.

        Where the tokenizer has a chat template, a prompt is a user's message and the text is the whole conversation.
        """
        rendered = [self._render(prompt) for prompt in prompts]
        ids = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in rendered]
        longest = max(len(p) + s.max_tokens for p, s in zip(ids, samplings, strict=True))
        with self._working(sum(s.max_tokens for s in samplings)):
            decoder = TorchDecoder(self.model, slots=batch, slot_tokens=longest)
            texts = generate(decoder, ids, samplings, stop_ids=stop_ids(self.model, self.tokenizer))
        responses = self.tokenizer.batch_decode([list(text.ids) for text in texts])
        return [
            Written(prompt, response, tuple(text.ids), str(text.finish_reason))
            for prompt, response, text in zip(rendered, responses, texts, strict=True)
        ]

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states, where these are: the layers of a large teacher lie on several devices."""
        logits: Tensor = self._lm_head(hidden)
        return logits.to(hidden.device)

    def layers(self) -> int:
        """How many decoder layers there are."""
        return int(self.model.config.num_hidden_layers)

    @contextmanager
    def _working(self, tokens: int) -> Iterator[None]:
        """Count one request about `tokens` tokens and the seconds that it takes."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.busy_s += time.monotonic() - began
            self.requests += 1
            self.tokens += tokens

    def _render(self, prompt: str) -> str:
        if not self.tokenizer.chat_template:
            return prompt
        message = [{"role": "user", "content": prompt}]
        return str(self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))


def likeliest(hidden_BTD: Tensor, head: Head, entries: int) -> TopK:
    """The `entries` likeliest tokens in fp16, in an order that ids and values alone decide (ties by id).

    So a cache may store them as a set, and devices whose top-k treats ties in other ways agree.
    """
    rows = [head(h_TD).float().log_softmax(-1).topk(entries, dim=-1) for h_TD in hidden_BTD]
    by_id = torch.stack([r.indices for r in rows]).sort(dim=-1)
    values_BTS = torch.stack([r.values for r in rows]).half().gather(-1, by_id.indices)
    logprobs_BTS, order_BTS = values_BTS.sort(dim=-1, descending=True, stable=True)
    return TopK(ids_BTS=by_id.values.gather(-1, order_BTS).int(), logprobs_BTS=logprobs_BTS)
