"""The teacher's service, beside the teacher's forward pass alone; and its wire, beside Ray's own.

answers   tokens per second through actor, wire and client, limited by the forward pass in the same process
wire      GiB/s of the answers with the forward pass taken out (the teacher remembers what it said), limited by one
          plain array of as many bytes that the same actor sends; also of the answer that a 0.6B student wants, hidden
          states and Q, K, V (10 KiB a token)
payload   bytes per token, beside full logits
"""

from __future__ import annotations

import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import ray
import torch

from bitdistill_ray.bench.batches import random_arrays
from bitdistill_ray.bench.cluster import Machine
from bitdistill_ray.bench.models import Size, save_random
from bitdistill_ray.bench.report import Row, Unit
from bitdistill_ray.bench.timing import window
from bitdistill_ray.core import AttentionStates, Payload, TeacherSignals, TokenBatch
from bitdistill_ray.data.batch import BatchArrays, token_batch
from bitdistill_ray.teacher.actor import Teacher
from bitdistill_ray.teacher.client import TeacherClient
from bitdistill_ray.teacher.request import SignalRequest

ROUNDS = 5
ANSWERS = 4  # of one round
IN_FLIGHT = 2
LIVE, REMEMBERED = (2, 128), (8, 256)  # sequences x tokens of one question
REPLAYED = {"cpu": (2, 2048), "cuda": (8, 2048)}
HIDDEN, HEADS, KEY_HEADS, HEAD_SIZE = 1024, 16, 8, 128  # of Qwen3-0.6B
TIMEOUT_S = 600.0
GIB = 2**30


