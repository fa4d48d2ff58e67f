"""The token losses of an Objective, each registered under its kind.

A new loss is one function: it takes a `Comparison` (student, teacher and labels of a chunk) and its Term, and returns
one value per token.

    @token_loss("total_variation")
    def total_variation(tokens: Comparison, term: Term) -> Tensor:
        student_log_nP, teacher_log_nP = tokens.pair(term.temperature)
        return 0.5 * (student_log_nP.exp() - teacher_log_nP.exp()).abs().sum(-1)

The Comparison makes each log-softmax once per temperature, however many terms look at it.  No function here reads a
value back to Python, so a chunk compiles into one graph.

Shapes: those of divergence.py.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

from torch import Tensor

from bitdistill_ray.errors import ConfigError, TeacherError
from bitdistill_ray.losses.cakld import confidence_aware_kl
from bitdistill_ray.losses.divergence import (
    jensen_shannon,
    kl_divergence,
    log_probabilities,
    negative_log_likelihood,
    tau_factor,
)
from bitdistill_ray.losses.objective import GammaMode, Scope, Term, TermKind
from bitdistill_ray.losses.teacher_view import SampledView, TeacherView


class Comparison:
    """Student, teacher and labels of one chunk of tokens, and the log-softmaxes that terms share.

    student_nV  logits of any float dtype, with gradient
    teacher     None where no term compares distributions
    labels_n    int64, -100 where there is none
    gamma       CAKLD's scalar, where the objective has one
    """

    def __init__(
        self, student_nV: Tensor, teacher: TeacherView | None, labels_n: Tensor, gamma: float | Tensor | None
    ) -> None:
        self.student_nV, self.labels_n = student_nV, labels_n
        self.view, self._gamma = teacher, gamma
        self._student_logs: dict[float, Tensor] = {}
        self._pairs: dict[float, tuple[Tensor, Tensor]] = {}

    def counted(self, term: Term, present_n: Tensor) -> Tensor:
        """bool [n]: the tokens that a term is averaged over."""
        return self.labels_n >= 0 if term.scope is Scope.TARGETS else present_n

    def student_log(self, temperature: float = 1.0) -> Tensor:
        """The student's log-probabilities [n, V]."""
        if temperature not in self._student_logs:
            self._student_logs[temperature] = log_probabilities(self.student_nV, temperature=temperature)
        return self._student_logs[temperature]

    @property
    def teacher(self) -> TeacherView:
        """The teacher's side; a TeacherError where the caller gave none."""
        if self.view is None:
            raise TeacherError("teacher signals", "none, and a term of the objective compares with a teacher",
                               "Give them, or use ce alone")  # fmt: skip
        return self.view

    def pair(self, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """(student, teacher) log-probabilities [n, P] over the same classes."""
        if temperature not in self._pairs:
            self._pairs[temperature] = self.teacher.compare(self.student_log(temperature), temperature=temperature)
        return self._pairs[temperature]

    def forward_kl(self, temperature: float = 1.0) -> Tensor:
        """KL(teacher || student) per token, [n]; from draws an unbiased estimate of it."""
        if isinstance(self.teacher, SampledView):
            return self.teacher.forward_kl(self.student_log(temperature), temperature=temperature)
        student_log_nP, teacher_log_nP = self.pair(temperature)
        return kl_divergence(teacher_log_nP, student_log_nP)

    def gamma(self, mode: GammaMode) -> float | Tensor:
        """CAKLD's gamma: [n] for PER_TOKEN, else the scalar of the run."""
        if mode is GammaMode.PER_TOKEN:
            return self.teacher.label_probability(self.labels_n)
        if self._gamma is None:
            raise ConfigError("objective.cakld.gamma_mode", f"{mode}, and no gamma was given",
                              "Measure it with estimate_gamma before the run, or use per-token")  # fmt: skip
        return self._gamma


TokenLoss = Callable[[Comparison, Term], Tensor]
_TOKEN_LOSSES: dict[str, TokenLoss] = {}


def token_loss(kind: str) -> Callable[[TokenLoss], TokenLoss]:
    """Register a token loss under `kind`, the name that recipes and `Loss.parts` use."""

    def register(function: TokenLoss) -> TokenLoss:
        if kind in _TOKEN_LOSSES:
            raise ConfigError(f"token loss {kind!r}", "registered twice", "Give the new one another name")
        _TOKEN_LOSSES[kind] = function
        return function

    return register


def lookup(kind: str) -> TokenLoss:
    """The loss registered under `kind`; a ConfigError naming the nearest known one where there is none."""
    if kind not in _TOKEN_LOSSES:
        near = difflib.get_close_matches(kind, _TOKEN_LOSSES, n=1, cutoff=0.0)
        raise ConfigError(f"objective.{kind}", "no such loss", f"Did you mean {near[0]}?")
    return _TOKEN_LOSSES[kind]


def term_values(tokens: Comparison, terms: tuple[Term, ...]) -> list[Tensor]:
    """Values [n] of each term, tau**2 included, weights not."""
    return [lookup(t.kind)(tokens, t) * tau_factor(t.temperature, t.tau_squared) for t in terms]


@token_loss(TermKind.CE)
def _cross_entropy(tokens: Comparison, term: Term) -> Tensor:
    return negative_log_likelihood(tokens.student_log(term.temperature), tokens.labels_n)


@token_loss(TermKind.FORWARD_KL)
def _forward_kl(tokens: Comparison, term: Term) -> Tensor:
    return tokens.forward_kl(term.temperature)


@token_loss(TermKind.REVERSE_KL)
def _reverse_kl(tokens: Comparison, term: Term) -> Tensor:
    return kl_divergence(*tokens.pair(term.temperature))


@token_loss(TermKind.JSD)
def _jsd(tokens: Comparison, term: Term) -> Tensor:
    return jensen_shannon(*tokens.pair(term.temperature), beta=0.5 if term.beta is None else term.beta)


@token_loss(TermKind.CAKLD)
def _cakld(tokens: Comparison, term: Term) -> Tensor:
    assert term.gamma_mode is not None
    return confidence_aware_kl(*tokens.pair(term.temperature), tokens.gamma(term.gamma_mode))
