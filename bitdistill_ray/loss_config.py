"""The `loss` sections of the configuration: which terms, their weights, and the attention relations among them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from bitdistill_ray.errors import ConfigError
from bitdistill_ray.section import Strict


class RelationConfig(Strict):
    """Attention-relation distillation (spec: BitNet Distillation, eq. 10-12 and Algorithm 1)."""

    weight: float = Field(gt=0)
    layer: int = -1
    """Which layer; negative counts from the end."""
    form: Literal["cosine", "scaled-dot"] = "cosine"
    heads: int | None = Field(32, ge=1)
    """Relation heads that the merged heads are split into; empty: the attention's own."""
    temperature: float = Field(1.0, gt=0)
    divide_by_heads: bool = True
    """Divide by the relation heads once more, as the authors' code does."""
    causal: bool = False


class LossConfig(Strict):
    """A weighted sum of losses; what has weight 0 is not computed."""

    ce: float = Field(0.0, ge=0)
    forward_kl: float = Field(0.0, ge=0)
    reverse_kl: float = Field(0.0, ge=0)
    jsd: float = Field(0.0, ge=0)
    cakld: float = Field(0.0, ge=0)
    temperature: float = Field(1.0, gt=0)
    temperature_squared: bool = False
    """Multiply the KLs by temperature squared, as BitNet Distillation's code does."""
    gamma: Literal["label", "max", "per-token"] | float = "label"
    """CAKLD's mix: measured once (label: the paper; max: the authors' code), per token, or a number."""
    gamma_sequences: int = Field(32, ge=1)
    """Sequences over which gamma is measured."""
    kl_scope: Literal["targets", "present"] = "targets"
    """Tokens that the KLs are averaged over: those with a label, or all that are not padding (both papers' code)."""
    reduction: Literal["token-mean", "sequence-sum"] = "token-mean"
    """sequence-sum: summed over tokens, averaged over sequences (BitDistiller's code)."""
    relation: RelationConfig | None = None

    @property
    def needs_teacher(self) -> bool:
        """False for plain cross-entropy."""
        return any((self.forward_kl, self.reverse_kl, self.jsd, self.cakld, self.relation))

    @model_validator(mode="after")
    def _something(self) -> LossConfig:
        if not (self.ce or self.needs_teacher):
            raise ConfigError(
                "loss", "every weight is 0", "Give one of ce, forward_kl, reverse_kl, jsd, cakld a weight"
            )
        if not any((self.forward_kl, self.reverse_kl, self.jsd, self.cakld)):
            for key, unset in (("temperature", 1.0), ("temperature_squared", False), ("kl_scope", "targets")):
                if getattr(self, key) != unset:
                    raise ConfigError(f"loss.{key}", f"{getattr(self, key)} without a KL", f"Leave {key} out")
        if self.gamma == "per-token" and self.kl_scope != "targets":
            raise ConfigError("loss.kl_scope", f"{self.kl_scope} with gamma per token", "Use targets: it needs labels")
        if self.temperature_squared and self.temperature == 1:
            raise ConfigError("loss.temperature_squared", "no effect at temperature 1", "Leave it out")
        if not self.cakld and self.gamma != "label":
            raise ConfigError("loss.gamma", f"{self.gamma} without cakld", "Set loss.cakld, or leave gamma out")
        if isinstance(self.gamma, float | int) and not 0 <= self.gamma <= 1:
            raise ConfigError("loss.gamma", f"{self.gamma}", "Give a number from 0 to 1")
        return self
