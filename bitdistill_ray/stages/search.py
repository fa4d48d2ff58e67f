"""`search`: which of the teacher's layers the attention relations are to be taken from.

The stage that asks (`loss.relation.layer=search`) is run with each of some layers for a short while, from the same
student, on the same sequences in the same order.  The layer with the lowest cross-entropy over the last steps wins.  As
long as the budget is less than a pass over the text these are rows that the student had not seen, so nothing need be
held out, and no test row is looked at.  Trials are training stages of their own (`metrics.jsonl`, the report), which go
on where they were; their students are not kept.
"""

from __future__ import annotations

import json

from bitdistill_ray.errors import ConfigError
from bitdistill_ray.losses.objective import TermKind
from bitdistill_ray.runs import RunFolder, StageRecord
from bitdistill_ray.stage_config import SearchStage, StudentStage
from bitdistill_ray.stages.base import StageContext, stage
from bitdistill_ray.stages.training import train
from bitdistill_ray.student.monitor import FILE


@stage("search")
def search(context: StageContext) -> StageRecord:
    """The record's `layer` is what later stages take."""
    options = context.stage
    assert isinstance(options, SearchStage)
    found = {layer: _tried(context, options, layer) for layer in options.layers}
    best = min(found, key=lambda layer: found[layer])
    for layer, loss in sorted(found.items(), key=lambda item: item[1]):
        print(f"[{context.name}] layer {layer}: cross-entropy {loss:.4f}{'  <' if layer == best else ''}", flush=True)
    return context.record({}, layer=best, cross_entropy={str(layer): round(loss, 5) for layer, loss in found.items()})


def _tried(context: StageContext, options: SearchStage, layer: int) -> float:
    """The cross-entropy that training with this layer came to."""
    trial = trial_of(context, options, layer)
    if trial.run.finished(trial.name) is None:
        record = train(trial)
        trial.run.finish(record)
        for path in record.artefacts.values():
            trial.run.storage.delete(path)
    lines = trial.run.storage.read_bytes(FILE).decode().splitlines()
    losses = [row[TermKind.CE] for row in map(json.loads, lines) if row["stage"] == trial.name]
    last = losses[-max(1, round(options.judged_on * len(losses))) :]
    return float(sum(last) / len(last))


def trial_of(context: StageContext, options: SearchStage, layer: int) -> StageContext:
    """The stage that asks, in this one's place, short and with this layer.

    Raises:
        ConfigError: it has no cross-entropy to be judged by.
    """
    asking = context.config.searching(context.name)
    assert asking is not None  # the configuration was checked
    target = context.config.stages[asking]
    assert isinstance(target, StudentStage)
    assert target.loss.relation is not None
    if not target.loss.ce:
        raise ConfigError(f"stages.{asking}.loss.ce", f"0, and stages.{context.name} goes by the cross-entropy",
                          "Give it a weight, or name a layer")  # fmt: skip
    relation = target.loss.relation.model_copy(update={"layer": layer})
    loss = target.loss.model_copy(update={"relation": relation})
    changes = {"loss": loss, "tokens": options.tokens, "average": 0.0, "keep_best": 0}
    before = list(context.config.stages)[: list(context.config.stages).index(context.name)]
    name = f"{context.name}/layer-{layer}"
    stages = {key: context.config.stages[key] for key in before} | {name: target.model_copy(update=changes)}
    config = context.config.model_copy(update={"stages": stages})
    return StageContext(config, name, RunFolder(config))
