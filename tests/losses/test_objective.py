"""Objectives refuse what has no effect or no meaning, by name, and cost no torch."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from bitdistill_ray.errors import ConfigError
from bitdistill_ray.losses.objective import GammaMode, Objective, RelationTerm, Scope, Term, TermKind

BAD_TERMS: dict[str, dict[str, Any]] = {
    "weight": {"kind": "ce", "weight": 0.0},
    "temperature": {"kind": "forward_kl", "temperature": 0.0},
    "tau_squared": {"kind": "forward_kl", "tau_squared": True},
    "ce.temperature": {"kind": "ce", "temperature": 2.0},
    "ce.scope": {"kind": "ce", "scope": Scope.PRESENT},
    "cakld.gamma_mode": {"kind": "cakld"},
    "forward_kl.gamma_mode": {"kind": "forward_kl", "gamma_mode": GammaMode.LABEL},
    "cakld.scope": {"kind": "cakld", "gamma_mode": GammaMode.PER_TOKEN, "scope": Scope.PRESENT},
    "reverse_kl.beta": {"kind": "reverse_kl", "beta": 0.5},
    "jsd.beta": {"kind": "jsd", "beta": 1.0},
}


@pytest.mark.parametrize("where", BAD_TERMS)
def test_term_refuses(where: str) -> None:
    with pytest.raises(ConfigError) as error:
        Term(**BAD_TERMS[where])
    assert where in error.value.where


@pytest.mark.parametrize(
    "options",
    [
        {"weight": 0.0},
        {"temperature": -1.0},
        {"relation_heads": 0},
        {"heads_per_chunk": 0},
        {"query": -1.0},
        {"query": 0.0, "key": 0.0, "value": 0.0},
    ],
)
def test_relation_refuses(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        RelationTerm(**({"weight": 1.0} | options))
    assert next(iter(options)) in error.value.where


def test_objective_refuses() -> None:
    cakld = {"kind": TermKind.CAKLD, "temperature": 1.0}
    with pytest.raises(ConfigError, match="nothing to minimise"):
        Objective()
    with pytest.raises(ConfigError, match="same term twice"):
        Objective(terms=(Term(kind="ce"), Term(kind="ce", weight=2.0)))
    with pytest.raises(ConfigError, match="two kinds of scalar gamma"):
        Objective(
            terms=(
                Term(**cakld, gamma_mode=GammaMode.MAX),
                Term(kind=TermKind.CAKLD, temperature=2.0, gamma_mode=GammaMode.LABEL),
            )
        )


def test_what_an_objective_needs() -> None:
    plain = Objective(terms=(Term(kind=TermKind.CE),))
    assert (plain.needs_distribution, plain.scalar_gamma, plain.needs_padding) == (False, None, False)
    mixed = Objective(
        terms=(
            Term(kind=TermKind.CAKLD, gamma_mode=GammaMode.MAX),
            Term(kind=TermKind.FORWARD_KL, temperature=5.0, scope=Scope.PRESENT),
        )
    )
    assert (mixed.needs_distribution, mixed.scalar_gamma, mixed.needs_padding) == (True, GammaMode.MAX, True)
    assert [term.name for term in mixed.terms] == ["cakld", "forward_kl@5"]
    per_token = Objective(terms=(Term(kind=TermKind.CAKLD, gamma_mode=GammaMode.PER_TOKEN),))
    assert per_token.scalar_gamma is None


def test_costs_no_torch() -> None:
    """`--plan` and the configuration may read it."""
    code = "import sys, bitdistill_ray.losses.objective; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
