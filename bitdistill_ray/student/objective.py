"""From a recipe's `loss` section to the Objective that the losses understand."""

from __future__ import annotations

from bitdistill_ray.loss_config import AdaptiveWeight, LossConfig, RelationConfig
from bitdistill_ray.losses.objective import (
    GammaMode,
    Objective,
    Reduction,
    RelationForm,
    RelationTerm,
    Scope,
    StatesTerm,
    Term,
    TermKind,
)


def objective_of(loss: LossConfig) -> Objective:
    """The Objective of `loss`; terms of weight 0 are left out."""
    terms = []
    if loss.ce:
        terms.append(Term(kind=TermKind.CE, weight=loss.ce))
    for kind in (TermKind.FORWARD_KL, TermKind.REVERSE_KL, TermKind.JSD, TermKind.CAKLD):
        weight = getattr(loss, kind.value)
        if weight:
            terms.append(
                Term(
                    kind=kind,
                    weight=weight,
                    temperature=loss.temperature,
                    tau_squared=loss.temperature_squared,
                    scope=Scope(loss.kl_scope),
                    gamma_mode=_gamma_mode(loss) if kind is TermKind.CAKLD else None,
                )
            )
    relation = _relation_term(loss.relation) if loss.relation else None
    states = StatesTerm(weight=loss.states.weight) if loss.states else None
    return Objective(terms=tuple(terms), relation=relation, states=states, reduction=Reduction(loss.reduction))


def _relation_term(relation: RelationConfig) -> RelationTerm:
    return RelationTerm(
        weight=1.0 if isinstance(relation.weight, AdaptiveWeight) else relation.weight,
        form=RelationForm(relation.form),
        temperature=relation.temperature,
        relation_heads=relation.heads,
        query=relation.query,
        key=relation.key,
        value=relation.value,
        causal=relation.causal,
        divide_by_heads=relation.divide_by_heads,
    )


def _gamma_mode(loss: LossConfig) -> GammaMode:
    return GammaMode(loss.gamma) if isinstance(loss.gamma, str) else GammaMode.FIXED
