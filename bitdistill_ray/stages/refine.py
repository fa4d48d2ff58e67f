"""`refine`: the teacher's architecture becomes the student's (BitNet Distillation, stage 1).

Linears are swapped in place for quantised ones and, if asked for, a SubLN goes in front of them.  The result, before
any training, is the round-to-nearest student: the baseline of everything after it.
"""

from __future__ import annotations

from bitdistill_ray.hardware import compute_dtype, local_device
from bitdistill_ray.model.identity import identity, refuse_mismatch
from bitdistill_ray.model.load import load_model
from bitdistill_ray.model.student import save_student
from bitdistill_ray.model.surgery import SubLN, calibrate_subln, insert_subln, quantize_linears
from bitdistill_ray.runs import StageRecord, provenance, storage_opener
from bitdistill_ray.stage_config import RefineStage
from bitdistill_ray.stages.base import StageContext, stage
from bitdistill_ray.stages.cluster import on_cluster
from bitdistill_ray.stages.corpus import corpus_of, first_batches
from bitdistill_ray.stages.notes import Notes


@stage("refine")
def refine(context: StageContext) -> StageRecord:
    """Publish `student/`."""
    return on_cluster(_refine, context)


def _refine(context: StageContext, notes: Notes) -> StageRecord:
    options, config = context.stage, context.config
    assert isinstance(options, RefineStage)
    device = local_device()
    dtype, why = compute_dtype(config.student.dtype, device)
    opener = storage_opener(config.storage)
    source = config.model.student or context.teacher_source
    model, tokenizer = load_model(source, dtype=dtype, device=device, storage=opener)
    if config.model.student:
        teacher = load_model(context.teacher_source, dtype=dtype, storage=opener)
        refuse_mismatch(identity(model, tokenizer), identity(*teacher))
    quant = config.quant
    linears = quantize_linears(model, quant.spec, include=quant.include, exclude=quant.exclude)
    norms = insert_subln(model, SubLN(options.subln))
    if norms and options.gain == "calibrated":
        with context.run.publish(context.path("tokenizer")) as folder:
            tokenizer.save_pretrained(folder)
        corpus = corpus_of(context, str(context.run.fetch(context.path("tokenizer"))))
        calibrate_subln(model, first_batches(corpus, options.calibration_sequences))
    with context.run.publish(context.path("student")) as folder:
        save_student(folder, model, tokenizer, provenance=provenance(config, stage=context.name))
    notes.say(f"quantised {len(linears)} linears as {quant.format}, {quant.granularity} {quant.group_size or ''}; "
              f"in {dtype}: {why}; SubLN: {options.subln}")  # fmt: skip
    path = context.path("student")
    return context.record({"student": path, "rtn": path}, linears=len(linears), subln_norms=len(norms))
