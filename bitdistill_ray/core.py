"""The nouns that every part speaks: QuantSpec, TokenBatch, TeacherSignals, PackedWeight.

Nothing here computes; importing it costs neither torch nor ray, so that configuration, `--plan` and the HTTP front end
stay light.  Tensors carry shape suffixes:

    B batch   T time   V vocabulary   D hidden size   N out features   K in features   G groups of a row
    H query heads   J key-value heads   C head size   S top-k entries   L layers
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from bitdistill_ray.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Format(StrEnum):
    """How one weight is coded.  `levels` are the values a code stands for, in units of its scale."""

    TERNARY = "ternary"  # {-1, 0, 1}, absmean scale (BitNet b1.58)
    INT2 = "int2"  # q - z, q in 0..3, integer zero point z (BitDistiller)
    INT3 = "int3"  # q - z, q in 0..7
    NF3 = "nf3"  # eight normal-float levels, one scale for each sign (BitDistiller)
    SEQ2 = "seq2"  # {-.75, -.25, .25, .75}, learnable scale (ParetoQ SEQ)
    SEQ_TERNARY = "seq-ternary"  # {-2/3, 0, 2/3}, learnable scale (ParetoQ SEQ)
    LSQ3 = "lsq3"  # {-4 .. 3}, learnable scale (LSQ)
    INT2_LSQ = "int2-lsq"  # int2 whose scale is learned (LSQ) and whose zero point, 1 or 2, stays; packed as int2
    INT3_LSQ = "int3-lsq"  # the same of int3, zero point 3 or 4
    INT4 = "int4"  # q - z, q in 0..15: a step on the way to fewer bits, and for heads and embeddings
    INT8 = "int8"  # q - 128, q in 1..255, for heads and embeddings

    @property
    def code_bits(self) -> int:
        """Bits of one stored code: 2 (ternary too), 3, 4 or 8."""
        return {Format.INT3: 3, Format.NF3: 3, Format.LSQ3: 3, Format.INT4: 4, Format.INT8: 8}.get(self.stored, 2)

    @property
    def code_count(self) -> int:
        """How many different codes there are."""
        return 3 if self in (Format.TERNARY, Format.SEQ_TERNARY) else 2**self.code_bits

    @property
    def has_zero_point(self) -> bool:
        """True where each group stores an integer zero point."""
        return self.stored in (Format.INT2, Format.INT3, Format.INT4)

    @property
    def scales_per_group(self) -> int:
        """2 for NF3 (positive, negative), else 1."""
        return 2 if self is Format.NF3 else 1

    @property
    def learns_scale(self) -> bool:
        """True where the scale is a parameter (`alpha`) and not a statistic of the weights."""
        return self in (Format.SEQ2, Format.SEQ_TERNARY, Format.LSQ3, Format.INT2_LSQ, Format.INT3_LSQ)

    @property
    def stored(self) -> Format:
        """The format in which its codes are packed: its own, but for those that only train another way."""
        return {Format.INT2_LSQ: Format.INT2, Format.INT3_LSQ: Format.INT3}.get(self, self)


class Granularity(StrEnum):
    """Which weights share a scale."""

    TENSOR = "tensor"
    ROW = "row"  # one output channel
    GROUP = "group"  # `group_size` consecutive inputs of one row; the last group of a row may be shorter
    BLOCK = "block"  # `group_size` consecutive weights of the flattened tensor (BitNet Distillation's "block")


class ScaleDtype(StrEnum):
    """The dtype of a stored scale.  The quantiser rounds to it *before* it makes codes, so packing loses nothing."""

    FP16 = "fp16"
    FP32 = "fp32"


class Rounding(StrEnum):
    """What happens to exact halves."""

    HALF_EVEN = "half-even"
    HALF_AWAY = "half-away"  # the BitDistiller trainer's


class Payload(StrEnum):
    """What a teacher puts on the wire for every position."""

    HIDDEN = "hidden"  # its last hidden state: exact full-vocabulary KL through a frozen copy of its LM head
    TOPK = "topk"  # its S likeliest tokens
    SAMPLED = "sampled"  # S tokens drawn from its distribution: an unbiased forward KL
    LOGITS = "logits"  # all of them: the numerical reference


class Coding(StrEnum):
    """How a cache stores the values of a top-k answer."""

    LOSSLESS = "lossless"  # bit for bit as they were on the wire
    COMPACT = "compact"  # a few bits each (cache/depths.py)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantSpec:
    """The only truth about a weight's format, for training, export, kernels and serving.

    `group_size` counts weights for GROUP and BLOCK and is None otherwise.  `activation_bits` is 8 (one scale per
    token) or None (activations stay in 16 or 32 bits).
    """

    format: Format
    granularity: Granularity = Granularity.GROUP
    group_size: int | None = 128
    activation_bits: int | None = None
    scale_dtype: ScaleDtype = ScaleDtype.FP16
    rounding: Rounding = Rounding.HALF_EVEN

    def __post_init__(self) -> None:
        grouped = self.granularity in (Granularity.GROUP, Granularity.BLOCK)
        if grouped and (self.group_size is None or self.group_size < 8):
            raise ConfigError("quant.group_size", f"{self.group_size} with {self.granularity} scales",
                              "Give a size of at least 8, such as 128")  # fmt: skip
        if not grouped and self.group_size is not None:
            raise ConfigError("quant.group_size", f"{self.group_size} with per-{self.granularity} scales",
                              "Leave group_size empty, or set quant.granularity=group")  # fmt: skip
        if self.format is Format.NF3 and self.granularity is not Granularity.GROUP:
            raise ConfigError("quant.granularity", f"{self.granularity} with nf3, whose two scales belong to a group",
                              "Set quant.granularity=group and quant.group_size=128")  # fmt: skip
        if self.granularity is Granularity.BLOCK and self.format is not Format.TERNARY:
            raise ConfigError("quant.granularity", f"block with {self.format}", "Use block with ternary only")
        if self.format is Format.NF3 and self.rounding is not Rounding.HALF_EVEN:
            raise ConfigError("quant.rounding", f"{self.rounding} with nf3, whose levels have cuts and no halves",
                              "Leave rounding out")  # fmt: skip
        if self.activation_bits not in (None, 8):
            raise ConfigError("quant.activation_bits", f"{self.activation_bits}", "Use 8, or leave it empty for 16")

    def groups(self, in_features: int) -> int:
        """Number of scales along a row of `in_features` weights (1 for TENSOR and ROW; BLOCK is never asked)."""
        if self.group_size is None:
            return 1
        return -(-in_features // self.group_size)

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """Stored bits per weight of an [N, K] matrix: codes, scales and zero points, no padding."""
        weights = out_features * in_features
        if self.granularity is Granularity.TENSOR:
            scales = 1
        elif self.granularity is Granularity.BLOCK:
            scales = -(-weights // (self.group_size or weights))
        else:
            scales = out_features * self.groups(in_features)
        per_scale = (16 if self.scale_dtype is ScaleDtype.FP16 else 32) * self.format.scales_per_group
        per_scale += self.format.code_bits if self.format.has_zero_point else 0
        return self.format.code_bits + scales * per_scale / weights

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; `from_dict` is its inverse."""
        return {f.name: (v.value if isinstance(v := getattr(self, f.name), StrEnum) else v) for f in fields(self)}

    @classmethod
    def from_dict(cls, spec: dict[str, Any]) -> QuantSpec:
        """Read what `to_dict` wrote; unknown keys are refused."""
        unknown = set(spec) - {f.name for f in fields(cls)}
        if unknown:
            raise ConfigError("quant", f"unknown key {sorted(unknown)[0]!r}", "Was it written by a newer version?")
        enums = {"format": Format, "granularity": Granularity, "scale_dtype": ScaleDtype, "rounding": Rounding}
        fields_: dict[str, Any] = {k: enums[k](v) if k in enums else v for k, v in spec.items()}
        return cls(**fields_)


