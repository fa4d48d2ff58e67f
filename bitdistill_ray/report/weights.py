"""Latent weights in units of their own scale, counted into bins: the picture that both papers print.

Relative to its scale a weight shows where it lies on the grid: at a level, or between two.  The scale is that of the
quantiser that trains and exports (for nf3 the scale of the weight's sign).  Some layers of each kind, spread over the
depth, stand for all, so that a large model is read in seconds; tensors are read one at a time.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from bitdistill_ray.core import Format, QuantSpec
from bitdistill_ray.model.student import ADDED_FILE, LATENT_FILE, StudentSurgery, read_about
from bitdistill_ray.quant import quantize
from bitdistill_ray.quant.nf3 import LEVELS
from bitdistill_ray.quant.report import relative_weights
from bitdistill_ray.storage import storage_errors

BINS = 121
LAYERS = 6
GRIDS: dict[Format, tuple[float, ...]] = {
    Format.TERNARY: (-1.0, 0.0, 1.0),
    Format.INT2: tuple(map(float, range(-3, 4))),
    Format.INT3: tuple(map(float, range(-7, 8))),
    Format.NF3: LEVELS,
    Format.SEQ2: (-0.75, -0.25, 0.25, 0.75),
    Format.SEQ_TERNARY: (-2 / 3, 0.0, 2 / 3),
    Format.LSQ3: tuple(map(float, range(-4, 4))),
    Format.INT2_LSQ: tuple(map(float, range(-2, 3))),
    Format.INT3_LSQ: tuple(map(float, range(-4, 5))),
    Format.INT4: tuple(map(float, range(-15, 16))),
    Format.INT8: tuple(map(float, range(-127, 128))),
}
"""The values that codes stand for, in units of the scale (for int2, int3 and int4 under every zero point)."""
RANGED = frozenset({Format.INT2, Format.INT3, Format.NF3, Format.INT4, Format.INT8})
"""Formats whose grid spans the range of its group."""
MOVING = (Format.INT2, Format.INT3, Format.INT4, Format.INT2_LSQ, Format.INT3_LSQ)
"""Grids whose ends depend on the zero point."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """The linears of one kind: shares of the weights in `BINS` bins of [-reach, reach]; the ends hold what is beyond.

    `cuts`, where a weight passes from one code to the next, are of grids that all groups share.  `after` is empty where
    nothing was trained yet.
    """

    kind: str
    levels: tuple[float, ...]
    cuts: tuple[float, ...]
    reach: float
    weights: int
    before: tuple[float, ...]
    after: tuple[float, ...] = ()

    def near(self, points: tuple[float, ...], distance: float, shares: tuple[float, ...]) -> float:
        """The share of weights within `distance` of one of the points."""
        width = 2 * self.reach / BINS
        middles = (-self.reach + (i + 0.5) * width for i in range(BINS))
        return sum(s for at, s in zip(middles, shares, strict=True) if any(abs(at - p) <= distance for p in points))


def weight_histograms(before: Path, after: Path | None) -> list[Histogram]:
    """One histogram for each kind of linear (`q_proj`, …) of two student folders.

    Raises:
        ModelError: no student folders; StorageError: a file that cannot be read.
    """
    specs = StudentSurgery.from_dict(read_about(before)["surgery"]).specs
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in specs:
        kinds[name.rpartition(".")[2]].append(name)
    found = []
    for kind, names in kinds.items():
        chosen = names[:: -(-len(names) // LAYERS)]
        spec = specs[chosen[0]]
        levels = GRIDS[spec.format]
        reach = _reach(spec.format, levels)
        counts = _counts(before, chosen, specs[chosen[0]], reach)
        trained = _counts(after, chosen, spec, reach) if after else None
        found.append(
            Histogram(
                kind=kind,
                levels=levels,
                cuts=() if spec.format in MOVING else tuple((a + b) / 2 for a, b in pairwise(levels)),
                reach=reach,
                weights=int(counts.sum()),
                before=tuple((counts / counts.sum()).tolist()),
                after=tuple((trained / trained.sum()).tolist()) if trained is not None else (),
            )
        )
    return found


def _reach(format: Format, levels: tuple[float, ...]) -> float:
    """As far as weights go: grids that span their group's range end just there, the others clip long tails."""
    largest = max(map(abs, levels))
    return largest * 1.1 if format in RANGED else largest * 3.0


def _counts(folder: Path, names: list[str], spec: QuantSpec, reach: float) -> Tensor:
    """float64 [BINS]."""
    counts = torch.zeros(BINS, dtype=torch.float64)
    with (
        storage_errors(str(folder)),
        safe_open(folder / LATENT_FILE, framework="pt") as latent,
        safe_open(folder / ADDED_FILE, framework="pt") as added,
    ):
        for name in names:
            alpha = added.get_tensor(f"{name}.alpha") if spec.format.learns_scale else None
            w_NK = latent.get_tensor(f"{name}.weight")
            relative = relative_weights(w_NK, quantize(w_NK, spec, alpha=alpha))
            bins = ((relative + reach) * (BINS / (2 * reach))).long().clamp_(0, BINS - 1)
            counts += torch.bincount(bins, minlength=BINS)
    return counts
