"""Documents to runs of tokens: batched encoding, end tokens, and supervised pairs cut to a sequence.

document  pieces ► ids of each piece, the end token after the last
pair      prompt ids (targets only if wanted) ► response ids ► end token, within one sequence
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from bitdistill_ray.data.documents import Counts, Pair, Piece
from bitdistill_ray.data.encoder import Encoder
from bitdistill_ray.data.packing import Run
from bitdistill_ray.data.sources import CorpusSpec

BATCH_DOCUMENTS = 64
BATCH_CHARACTERS = 1 << 20  # an encoded character costs some hundred bytes for a moment


def encode_documents(
    documents: Iterable[Piece | Pair], encoder: Encoder, corpus: CorpusSpec, counts: Counts
) -> Iterator[Run]:
    """The runs of documents, in their order; truncated and dropped pairs are counted."""
    opens = True
    for batch in _batches(documents):
        texts = [text for document in batch for text in _texts(document)]
        encoded = iter(encoder.encode(texts))
        for document in batch:
            if isinstance(document, Piece):
                ids_R = next(encoded)
                if document.last:
                    ids_R = np.append(ids_R, np.int32(encoder.end_id))
                yield Run(ids_R, np.ones(len(ids_R), dtype=np.bool_), opens=opens)
                opens = document.last or (opens and len(ids_R) == 0)
            else:
                yield from _pair_run(next(encoded), next(encoded), encoder.end_id, corpus, counts)


def _texts(document: Piece | Pair) -> tuple[str, ...]:
    return (document.text,) if isinstance(document, Piece) else (document.prompt, document.response)


def _batches(documents: Iterable[Piece | Pair]) -> Iterator[list[Piece | Pair]]:
    batch: list[Piece | Pair] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += sum(map(len, _texts(document)))
        if len(batch) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _pair_run(
    prompt_R: np.ndarray, response_R: np.ndarray, end_id: int, corpus: CorpusSpec, counts: Counts
) -> Iterator[Run]:
    ids_R = np.concatenate([prompt_R, response_R, np.array([end_id], dtype=np.int32)])
    if len(prompt_R) >= corpus.sequence_length:
        counts.dropped += 1
        return
    counts.truncated += len(ids_R) > corpus.sequence_length
    target_R = np.ones(len(ids_R), dtype=np.bool_)
    if not corpus.prompt_is_target:
        target_R[: len(prompt_R)] = False
    end = corpus.sequence_length
    yield Run(ids_R[:end], target_R[:end], whole=True)
