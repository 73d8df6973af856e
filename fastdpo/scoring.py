"""Scoring responses: the second stage of a round.

    score(load_scorer("my_rewards:helpful"), candidates_dir, scores_dir)

Writes one part of scores per part of candidates: prompt_index, sample_index, score.
"""

import importlib
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import torch

from fastdpo.data import DataError, Text
from fastdpo.storage import begin_stage, list_parts, read_jsonl, read_plan, write_jsonl_atomic


@dataclass(frozen=True)
class Scorer:
    """A function from prompts and as many responses to as many finite numbers, higher is better.

    Prompts are strings or message lists, as they were given to sampling.
    """

    name: str
    function: Callable[[list[Text], list[str]], Any]

    def __call__(self, prompts: list[Text], responses: list[str]) -> Any:
        return self.function(prompts, responses)


def load_scorer(
    spec: str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    batch_size: int = 8,
) -> Scorer:
    """Load a scorer by name.

    `spec` is `module:function`, a Python function `f(prompts, responses) -> scores`, or else the
    folder or hub name of a sequence-classification reward model with one logit. What has a colon
    and is no existing path is a function; modules in the working directory are found too.

    The rest is for reward models: `device` defaults to the GPU if there is one, `dtype` to that of
    the checkpoint. They see prompt and response through their chat template, or without one as
    `prompt + "\\n" + response`, `batch_size` of them at a time, one at a time if there is no
    padding token. Weights are read from safetensors only and code from the hub is never run.

    Raises ValueError when it can't be loaded.
    """
    if type(batch_size) is not int or batch_size < 1:
        raise ValueError(f"batch_size must be an int of at least 1, got {batch_size!r}")
    if ":" in spec and not Path(spec).exists():
        return Scorer(spec, _load_function(spec))
    return Scorer(spec, _load_reward_model(spec, device, dtype, batch_size))


def score(scorer: Scorer, rows_dir: Path, out_dir: Path, *, progress: bool = True) -> None:
    """Score all candidates in `rows_dir` and write the scores to `out_dir` in parts.

    The scorer is called once per part; parts already there are skipped.

    Raises DataError when candidates are missing or malformed, when `out_dir` holds the scores of
    another scorer or of other candidates, and when the scorer raises or returns anything but one
    finite number per response: then nothing of that part is written, earlier parts stay.
    """
    from tqdm import tqdm

    parts = list_parts(rows_dir)
    plan = {"scorer": scorer.name, "candidates": read_plan(rows_dir), "parts": len(parts)}
    begin_stage(out_dir, plan)
    for path in tqdm(parts, desc="scoring", unit="part", disable=not progress):
        out_path = Path(out_dir) / path.name
        if not out_path.exists():
            write_jsonl_atomic(out_path, _score_rows(scorer, read_jsonl(path), path))


