"""python -m bitdistill_ray.export STUDENT OUT [--head-bits 16|8|4]    pack a student folder (of a training stage).

STUDENT is `RUN/stages/NAME/student`, local or at a URL.  `packed` (docs/FORMAT.md) is what the `export` stage makes
inside a run; the embedding and the head are packed too, in 8 bits or in 4, unless `--head-bits` is 16, and what that
costs is measured and printed; `--trits` stores ternary codes five to a byte.  `--format hf-bitnet` writes a checkpoint
of a ternary student with 8-bit activations that stock transformers loads: `--mode online` with latent weights, which go
on training, `--mode packed` with four codes a byte.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bitdistill_ray.errors import BitdistillError

PACKED, HF_BITNET = "packed", "hf-bitnet"


def main(argv: Sequence[str] | None = None) -> int:
    """Pack; returns the exit status, 2 after an error that the user can mend."""
    command = argparse.ArgumentParser(prog="bitdistill export", description=__doc__.partition("\n\n")[2])
    command.add_argument("student", metavar="STUDENT")
    command.add_argument("out", metavar="OUT")
    command.add_argument("--format", choices=(PACKED, HF_BITNET), default=PACKED, help=f"default {PACKED}")
    command.add_argument("--mode", choices=("online", "packed"), help=f"of {HF_BITNET} (default online)")
    command.add_argument("--head-bits", type=int, choices=(16, 8, 4), help="of embedding and head (default 8)")
    command.add_argument("--trits", action="store_true", help="store ternary codes at 1.6 bits instead of 2")
    options = command.parse_args(argv)
    if options.mode and options.format != HF_BITNET:
        command.error(f"--mode belongs to --format {HF_BITNET}")
    if (options.head_bits or options.trits) and options.format != PACKED:
        command.error(f"--head-bits and --trits belong to --format {PACKED}")
    from bitdistill_ray.evaluation.head_cost import head_cost
    from bitdistill_ray.inspect import render
    from bitdistill_ray.model.hf_bitnet import Mode, save_hf_bitnet
    from bitdistill_ray.model.sources import resolve
    from bitdistill_ray.model.student import load_student, read_about, saved_dtype
    from bitdistill_ray.packed.export import pack_student
    from bitdistill_ray.packed.folder import PackedFolder
    from bitdistill_ray.packed.manifest import Layout
    from bitdistill_ray.packed.tables import HeadBits

    try:
        source = Path(resolve(options.student))
        if options.format == HF_BITNET:
            model, tokenizer = load_student(source, dtype=saved_dtype(source))
            save_hf_bitnet(Path(options.out), model, tokenizer, Mode(options.mode or Mode.ONLINE))
            print(f"wrote {options.out}: AutoModelForCausalLM.from_pretrained({options.out!r})")
            return 0
        layout = Layout.TRITS if options.trits else Layout.PLANES
        bits, about = HeadBits(options.head_bits or HeadBits.EIGHT), dict(read_about(source)["provenance"])
        pack_student(source, Path(options.out), about, head_bits=bits, ternary=layout)
        if cost := head_cost(source, Path(options.out)):
            print(f"head_bits {bits}: {cost}")
        print(render(PackedFolder.open(options.out), tensors=False))
    except BitdistillError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