@dataclass(slots=True, kw_only=True)
class TokenBatch:
    """Packed token sequences and where they came from.

    ids_BT       int64 token ids
    target_BT    bool: this token is to be predicted (False: padding, prompt, or the first token of a document)
    segment_BT   int32: which document of the sequence a token belongs to, counted from 0; -1 is padding
    sequence_ids one id per row, `SOURCE#UNIT#INDEX`, stable over runs: the ledger and the caches are keyed by it
    """

    ids_BT: Tensor
    target_BT: Tensor
    segment_BT: Tensor
    sequence_ids: tuple[str, ...]

    @property
    def labels_BT(self) -> Tensor:
        """int64 next-token labels: `labels[t]` is the token after t where that is a target, else -100."""
        import torch

        labels_BT = torch.full_like(self.ids_BT, -100)
        follows = self.target_BT[:, 1:] & (self.segment_BT[:, 1:] == self.segment_BT[:, :-1])
        labels_BT[:, :-1] = torch.where(follows, self.ids_BT[:, 1:], labels_BT[:, :-1])
        return labels_BT

    @property
    def positions_BT(self) -> Tensor:
        """int64 positions that restart at every document boundary, so that no token attends across one."""
        import torch

        step_BT = torch.arange(self.ids_BT.shape[1], device=self.ids_BT.device).expand_as(self.ids_BT)
        starts = torch.ones_like(self.segment_BT, dtype=torch.bool)
        starts[:, 1:] = self.segment_BT[:, 1:] != self.segment_BT[:, :-1]
        return step_BT - torch.where(starts, step_BT, 0).cummax(dim=1).values

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch on `device`.  A GPU copies by itself, from pinned memory: the host waits for nothing."""
        import torch

        target = torch.device(device)

        def moved(tensor: Tensor) -> Tensor:
            if target.type == "cuda" and not tensor.is_cuda:
                tensor = tensor.pin_memory()
            return tensor.to(target, non_blocking=True)

        return TokenBatch(
            ids_BT=moved(self.ids_BT),
            target_BT=moved(self.target_BT),
            segment_BT=moved(self.segment_BT),
            sequence_ids=self.sequence_ids,
        )


@dataclass(slots=True, kw_only=True)
class AttentionStates:
    """Q and K after RoPE and any q/k norm, V as projected, of one layer; K and V before they are repeated."""

    layer: int
    q_BHTC: Tensor
    k_BJTC: Tensor
    v_BJTC: Tensor


@dataclass(slots=True, kw_only=True)
class LayerStates:
    """What some decoder layers gave, before the final norm: hidden_BLTD, L layers in the order of `layers`."""

    layers: tuple[int, ...]
    hidden_BLTD: Tensor


@dataclass(slots=True, kw_only=True)
class TopK:
    """The teacher's S likeliest tokens: int32 ids and log-probabilities (fp16 or fp32), likeliest first, ties by id."""

    ids_BTS: Tensor
    logprobs_BTS: Tensor


