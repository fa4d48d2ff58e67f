"""One frozen teacher, alone in its process: it answers a batch of tokens with TeacherSignals.

Every call is a pure function of its arguments and the weights, so that a request may be repeated, on this teacher or on
another, whenever a process or a node is lost.  The answer carries a digest of its question; the tensor it sends for
`hidden` is the one that its own LM head consumes (after the final norm).

    pool.py starts these as Ray actors; client.py is the student's side.    S top-k entries
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bitdistill_ray.config import Dtype
from bitdistill_ray.core import Payload, TeacherSignals, TokenBatch, TopK
from bitdistill_ray.decode.generation import GeneratedText, generate
from bitdistill_ray.decode.sampling import Sampling
from bitdistill_ray.decode.torch_decoder import TorchDecoder
from bitdistill_ray.errors import BitdistillError
from bitdistill_ray.hardware import compute_dtype, local_device
from bitdistill_ray.model.forward import LMHead, hidden_states
from bitdistill_ray.model.load import ModelIdentity, identity, load_model
from bitdistill_ray.model.taps import attention_taps
from bitdistill_ray.teacher import wire
from bitdistill_ray.teacher.request import SignalRequest


class Teacher:
    """A frozen causal LM.  Wrap with `ray.remote` to serve it; it is as well an ordinary object in tests."""

    def __init__(self, source: str, *, dtype: Dtype = Dtype.AUTO, threads: int | None = None) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.device = local_device()
        self.dtype, self.why = compute_dtype(dtype, self.device)
        self.source = source
        self.refusal: BitdistillError | None = None
        try:
            self.model, self.tokenizer = load_model(source, dtype=self.dtype, device=self.device)
        except BitdistillError as refusal:
            self.refusal = refusal  # an actor whose constructor raises loses its message; the handshake carries it
            return
        self.model.eval().requires_grad_(requires_grad=False)
        self.head = LMHead.of(self.model)

    def handshake(self) -> ModelIdentity:
        """Who this is: hashes of weights, configuration and vocabulary.  Students compare before they train.

        Raises whatever BitdistillError kept the model from loading.
        """
        if self.refusal is not None:
            raise self.refusal
        return identity(self.model, self.tokenizer)

    def describe(self) -> str:
        """One line for the log."""
        return f"{self.source} on {self.device} in {str(self.dtype).removeprefix('torch.')} ({self.why})"

    def frozen_head(self) -> wire.Message:
        """The LM head's tensors, for the frozen copy on the student's side."""
        message: wire.Message = {}
        for name, tensor in self.head.frozen_copy().state_dict().items():
            wire.put(message, name, tensor)
        return message

    @torch.no_grad()
    def score(self, message: wire.Message, request: SignalRequest) -> wire.Message:
        """Answer an encoded TokenBatch; `wire.decode_signals` reads the result."""
        signals = self.signals(wire.decode_batch(message).to(self.device), request)
        return {**wire.encode_signals(signals), "digest": wire.batch_digest(message)}

    @torch.no_grad()
    def signals(self, batch: TokenBatch, request: SignalRequest) -> TeacherSignals:
        """The same on tensors, without the wire."""
        layers = () if request.attention_layer is None else (self._layer(request.attention_layer),)
        with attention_taps(self.model, layers) as taps:
            hidden_BTD = hidden_states(self.model, batch)
        signals = TeacherSignals(sequence_ids=batch.sequence_ids, attention=taps[layers[0]] if layers else None)
        match request.payload:
            case Payload.HIDDEN:
                signals.hidden_BTD = hidden_BTD
            case Payload.LOGITS:
                signals.logits_BTV = self.head(hidden_BTD)
            case Payload.TOPK:
                signals.topk = self._topk(hidden_BTD, request.topk)
        return signals

    def generate(
        self, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling], *, batch: int
    ) -> list[GeneratedText]:
        """Continue each prompt (token ids) under its own sampling, `batch` at a time, in continuous batches."""
        longest = max(len(p) + s.max_tokens for p, s in zip(prompts, samplings, strict=True))
        decoder = TorchDecoder(self.model, slots=batch, slot_tokens=longest)
        return generate(decoder, prompts, samplings, stop_ids=self.stop_ids)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Token ids that end a text: the generation config's and the tokenizer's end tokens."""
        configured: Any = self.model.generation_config.eos_token_id
        ids = configured if isinstance(configured, list) else [configured]
        return tuple(sorted({i for i in (*ids, self.tokenizer.eos_token_id) if i is not None}))

    def _layer(self, layer: int) -> int:
        return layer % int(self.model.config.num_hidden_layers)

    def _topk(self, hidden_BTD: Tensor, entries: int) -> TopK:
        rows = [self.head(h_TD).float().log_softmax(-1).topk(entries, dim=-1) for h_TD in hidden_BTD]
        return TopK(
            ids_BTS=torch.stack([r.indices for r in rows]).int(),
            logprobs_BTS=torch.stack([r.values for r in rows]),
        )
