"""python -m bitdistill_ray.demo [key=value …]    the whole road on this machine: distil a real model, serve it, ask it.

What `make demo` runs.  SmolLM2-135M (from a wheel of the package registry) writes its own training text; its 3-bit
student is clipped, distilled on a local Ray with one teacher actor and one student worker, packed, measured, served
over HTTP and asked a question.  13 minutes were measured on two cores with AMX
(docs/LEADERBOARD.md); run again, it continues where it was.  Overrides are those of the `demo` recipe.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from bitdistill_ray import recipe
from bitdistill_ray.config import Config
from bitdistill_ray.errors import BitdistillError, ServeError
from bitdistill_ray.evaluation.table import align

QUESTION = "Why do leaves fall from the trees in autumn?"
ANSWER_TOKENS = 96
START_S = 240.0
MODELS = (
    ("teacher", None),
    ("round-to-nearest", "packed-rtn"),
    ("clipped only", "packed-clipped"),
    ("trained", "packed"),
)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said, and how fast."""

    text: str
    tokens_per_s: float


def demonstrate(config: Config) -> None:
    """Run the recipe, ask all four models, print the table."""
    from bitdistill_ray.train import run

    summary = run(config)
    packed = summary["artefacts"]["packed"]
    answers = {name: ask_decoder(summary["artefacts"].get(str(role), config.model.teacher)) for name, role in MODELS}
    with served(packed) as url:
        over_http = ask_http(url)
    reports = {m["name"]: m for m in summary["stages"]["evaluate"]["evaluation"]}
    rows = [["", "bits/weight", "MB on disk", "PPL written", "KL written", "PPL excerpt", "KL excerpt", "agreement",
             "tokens/s"]]  # fmt: skip
    for name, _ in MODELS:
        rows.append([name, *_cells(reports[name]), f"{answers[name].tokens_per_s:.1f}"])
    print(f"\n{align(rows)}\n\nQ: {QUESTION}")
    for name, answer in answers.items():
        print(f"\n{name}: {answer.text.strip()}")
    print(f"\ntrained, over HTTP at {over_http.tokens_per_s:.1f} tokens/s: {over_http.text.strip()}")
    print(f"\nkept in {summary['run']}; serve it again with: bitdistill serve {packed}")


def ask_decoder(source: str) -> Answer:
    """Greedy answer of a model in this process."""
    from bitdistill_ray.decode.generation import generate
    from bitdistill_ray.decode.loading import decoder_over, load_decoder, stop_ids
    from bitdistill_ray.decode.sampling import Sampling

    model, tokenizer = load_decoder(source, device="cpu")
    messages = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    decoder = decoder_over(model, slots=1, slot_tokens=len(ids) + ANSWER_TOKENS)
    clock: list[float] = []
    greedy = Sampling(temperature=0, max_tokens=ANSWER_TOKENS)
    (text,) = generate(decoder, [ids], greedy, stop_ids=stop_ids(model, tokenizer),
                       on_token=lambda *_: clock.append(time.perf_counter()))  # fmt: skip
    speed = (len(clock) - 1) / (clock[-1] - clock[0]) if len(clock) > 1 else 0.0
    return Answer(tokenizer.decode(list(text.ids)), speed)


def ask_http(url: str) -> Answer:
    """The same question through `/v1/chat/completions`, streamed."""
    body = {"model": "student", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0,
            "max_tokens": ANSWER_TOKENS, "stream": True, "stream_options": {"include_usage": True}}  # fmt: skip
    text, first, last, tokens = "", 0.0, 0.0, 0
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=START_S) as response:
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event: dict[str, Any] = json.loads(line.removeprefix("data: "))
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
            for choice in event.get("choices", []):
                if choice["delta"].get("content"):
                    last = time.perf_counter()
                    first = first or last
                    text += choice["delta"]["content"]
    return Answer(text, (tokens - 1) / (last - first) if last > first else 0.0)


@contextlib.contextmanager
def served(path: str) -> Iterator[str]:
    """`bitdistill serve` in a process of its own; yields its URL when it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "bitdistill_serve.cli", path, "--port", str(port), "--name", "student"]
    server = subprocess.Popen(command)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_S
    try:
        while not _healthy(url):
            if server.poll() is not None or time.monotonic() > deadline:
                raise ServeError(path, f"did not answer at {url} within {START_S:.0f} s", "See its output above")
            time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        server.wait(60)


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).is_success
    except httpx.TransportError:
        return False


def _cells(report: dict[str, Any]) -> list[str]:
    def cell(metric: str) -> str:
        found = report["metrics"].get(metric)
        return "-" if found is None else f"{found['value']:,.3f}" if found["value"] < 100 else f"{found['value']:,.0f}"

    return [f"{report['bits_per_weight']:.2f}", f"{report['bytes'] / 1e6:.1f}", cell("ppl:written"), cell("kl:written"),
            cell("ppl:excerpt"), cell("kl:excerpt"), cell("agreement:excerpt")]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    try:
        demonstrate(recipe.load("demo", sys.argv[1:] if argv is None else argv))
    except BitdistillError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; `make demo` continues where it was", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
