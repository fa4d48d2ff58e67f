"""python -m bitdistill_ray.bench KIND [--device D] [--threads N] [--json FILE] …

Measures, and never judges.  Every value stands beside a limit that was measured in the same run, and beside a baseline.

    kernels   low-bit products alone, for one token, a few and 128
    decode    tokens per second of a packed student, beside the model it came from; random ones unless named
    peers     a known shape beside llama.cpp's own decoder (make bench-peers)
    serve     a server over HTTP beside the decoder alone: one stream, several, overload, a soak with killed replicas
    teacher   what a student gets from a teacher over the wire, beside the teacher's forward pass alone; and what its
              top-k answers cost in the cache
    train     a training step: what the live teacher, the quantisers, the chunked loss and further workers cost
    data      files to packed sequences, beside the tokenizer alone; peak memory as the text grows
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from bitdistill_ray import env
from bitdistill_ray.bench.report import Row, as_json, table
from bitdistill_ray.errors import BitdistillError, ConfigError
from bitdistill_ray.storage import write_json

FORMATS = "ternary,int2:a8,int3:a8,nf3:a8"
SHAPES = "4096x4096"
TRAINING = "steps,loss,scale"
SERVING = "stream,streams,overload,soak"


def parser() -> argparse.ArgumentParser:
    """The command line; each kind takes only what it uses."""
    command = argparse.ArgumentParser(
        prog="bitdistill bench",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = command.add_subparsers(dest="kind", required=True, metavar="KIND")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    shared.add_argument("--threads", type=int, default=env.cpu_count(), help="default: every CPU of this process")
    shared.add_argument("--json", metavar="FILE")

    kernels = kinds.add_parser("kernels", parents=[shared])
    kernels.add_argument("--formats", default=FORMATS, help=f"FORMAT[:a8|:a16], … (default {FORMATS})")
    kernels.add_argument("--shapes", default=SHAPES, metavar="NxK,…", help=f"out x in features (default {SHAPES})")
    kernels.add_argument("--tokens", default="1,4,128", metavar="M,…", help="multiplied at a time (default 1,4,128)")
    kernels.set_defaults(run=_kernels)

    decode = kinds.add_parser("decode", parents=[shared])
    decode.add_argument("model", nargs="?", metavar="MODEL", help="default: random students of --formats")
    decode.add_argument("--baseline", metavar="MODEL", help="another model, beside MODEL")
    decode.add_argument("--shape", metavar="NAME", help="random weights of a known shape, in place of MODEL")
    decode.add_argument("--formats", help="of random students, or fp16 with --shape (default nf3)")
    decode.add_argument("--head-bits", type=int, choices=(16, 8, 4), default=16, help="of the packed, with --shape")
    decode.add_argument("--cache", choices=("fp16", "int8"), default="fp16", help="of the native decoder")
    decode.add_argument("--activation-bits", type=int, choices=(8,), help="of weight-only students, on a CPU")
    decode.add_argument("--batch", type=int, default=4, help="sequences, beside one alone (default 4)")
    decode.add_argument("--prompt-tokens", type=int, default=128)
    decode.add_argument("--new-tokens", type=int, default=32)
    decode.set_defaults(run=_decode)

    peers = kinds.add_parser("peers", parents=[shared])
    peers.add_argument("--shape", default="1.1b-llama", metavar="NAME", help="default: 1.1b-llama")
    peers.add_argument("--formats", default="ternary,int2:a8", help="of ours (default ternary,int2:a8)")
    peers.add_argument("--head-bits", type=int, choices=(16, 8, 4), default=8, help="of ours; the peers have 8")
    peers.add_argument("--batch", type=int, default=1, help="sequences, beside one alone (default 1)")
    peers.add_argument("--prompt-tokens", type=int, default=128)
    peers.add_argument("--new-tokens", type=int, default=32)
    peers.set_defaults(run=_peers)

    serve = kinds.add_parser("serve", parents=[shared])
    serve.add_argument("model", nargs="?", metavar="MODEL", help="default: random students of --formats")
    serve.add_argument("--formats", help="of random students (default int2)")
    serve.add_argument("--only", default=SERVING, metavar="PART,…", help=f"some of {SERVING}")
    serve.add_argument("--activation-bits", type=int, choices=(8,), help="of weight-only students, on a CPU")
    serve.add_argument("--streams", type=int, default=16, help="clients at once, and slots (default 16)")
    serve.add_argument("--queue", type=int, default=16, help="places beyond the slots (default 16)")
    serve.add_argument("--prompt-tokens", type=int, default=64)
    serve.add_argument("--new-tokens", type=int, default=64)
    serve.add_argument("--overload-s", type=float, default=10, help="seconds (default 10)")
    serve.add_argument("--soak-s", type=float, default=20, help="seconds (default 20)")
    serve.add_argument("--kill-every-s", type=float, default=10, help="seconds between killed replicas (default 10)")
    serve.add_argument(
        "--against", metavar="URL", help="another server with /v1/completions, beside this one's streams"
    )
    serve.set_defaults(run=_serve)

    teacher = kinds.add_parser("teacher", parents=[shared])
    teacher.add_argument("--model", metavar="SOURCE", help="default: a random one")
    teacher.set_defaults(run=_teacher)

    train = kinds.add_parser("train", parents=[shared])
    train.add_argument("--model", metavar="SOURCE", help="teacher and student (default: a random one)")
    train.add_argument("--formats", default="nf3", help="FORMAT[:a8|:a16], … of the student (default nf3)")
    train.add_argument(
        "--size",
        choices=("small", "135m", "0.6b"),
        help="of the random model, the step and the loss; 135m and 0.6b: the shapes of SmolLM2-135M and Qwen3-0.6B, "
        "8 x 2048 tokens (default on a GPU: 0.6b)",
    )
    train.add_argument("--only", default=TRAINING, metavar="PART,…", help=f"some of {TRAINING}")
    train.add_argument("--workers", type=int, help="of the scale part (default: every GPU, or 2 on CPUs)")
    train.set_defaults(run=_train)

    data = kinds.add_parser("data", parents=[shared])
    data.add_argument("--data", metavar="SOURCE", help="take the text from there (default: made up)")
    data.add_argument("--tokenizer", metavar="SOURCE", help="default: a BPE learned from the text")
    data.add_argument("--megabytes", type=float, default=2, help="of text (default 2)")
    data.add_argument("--times", type=int, default=10, help="as much, for the peak of memory (default 10)")
    data.add_argument("--files", default="parquet,jsonl", metavar="KIND,…", help="default: parquet,jsonl")
    data.set_defaults(run=_data)
    return command


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the JSON; returns the exit status, 2 after an error that the user can mend."""
    options = parser().parse_args(argv)
    run: Callable[[argparse.Namespace], list[Row]] = options.run
    try:
        _check(options)
        rows = run(options)
        print(table(rows), flush=True)
        if options.json:
            write_json(options.json, as_json(rows))
    except BitdistillError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _check(options: argparse.Namespace) -> None:
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError("--device", "cuda, but torch sees no GPU here", "Use --device cpu")
    if options.threads < 1:
        raise ConfigError("--threads", f"{options.threads}", "Give at least 1")