@dataclass(slots=True, kw_only=True)
class Sampled:
    """S tokens drawn from the teacher's distribution, with repetition: int32 ids, and their log-probabilities."""

    ids_BTS: Tensor
    logprobs_BTS: Tensor


@dataclass(slots=True, kw_only=True)
class TeacherSignals:
    """What a teacher said about a batch, whatever the wire form: exactly one of hidden, logits, topk, sampled is set.

    `hidden_BTD` is the tensor that the teacher's own LM head consumes (after the final norm).  Losses take this, and
    never ask where it came from: a live actor, a cache, a test.
    """

    sequence_ids: tuple[str, ...]
    hidden_BTD: Tensor | None = None
    logits_BTV: Tensor | None = None
    topk: TopK | None = None
    sampled: Sampled | None = None
    attention: AttentionStates | None = None
    states: LayerStates | None = None


@dataclass(slots=True, kw_only=True)
class PackedWeight:
    """One quantised matrix as bytes: the bridge from training to kernels.  `docs/FORMAT.md` fixes every bit.

    codes   uint8 [N, row_bytes]; 2-bit plane of a row, then (3-bit formats) its 1-bit plane
    scales  fp16 or fp32: [1] TENSOR, [N, 1] ROW, [N, G] GROUP; nf3: [N, G, 2] (positive, negative)
    zeros   uint8 [N, ceil(G * code_bits / 8) as planes], or None
    A BLOCK weight is stored as GROUP, its blocks cut where rows end.
    """

    spec: QuantSpec
    shape: tuple[int, int]
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
