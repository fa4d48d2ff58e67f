"""One served model: its engine, its tokenizer, its name.  `load` reads it; the HTTP routes use it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerBase

import bitdistill_kernels
from bitdistill_ray import env
from bitdistill_ray.decode.base import Decoder
from bitdistill_ray.decode.loading import decoder_over, load_decoder, stop_ids
from bitdistill_ray.packed.linear import PackedLinear
from bitdistill_serve.engine import Engine
from bitdistill_serve.options import ServeOptions
from bitdistill_serve.prompts import Prompts


@dataclass(slots=True)
class Service:
    """What the routes need."""

    name: str
    engine: Engine
    prompts: Prompts
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def over(
        cls,
        decoder: Decoder,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        stop_ids: Iterable[int],
        queue: int,
        prefill_tokens: int,
    ) -> Service:
        """Serve `decoder` as `name`; a generation ends at any of `stop_ids`."""
        engine = Engine(decoder, tokenizer, stop_ids=frozenset(stop_ids), queue=queue, prefill_tokens=prefill_tokens)
        prompts = Prompts(tokenizer, slot_tokens=decoder.slot_tokens, vocab_size=decoder.vocab_size)
        return cls(name, engine, prompts)

    @classmethod
    def load(cls, options: ServeOptions) -> Service:
        """Read the model, and give this process's torch and kernels their threads.

        Raises ModelError or PackedError, and KernelError for a packed student where the kernels are not built.
        """
        threads = options.threads or env.cpu_count()
        torch.set_num_threads(threads)  # Ray lets torch have as many as it was asked for CPUs
        model, tokenizer = load_decoder(options.model, device=options.device)
        if options.device == "cpu" and any(isinstance(module, PackedLinear) for module in model.modules()):
            bitdistill_kernels.set_threads(threads)
        return cls.over(
            decoder_over(model, slots=options.slots, slot_tokens=options.slot_tokens),
            tokenizer,
            name=options.served_name,
            stop_ids=stop_ids(model, tokenizer),
            queue=options.queue,
            prefill_tokens=options.prefill_tokens,
        )

    def start(self) -> None:
        """Start the engine, for requests from the running event loop."""
        self.engine.start()

    async def stop(self) -> None:
        """Stop the engine; what is unfinished fails."""
        await self.engine.stop()
        self.prompts.close()
