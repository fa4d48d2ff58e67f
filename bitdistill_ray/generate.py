"""python -m bitdistill_ray.generate MODEL --prompt TEXT [--chat] [--max-tokens N] [--temperature T] [--seed S] …

Prints what a model writes after a prompt, as it writes it.  MODEL is a packed student, the folder of a training stage,
a Hugging Face id or folder, a GGUF file, or any of these at a URL.  With several `--prompt` the texts are written in
one batch and printed one after the other.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from bitdistill_ray.errors import BitdistillError, ModelError


def main(argv: Sequence[str] | None = None) -> int:
    """Print the texts; returns the exit status, 2 after an error that the user can mend."""
    options = parser().parse_args(argv)
    try:
        write_texts(options)
    except BitdistillError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line; the defaults of sampling are those of `decode.sampling.Sampling`, but greedy."""
    command = argparse.ArgumentParser(prog="bitdistill generate", description=__doc__.partition("\n\n")[2])
    command.add_argument("model", metavar="MODEL")
    command.add_argument("--prompt", action="append", required=True, help="may be given several times")
    command.add_argument(
        "--chat", action="store_true", help="send the prompt as a user's message, by the chat template"
    )
    command.add_argument("--max-tokens", type=int, default=128)
    command.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    command.add_argument("--top-p", type=float, default=1.0)
    command.add_argument("--top-k", type=int, default=0, help="0: all")
    command.add_argument("--min-p", type=float, default=0.0)
    command.add_argument("--repetition-penalty", type=float, default=1.0)
    command.add_argument("--presence-penalty", type=float, default=0.0)
    command.add_argument("--frequency-penalty", type=float, default=0.0)
    command.add_argument("--logit-bias", action="append", default=[], metavar="TOKEN=BIAS", type=bias)
    command.add_argument("--seed", type=int, default=0, help="of the first prompt; the next ones count up")
    command.add_argument("--device", default="cpu")
    command.add_argument("--activation-bits", type=int, choices=(8,), help="of weight-only students, on a CPU")
    return command


def bias(text: str) -> tuple[int, float]:
    """`TOKEN=BIAS`, a token's id and the number added to its logit."""
    token, _, number = text.partition("=")
    return int(token), float(number)


def write_texts(options: argparse.Namespace) -> None:
    """Load, generate, print.  Raises BitdistillError."""
    from bitdistill_ray.decode.generation import generate
    from bitdistill_ray.decode.loading import decoder_over, load_decoder, stop_ids
    from bitdistill_ray.decode.sampling import Sampling

    given = {field.name: getattr(options, field.name) for field in fields(Sampling)}
    sampling = Sampling(**given | {"logit_bias": tuple(options.logit_bias)})
    model, tokenizer = load_decoder(options.model, device=options.device)
    prompts = [encode(tokenizer, prompt, chat=options.chat) for prompt in options.prompt]
    longest = max(len(prompt) for prompt in prompts)
    decoder = decoder_over(model, slots=len(prompts), slot_tokens=longest + sampling.max_tokens,
                           activation_bits=options.activation_bits)  # fmt: skip
    stream = Stream(tokenizer) if len(prompts) == 1 else None
    texts = generate(
        decoder, prompts, sampling, stop_ids=stop_ids(model, tokenizer), on_token=stream.write if stream else None
    )
    if stream:
        stream.finish()
        return
    for prompt, text in zip(options.prompt, texts, strict=True):
        print(f"=== {prompt}\n{tokenizer.decode(text.ids, skip_special_tokens=True)}")


def encode(tokenizer: Any, prompt: str, *, chat: bool) -> list[int]:
    """Token ids of a prompt.  Raises ModelError for `chat` with a tokenizer that has no chat template."""
    if not chat:
        return [int(token) for token in tokenizer(prompt)["input_ids"]]
    if not tokenizer.chat_template:
        raise ModelError("--chat", "the tokenizer has no chat template", "Leave --chat away")
    message = [{"role": "user", "content": prompt}]
    encoded = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)
    return [int(token) for token in encoded["input_ids"]]


class Stream:
    """Prints a growing text.  A character is held back until the tokens that make it are complete."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.printed = tokenizer, 0
        self.ids: list[int] = []

    def write(self, index: int, token: int) -> None:
        """Take one more token; `index`, the prompt's, is always 0."""
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._print(text)

    def finish(self) -> None:
        """Print what was held back, and end the line."""
        self._print(self.tokenizer.decode(self.ids, skip_special_tokens=True))
        print()

    def _print(self, text: str) -> None:
        print(text[self.printed :], end="", flush=True)
        self.printed = len(text)


if __name__ == "__main__":
    sys.exit(main())
