"""The playground at `/`: one file, with a policy that lets it reach this server and nothing else."""

from __future__ import annotations

from functools import cache
from pathlib import Path

POLICY = (
    "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; form-action 'none'"
)


@cache
def page() -> str:
    """The page."""
    return (Path(__file__).parent / "index.html").read_text(encoding="utf-8")
