"""The ledger: which sequences were trained on, in so few words that it fits into every checkpoint.

The global order of sequences is a pure function of the corpus, so a position in it says everything.  The ledger keeps
that position in the form from which reading can go on at once (`Cursor`: units before it are never opened again), a
rolling sha256 over the ids consumed so far, and fingerprints of what decides the order:

    digest_0 = "",   digest_{n+1} = sha256(digest_n · id_n)

Two runs with the same digest consumed the same sequences in the same order, however often they were killed.  It is
advanced per optimizer step, not when data is prefetched: exactly once with respect to the checkpoint it is saved in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from bitdistill_ray.data.encoder import Encoder
from bitdistill_ray.data.sources import CorpusSpec
from bitdistill_ray.data.units import Unit
from bitdistill_ray.errors import DataError

VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """A place in the endless order of one stream of sequences.

    epoch    passes finished before
    window   number of the current shuffle window within the pass
    unit     the window begins in the `unit`-th unit of the pass's order: all units before it are finished
    skip     … after this many of that unit's sequences
    taken    sequences of the window consumed so far
    """

    epoch: int = 0
    window: int = 0
    unit: int = 0
    skip: int = 0
    taken: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """What was consumed up to the end of an optimizer step.

    step      optimizer steps done; the next one has this number
    position  sequences consumed
    digest    rolling sha256 of their ids, hex ("" at the start)
    corpus    fingerprints of what decides the order; `check` compares them
    cursors   where to go on, per stream: the one of a corpus, or one for each weighted source that gave anything yet
    """

    corpus: Mapping[str, str]
    step: int = 0
    position: int = 0
    digest: str = ""
    cursors: Mapping[str, Cursor] = field(default_factory=dict)

    def advance(self, ids: Iterable[str], cursors: Mapping[str, Cursor]) -> Ledger:
        """The ledger after one more step, which consumed the sequences `ids`, in this order, up to `cursors`."""
        digest, position = self.digest, self.position
        for identity in ids:
            digest = hashlib.sha256(f"{digest}{identity}".encode()).hexdigest()
            position += 1
        return replace(self, step=self.step + 1, position=position, digest=digest, cursors=dict(cursors))

    def check(self, corpus: Mapping[str, str]) -> None:
        """Raise DataError unless `corpus` (of `corpus_fingerprint`) has the order of sequences of this ledger's."""
        changed = [key for key in CHANGES if self.corpus.get(key) != corpus.get(key)]
        if changed:
            reasons = ", ".join(CHANGES[key] for key in changed)
            raise DataError("data ledger", f"cannot go on from step {self.step}: {reasons} changed since",
                            "Put it back as it was, or begin a new run")  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; `from_dict` is its inverse."""
        cursors = {name: asdict(cursor) for name, cursor in self.cursors.items()}
        return {"version": VERSION, "step": self.step, "position": self.position, "digest": self.digest,
                "corpus": dict(self.corpus), "cursors": cursors}  # fmt: skip

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Ledger:
        """Read what `to_dict` wrote; DataError for anything else."""
        if state.get("version") != VERSION:
            raise DataError("data ledger", f"version {state.get('version')!r}, not {VERSION}",
                            "Resume with the version that wrote the checkpoint")  # fmt: skip
        try:
            cursors = {str(name): Cursor(**cursor) for name, cursor in state["cursors"].items()}
            return cls(corpus=dict(state["corpus"]), step=int(state["step"]), position=int(state["position"]),
                       digest=str(state["digest"]), cursors=cursors)  # fmt: skip
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DataError("data ledger", f"damaged: {error!r}", "Resume from an earlier checkpoint") from error


CHANGES = {
    "units": "the files of the corpus",
    "tokenizer": "the tokenizer or the end token",
    "packing": "how documents become sequences (sequence length, columns, limits)",
    "order": "the seed or the shuffle window",
    "mixture": "the weights of the sources",
}


def corpus_fingerprint(corpus: CorpusSpec, units: Iterable[Unit], encoder: Encoder) -> dict[str, str]:
    """sha256 of each thing that decides which sequences there are and in which order; keys are those of CHANGES.

    Only a weighted corpus has a "mixture".
    """
    labels = [source.label for source in corpus.sources]
    found = {
        "units": _sha256([[labels[unit.source], unit.name, unit.stamp] for unit in units]),
        "tokenizer": encoder.fingerprint,
        "packing": _sha256([corpus.sequence_length, corpus.max_document_characters, corpus.prompt_is_target,
                            [source.reading for source in corpus.sources]]),
        "order": _sha256([corpus.seed, corpus.window]),
    }  # fmt: skip
    if corpus.is_weighted:
        found["mixture"] = _sha256([[label, str(share)] for label, share in zip(labels, corpus.shares, strict=True)])
    return found


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
