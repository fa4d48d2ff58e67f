"""What it costs to turn files into packed sequences, beside the tokenizer alone; and whether memory follows the corpus.

    stream       tokens per second of one core: read, tokenise, pack, shuffle in windows.  Its limit is the tokenizer
                 alone on the same text, in turn on the same core; both count the core's own seconds, so that what else
                 runs on the machine matters little
    peak memory  of a process that reads one pass of `times` as much text, beside one that reads the text once

The text is made up of words of a shipped excerpt, or taken from a corpus; the tokenizer is a BPE learned from it, or a
model's.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
from pyarrow import parquet as pq

from bitdistill_ray.bench import corpus as sides
from bitdistill_ray.bench.report import Row, Unit
from bitdistill_ray.data.sources import CorpusSpec, FileFormat, Source

T = TypeVar("T")

MB = 1_000_000
FORMATS = (FileFormat.PARQUET, FileFormat.JSONL)
FILE_MB = 64
ROW_GROUP_MB = 8
VOCABULARY = 8192
LEARNED_MB = 2
END = "<|end|>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """`megabytes` of text, and `times` as much; from the corpus `data`, or made up; `tokenizer` None: a learned BPE."""

    megabytes: float = 2
    times: int = 10
    data: str | None = None
    tokenizer: str | None = None
    sequence_length: int = 512
    window: int = 256
    files: tuple[FileFormat, ...] = FORMATS


def measure(load: Load) -> list[Row]:
    """Two rows for each format.  Raises what reading `load.data` and loading the tokenizer raise."""
    with tempfile.TemporaryDirectory(prefix="bitdistill-bench-") as folder:
        tokenizer = load.tokenizer or _learn(Path(folder) / "tokenizer", load)
        return [row for kind in load.files for row in _measure(kind, Path(folder), tokenizer, load)]


def _measure(kind: FileFormat, folder: Path, tokenizer: str, load: Load) -> Iterator[Row]:
    sizes = {name: int(times * load.megabytes * MB) for name, times in (("once", 1), ("more", load.times))}
    corpora = {
        name: CorpusSpec(
            sources=(Source(_write(folder / kind / name, kind, _texts(load), size)),),
            tokenizer=tokenizer,
            sequence_length=load.sequence_length,
            window=load.window,
        )
        for name, size in sizes.items()
    }
    case = f"data, {kind}"
    speed = _alone(sides.speed, corpora["once"])
    yield Row(case=case, metric="stream", unit=Unit.TOKENS_S, value=speed.stream, threads=1, limit=speed.tokenizer,
              limit_is="the tokenizer alone on the same text, in turn on the same core")  # fmt: skip
    once, more = (_alone(sides.peak_mib, corpora[name]) for name in sizes)
    less = f"a pass over {load.megabytes:g} MB of text; the value is of {load.times} times as much"
    yield Row(case=case, metric="peak memory", unit=Unit.MIB, value=more, threads=1, baseline=once, baseline_is=less)


def _alone(function: Callable[[CorpusSpec], T], corpus: CorpusSpec) -> T:
    """`function(corpus)` in a new process, so that nothing of this one is in its memory or on its core."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, corpus).result()


def _texts(load: Load) -> Iterator[str]:
    if load.data is None:
        words = files("bitdistill_ray.recipes").joinpath("excerpt.txt").read_text(encoding="utf-8").split()
        return sides.made_up(words, seed=0)
    source = CorpusSpec(sources=(Source(load.data),), tokenizer="", sequence_length=load.sequence_length)
    return sides.documents_of(source)


def _up_to(texts: Iterator[str], size: int) -> Iterator[str]:
    """Texts until they have `size` bytes."""
    for text in texts:
        yield text
        size -= len(text.encode())
        if size <= 0:
            return


def _write(folder: Path, kind: FileFormat, texts: Iterator[str], size: int) -> str:
    """About `size` bytes of text in files of at most FILE_MB, a row group at a time; returns the folder."""
    folder.mkdir(parents=True)
    for number in range(-(-size // (FILE_MB * MB))):
        left = min(FILE_MB * MB, size - number * FILE_MB * MB)
        path = folder / f"{number:05}.{kind}"
        if kind is FileFormat.JSONL:
            with path.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps({"text": text}) + "\n" for text in _up_to(texts, left))
            continue
        with pq.ParquetWriter(path, pa.schema({"text": pa.string()}), compression="zstd") as writer:
            while left > 0:
                rows = list(_up_to(texts, min(left, ROW_GROUP_MB * MB)))
                left -= sum(len(text.encode()) for text in rows)
                writer.write_table(pa.table({"text": rows}))
    return str(folder)


def _learn(folder: Path, load: Load) -> str:
    """A byte-level BPE learned from the text, saved as a tokenizer folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    size = min(LEARNED_MB, load.megabytes) * MB
    tokenizer.train_from_iterator(_up_to(_texts(load), int(size)), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(folder)
    return str(folder)
