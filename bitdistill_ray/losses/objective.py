"""Objective: what training minimises, as plain data.

    L = sum_i weight_i * term_i  +  relation.weight * attention relations  +  states.weight * layer states

A term is a token loss of `terms.py` with its options.  Both papers and their baselines are Objectives:

    plain fine-tuning     Objective(terms=(Term(kind=TermKind.CE),))
    BitDistiller          Objective(terms=(Term(kind=TermKind.CAKLD, gamma_mode=GammaMode.LABEL),))
    BitNet Distillation   Objective(terms=(Term(kind=TermKind.CE),
                                           Term(kind=TermKind.FORWARD_KL, weight=10, temperature=5, tau_squared=True,
                                                scope=Scope.PRESENT)),
                                    relation=RelationTerm(weight=1e5, relation_heads=32, divide_by_heads=True))

The last one follows the authors' code; the paper has tau_squared=False, and Algorithm 1 divide_by_heads=False.
Torch is not imported, so that configuration and `--plan` stay light; impossible combinations are refused here, by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from bitdistill_ray.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


class TermKind(StrEnum):
    """The token losses that come with the library; `terms.token_loss` registers more under other names."""

    CE = "ce"  # cross entropy with the data token
    FORWARD_KL = "forward_kl"  # KL(teacher || student), mode covering
    REVERSE_KL = "reverse_kl"  # KL(student || teacher), mode seeking
    JSD = "jsd"  # generalised Jensen-Shannon divergence
    CAKLD = "cakld"  # gamma * reverse + (1 - gamma) * forward


class GammaMode(StrEnum):
    """Where CAKLD's gamma comes from."""

    LABEL = "label"  # the paper: mean teacher probability of the data token, one scalar for the run
    MAX = "max"  # the authors' code: mean of the teacher's largest probability, one scalar for the run
    PER_TOKEN = "per-token"  # AngelSlim: the teacher's probability of this very data token
    FIXED = "fixed"  # a number of the recipe


class Scope(StrEnum):
    """Which tokens a term is averaged over."""

    TARGETS = "targets"  # positions that have a label
    PRESENT = "present"  # every position that is not padding, prompt included


class Reduction(StrEnum):
    """How the values of the tokens become one number."""

    TOKEN_MEAN = "token-mean"  # sum over tokens / number of tokens
    SEQUENCE_SUM = "sequence-sum"  # sum over tokens / number of sequences (BitDistiller's code)