def _score_rows(scorer: Scorer, rows: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    for i, row in enumerate(rows):
        missing = {"prompt_index", "sample_index", "prompt", "response"} - row.keys()
        if missing:
            raise DataError(f"{path}:{i + 1}: {min(missing)!r} is missing. Sample it again.")
    these = f"{path} (prompt {rows[0]['prompt_index']} to prompt {rows[-1]['prompt_index']})"
    try:
        values = scorer([row["prompt"] for row in rows], [row["response"] for row in rows])
    except Exception as error:
        raise DataError(
            f"scorer {scorer.name} raised {type(error).__name__} for {these}: {error}"
        ) from error
    if hasattr(values, "tolist"):  # an array or a tensor
        values = values.tolist()
    if not isinstance(values, list | tuple) or len(values) != len(rows):
        found = len(values) if isinstance(values, list | tuple) else f"a {type(values).__name__}"
        raise DataError(
            f"scorer {scorer.name} returned {found} for {these}. "
            f"It must return a list of {len(rows)} numbers, one per response."
        )
    return [
        {
            "prompt_index": row["prompt_index"],
            "sample_index": row["sample_index"],
            "score": _finite(value, scorer.name, row),
        }
        for row, value in zip(rows, values)
    ]


def _finite(value: Any, scorer_name: str, row: dict[str, Any]) -> float:
    try:
        if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an int above the largest float
        pass
    raise DataError(
        f"scorer {scorer_name} returned {value!r} for prompt {row['prompt_index']}, sample "
        f"{row['sample_index']}. Every score must be a finite number."
    )


def _load_function(spec: str) -> Callable[..., Any]:
    module_name, _, name = spec.partition(":")
    # The command line tool starts without the working directory; at the end it hides nothing.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(
            f"scorer {spec!r}: module {module_name!r} can't be imported "
            f"({type(error).__name__}: {error}). Check the name, or run where its file lies."
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(
            f"scorer {spec!r}: module {module_name!r} has no function {name!r}. "
            "Write module:function."
        )
    return function


def _load_reward_model(
    name: str, device: torch.device | str | None, dtype: torch.dtype | None, batch_size: int
) -> "_RewardModel":
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        num_labels = config.num_labels
        model: Any = None
        if num_labels == 1:
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                name,
                dtype=dtype or "auto",
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        first_line = next(iter(str(error).splitlines()), "")
        raise ValueError(
            f"scorer {name!r}: can't be loaded as a reward model ({type(error).__name__}: "
            f"{first_line}). Name its folder or its hub name; a Python function is written "
            "module:function."
        ) from error
    if model is None:
        raise ValueError(
            f"scorer {name!r}: the model has {num_labels} labels. "
            "A reward model is a sequence classifier with one."
        )
    if loading["missing_keys"]:
        raise ValueError(
            f"scorer {name!r}: the checkpoint has no {', '.join(sorted(loading['missing_keys']))}. "
            "A reward model is a sequence classifier with a trained head."
        )
    text_config = config.get_text_config()
    pad_id = model.config.get_text_config().pad_token_id
    if pad_id is None and tokenizer.pad_token_id not in (None, tokenizer.eos_token_id):
        # An end token can't pad: the model scores at the last token that isn't padding.
        pad_id = tokenizer.pad_token_id
        model.config.get_text_config().pad_token_id = pad_id
    model.config.use_cache = False
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    context = min(
        getattr(text_config, "max_position_embeddings", None) or math.inf,
        tokenizer.model_max_length,
    )
    return _RewardModel(
        model.eval().to(device), tokenizer, pad_id, batch_size if pad_id is not None else 1, context
    )


@dataclass(frozen=True)
class _RewardModel:
    model: Any
    tokenizer: Any
    pad_id: int | None
    batch_size: int
    context: float

    @torch.inference_mode()
    def __call__(self, prompts: list[Text], responses: list[str]) -> list[float]:
        ids = [self._render(prompt, response) for prompt, response in zip(prompts, responses)]
        longest = max(map(len, ids))
        if longest > self.context:
            raise ValueError(
                f"a prompt with its response has {longest} tokens, more than the reward model's "
                f"context of {self.context}; lower max_new_tokens of sampling"
            )
        scores = [0.0] * len(ids)
        by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        for start in range(0, len(ids), self.batch_size):
            batch = by_length[start : start + self.batch_size]
            logits_B1 = self._logits([ids[i] for i in batch])
            for i, value in zip(batch, logits_B1.flatten().tolist()):
                scores[i] = value
        return scores

    def _render(self, prompt: Text, response: str) -> list[int]:
        if self.tokenizer.chat_template is None:
            text = _text_of(prompt) + "\n" + response
            return self.tokenizer(text=text)["input_ids"]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        encoded = self.tokenizer.apply_chat_template(
            [*messages, {"role": "assistant", "content": response}], tokenize=True, return_dict=True
        )
        return encoded["input_ids"]

    def _logits(self, batch: list[list[int]]) -> torch.Tensor:
        width = max(map(len, batch))
        pad = self.pad_id or 0
        # On the right: absolute positions then start at 0 in every row.
        ids = torch.tensor([x + [pad] * (width - len(x)) for x in batch])
        mask = torch.tensor([[1] * len(x) + [0] * (width - len(x)) for x in batch])
        device = self.model.device
        return self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.float()


def _text_of(prompt: Text, role: str | None = None) -> str:
    """A prompt as plain text; of messages the contents, `role` selects some of them."""
    if isinstance(prompt, str):
        return prompt
    texts = []
    for message in prompt:
        content = message.get("content") or ""
        if role in (None, message["role"]):
            parts = [content] if isinstance(content, str) else [x.get("text", "") for x in content]
            texts.extend(parts)
    return "\n".join(texts)


_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s|$)|\n+")
_MIN_WORDS = 5
_STOP_WORDS = frozenset(
    _WORD.findall(
        "about also been being could describe does each explain from give have help into just like "
        "list make more most much need only please short should simple some such tell than that "
        "their them then there these they this those very want were what when where which while "
        "with work would write your"
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
    return [_plainness(_text_of(p, role="user"), r) for p, r in zip(prompts, responses)]


def _plainness(prompt: str, response: str) -> float:
    words = _words(response)
    if len(words) < _MIN_WORDS:
        return 0.0
    return _reading_ease(response) / 100 * _variety(words) * _relevance(prompt, words)


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


def _relevance(prompt: str, words: list[str]) -> float:
    content = {word for word in _words(prompt) if len(word) > 3 and word not in _STOP_WORDS}
    share = len(content & set(words)) / len(content) if content else 1.0
    return 0.5 + 0.5 * share
