"""`export`: the student is quantised for good and written as a packed folder (`docs/FORMAT.md`).

The codes come from the same quantiser as in training, from the very weights that the forward pass saw.  With
`baselines`, the students before training (rounded to nearest, clipped, GPTQ's) are packed too, so that they can be
compared as equals.
"""

from __future__ import annotations

from bitdistill_ray.packed.export import pack_student
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
    artefacts, facts = {}, {}
    for name, role in notes.each(roles.items(), total=len(roles)):
        source = context.fetch(role)
        with context.run.publish(context.path(name)) as folder:
            pack_student(source, folder, {**provenance(context.config, stage=context.name), "student": role})
            facts[f"{name}_bytes"] = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        artefacts[name] = context.path(name)
    return context.record(artefacts, **facts)
