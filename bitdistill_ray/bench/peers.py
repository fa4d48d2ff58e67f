"""llama.cpp beside the native decoder: the same shape, threads and load, all taking turns in one run.

`make bench-peers` builds llama.cpp with this machine's own flags (the PyPI package llama-cpp-python) and runs

    python -m bitdistill_ray.bench peers [--shape 1.1b-llama] [--formats ternary,int2:a8] [--head-bits 8] [--threads 1]

A peer reads a GGUF file of that shape with random weights, which llama.cpp itself brings into its 2-bit types, its
embedding and head into 8 bits.  TQ2_0 is its ternary type; Q2_K runs with its weights repacked for the processor's
instructions and without, since either may be the faster.  Our baseline is the best of them.
"""

from __future__ import annotations

import ctypes
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any, Self

import numpy as np
from gguf import GGUFReader, GGUFWriter, LlamaFileType

from bitdistill_ray.bench.limits import Place, Reader
from bitdistill_ray.bench.report import Row, Unit
from bitdistill_ray.bench.shapes import SHAPES
from bitdistill_ray.bench.subject import Load, Speed, Subject
from bitdistill_ray.bench.timing import window
from bitdistill_ray.core import QuantSpec
from bitdistill_ray.errors import ConfigError

ROUNDS = 5
EMBEDDING = "token_embd.weight"
LARGEST_BATCH = 512  # tokens of one call, as llama.cpp's own server has it
SILENCE = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda level, text, data: None)


@dataclass(frozen=True, slots=True)
class Peer:
    """One way of llama.cpp's to hold 2-bit weights."""

    name: str
    file_type: LlamaFileType
    repacked: bool


PEERS = (
    Peer("TQ2_0", LlamaFileType.MOSTLY_TQ2_0, repacked=True),
    Peer("Q2_K", LlamaFileType.MOSTLY_Q2_K, repacked=False),
    Peer("Q2_K repacked", LlamaFileType.MOSTLY_Q2_K, repacked=True),
)


class LlamaCpp:
    """A GGUF file in llama.cpp's own decoder, measured as a `Subject` is."""

    def __init__(self, name: str, model: Any, context: Any, load: Load, *, nbytes: int, vocabulary: int) -> None:
        self.name, self.load, self.nbytes = name, load, nbytes
        self._model, self._context, self._vocabulary = model, context, vocabulary

    @classmethod
    def open(cls, peer: Peer, file: Path, place: Place, load: Load) -> Self:
        """Raises ConfigError where llama.cpp refuses the file."""
        api = llama_cpp()
        threads = place.threads or 1
        options = api.llama_model_default_params()
        options.n_gpu_layers, options.use_extra_bufts = 0, peer.repacked
        model = api.llama_model_load_from_file(str(file).encode(), options)
        settings = api.llama_context_default_params()
        settings.n_ctx = load.batch * load.slot_tokens
        settings.n_batch = settings.n_ubatch = min(LARGEST_BATCH, settings.n_ctx)
        settings.n_seq_max, settings.n_threads, settings.n_threads_batch = load.batch, threads, threads
        context = api.llama_init_from_model(model, settings) if model else None
        if not context:
            raise ConfigError(str(file), "llama.cpp does not open it", "Build llama-cpp-python again: make bench-peers")
        reader = GGUFReader(file)
        nbytes = sum(int(tensor.n_bytes) for tensor in reader.tensors if tensor.name != EMBEDDING)
        vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        return cls(f"llama.cpp {peer.name}", model, context, load, nbytes=nbytes, vocabulary=vocabulary)

    def decode(self, batch: int) -> Speed:
        """Read `batch` prompts and continue them, as `Subject.decode` does."""
        api, load = llama_cpp(), self.load
        tokens = np.random.default_rng(0).integers(self._vocabulary, size=(batch, load.prompt_tokens))
        api.llama_memory_clear(api.llama_get_memory(self._context), True)
        began = time.perf_counter()
        self._run([(int(token), place, row, place == load.prompt_tokens - 1)
                   for row in range(batch) for place, token in enumerate(tokens[row])])  # fmt: skip
        prefill_s = time.perf_counter() - began
        places = iter(range(load.prompt_tokens, load.slot_tokens))

        def step() -> None:
            place = next(places)
            self._run([(1, place, row, True) for row in range(batch)])

        began = time.perf_counter()
        for _ in range(load.new_tokens):
            step()
        return Speed((time.perf_counter() - began) / load.new_tokens, prefill_s)

    def close(self) -> None:
        """Free its memory."""
        api = llama_cpp()
        api.llama_free(self._context)
        api.llama_model_free(self._model)

    def _run(self, tokens: Sequence[tuple[int, int, int, bool]]) -> None:
        """(token, position, sequence, whether its logits are wanted), so many at a time as a call takes."""
        api = llama_cpp()
        for first in range(0, len(tokens), LARGEST_BATCH):
            piece = tokens[first : first + LARGEST_BATCH]
            batch = api.llama_batch_init(len(piece), 0, 1)
            batch.n_tokens = len(piece)
            for number, (token, place, row, wanted) in enumerate(piece):
                batch.token[number], batch.pos[number], batch.logits[number] = token, place, wanted
                batch.n_seq_id[number], batch.seq_id[number][0] = 1, row
            failed = api.llama_decode(self._context, batch)
            api.llama_batch_free(batch)
            if failed:
                raise ConfigError(self.name, f"llama_decode gave {failed}", "Lower --batch or --prompt-tokens")


