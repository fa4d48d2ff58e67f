"""`write`: the teacher writes the text that its student will learn from (BitDistiller, section 4 of the paper's code).

Every text has its own prompt, number and seed, so the set does not depend on how many teachers write it.  It is written
in parts, each published when it is whole; an interrupted stage goes on with the parts that are missing.  A text that
repeats itself (a base model's loops) is dropped and counted.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.exceptions import RayActorError, RayError
from tqdm import tqdm

from bitdistill_ray.data.tables import read_texts
from bitdistill_ray.decode.sampling import Sampling
from bitdistill_ray.errors import DataError, TeacherError
from bitdistill_ray.ray_errors import user_error
from bitdistill_ray.runs import StageRecord
from bitdistill_ray.stage_config import SourceConfig, WriteStage
from bitdistill_ray.stages.base import StageContext, stage
from bitdistill_ray.stages.corpus import source_of
from bitdistill_ray.teacher.actor import Written
from bitdistill_ray.teacher.pool import TeacherPool
from bitdistill_ray.teacher.recovery import PAUSE_S

NGRAM = 8
Part = tuple[int, int]  # number of the part, number of its first text


@stage("write")
def write(context: StageContext) -> StageRecord:
    """Write `texts` texts into `text/` (training) and `held-out/`."""
    options = context.stage
    assert isinstance(options, WriteStage)
    prompts = load_prompts(options.prompts, context)
    size = 2 * options.batch
    parts = [(number, first) for number, first in enumerate(range(0, options.texts, size))]
    missing = deque(part for part in parts if not context.run.storage.exists(_stats_path(context, part)))
    fixed = context.config.teacher.model_copy(update={"min_actors": None, "max_actors": None})
    pool = TeacherPool.open(context.teacher_source, fixed, context.config.storage)
    print(f"{len(prompts)} prompts; {len(pool.handles)} teachers: {pool.description}", flush=True)
    try:
        with tqdm(total=options.texts, initial=(len(parts) - len(missing)) * size, unit="text", desc="write") as bar:
            for part, texts in _written(pool, missing, prompts, options, size):
                _publish(context, part, texts, options)
                bar.update(len(texts))
    finally:
        pool.shutdown()
    stats = [json.loads(context.run.storage.read_bytes(_stats_path(context, part))) for part in parts]
    totals = {key: sum(s[key] for s in stats) for key in stats[0]}
    if not totals["kept"]:
        raise DataError(f"stages.{context.name}", f"all {options.texts} texts repeat themselves",
                        "Raise max_repetition or the temperature")  # fmt: skip
    artefacts = {"text": context.path("text")}
    if totals["held_out"]:
        artefacts["held-out"] = context.path("held-out")
    return context.record(artefacts, teacher=pool.identity.weights[:12], **totals)


def load_prompts(source: str, context: StageContext) -> list[str]:
    """The prompts of `source`: `builtin`, or one document of a corpus each."""
    if source == "builtin":
        text = (resources.files("bitdistill_ray") / "recipes" / "prompts.txt").read_text(encoding="utf-8")
        return [line for line in text.splitlines() if line.strip()]
    prompts = read_texts(source_of(context, SourceConfig(path=source)))
    found = [prompt.strip() for prompt in prompts if prompt.strip()]
    if not found:
        raise DataError(source, "holds no prompt", "Give a text, JSONL or parquet file with one prompt a row")
    return found


def repeated_share(ids: Sequence[int]) -> float:
    """Share of the 8-grams of a text that occurred in it before; 0 for texts of fewer than 9 tokens."""
    grams = [tuple(ids[i : i + NGRAM]) for i in range(len(ids) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if len(grams) > 1 else 0.0


def is_held_out(number: int, share: float) -> bool:
    """Whether text `number` is kept from training: a hash decides, so that the choice depends on nothing else."""
    digest = hashlib.sha256(f"held-out/{number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _written(
    pool: TeacherPool, missing: deque[Part], prompts: list[str], options: WriteStage, size: int
) -> Iterator[tuple[Part, list[Written]]]:
    """The texts of each missing part, as teachers finish them; a lost teacher's part is written again by another."""
    running: dict[Any, tuple[Part | None, Any]] = {}  # None: a teacher that is being started again
    losses: Counter[Part] = Counter()
    idle, alive_at = list(pool.handles), time.monotonic()
    while missing or any(part for part, _ in running.values()):
        while missing and idle:
            ahead, handle = missing.popleft(), idle.pop()
            numbers = range(ahead[1], min(ahead[1] + size, options.texts))
            sampling = [
                Sampling(max_tokens=options.max_new_tokens, temperature=options.temperature, top_p=options.top_p,
                         seed=options.seed * 1_000_003 + number) for number in numbers
            ]  # fmt: skip
            chosen = [prompts[number % len(prompts)] for number in numbers]
            running[handle.write.remote(chosen, sampling, batch=options.batch)] = (ahead, handle)
        done, _ = ray.wait(list(running), num_returns=1)
        part, handle = running.pop(done[0])
        try:
            texts = ray.get(done[0])
        except RayActorError as lost:
            if part is not None:
                print(f"a teacher was lost while writing part {part[0]} ({type(lost).__name__}): written again",
                      flush=True)  # fmt: skip
                losses[part] += 1
                if losses[part] == pool.config.attempts:
                    raise TeacherError("teacher", f"lost while writing part {part[0]}, in attempt {losses[part]} of "
                                       f"{pool.config.attempts}",
                                       "See the teachers' logs; a smaller batch is lighter") from None  # fmt: skip
                missing.append(part)
                alive_at = time.monotonic()
            if not any(part for part, _ in running.values()) and time.monotonic() - alive_at > pool.config.timeout_s:
                raise TeacherError("teacher", f"all were lost, and none came back in {pool.config.timeout_s:.0f} s",
                                   "See the teachers' logs; the same command continues") from None  # fmt: skip
            time.sleep(PAUSE_S)
            running[handle.__ray_ready__.remote()] = (None, handle)
            continue
        except RayError as error:
            raise user_error(error) or error from None
        idle.append(handle)
        alive_at = time.monotonic()
        if part is not None:
            yield part, texts


def _publish(context: StageContext, part: Part, texts: list[Written], options: WriteStage) -> None:
    number, first = part
    rows: dict[str, list[dict[str, Any]]] = {"text": [], "held-out": []}
    for i, text in enumerate(texts, start=first):
        if text.response.strip() and repeated_share(text.response_ids) <= options.max_repetition:
            split = "held-out" if is_held_out(i, options.held_out) else "text"
            rows[split].append({"number": i, "prompt": text.prompt, "response": text.response,
                                "text": text.prompt + text.response})  # fmt: skip
    for split, kept in rows.items():
        if kept:
            sink = pa.BufferOutputStream()
            pq.write_table(pa.Table.from_pylist(kept), sink, compression="zstd")
            context.run.storage.write_bytes(
                context.path(f"{split}/part-{number:05}.parquet"), sink.getvalue().to_pybytes()
            )
    kept_count = len(rows["text"]) + len(rows["held-out"])
    stats = {"kept": kept_count, "held_out": len(rows["held-out"]), "repetitive": len(texts) - kept_count,
             "tokens": sum(len(t.response_ids) for t in texts)}  # fmt: skip
    context.run.storage.write_bytes(_stats_path(context, part), json.dumps(stats).encode())


def _stats_path(context: StageContext, part: Part) -> str:
    """Written last: a part is there when its statistics are."""
    return context.path(f"parts/part-{part[0]:05}.json")
