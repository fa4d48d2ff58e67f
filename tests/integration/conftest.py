"""The run that was left alone, made once for all tests of faults, and copies of its start for them to disturb."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitdistill_ray.train import run
from tests.integration.curves import TEXT, overrides_of, refined
from tests.road import tiny_config


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Path:
    """The folder of an uninterrupted run; its parent has the corpus and the teacher."""
    root = tmp_path_factory.mktemp("faults")
    (root / "corpus.jsonl").write_text(TEXT)
    run(tiny_config(root, *overrides_of(root), run=str(root / "alone")))
    return root / "alone"


@pytest.fixture
def victim(alone: Path, request: pytest.FixtureRequest) -> Path:
    """A run folder whose `refine` stage is finished."""
    return refined(alone, request.node.name)
