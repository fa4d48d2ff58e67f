"""What a recipe's loss section means, and which layer learns from which."""

from __future__ import annotations

from typing import Any

import pytest

from bitdistill_ray.loss_config import LossConfig, StatesConfig
from bitdistill_ray.losses.objective import GammaMode, Reduction, RelationForm, RelationTerm, Scope, Term, TermKind
from bitdistill_ray.student.layer_pairs import LayerPairs, student_layer
from bitdistill_ray.student.objective import objective_of


def terms_of(**loss: Any) -> tuple[Term, ...]:
    return objective_of(LossConfig.model_validate(loss)).terms


def test_plain_cross_entropy() -> None:
    objective = objective_of(LossConfig(ce=2.0))
    assert objective.terms == (Term(kind=TermKind.CE, weight=2.0),)
    assert objective.relation is None
    assert objective.reduction is Reduction.TOKEN_MEAN


@pytest.mark.parametrize("kind", [TermKind.FORWARD_KL, TermKind.REVERSE_KL, TermKind.JSD])
def test_a_divergence_carries_its_options(kind: TermKind) -> None:
    assert terms_of(**{kind: 0.5}) == (Term(kind=kind, weight=0.5),)
    assert terms_of(**{kind: 0.5}, temperature=5, temperature_squared=True, kl_scope="present") == (
        Term(kind=kind, weight=0.5, temperature=5, tau_squared=True, scope=Scope.PRESENT),
    )


@pytest.mark.parametrize(
    ("gamma", "mode"),
    [
        ("label", GammaMode.LABEL),
        ("max", GammaMode.MAX),
        ("per-token", GammaMode.PER_TOKEN),
        (0.25, GammaMode.FIXED),
        (0, GammaMode.FIXED),
        (1, GammaMode.FIXED),
    ],
)
def test_gamma_belongs_to_cakld(gamma: Any, mode: GammaMode) -> None:
    assert terms_of(cakld=1, gamma=gamma) == (Term(kind=TermKind.CAKLD, gamma_mode=mode),)


def test_terms_of_weight_zero_are_left_out_and_the_others_add_up() -> None:
    found = terms_of(ce=1, forward_kl=0, reverse_kl=2, jsd=0, cakld=3)
    assert [(term.kind, term.weight) for term in found] == [("ce", 1), ("reverse_kl", 2), ("cakld", 3)]


def test_cross_entropy_keeps_its_temperature_beside_a_soft_kl() -> None:
    ce, kl = terms_of(ce=1, forward_kl=10, temperature=5)
    assert (ce.temperature, ce.scope, kl.temperature) == (1, Scope.TARGETS, 5)


def test_the_reduction_of_bitdistillers_code() -> None:
    loss = LossConfig(cakld=1, reduction="sequence-sum")
    assert objective_of(loss).reduction is Reduction.SEQUENCE_SUM


def test_relations_alone_are_an_objective() -> None:
    loss = LossConfig.model_validate(
        {
            "relation": {
                "weight": 60,
                "layer": 3,
                "form": "scaled-dot",
                "heads": 8,
                "temperature": 2,
                "divide_by_heads": False,
                "causal": True,
                "key": 0,
                "value": 2,
            }
        }
    )
    objective = objective_of(loss)
    assert objective.terms == ()
    assert objective.relation == RelationTerm(
        weight=60,
        form=RelationForm.SCALED_DOT,
        relation_heads=8,
        temperature=2,
        divide_by_heads=False,
        causal=True,
        key=0,
        value=2,
    )


def test_relations_default_to_the_authors_code() -> None:
    relation = objective_of(LossConfig.model_validate({"ce": 1, "relation": {"weight": 1e5}})).relation
    assert relation == RelationTerm(weight=1e5, form=RelationForm.COSINE, relation_heads=32, divide_by_heads=True)


@pytest.mark.parametrize("layers", [1, 2, 28])
def test_models_of_one_depth_learn_layer_by_layer(layers: int) -> None:
    assert [student_layer(i, layers, layers) for i in range(layers)] == list(range(layers))
    assert student_layer(-1, layers, layers) == layers - 1


def test_other_depths_learn_from_the_same_relative_depth() -> None:
    assert [student_layer(i, 4, 2) for i in (1, 3)] == [0, 1]
    assert [student_layer(i, 2, 4) for i in (0, 1)] == [1, 3]
    assert [student_layer(22, 36, 28, chosen=chosen) for chosen in (27, -1, 0)] == [27, 27, 0]
    assert student_layer(-8, 36, 28) == 22  # the 29th of 36 lies at 22.6 of 28: the 23rd, counted from 1


@pytest.mark.parametrize(
    ("wanted", "layers", "meant"),
    [(3, 30, (9, 19, 28)), (1, 30, (28,)), (2, 4, (1, 2)), (4, 4, (0, 1, 2)), (1, 1, (0,)), ((2, -1), 12, (2, 11))],
)
def test_states_of_so_many_layers_lie_evenly_below_the_last(wanted: Any, layers: int, meant: tuple[int, ...]) -> None:
    assert StatesConfig(weight=1.0, layers=wanted).of(layers) == meant


def test_layers_are_paired_at_their_depth_and_no_teacher_is_asked_for_none() -> None:
    loss = LossConfig.model_validate({"states": {"weight": 2, "layers": [8, -1]}, "relation": {"weight": 1}})
    pairs = LayerPairs.of(loss, -2, teacher=lambda: 36, student=12)
    assert pairs == LayerPairs((34, 11), ((8, 2), (35, 11)))
    assert pairs.tapped == (11,)
    assert objective_of(loss).states is not None

    def nobody() -> int:
        raise AssertionError("asked for a layer that is not needed")

    assert LayerPairs.of(LossConfig(forward_kl=1.0), None, teacher=nobody, student=12) == LayerPairs()