class RelationForm(StrEnum):
    """How the relation logits are made of the rows A of Q, K or V."""

    COSINE = "cosine"  # a . a' of L2-normalised rows (Algorithm 1 and the authors' code)
    SCALED_DOT = "scaled-dot"  # a . a' / sqrt(width) (equations 10 to 12; MiniLMv2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One token loss and its options.

    weight       its factor in the sum
    temperature  tau: both sides are softmax(logits / tau)
    tau_squared  multiply by tau**2, which keeps the gradient's size when tau grows (Hinton et al., 2015)
    scope        the tokens it is averaged over
    beta         JSD only, in (0, 1): the teacher's share of the mixture; None is 0.5
    gamma_mode   CAKLD only, and needed there
    """

    kind: str
    weight: float = 1.0
    temperature: float = 1.0
    tau_squared: bool = False
    scope: Scope = Scope.TARGETS
    beta: float | None = None
    gamma_mode: GammaMode | None = None

    def __post_init__(self) -> None:
        where = f"objective.{self.kind}"
        if not self.weight > 0:
            raise ConfigError(f"{where}.weight", f"{self.weight}", "Give a positive weight, or leave the term out")
        if not self.temperature > 0:
            raise ConfigError(f"{where}.temperature", f"{self.temperature}", "Give a positive temperature")
        if self.tau_squared and self.temperature == 1.0:
            raise ConfigError(f"{where}.tau_squared", "no effect at temperature 1", "Leave it out")
        if self.kind == TermKind.CE and self.temperature != 1.0:
            raise ConfigError(f"{where}.temperature", f"{self.temperature} for cross entropy", "Leave it at 1")
        if self.kind == TermKind.CE and self.scope is not Scope.TARGETS:
            raise ConfigError(f"{where}.scope", f"{self.scope} for cross entropy", "Use targets: it needs labels")
        if (self.kind == TermKind.CAKLD) != (self.gamma_mode is not None):
            raise ConfigError(f"{where}.gamma_mode", f"{self.gamma_mode}", "Give it for cakld, and for cakld only")
        if self.gamma_mode is GammaMode.PER_TOKEN and self.scope is not Scope.TARGETS:
            raise ConfigError(f"{where}.scope", f"{self.scope} with gamma per token", "Use targets: it needs labels")
        if self.beta is not None and self.kind != TermKind.JSD:
            raise ConfigError(f"{where}.beta", f"{self.beta} without jsd", "Leave it out")
        if self.beta is not None and not 0 < self.beta < 1:
            raise ConfigError(f"{where}.beta", f"{self.beta}", "Give a value between 0 and 1, or use a KL instead")

    @property
    def name(self) -> str:
        """The term's key in `Loss.parts`: its kind, with the temperature where that is not 1 (`forward_kl@5`)."""
        return str(self.kind) if self.temperature == 1.0 else f"{self.kind}@{self.temperature:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RelationTerm:
    """Attention-relation distillation of one layer (BitNet Distillation, section 3.3; MiniLMv2).

    weight           its factor in the sum (gamma in the paper); `chunked_loss` may be given another, made as it trains
    form             how relation logits are made
    temperature      divides the relation logits
    relation_heads   heads*C is merged and split anew into this many, so that student and teacher may differ in width;
                     None keeps the model's own heads (Q: H, K and V: J)
    query, key, value   weights (alpha) of the three relations; 0 leaves one out
    causal           a token relates to itself and earlier ones only; the paper relates all tokens of a sequence
    divide_by_heads  divide the mean over rows by the number of relation heads once more, as the authors' code does:
                     there 1e5 means 3125 * mean row KL; without it (Algorithm 1) 1e5 means 1e5 * mean row KL
    heads_per_chunk  relation heads whose [T, T] are held at the same time
    """

    weight: float
    form: RelationForm = RelationForm.COSINE
    temperature: float = 1.0
    relation_heads: int | None = None
    query: float = 1.0
    key: float = 1.0
    value: float = 1.0
    causal: bool = False
    divide_by_heads: bool = False
    heads_per_chunk: int = 4

    def __post_init__(self) -> None:
        where = "objective.relation"
        if not self.weight > 0:
            raise ConfigError(f"{where}.weight", f"{self.weight}", "Give a positive weight, or leave relations out")
        if not self.temperature > 0:
            raise ConfigError(f"{where}.temperature", f"{self.temperature}", "Give a positive temperature")
        if self.relation_heads is not None and self.relation_heads < 1:
            raise ConfigError(f"{where}.relation_heads", f"{self.relation_heads}", "Give at least 1, or leave it empty")
        if self.heads_per_chunk < 1:
            raise ConfigError(f"{where}.heads_per_chunk", f"{self.heads_per_chunk}", "Give at least 1")
        weights = (self.query, self.key, self.value)
        if min(weights) < 0 or max(weights) == 0:
            raise ConfigError(f"{where}.query/key/value", f"{weights}", "Give weights >= 0, at least one above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class StatesTerm:
    """The directions of what some layers give, student beside teacher (`states.py`); `weight` is its factor."""

    weight: float

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ConfigError("objective.states.weight", f"{self.weight}", "Give a positive weight, or leave it out")


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """The weighted sum that training minimises.  `reduction` applies to the terms; relations are means over rows, layer
    states over tokens."""

    terms: tuple[Term, ...] = ()
    relation: RelationTerm | None = None
    states: StatesTerm | None = None
    reduction: Reduction = Reduction.TOKEN_MEAN

    def __post_init__(self) -> None:
        if not self.terms and self.relation is None and self.states is None:
            raise ConfigError("objective", "nothing to minimise", "Give at least one term")
        names = [term.name for term in self.terms]
        if len(set(names)) < len(names):
            raise ConfigError("objective.terms", f"the same term twice in {names}", "Merge them into one")

        if len({term.gamma_mode for term in self.terms} - {None, GammaMode.PER_TOKEN}) > 1:
            raise ConfigError("objective.terms", "two kinds of scalar gamma", "Use the same gamma_mode in all terms")

    @property
    def needs_distribution(self) -> bool:
        """True where some token term compares with the teacher's distribution over the vocabulary."""
        return any(term.kind != TermKind.CE for term in self.terms)

    @property
    def scalar_gamma(self) -> GammaMode | None:
        """The kind of the one gamma that `chunked_loss` must be given (LABEL, MAX or FIXED); None: it needs none."""
        modes = {term.gamma_mode for term in self.terms} - {None, GammaMode.PER_TOKEN}
        return modes.pop() if modes else None

    @property
    def needs_padding(self) -> bool:
        """True where some term counts positions that have no label."""
        return any(term.scope is Scope.PRESENT for term in self.terms)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """What `chunked_loss` returns.

    value   fp32 scalar with gradient: the weighted sum
    parts   detached scalars by `Term.name`, and `relation`: reduced, *without* their weights (tau**2 included)
    tokens  detached scalar: how many target positions this call saw
    """

    value: Tensor
    parts: dict[str, Tensor]
    tokens: Tensor
