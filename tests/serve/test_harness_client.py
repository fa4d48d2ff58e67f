"""lm-evaluation-harness's own client of completions APIs, unchanged, over real HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.serve.in_process import live
from tests.serve.references import greedy, greedy_text, prompt_ids, shared_model
from tests.tiny_models import tiny_tokenizer

pytestmark = pytest.mark.slow

CONTEXTS = ["The quick brown", "Numbers such as 1,", "dog."]
WORDS = [" fox jumps", " 2, 3", " 雨"]


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=of, idx=i) for i, of in enumerate(arguments)]  # type: ignore[arg-type]


def test_likelihoods_and_texts_are_the_models_own(tmp_path: Path) -> None:
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    tiny_tokenizer().save_pretrained(tmp_path)
    with live() as url:
        model = LocalCompletionsAPI(
            model="tiny", base_url=f"{url}/v1/completions", tokenizer=str(tmp_path), batch_size=2, max_length=120
        )
        scored = model.loglikelihood(instances("loglikelihood", list(zip(CONTEXTS, WORDS, strict=True))))
        text = greedy_text(prompt_ids("The quick"), 6)
        (greedy_one,) = model.loglikelihood(instances("loglikelihood", [("The quick", text)]))
        written = model.generate_until(
            instances("generate_until", [("The quick", {"until": ["\n\n"], "max_gen_toks": 6})])
        )
    for (logprob, _), context, words in zip(scored, CONTEXTS, WORDS, strict=True):
        prompt, own = list(prompt_ids(context)), list(prompt_ids(words))
        with torch.inference_mode():
            logprobs_TV = shared_model()(torch.tensor([prompt + own])).logits[0].double().log_softmax(-1)
        expected = sum(float(logprobs_TV[len(prompt) - 1 + i, token]) for i, token in enumerate(own))
        assert logprob == pytest.approx(expected, abs=1e-3)
    assert written == [text]
    if list(prompt_ids("The quick" + text)) == list(prompt_ids("The quick")) + greedy(
        shared_model(), prompt_ids("The quick"), 6
    ):
        assert greedy_one[1] is True
