"""Telling one model from another: the handshake between student and teacher, and the key of every cache.

Hashes are cheap (one pass over the weights, no copy of them) and the same on every device.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from bitdistill_ray.errors import TeacherError

if TYPE_CHECKING:
    from torch import Tensor

# Config fields that say how a model was stored, not what it computes.
INCIDENTAL = ("_name_or_path", "_model_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelIdentity:
    """Who a model is: short hashes that are equal where two models, or two copies of one, are interchangeable."""

    name: str
    vocab_size: int  # of the LM head, padding included
    tokenizer: str  # every token and its id
    config: str  # the architecture
    weights: str  # every parameter, in its dtype

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; `ModelIdentity(**d)` is its inverse."""
        return asdict(self)


def identity(model: Any, tokenizer: Any) -> ModelIdentity:
    """Hashes of a loaded model; one pass over its weights, on their device."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in INCIDENTAL}
    weights = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        weights.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {_fingerprint(parameter)}".encode())
    return ModelIdentity(
        name=str(model.name_or_path),
        vocab_size=int(model.config.vocab_size),
        tokenizer=tokenizer_hash(tokenizer),
        config=_digest(config),
        weights=weights.hexdigest()[:16],
    )


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of every token and its id."""
    return _digest(sorted(tokenizer.get_vocab().items()))


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _fingerprint(parameter: Tensor) -> str:
    """Two sums of the bits as integers, the second weighted by place (to 1/256 of the tensor): exact on any device.

    Changing one weight changes the first; exchanging weights, mostly, the second.
    """
    import torch  # here: a registry compares identities, and loads no model

    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32}[parameter.element_size()]
    bits = parameter.detach().flatten().view(integer)
    whole = len(bits) // 256 * 256
    places = torch.cat(
        [bits[:whole].view(256, -1).sum(1, dtype=torch.int64), bits[whole:].sum(dtype=torch.int64)[None]]
    )
    weighted = places * torch.arange(1, len(places) + 1, device=places.device)
    return f"{places.sum().item()} {weighted.sum().item()}"


def refuse_mismatch(student: ModelIdentity, teacher: ModelIdentity) -> None:
    """Refuse a teacher whose tokens are not the student's: same ids, same vocabulary, or no distillation.

    Raises:
        TeacherError: names what differs.
    """
    _refuse(student, teacher, ("vocab_size", "tokenizer"), "the student", "the teacher",
            "Choose a teacher and a student of one family, with one tokenizer")  # fmt: skip


def refuse_change(expected: ModelIdentity, found: ModelIdentity) -> None:
    """Refuse a teacher that is not the one that earlier answers came from (a cache, another replica, a resumed run).

    Raises:
        TeacherError: names what differs.
    """
    _refuse(expected, found, ("vocab_size", "tokenizer", "config", "weights"), "expected", "found",
            "Load the same model in the same dtype, or start a new run and a new cache")  # fmt: skip


def _refuse(a: ModelIdentity, b: ModelIdentity, fields: tuple[str, ...], is_a: str, is_b: str, remedy: str) -> None:
    for field in fields:
        if getattr(a, field) != getattr(b, field):
            kind = "size" if field == "vocab_size" else "hash"
            raise TeacherError(b.name or "teacher", f"the {field} {kind} differs: {is_a} {a.name!r} has "
                               f"{getattr(a, field)}, {is_b} {b.name!r} has {getattr(b, field)}", remedy)  # fmt: skip
