"""The `loss` sections of the configuration: which terms, their weights, and the attention relations among them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from bitdistill_ray.errors import ConfigError
from bitdistill_ray.section import Strict

KLS = ("forward_kl", "reverse_kl", "jsd", "cakld")
ADAPTIVE, SEARCH = "adaptive", "search"


class AdaptiveWeight(Strict):
    """A weight by gradients: as large as makes the norm of the relations' gradient `ratio` times that of other terms.

    It is measured on the student's own gradients in the first step and in every so-manieth after it (two passes more,
    over the first micro-batch of each worker) and stays as it is in between."""

    ratio: float = Field(1.0, gt=0)
    against: Literal["ce", "others"] = "others"
    """The gradient of the cross-entropy alone, or of all other terms together, each with its weight."""
    every: int = Field(25, ge=1)
    """Steps between measurements."""
    smoothing: float = Field(0.7, ge=0, lt=1)
    """Share of the weight before in the new one, in logarithms."""


def _weight(value: Any) -> Any:
    return {} if value == ADAPTIVE else value


class RelationConfig(Strict):
    """Attention-relation distillation (spec: BitNet Distillation, eq. 10-12 and Algorithm 1)."""

    weight: Annotated[Annotated[float, Field(gt=0)] | AdaptiveWeight, BeforeValidator(_weight)]
    """A number, `adaptive`, or the section of an adaptive weight."""
    layer: int | Literal["search"] = -1
    """Which layer of the teacher; negative counts from the end; search: the one that the `search` stage found."""
    student_layer: int | None = None
    """The student's layer that learns from it; empty: the one at the same depth, of as many."""
    query: float = Field(1.0, ge=0)
    """Weight of the queries' relations among the three."""
    key: float = Field(1.0, ge=0)
    value: float = Field(1.0, ge=0)
    form: Literal["cosine", "scaled-dot"] = "cosine"
    heads: int | None = Field(32, ge=1)
    """Relation heads that the merged heads are split into; empty: the attention's own."""
    temperature: float = Field(1.0, gt=0)
    divide_by_heads: bool = True
    """Divide by the relation heads once more, as the authors' code does."""
    causal: bool = False


class StatesConfig(Strict):
    """What some layers give, by its direction, beside what the teacher's at the same depth give."""

    weight: float = Field(gt=0)
    layers: Annotated[int, Field(ge=1)] | Annotated[tuple[int, ...], Field(min_length=1)] = 3
    """Of the teacher: so many over its depth, the last of them the last but one; or their numbers, negative ones from
    the end."""

    def of(self, layers: int) -> tuple[int, ...]:
        """The layers that are meant of a teacher of so many, counted from 0."""
        if not isinstance(self.layers, int):
            return tuple(layer % layers for layer in self.layers)
        depths = [round((place + 1) * layers / self.layers) - 1 for place in range(self.layers)]
        return tuple(dict.fromkeys(max(0, min(depth, layers - 2)) for depth in depths))


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
    states: StatesConfig | None = None

    @property
    def needs_teacher(self) -> bool:
        """False for plain cross-entropy."""
        return self.relation is not None or self.states is not None or any(getattr(self, kind) for kind in KLS)

    @property
    def unused(self) -> tuple[str, ...]:
        """Keys that are set and say nothing about this sum."""
        if any(getattr(self, kind) for kind in KLS):
            return ()
        return tuple(key for key in ("temperature", "temperature_squared", "kl_scope")
                     if getattr(self, key) != type(self).model_fields[key].default)  # fmt: skip

    @model_validator(mode="after")
    def _comparable(self) -> LossConfig:
        weight = self.relation.weight if self.relation else None
        if isinstance(weight, AdaptiveWeight):
            kls = any(getattr(self, kind) for kind in KLS)
            others = self.ce if weight.against == "ce" else self.ce or kls or self.states
            if not others:
                raise ConfigError("loss.relation.weight", f"adaptive against {weight.against}, which there are none of",
                                  "Give the other term a weight, or the relations a number")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _something(self) -> LossConfig:
        if not (self.ce or self.needs_teacher):
            raise ConfigError(
                "loss", "every weight is 0", "Give one of ce, forward_kl, reverse_kl, jsd, cakld a weight"
            )
        if self.gamma == "per-token" and self.kl_scope != "targets":
            raise ConfigError("loss.kl_scope", f"{self.kl_scope} with gamma per token", "Use targets: it needs labels")
        if self.temperature_squared and self.temperature == 1:
            raise ConfigError("loss.temperature_squared", "no effect at temperature 1", "Leave it out")
        if not self.cakld and self.gamma != "label":
            raise ConfigError("loss.gamma", f"{self.gamma} without cakld", "Set loss.cakld, or leave gamma out")
        if isinstance(self.gamma, float | int) and not 0 <= self.gamma <= 1:
            raise ConfigError("loss.gamma", f"{self.gamma}", "Give a number from 0 to 1")
        return self


def _named(value: Any) -> Any:
    return {value: 1.0} if isinstance(value, str) else value


Loss = Annotated[LossConfig, BeforeValidator(_named)]
"""A term's name alone stands for that term with weight 1, and nothing else."""
