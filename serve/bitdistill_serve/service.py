"""One served model: its engine, its tokenizer, its name.  `load` reads it; the HTTP routes use it."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerBase

import bitdistill_kernels
from bitdistill_ray import env
from bitdistill_ray.decode.base import Decoder
from bitdistill_ray.decode.loading import decoder_over, load_decoder, stop_ids
from bitdistill_ray.errors import KernelError
from bitdistill_ray.packed.linear import PackedLinear
from bitdistill_serve.engine import Engine
from bitdistill_serve.keys import KeyFile
from bitdistill_serve.metrics import Metrics
from bitdistill_serve.options import ServeOptions
from bitdistill_serve.prompts import Prompts, Room
from bitdistill_serve.rates import Client
from bitdistill_serve.shares import SharedLedger, client_of
from bitdistill_serve.token_texts import TokenTexts

SWITCH_S = 0.0002  # a step takes Python's lock back many times, and each time may wait so long for the event loop


@dataclass(slots=True)
class Service:
    """What the routes need; `keys` is None where anybody may ask, `clients` are the holders of keys by their hash."""

    name: str
    options: ServeOptions
    engine: Engine
    prompts: Prompts
    texts: TokenTexts
    metrics: Metrics
    keys: KeyFile | None
    clients: dict[str, Client]
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def over(
        cls,
        decoder: Decoder,
        tokenizer: PreTrainedTokenizerBase,
        options: ServeOptions,
        *,
        stop_ids: Iterable[int],
        ledger: SharedLedger | None = None,
    ) -> Service:
        """Serve `decoder` as `options` say; a generation ends at any of `stop_ids`.  `ledger` counts the rates of keys.

        Raises ServeError or StorageError for a file of keys that cannot be read.
        """
        ends, longest = frozenset(stop_ids), decoder.slot_tokens
        metrics = Metrics(options.served_name, {"decoder": type(decoder).__name__, "instructions": _instructions()})
        room = Room(longest, options.max_prompt_tokens or longest, options.max_output_tokens or longest)
        keys = KeyFile.read(options.keys) if options.keys else None
        return cls(
            name=options.served_name,
            options=options,
            engine=Engine(decoder, tokenizer, options, stop_ids=ends, metrics=metrics),
            prompts=Prompts(tokenizer, room, vocab_size=decoder.vocab_size, stop_ids=ends),
            texts=TokenTexts(tokenizer),
            metrics=metrics,
            keys=keys,
            clients={key.sha256: client_of(key, ledger) for key in keys.keys} if keys else {},
        )

    @classmethod
    def load(cls, options: ServeOptions, *, ledger: SharedLedger | None = None) -> Service:
        """Read the model, and give this process's torch and kernels their threads, and its decoder Python's lock soon.

        Raises ModelError or PackedError, and KernelError for a packed student where the kernels are not built.
        """
        sys.setswitchinterval(SWITCH_S)
        decoder, tokenizer, ends = open_decoder(options)
        service = cls.over(decoder, tokenizer, options, stop_ids=ends, ledger=ledger)
        gc.collect()
        gc.freeze()  # the model and the libraries stay: no collection among streams walks through them
        return service

    def client(self, secret: str | None, address: tuple[str, int] | None) -> Client | None:
        """Who asks: the holder of the key, or where anybody may ask whoever has that address; None without a key."""
        if self.keys is None:
            return Client(f"address {address[0]}" if address else "")
        key = self.keys.find(secret) if secret else None
        return self.clients[key.sha256] if key else None

    def start(self) -> None:
        """Start the engine, for requests from the running event loop."""
        self.engine.start()

    async def stop(self) -> None:
        """Stop the engine; what is unfinished fails."""
        await self.engine.stop()
        self.prompts.close()


def open_decoder(options: ServeOptions) -> tuple[Decoder, PreTrainedTokenizerBase, frozenset[int]]:
    """What `options` ask for, its tokenizer and the tokens that end a text.  Raises as `Service.load` does."""
    threads = options.threads or env.cpu_count()
    torch.set_num_threads(threads)  # Ray lets torch have as many as it was asked for CPUs
    model, tokenizer = load_decoder(options.model, device=options.device)
    if options.device == "cpu" and any(isinstance(module, PackedLinear) for module in model.modules()):
        bitdistill_kernels.set_threads(threads)
    decoder = decoder_over(model, slots=options.slots, slot_tokens=options.slot_tokens,
                           activation_bits=options.activation_bits)  # fmt: skip
    return decoder, tokenizer, stop_ids(model, tokenizer)


def _instructions() -> str:
    with suppress(KernelError):  # a checkout without the compiled library serves what is not packed
        return str(bitdistill_kernels.instruction_sets()["chosen"])
    return "none"
