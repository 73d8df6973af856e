"""Scores and comparisons by servers: one's own, vLLM's reward models, chat models."""

import logging
import math
import re
from dataclasses import dataclass
from typing import Any

from fastdpo.data.records import Text, messages_of
from fastdpo.errors import is_number
from fastdpo.remote import Endpoint, RemoteError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RemoteScores:
    """Scores of an endpoint of one's own.

    POST {"prompts": [...], "responses": [...]} with up to `batch_size` of both, prompts as strings
    or message lists; it answers {"scores": [...]}, a number for each.
    """

    endpoint: Endpoint
    batch_size: int

    def __call__(self, prompts: list[Text], responses: list[str]) -> list[float]:
        starts = range(0, len(prompts), self.batch_size)
        cuts = [slice(start, start + self.batch_size) for start in starts]
        bodies = [{"prompts": prompts[cut], "responses": responses[cut]} for cut in cuts]
        found = self.endpoint.ask_all(bodies, self._scores, lambda x: all(map(is_number, x)))
        return [score for of_request in found for score in of_request]

    def _scores(self, answer: Any, body: Any) -> list[float]:
        found = answer.get("scores") if isinstance(answer, dict) else None
        count = len(body["prompts"])
        if not isinstance(found, list) or len(found) != count:
            wanted = f'{{"scores": [...]}} with {count} numbers'
            raise self.endpoint.malformed(answer, wanted)
        return found


@dataclass(frozen=True)
class PooledScores:
    """Scores of a reward model under vLLM's `/pooling`, one request a response.

    The form of requests and answers is that of vllm/entrypoints/pooling (PoolingChatRequest,
    PoolingResponse): chat messages in, a number or one a token out, of which the last counts.
    `use_activation` false asks a classifier for its logit. UNVERIFIED against a running vLLM.
    """

    endpoint: Endpoint
    model: str

    def __call__(self, prompts: list[Text], responses: list[str]) -> list[float]:
        bodies = [
            {
                "model": self.model,
                "messages": messages_of(prompt, response),
                "use_activation": False,
                "add_generation_prompt": False,
            }
            for prompt, response in zip(prompts, responses)
        ]
        return self.endpoint.ask_all(bodies, self._last, is_number)

    def _last(self, answer: Any, body: Any) -> float:
        try:
            value = answer["data"][0]["data"]
            while isinstance(value, list):
                value = value[-1]
        except (LookupError, TypeError):
            value = None
        if not isinstance(value, int | float):
            raise self.endpoint.malformed(answer, '{"data": [{"data": [number, ...]}]}')
        return value


# A letter in quotes or markup, such as **A**; what is markup alone comes before it.
_LETTER = re.compile(r"[\W_]*([AaBb])[\W_]*")
_MARKUP = re.compile(r"[\W_]*")
# The letter that an answer begins with. "a" may be a word, unless it is alone.
_FIRST = re.compile(r"[\W_]*(?:([AB])(?![A-Za-z])|([ab])[\W_]*$)")
_LEAST = 0.01  # below, the letters are noise in the answer that the model is about to give


@dataclass(frozen=True)
class RemoteJudge:
    """Probability of A against B under an OpenAI-compatible chat endpoint.

    By the log-probabilities of the first token that isn't markup, where the server gives them, else
    by the letter at the beginning. Where neither letter turns up, or both with less than 1%, the
    answer is a tie, and a warning counts these.

    Raises RemoteError when more than half of the answers of a call are such: of a model that thinks
    first, all are.
    """

    endpoint: Endpoint
    model: str

    def __call__(self, texts: list[str]) -> list[float]:
        bodies = [
            {
                "model": self.model,
                "messages": [{"role": "user", "content": text}],
                "max_tokens": 4,  # of which markup may take some
                "temperature": 0,
                "logprobs": True,
                "top_logprobs": 20,
            }
            for text in texts
        ]
        answers = self.endpoint.ask_all(bodies, self._read, lambda value: value[0] is not None)
        said = [text for win, text in answers if win is None]
        if 2 * len(said) > len(answers):
            raise RemoteError(
                f"{self.endpoint.url}: {len(said)} of {len(answers)} answers of {self.model} were "
                f"neither A nor B, such as {said[0]!r}. A model that thinks first can't judge: "
                "serve it with thinking off, or name another."
            )
        if said:
            _log.warning(
                "%s: %d of %d answers were neither A nor B and count as ties",
                self.endpoint.url, len(said), len(answers),
            )  # fmt: skip
        return [0.5 if win is None else win for win, _ in answers]

    def _read(self, answer: Any, body: Any) -> tuple[float | None, str]:
        """Probability of A against B, None where neither is there, and the text."""
        try:
            choice = answer["choices"][0]
            text = choice["message"]["content"] or ""
            content = (choice.get("logprobs") or {}).get("content")
            if content:
                first = next((x for x in content if not _MARKUP.fullmatch(x["token"])), content[0])
                seen = [(x["token"], math.exp(x["logprob"])) for x in first["top_logprobs"]]
                letters = [(m[1].upper(), p) for x, p in seen if (m := _LETTER.fullmatch(x))]
            else:
                match = _FIRST.match(text)
                letters = [((match[1] or match[2]).upper(), 1.0)] if match else []
            a, b = (sum(p for letter, p in letters if letter == x) for x in "AB")
        except (LookupError, TypeError, AttributeError, OverflowError):
            raise self.endpoint.malformed(answer, "a chat completion") from None
        if not math.isfinite(a + b):
            raise self.endpoint.malformed(answer, "finite log-probabilities")
        return a / (a + b) if a + b >= _LEAST else None, self.endpoint.excerpt(str(text))
