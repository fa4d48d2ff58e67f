"""What is measured beside the loss now and then: the codes' flip rate and zeros, and each loss term's gradient.

    flip_rate      share of the codes that differ from those of the measurement before, `flip_steps` steps ago; about
                   0.05 % a step is a healthy ternary run (arXiv 2412.04787)
    zeros          share of the quantised weights that are exactly 0
    near_cut       of ternary students, share of the weights within a tenth of a scale of where another code begins
    grad_norm_X    L2 norm of the gradient that term X, with its weight, has over all trained weights
    grad_norm_ratio   with two terms: the second's norm over the first's
    ppl:TEXT, kl:TEXT, agreement:TEXT   on held-out texts (`quality.py`)

Codes: each rank measures its share of the linears and the counts are added up, so that the cost and the copy of the
codes (one byte a weight) divide by the ranks; ZeRO-3's shards are gathered one matrix at a time.  Gradients: one more
forward and backward pass for each term, over the first micro-batch of every rank, averaged over ranks.  They bypass
DeepSpeed (`torch.autograd.grad` accumulates nothing, so its hooks sleep) and leave the training as it is, bit for bit.
ZeRO-3's shards cannot be differentiated so, and the measurement is left out there, with a word.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bitdistill_ray.core import TeacherSignals, TokenBatch
from bitdistill_ray.losses.reduction import Totals
from bitdistill_ray.model.linear import QuantLinear, whole_parameter
from bitdistill_ray.monitor_config import MonitorConfig
from bitdistill_ray.quant import quantize
from bitdistill_ray.quant.report import near_cut_count, zero_count
from bitdistill_ray.student.module import LossModule
from bitdistill_ray.student.quality import QualityProbe
from bitdistill_ray.student.term_gradients import gradient_norms, single_terms


class CodeProbe:
    """The codes of a model's quantised linears, compared with those of the last look; all ranks look together."""

    def __init__(self, model: nn.Module, *, rank: int = 0, ranks: int = 1) -> None:
        modules = model.named_modules()
        self.linears = [(name, m) for name, m in modules if isinstance(m, QuantLinear) and m.spec is not None]
        self.rank, self.ranks = rank, ranks
        self.codes: dict[int, Tensor] = {}

    @torch.no_grad()
    def look(self) -> dict[str, float]:
        """`flip_rate`, the share of codes that changed since the last look (not at the first), `zeros`, `near_cut`."""
        first, device = not self.codes, self.linears[0][1].weight.device
        # of flips, zeros, weights, ranks that look first, weights near a cut
        sums = torch.zeros(5, dtype=torch.float64, device=device)
        sums[3] += first
        for place, (name, linear) in enumerate(self.linears):
            with whole_parameter(linear.weight):  # a collective under ZeRO-3: every rank enters for every linear
                if place % self.ranks != self.rank:
                    continue
                assert linear.spec is not None
                quantized = quantize(linear.weight, linear.spec, alpha=linear.alpha, name=name, known_finite=True)
                sums[4] += near_cut_count(linear.weight, quantized)
            codes, before = quantized.codes_NK, self.codes.get(place)
            flipped = 0 if before is None else (codes != before).sum()
            self.codes[place] = codes
            sums[0] += flipped
            sums[1] += zero_count(quantized)
            sums[2] += codes.numel()
        if self.ranks > 1:
            dist.all_reduce(sums)
        flips, zeroed, total, newcomers, near = sums.tolist()
        found = {"flip_rate": flips / total} if newcomers < self.ranks else {}
        return found | {"zeros": zeroed / total} | ({"near_cut": near / total} if near else {})


class Probes:
    """All of them, at their steps, for one rank of a training stage.

    The worker calls `start` before its first step, `micro` with every micro-batch, and `take` after every step.
    """

    def __init__(
        self,
        module: LossModule,
        config: MonitorConfig,
        *,
        rank: int,
        ranks: int,
        zero: int,
        steps: int,
        quality: QualityProbe | None = None,
        say: Callable[[str], object],
    ) -> None:
        self.module, self.ranks, self.steps = module, ranks, steps
        self.quality, self.quality_every = quality, config.quality_every
        codes = CodeProbe(module.model, rank=rank, ranks=ranks) if config.codes_every else None
        self.codes = codes if codes and codes.linears else None  # `finetune` has none
        self.codes_every, self.gradients_every = config.codes_every, config.gradients_every
        if self.gradients_every and zero == 3:
            self.gradients_every = 0
            if rank == 0:
                say("monitor.gradients_every is left out under ZeRO-3, which shards what would be differentiated")
        self.done, self.looked_at = 0, 0
        self.norms: dict[str, Tensor] = {}

    def start(self, done: int) -> None:
        """Steps `done` are over; remember the codes as they are."""
        self.done = self.looked_at = done
        if self.codes:
            self.codes.look()

    def micro(self, batch: TokenBatch, signals: TeacherSignals | None, totals: Totals) -> None:
        """A micro-batch on the device, before the pass that trains; the first of a step may be measured."""
        if self.gradients_every and not self.norms and (self.done + 1) % self.gradients_every == 0:
            self.norms = gradient_norms(self.module, single_terms(self.module.objective), batch, signals, totals)

    def take(self) -> dict[str, float]:
        """A step is over: what was measured, for its row; empty on most steps.  All ranks call it together."""
        self.done += 1
        figures = self._gradients()
        if self.codes and self.done % self.codes_every == 0:
            figures |= self.codes.look()
            if "flip_rate" in figures:
                figures["flip_steps"] = self.done - self.looked_at
            self.looked_at = self.done
        if self.quality and (self.done % self.quality_every == 0 or self.done == self.steps):
            figures |= self.quality.look()
        return figures

    def _gradients(self) -> dict[str, float]:
        if not self.norms:
            return {}
        norms = torch.stack(list(self.norms.values())).double()
        if self.ranks > 1:
            dist.all_reduce(norms)
        values = dict(zip(self.norms, (norms / self.ranks).tolist(), strict=True))
        self.norms = {}
        figures = {f"grad_norm_{name}": value for name, value in values.items()}
        if len(values) == 2 and (first := next(iter(values.values()))) > 0:
            figures["grad_norm_ratio"] = list(values.values())[1] / first
        return figures
