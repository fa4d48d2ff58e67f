"""Whether a pool that somebody else started is the one that a run needs: one line for the first thing that differs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bitdistill_ray import __version__
from bitdistill_ray.config import Dtype, TeacherConfig
from bitdistill_ray.core import Payload
from bitdistill_ray.errors import TeacherError
from bitdistill_ray.model.identity import ModelIdentity


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What a pool's registry says of itself."""

    source: str
    identity: ModelIdentity
    description: str
    dtype: Dtype
    payloads: Sequence[str] = tuple(str(payload) for payload in Payload)
    version: str = __version__


def refuse_offer(name: str, offer: Offer, *, source: str, config: TeacherConfig, tokenizer: str | None = None) -> None:
    """Refuse the pool `name` for a run with the teacher `source`, `config` and students of the `tokenizer` hash.

    The weights are the pool's word: a run that loads no teacher cannot hash them, so both must name the same source.

    Raises:
        TeacherError: names what differs.
    """
    where, other = f"teacher pool {name!r}", "Join another pool, or set teacher.join empty"
    if offer.version != __version__:
        raise TeacherError(where, f"runs bitdistill-ray {offer.version}, this is {__version__}",
                           f"Start it again: bitdistill teacher down {name}, then up")  # fmt: skip
    if _place(offer.source) != _place(source):
        raise TeacherError(where, f"its model is {offer.source}, this run's teacher {source}", other)
    if tokenizer is not None and offer.identity.tokenizer != tokenizer:
        raise TeacherError(where, f"its tokenizer has hash {offer.identity.tokenizer}, the student's {tokenizer}",
                           other)  # fmt: skip
    if Dtype.AUTO not in (offer.dtype, config.dtype) and offer.dtype is not config.dtype:
        raise TeacherError(where, f"computes in {offer.dtype}, teacher.dtype is {config.dtype}", other)
    if config.payload not in offer.payloads:
        raise TeacherError(where, f"sends {', '.join(offer.payloads)}, teacher.payload is {config.payload}", other)
    if config.payload is Payload.TOPK and config.topk > offer.identity.vocab_size:
        raise TeacherError(where, f"has {offer.identity.vocab_size} tokens, teacher.topk is {config.topk}",
                           f"Set teacher.topk to at most {offer.identity.vocab_size}")  # fmt: skip


def _place(source: str) -> str:
    """A local folder by its absolute path, whatever way it was written."""
    return str(Path(source).resolve()) if "://" not in source and Path(source).exists() else source
