"""The terms of the white-box relevance reward that need no model (R^3, arXiv 2402.03469).

The whole reward of an open-ended prompt is `relevance * length_incentive * repetition_penalty`,
relevance being the product of Contriever embeddings of prompt and response; of a closed one it is
`relevance to the reference answer * repetition_penalty`. Formulas are those of its code
(naver-ai/rethinking-proxy-reward).
"""

import re
from typing import Any

_TOKEN = re.compile(r"\w+|[^\w\s]+")


def length_incentive(response: str) -> float:
    """Words and runs of punctuation, over 100.

    It pays for length without bound: the opposite of what a length penalty is for.
    """
    return len(_TOKEN.findall(response)) / 100


def repetition_penalty(response: str) -> float:
    """Share of trigrams of words and punctuation that are distinct; 1 where there are none."""
    tokens = _TOKEN.findall(response)
    trigrams = list(zip(tokens, tokens[1:], tokens[2:]))
    return len(set(trigrams)) / len(trigrams) if trigrams else 1.0


def open_ended(prompts: list[Any], responses: list[str]) -> list[float]:
    """`length_incentive * repetition_penalty`, a scorer: `fastdpo.recipes.relevance:open_ended`.

    What is left of R^3 without relevance: a baseline that knows nothing of the prompt.
    """
    return [length_incentive(x) * repetition_penalty(x) for x in responses]