def measure(
    shape: str, specs: Sequence[QuantSpec], load: Load, place: Place, *, head_bits: int, rounds: int = ROUNDS
) -> list[Row]:
    """Rows of ours in each format, whose baseline is the best peer, and of every peer.

    Raises:
        ConfigError: llama-cpp-python is not installed, or it has no such model.
    """
    llama_cpp()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        peers = [LlamaCpp.open(peer, file, place, load) for peer, file in gguf_files(shape, Path(folder))]
        for peer in peers:
            stack.callback(peer.close)
        own = [Subject.of_shape(shape, spec, place, load, head_bits=head_bits) for spec in specs]
        return _rows(own, peers, load, place, rounds)


def _rows(own: Sequence[Subject], peers: Sequence[LlamaCpp], load: Load, place: Place, rounds: int) -> list[Row]:
    reader, rows = Reader(place), list[Row]()
    every: list[Subject | LlamaCpp] = [*own, *peers]
    for batch in sorted({1, load.batch}):
        for subject in every:
            subject.decode(batch)  # warm-up
        reads, speeds = list[float](), [list[Speed]() for _ in every]
        for _ in range(rounds):
            reads.append(reader.best({name: window(way, 1, place.device) for name, way in reader.ways.items()}))
            for subject, of in zip(every, speeds, strict=True):
                of.append(subject.decode(batch))
        steps = [batch / median(s.step_s for s in of) for of in speeds]
        limits = [batch * median(reads) / subject.nbytes for subject in every]
        rows += _beside(
            f"decode, batch {batch}", every, steps, place, limits, f"its bytes at the speed of {reader.says}"
        )
        prefills = [batch * load.prompt_tokens / median(s.prefill_s for s in of) for of in speeds]
        rows += _beside(f"prefill, batch {batch} x {load.prompt_tokens}", every, prefills, place)
    return rows


def _beside(
    case: str,
    every: Sequence[Subject | LlamaCpp],
    values: Sequence[float],
    place: Place,
    limits: Sequence[float] = (),
    limit_is: str | None = None,
) -> list[Row]:
    """A row of each; of ours with the best peer's value."""
    best, name = max((v, s.name) for v, s in zip(values, every, strict=True) if isinstance(s, LlamaCpp))
    return [
        Row(
            case=case,
            format=subject.name if isinstance(subject, LlamaCpp) else subject.format,
            threads=place.threads,
            metric=case.partition(",")[0],
            unit=Unit.TOKENS_S,
            value=value,
            limit=limits[number] if limits else None,
            limit_is=limit_is,
            baseline=None if isinstance(subject, LlamaCpp) else best,
            baseline_is=None if isinstance(subject, LlamaCpp) else f"the best peer, {name}",
        )
        for number, (subject, value) in enumerate(zip(every, values, strict=True))
    ]


def gguf_files(shape: str, folder: Path) -> Iterator[tuple[Peer, Path]]:
    """A file of random weights for each peer; those of one type share it."""
    source = write_random(shape, folder / "f16.gguf")
    made: dict[LlamaFileType, Path] = {}
    for peer in PEERS:
        if peer.file_type not in made:
            made[peer.file_type] = quantised(source, folder / f"{peer.file_type.name}.gguf", peer.file_type)
        yield peer, made[peer.file_type]
    source.unlink()


def write_random(shape: str, file: Path) -> Path:
    """The shape as a GGUF file in fp16.  Raises ConfigError for one that is no llama."""
    config: Any = SHAPES[shape]
    if config.model_type != "llama":
        raise ConfigError("--shape", f"{shape} is {config.model_type}", "Give 1.1b-llama, which llama.cpp's types fit")
    D, F, J = config.hidden_size, config.intermediate_size, config.num_key_value_heads
    C = D // config.num_attention_heads
    writer = GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(D)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(F)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(J)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(C)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("no_vocab")
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(max(config.vocab_size * D, F * D), dtype=np.float32)

    def matrix(name: str, rows: int, columns: int) -> None:
        weights = noise[: rows * columns].reshape(rows, columns) * columns**-0.5
        writer.add_tensor(name, weights.astype(np.float16))

    def gain(name: str) -> None:
        writer.add_tensor(name, np.ones(D, dtype=np.float32))

    matrix(EMBEDDING, config.vocab_size, D)
    for layer in range(config.num_hidden_layers):
        for leaf, rows, columns in (
            ("attn_q", D, D), ("attn_k", J * C, D), ("attn_v", J * C, D), ("attn_output", D, D),
            ("ffn_gate", F, D), ("ffn_up", F, D), ("ffn_down", D, F),
        ):  # fmt: skip
            matrix(f"blk.{layer}.{leaf}.weight", rows, columns)
        gain(f"blk.{layer}.attn_norm.weight")
        gain(f"blk.{layer}.ffn_norm.weight")
    gain("output_norm.weight")
    matrix("output.weight", config.vocab_size, D)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def quantised(source: Path, file: Path, file_type: LlamaFileType) -> Path:
    """`source` in a type of llama.cpp's, its embedding and head in 8 bits.  Raises ConfigError where that fails."""
    api = llama_cpp()
    options = api.llama_model_quantize_default_params()
    options.ftype, options.pure = int(file_type), True
    options.token_embedding_type = options.output_tensor_type = api.GGML_TYPE_Q8_0
    if api.llama_model_quantize(str(source).encode(), str(file).encode(), ctypes.byref(options)):
        raise ConfigError(file.name, "llama.cpp does not make it", "Build llama-cpp-python again: make bench-peers")
    return file


@cache
def llama_cpp() -> ModuleType:
    """Its C functions, which log nothing.  Raises ConfigError where it is not installed."""
    try:
        import llama_cpp as api
    except ImportError:
        raise ConfigError("llama-cpp-python", "not installed", "Run make bench-peers, which builds it") from None
    module: ModuleType = api
    module.llama_log_set(SILENCE, None)
    return module