class MeasuredTeacher(Teacher):
    """A teacher that also measures itself, and that can repeat an answer without computing it again."""

    remembered: TeacherSignals | None = None

    def signals(self, batch: TokenBatch, request: SignalRequest) -> TeacherSignals:
        """What it remembers, or what it computes."""
        return super().signals(batch, request) if self.remembered is None else self.remembered

    def remember(self, arrays: BatchArrays | None, request: SignalRequest) -> None:
        """Say from now on what it says about `arrays`; None: think again."""
        self.remembered = None
        if arrays is not None:
            self.remembered = self.signals(token_batch(arrays).to(self.device), request)

    def replay(self, arrays: BatchArrays) -> None:
        """Say from now on, about `arrays`, something of the size that a 0.6B teacher says."""
        B, T = arrays["ids"].shape

        def states(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=self.device).bfloat16()

        q, k, v = (states(B, heads, T, HEAD_SIZE) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
        self.remembered = TeacherSignals(
            sequence_ids=tuple(arrays["sequence_ids"].tolist()),
            hidden_BTD=states(B, T, HIDDEN),
            attention=AttentionStates(layer=0, q_BHTC=q, k_BJTC=k, v_BJTC=v),
        )

    def forward_s(self, arrays: BatchArrays, request: SignalRequest, calls: int) -> float:
        """Seconds of one forward pass, averaged over `calls`."""
        batch = token_batch(arrays).to(self.device)
        return window(lambda: self.signals(batch, request), calls, self.device)

    def send(self, nbytes: int) -> np.ndarray:
        """An array of so many bytes."""
        return np.ones(nbytes, dtype=np.uint8)

    def vocabulary(self) -> int:
        """Rows of its embedding."""
        return int(self.model.config.vocab_size)


def measure(source: str | None, machine: Machine) -> list[Row]:
    """Rows of one teacher, `source` or a random one, for every payload."""
    with tempfile.TemporaryDirectory() as folder:
        source = source or save_random(Path(folder) / "teacher", Size())
        config = machine.config.teacher
        actor = ray.remote(MeasuredTeacher).options(num_cpus=config.cpus, num_gpus=config.gpus)
        teacher = actor.remote(source, dtype=config.dtype, threads=config.threads)
        try:
            ray.get(teacher.handshake.remote())
            return _measure(teacher, machine)
        finally:
            ray.kill(teacher)


def _measure(teacher: Any, machine: Machine) -> list[Row]:
    vocabulary = ray.get(teacher.vocabulary.remote())
    live, remembered = (random_arrays(*shape, vocabulary) for shape in (LIVE, REMEMBERED))
    rows: list[Row] = []
    logits_bytes: float | None = None
    for payload in (Payload.LOGITS, Payload.HIDDEN, Payload.TOPK):
        request = SignalRequest(payload=payload)
        shared: dict[str, Any] = {
            "case": f"teacher, {payload}",
            "threads": machine.threads if machine.device == "cpu" else None,
        }
        alone, answered, _ = _answers(teacher, request, live)
        ray.get(teacher.remember.remote(remembered, request))
        wire, bare, per_token = _wire(teacher, request, remembered)
        logits_bytes = logits_bytes or per_token
        rows += [
            Row(**shared, metric="answers", unit=Unit.TOKENS_S, value=answered, limit=alone,
                limit_is="the teacher's forward pass alone, in the same process"),
            Row(**shared, metric="wire", unit=Unit.GIB_S, value=wire, limit=bare,
                limit_is="one plain array of as many bytes, from the same actor"),
            Row(**shared, metric="payload per token", unit=Unit.BYTES, value=per_token, baseline=logits_bytes,
                baseline_is="all logits in the teacher's dtype"),
        ]  # fmt: skip
    return [*rows, _replayed_row(teacher, machine, vocabulary)]


def _replayed_row(teacher: Any, machine: Machine, vocabulary: int) -> Row:
    sequences, tokens = REPLAYED[machine.device]
    arrays = random_arrays(sequences, tokens, vocabulary)
    ray.get(teacher.replay.remote(arrays))
    wire, bare, _ = _wire(teacher, SignalRequest(attention_layer=0), arrays)
    return Row(case=f"teacher, hidden + Q, K, V of {sequences} x {tokens} tokens, replayed", metric="wire",
               threads=machine.threads if machine.device == "cpu" else None, unit=Unit.GIB_S, value=wire, limit=bare,
               limit_is="one plain array of as many bytes, from the same actor")  # fmt: skip


def _answers(teacher: Any, request: SignalRequest, arrays: BatchArrays) -> tuple[float, float, float]:
    """Tokens per second of the forward pass alone and through the client, and bytes per token."""
    ray.get(teacher.remember.remote(None, request))
    return _compare(
        teacher, request, arrays, lambda: ANSWERS * ray.get(teacher.forward_s.remote(arrays, request, ANSWERS))
    )


def _wire(teacher: Any, request: SignalRequest, arrays: BatchArrays) -> tuple[float, float, float]:
    """GiB/s of remembered answers and of a plain array, and bytes per token."""
    client = TeacherClient([teacher], request, timeout_s=TIMEOUT_S, attempts=1)
    client.answer(client.ask(arrays), arrays)
    nbytes = int(client.take_counters()["teacher_bytes"])
    tokens = arrays["ids"].size
    bare, wire, per_token = _compare(teacher, request, arrays, lambda: _seconds(lambda: _send(teacher, nbytes)))
    return wire * nbytes / tokens / GIB, bare * nbytes / tokens / GIB, per_token


def _compare(
    teacher: Any, request: SignalRequest, arrays: BatchArrays, other: Callable[[], float]
) -> tuple[float, float, float]:
    """Medians of tokens per second of `other` (seconds of a round) and of the client, in turns; bytes per token."""
    client = TeacherClient([teacher], request, timeout_s=TIMEOUT_S, attempts=1)
    question, tokens = ray.put(arrays), ANSWERS * arrays["ids"].size
    _ask(client, question, arrays)
    client.take_counters()
    rounds = [(other(), _seconds(lambda: _ask(client, question, arrays))) for _ in range(ROUNDS)]
    per_token = client.take_counters()["teacher_bytes"] / ROUNDS / tokens
    return tokens / median(r[0] for r in rounds), tokens / median(r[1] for r in rounds), per_token


def _ask(client: TeacherClient, question: Any, arrays: BatchArrays) -> None:
    """`ANSWERS` questions, `IN_FLIGHT` at a time, as a student asks them."""
    tickets = deque(client.ask(question) for _ in range(IN_FLIGHT))
    for answer in range(ANSWERS):
        client.answer(tickets.popleft(), arrays)
        if answer + IN_FLIGHT < ANSWERS:
            tickets.append(client.ask(question))


def _send(teacher: Any, nbytes: int) -> None:
    """The same with plain arrays, which the reader copies out of the object store as the client does."""
    refs = deque(teacher.send.remote(nbytes) for _ in range(IN_FLIGHT))
    for answer in range(ANSWERS):
        torch.from_numpy(ray.get(refs.popleft()).copy())
        if answer + IN_FLIGHT < ANSWERS:
            refs.append(teacher.send.remote(nbytes))


def _seconds(function: Callable[[], None]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began
