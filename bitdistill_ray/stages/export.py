"""`export`: the student is quantised for good and written as a packed folder (`docs/FORMAT.md`).

The codes come from the same quantiser as in training, from the very weights that the forward pass saw.  With
`baselines`, the students before training (rounded to nearest, clipped, GPTQ's) are packed too, so that they can be
compared as equals.  With `head_bits` below 16 the embedding and the head are packed too, and what that costs is
printed.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from bitdistill_ray.evaluation.head_cost import head_cost
from bitdistill_ray.packed.export import pack_student
from bitdistill_ray.packed.manifest import Layout
from bitdistill_ray.packed.tables import HeadBits
from bitdistill_ray.runs import StageRecord, provenance
from bitdistill_ray.stage_config import ExportStage
from bitdistill_ray.stages.base import StageContext, stage
from bitdistill_ray.stages.cluster import on_cluster
from bitdistill_ray.stages.notes import Notes

BASELINES = ("rtn", "clipped", "gptq", "reconstructed")


@stage("export")
def export(context: StageContext) -> StageRecord:
    """Publish `packed/`, and `packed-rtn/`, `packed-clipped/` and so on where asked for."""
    return on_cluster(_export, context)


def _export(context: StageContext, notes: Notes) -> StageRecord:
    options = context.stage
    assert isinstance(options, ExportStage)
    roles = {"packed": "student"}
    if options.baselines:
        student = context.earlier("student")
        roles |= {f"packed-{role}": role for role in BASELINES if context.earlier(role) not in (None, student)}
    layout = Layout.TRITS if options.trits else Layout.PLANES
    artefacts: dict[str, str] = {}
    facts: dict[str, Any] = {}
    for name, role in notes.each(roles.items(), total=len(roles)):
        source = context.fetch(role)
        with context.run.publish(context.path(name)) as folder:
            about = {**provenance(context.config, stage=context.name), "student": role}
            pack_student(source, folder, about, head_bits=HeadBits(options.head_bits), ternary=layout)
            if name == "packed" and (cost := head_cost(source, folder)):
                notes.say(f"head_bits {options.head_bits}: {cost}")
                facts["head_cost"] = asdict(cost)
            facts[f"{name}_bytes"] = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        artefacts[name] = context.path(name)
    return context.record(artefacts, **facts)
