"""What a student asks a teacher for, per call (one teacher serves students with different wishes), and what it did."""

from __future__ import annotations

from dataclasses import dataclass

from bitdistill_ray.core import Payload


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalRequest:
    """`payload` for every position; `attention_layer`: also raw Q, K, V of that layer; `states_layers`: also what these
    layers gave.  Negative layers count from the end."""

    payload: Payload = Payload.HIDDEN
    topk: int = 64
    samples: int = 32
    attention_layer: int | None = None
    states_layers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a teacher did since it was started: requests and tokens answered, seconds of work, seconds of life."""

    requests: int
    tokens: int
    busy_s: float
    up_s: float
