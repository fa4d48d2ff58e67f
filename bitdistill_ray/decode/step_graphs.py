"""A decoder's step in a few shapes, each recorded once as a CUDA graph and replayed ever after.

A step of a small model is hundreds of short kernels, which Python hands to a GPU more slowly than they run.  So a step
covers the rows from the first to a power of two of them, in which rows that do not step are padding, and attention
reads whole leaps of `LEAP` tokens: a few shapes, and nothing else changes from step to step but the numbers in one
tensor of tokens, positions and counts.

On a CPU, which records nothing, it is the same step run each time.

    B rows from the first on, a power of two or all   V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bitdistill_ray.decode.cache import SlotCache

LEAP = 256  # tokens

Run = Callable[[Tensor, Tensor, Any], Tensor]
"""(ids_B1, positions_B1, mask) to logits_BV, with the keys and values in the cache."""


class StepGraphs:
    """`graphs(rows, starts, tokens)` appends one token to each of these rows of `cache`."""

    def __init__(self, cache: SlotCache, run: Run) -> None:
        self._cache, self._run = cache, run
        self._inputs: dict[int, Tensor] = {}
        self._steps: dict[tuple[int, int], Callable[[], Tensor]] = {}
        self._memory: Any = None

    @torch.inference_mode()
    def __call__(self, rows: Sequence[int], starts: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """fp32 logits of what follows, in the order of `rows`; the caller's own."""
        batch, live = self._batch(max(rows) + 1), self._cache.leap(max(starts) + 1, LEAP)
        numbers_3B = torch.zeros(3, batch, dtype=torch.int64)
        numbers_3B[:, list(rows)] = torch.tensor([[*tokens], [*starts], [1] * len(rows)])
        if batch not in self._inputs:
            self._inputs[batch] = torch.zeros(3, batch, dtype=torch.int64, device=self._cache.kv.device)
        self._inputs[batch].copy_(numbers_3B)
        if (batch, live) not in self._steps:
            self._steps[batch, live] = self._recorded(lambda: self._step(batch, live))
        logits_BV = self._steps[batch, live]()
        return logits_BV[torch.tensor(rows, device=logits_BV.device)]

    def _batch(self, rows: int) -> int:
        return min(1 << (rows - 1).bit_length(), self._cache.rows)

    def _step(self, batch: int, live: int) -> Tensor:
        ids_B1, start_B1, count_B1 = self._inputs[batch][:, :, None]
        positions_B1, mask = self._cache.see(slice(0, batch), start_B1, count_B1, width=1, live=live, oldest=0)
        return self._run(ids_B1, positions_B1, mask)

    def _recorded(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        if self._cache.kv.device.type != "cuda":
            return step
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call,unused-ignore]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()  # whatever is set up on first use is; what it writes, the replay writes again
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            logits_BV = step()
        self._memory = self._memory or graph.pool()

        def replay() -> Tensor:
            graph.replay()
            return logits_BV

        return replay
