"""Log-probabilities as OpenAI's two endpoints list them."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from bitdistill_ray.decode.logprobs import TokenLogprob
from bitdistill_serve.replies import Alternative, ChatLogprobs, ChatTokenLogprob, CompletionLogprobs
from bitdistill_serve.token_texts import TokenTexts


def chat_logprobs(texts: TokenTexts, told: Iterable[TokenLogprob]) -> ChatLogprobs:
    """The list of `/v1/chat/completions`."""

    def fields(token: int, logprob: float) -> dict[str, object]:
        return {"token": texts.text(token), "logprob": logprob, "bytes": list(texts.bytes_of(token))}

    return ChatLogprobs(
        content=[
            ChatTokenLogprob.model_validate(
                fields(of.token, of.logprob)
                | {"top_logprobs": [Alternative.model_validate(fields(*t)) for t in of.top]}
            )
            for of in told
        ]
    )


class CompletionLogprobList:
    """The lists of `/v1/completions` for one choice, as it grows; offsets are characters of its text."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts, self._offset = texts, 0
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")

    def unscored(self, token: int) -> CompletionLogprobs:
        """The first token of a prompt, which nothing comes before."""
        return self._lists([token], [None], [None])

    def more(self, told: Iterable[TokenLogprob]) -> CompletionLogprobs:
        """The tokens that come next.  The token itself is always among its alternatives."""
        every = list(told)
        return self._lists(
            [of.token for of in every],
            [of.logprob for of in every],
            [self._alternatives(of) for of in every],
        )

    def _alternatives(self, of: TokenLogprob) -> dict[str, float]:
        alternatives: dict[str, float] = {}
        for token, logprob in (*of.top, (of.token, of.logprob)):
            alternatives.setdefault(self._texts.text(token), logprob)  # of two that read the same, the likelier
        return alternatives

    def _lists(
        self, tokens: list[int], logprobs: list[float | None], top: list[dict[str, float] | None]
    ) -> CompletionLogprobs:
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            if token not in self._texts.special:
                self._offset += len(self._characters.decode(self._texts.bytes_of(token)))
        return CompletionLogprobs(
            tokens=[self._texts.text(token) for token in tokens],
            token_logprobs=logprobs,
            top_logprobs=top,
            text_offset=offsets,
        )


def joined(lists: Iterable[CompletionLogprobs]) -> CompletionLogprobs:
    """Lists that follow each other as one."""
    every = list(lists)
    return CompletionLogprobs(
        tokens=[x for of in every for x in of.tokens],
        token_logprobs=[x for of in every for x in of.token_logprobs],
        top_logprobs=[x for of in every for x in of.top_logprobs],
        text_offset=[x for of in every for x in of.text_offset],
    )
