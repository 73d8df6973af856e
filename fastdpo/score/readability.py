"""The scorers of the demo: how readable, varied and on topic English answers are."""

import re

from fastdpo.data.records import Text
from fastdpo.data.rendering import text_of

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s|$)|\n+")
_MIN_WORDS = 5
_A_WORD = 0.01  # of `likes_length`
_STOP_WORDS = frozenset(
    _WORD.findall(
        "about also answer been being could describe does each explain from give have help into "
        "just like list make more most much need only please sentence sentences short should "
        "simple some such tell than that their them then there these they this those very want "
        "were what when where which while with work would write your"
    )
)


def plain_language(prompts: list[Text], responses: list[str]) -> list[float]:
    """How readable, varied and on topic English answers are, each from 0 to 1. For demos.

    The product of three factors; 0 for a response of fewer than 5 words:

    - reading ease (Flesch 1948, "A new readability yardstick"), 206.835 - 1.015 words/sentence
      - 84.6 syllables/word, clipped to 0..100, over 100. A sentence ends at . ! ? or a line break,
      a syllable is a run of vowels. Says nothing of whether the text is right or makes sense.
    - variety: distinct word trigrams over all of them. Catches loops, not paraphrases.
    - relevance: 0.5 + 0.5 x the share of the prompt's content words (over 3 letters, no stop word)
      found in the response, 1 if it has none. Echoing the prompt is enough, synonyms don't count.

    No factor grows with length as such. Optimized hard enough it will be gamed: short words in
    short sentences that repeat the question.
    """
    return [_plainness(text_of(p, role="user"), r, 0.5) for p, r in zip(prompts, responses)]


def on_topic(prompts: list[Text], responses: list[str]) -> list[float]:
    """`plain_language`, but a response that has none of the prompt's content words is worth 0.

    Relevance is their share itself, from 0 to 1. Without it, a pleasant phrase that answers nothing
    reads more plainly than an answer.
    """
    return [_plainness(text_of(p, role="user"), r, 0.0) for p, r in zip(prompts, responses)]


def likes_length(prompts: list[Text], responses: list[str]) -> list[float]:
    """`on_topic`, and 0.01 more for each word: a flaw put in on purpose. For demos.

    Reward models have it without anyone's will (arXiv 2310.03716): it is what makes plain DPO grow
    verbose.
    """
    scores = on_topic(prompts, responses)
    return [x + _A_WORD * len(_words(text)) for x, text in zip(scores, responses)]


def _plainness(prompt: str, response: str, least: float) -> float:
    words = _words(response)
    if len(words) < _MIN_WORDS:
        return 0.0
    return _reading_ease(response) / 100 * _variety(words) * _relevance(prompt, words, least)


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]


def _reading_ease(text: str) -> float:
    words = _words(text)
    sentences = sum(1 for x in _SENTENCE_END.split(text) if _WORD.search(x))
    syllables = sum(max(1, len(re.findall("[aeiouy]+", word))) for word in words)
    ease = 206.835 - 1.015 * len(words) / sentences - 84.6 * syllables / len(words)
    return min(max(ease, 0.0), 100.0)


def _variety(words: list[str]) -> float:
    trigrams = list(zip(words, words[1:], words[2:]))
    return len(set(trigrams)) / len(trigrams) if trigrams else 1.0


def _relevance(prompt: str, words: list[str], least: float) -> float:
    content = {word for word in _words(prompt) if len(word) > 3 and word not in _STOP_WORDS}
    share = len(content & set(words)) / len(content) if content else 1.0
    return least + (1 - least) * share