def _kernels(options: argparse.Namespace) -> list[Row]:
    import torch

    from bitdistill_ray.bench import kernels
    from bitdistill_ray.bench.limits import Place

    specs = [kernels.parse_format(name) for name in options.formats.split(",")]
    shapes = [kernels.parse_shape(text) for text in options.shapes.split(",")]
    tokens = options.tokens.split(",")
    if not all(count.isdecimal() and int(count) > 0 for count in tokens):
        raise ConfigError("--tokens", options.tokens, "Give numbers of tokens, such as 1,4,128")
    place = Place.of(torch.device(options.device), options.threads)
    return kernels.measure(specs, shapes, place, [int(count) for count in tokens])


def _decode(options: argparse.Namespace) -> list[Row]:
    import torch

    from bitdistill_kernels.decoder import CacheType
    from bitdistill_ray.bench import decode, kernels
    from bitdistill_ray.bench.limits import Place
    from bitdistill_ray.bench.models import Size
    from bitdistill_ray.bench.subject import Load

    if options.model and options.formats:
        raise ConfigError("--formats", "given with MODEL, which has one", "Leave one of them away")
    if options.baseline and not options.model:
        raise ConfigError("--baseline", "given without MODEL", "Name the model to measure")
    if options.shape and options.model:
        raise ConfigError("--shape", "given with MODEL", "Leave one of them away")
    load = Load(batch=options.batch, prompt_tokens=options.prompt_tokens, new_tokens=options.new_tokens,
                cache=CacheType[options.cache.upper()], activation_bits=options.activation_bits)  # fmt: skip
    place = Place.of(torch.device(options.device), options.threads)
    if options.model:
        return decode.measure(options.model, options.baseline, load, place)
    names = (options.formats or "nf3").split(",")
    if options.shape:
        every = [None if name == "fp16" else kernels.parse_format(name) for name in names]
        return decode.measure_shape(options.shape, every, load, place, head_bits=options.head_bits)
    specs = [kernels.parse_format(name) for name in names]
    return decode.measure_random(specs, Size(), load, place)


