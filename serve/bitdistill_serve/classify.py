"""`/v1/classify`: which label the model holds likeliest after an input, which is what task students are for.

A label's tokens are appended to those of the input and scored by their log-probability, summed as `bitdistill
evaluate` does, or averaged.  Nothing is generated, so the answer is one of the labels whatever the model would write.
The input is read once: its labels share it in the cache.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from bitdistill_serve.answers import Count
from bitdistill_serve.generation import Generation, Piece
from bitdistill_serve.replies import Classification, Classified, LabelScore, PromptDetails, Usage
from bitdistill_serve.requests import ClassifyRequest, Normalize


def classification(
    request: ClassifyRequest,
    generations: Sequence[Generation],
    pieces: Sequence[Piece],
    count: Count,
    *,
    id: str,
    model: str,
) -> Classification:
    """The answer, from the scored tokens of every label of every input."""
    width = len(request.labels)
    logprobs = [_score(piece, request.normalize) for piece in pieces]
    rows = [logprobs[at : at + width] for at in range(0, len(logprobs), width)]
    inputs = sum(generations[at].common for at in range(0, len(generations), width))
    labels = sum(len(g.prompt) - g.common for g in generations)
    return Classification(
        id=id,
        created=int(time.time()),
        model=model,
        data=[_classified(i, request.labels, row) for i, row in enumerate(rows)],
        usage=Usage(
            prompt_tokens=inputs + labels,
            completion_tokens=0,
            total_tokens=inputs + labels,
            prompt_tokens_details=PromptDetails(cached_tokens=min(count.cached, inputs)),
        ),
    )


def _score(piece: Piece, normalize: Normalize) -> float:
    total = math.fsum(told.logprob for told in piece.scored)
    return total / len(piece.scored) if normalize is Normalize.MEAN else total


def _classified(index: int, labels: Sequence[str], logprobs: Sequence[float]) -> Classified:
    best = max(logprobs)
    weights = [math.exp(logprob - best) for logprob in logprobs]
    scores = [
        LabelScore(label=label, logprob=logprob, probability=weight / math.fsum(weights))
        for label, logprob, weight in zip(labels, logprobs, weights, strict=True)
    ]
    return Classified(index=index, label=labels[logprobs.index(best)], scores=scores)