def _peers(options: argparse.Namespace) -> list[Row]:
    import torch

    from bitdistill_ray.bench import kernels, peers
    from bitdistill_ray.bench.limits import Place
    from bitdistill_ray.bench.subject import Load

    if options.device != "cpu":
        raise ConfigError("--device", options.device, "Leave it at cpu, which the peers' 2-bit types are for")
    load = Load(batch=options.batch, prompt_tokens=options.prompt_tokens, new_tokens=options.new_tokens)
    place = Place.of(torch.device("cpu"), options.threads)
    specs = [kernels.parse_format(name) for name in options.formats.split(",")]
    return peers.measure(options.shape, specs, load, place, head_bits=options.head_bits)


def _serve(options: argparse.Namespace) -> list[Row]:
    from bitdistill_ray.bench import kernels, serve
    from bitdistill_serve.options import ServeOptions

    parts = options.only.split(",")
    for part in parts:
        if part not in serve.PARTS:
            raise ConfigError("--only", part, f"Give some of {SERVING}")
    if options.model and options.formats:
        raise ConfigError("--formats", "given with MODEL, which has one", "Leave one of them away")
    load = serve.Load(
        streams=options.streams,
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        overload_s=options.overload_s,
        soak_s=options.soak_s,
        kill_every_s=options.kill_every_s,
    )
    own = ServeOptions.parse({"model": options.model or "random", "device": options.device, "threads": options.threads,
                              "slots": options.streams, "queue": options.queue,
                              "activation_bits": options.activation_bits,
                              "slot_tokens": options.prompt_tokens + options.new_tokens + 1})  # fmt: skip
    if options.model:
        return serve.measure(own, load, parts, against=options.against)
    specs = [kernels.parse_format(name) for name in (options.formats or "int2").split(",")]
    return serve.measure_random(specs, own, load, parts, against=options.against)


def _teacher(options: argparse.Namespace) -> list[Row]:
    from bitdistill_ray.bench.cluster import Machine, local_ray

    with local_ray(machine := Machine(device=options.device, threads=options.threads)):
        from bitdistill_ray.bench import cache, teacher

        return teacher.measure(options.model, machine) + cache.measure()


def _train(options: argparse.Namespace) -> list[Row]:
    from bitdistill_ray.bench.cluster import Machine, local_ray

    parts = options.only.split(",")
    for part in parts:
        if part not in TRAINING.split(","):
            raise ConfigError("--only", part, f"Give some of {TRAINING}")
    with local_ray(machine := Machine(device=options.device, threads=options.threads)):
        import torch

        from bitdistill_ray.bench import kernels, loss, scale, train

        specs = [kernels.parse_format(name) for name in options.formats.split(",")]
        load = train.LOADS[options.size or ("0.6b" if options.device == "cuda" else "small")]
        workers = options.workers or (torch.cuda.device_count() if options.device == "cuda" else 2)
        rows = train.measure(options.model, specs, machine, load) if "steps" in parts else []
        if "loss" in parts:
            rows += loss.measure(
                load, torch.device(options.device), machine.threads if options.device == "cpu" else None
            )
        if "scale" in parts and workers > 1:
            rows += scale.measure(options.model, specs[0], machine, load, workers)
        return rows


def _data(options: argparse.Namespace) -> list[Row]:
    from bitdistill_ray.bench import data
    from bitdistill_ray.data.sources import FileFormat

    for name, value, least in (("--megabytes", options.megabytes, 0.1), ("--times", options.times, 2)):
        if not value >= least:
            raise ConfigError(name, f"{value}", f"Give at least {least}")
    for kind in options.files.split(","):
        if kind not in data.FORMATS:
            raise ConfigError("--files", kind, f"Give some of {','.join(data.FORMATS)}")
    load = data.Load(megabytes=options.megabytes, times=options.times, data=options.data, tokenizer=options.tokenizer,
                     files=tuple(map(FileFormat, options.files.split(","))))  # fmt: skip
    return data.measure(load)
