"""Scoring responses: the second stage of a round.

    score(load_scorer("my_rewards:helpful"), candidates_dir, scores_dir)

Writes one part of scores per part of candidates: prompt_index, sample_index, score, and candidates,
the beginning of the SHA-256 of the part that was scored. Several scorers write a folder each;
`fastdpo.pair.transforms` makes one score of them.
"""

import importlib
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from fractions import Fraction
from numbers import Real
from pathlib import Path
from typing import Any

import torch

from fastdpo.data.clock import KEY, rendering_at
from fastdpo.data.records import Text
from fastdpo.errors import DataError
from fastdpo.model.identity import dtype_name, policy_digest
from fastdpo.remote import Endpoint, Remote, check_url
from fastdpo.score.rewards import (
    JUDGE_TEMPLATE,
    Judge,
    PooledScores,
    RemoteJudge,
    RemoteScores,
    check_template,
    load_implicit,
    load_likelihood,
    load_local_judge,
    load_reward_model,
    text_of,
)
from fastdpo.storage import (
    begin_stage,
    checksum_path,
    file_digest,
    list_parts,
    read_jsonl,
    read_plan,
    write_jsonl_atomic,
)


@dataclass(frozen=True)
class Scorer:
    """A function to as many finite numbers as there are responses, higher is better.

    It takes prompts and as many responses (`on` is "text"), or candidates as sampling wrote them,
    with all samples of a prompt (`on` is "rows"). Prompts are strings or message lists, as they
    were given to sampling.

    `compare` is there where scores are comparisons within a prompt: the probability that
    `first[i]` is a better response to `prompts[i]` than `second[i]`. Such scores average to 0.5
    whatever the policy, so policies are compared by it and not by them. `settings` is JSON that
    decides scores beside the name; it is kept in the plan, so it never holds a key. `endpoint` is
    the server that is asked, if there is one: its answers are kept until a part is complete.
    `columns` are those of the prompts that it needs, see `check_columns`.
    """

    name: str
    function: Callable[..., Any]
    on: str = "text"
    compare: Callable[[list[Text], list[str], list[str]], list[float]] | None = None
    settings: dict[str, Any] = field(default_factory=dict, compare=False)
    endpoint: Endpoint | None = field(default=None, compare=False)
    columns: tuple[str, ...] = ()

    def __call__(self, *inputs: Any) -> Any:
        return self.function(*inputs)


def load_scorer(
    spec: str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    batch_size: int = 8,
    policy: str | None = None,
    previous: str | None = None,
    remote: Remote | None = None,
    judge_template: str = JUDGE_TEMPLATE,
) -> Scorer:
    """Load a scorer by name.

    - `module:function`: a Python function `f(prompts, responses) -> scores`.
    - `name` or `name#tokenizer`: a reward model, the folder or hub name of a sequence classifier
      with one logit or of a causal model with a `v_head`, and of its tokenizer if elsewhere.
    - `judge:name`: a causal language model that compares the responses of a prompt, see `Judge`.
    - `judge:URL#model`: the same by an OpenAI-compatible server; `URL` ends in `/v1` mostly.
    - `http://...`, `https://...`: an endpoint of one's own, see `RemoteScores`.
    - `http://.../pooling#model`: a reward model under vLLM, see `PooledScores`.
    - `answer`: 1 where the response gives the prompt's `answer`, see `right_answer`.
    - `implicit`: log-ratio of `policy` and `previous`, see `ImplicitReward`.
    - `likelihood`: mean log-probability under `policy`, see `Likelihood`.

    What else has a colon and is no existing path is a function; modules in the working directory
    are found too. Servers are asked as `remote` says.

    `device` defaults to the GPU if there is one, `dtype` to that of the checkpoint, and for the
    implicit reward to fp32: its log-ratios are small next to the rounding of bf16. Reward models
    see prompt and response through their chat template, or with a line break between them where
    there is none, `batch_size` of them at a time, one at a time if there is no padding token.
    Weights are read from safetensors only and code from the hub is never run.

    Raises ValueError when it can't be loaded.
    """
    if type(batch_size) is not int or batch_size < 1:
        raise ValueError(f"batch_size must be an int of at least 1, got {batch_size!r}")
    remote = remote or Remote()
    if spec == "answer":
        return Scorer(spec, right_answer, on="rows", columns=("answer",))
    if spec == "implicit":
        if policy is None or previous is None:
            raise ValueError(
                "scorer 'implicit' needs policy and previous, folders or hub names of the policy "
                "and of the one before it"
            )
        reward = load_implicit(str(policy), str(previous), device, dtype, batch_size)
        return Scorer(spec, reward, on="rows", settings=reward.digests)
    if spec == "likelihood":
        if policy is None:
            raise ValueError("scorer 'likelihood' needs policy, a folder or hub name")
        likelihood = load_likelihood(str(policy), device, dtype, batch_size)
        return Scorer(spec, likelihood, on="rows", settings=likelihood.digests)
    if spec.startswith("judge:"):
        check_template(judge_template)
        name = spec.removeprefix("judge:")
        settings, endpoint = {"template": judge_template}, None
        if _is_url(name):
            endpoint, model = _endpoint(name, remote, "/chat/completions")
            judge = Judge(RemoteJudge(endpoint, _required(model, spec)), judge_template)
        else:
            local = load_local_judge(name, device, dtype, batch_size)
            judge = Judge(local, judge_template)
            settings |= _weights(name, local.model)
        return Scorer(spec, judge, "rows", judge.compare, settings, endpoint)
    if _is_url(spec):
        endpoint, model = _endpoint(spec, remote)
        if endpoint.url.endswith("/pooling"):
            pooled = PooledScores(endpoint, _required(model, spec))
            return Scorer(spec, pooled, endpoint=endpoint)
        return Scorer(spec, RemoteScores(endpoint, batch_size), endpoint=endpoint)
    if _is_function(spec):
        return Scorer(spec, _load_function(spec))
    reward_model = load_reward_model(spec, device, dtype, batch_size)
    folder = spec if Path(spec).exists() else spec.partition("#")[0]
    return Scorer(spec, reward_model, settings=_weights(folder, reward_model.model))


def _weights(name: str, model: Any) -> dict[str, str]:
    """What decides the scores of a model beside its name."""
    return {"weights": policy_digest(name), "dtype": dtype_name(model.dtype)}


def uses(spec: str) -> set[str]:
    """What `load_scorer` reads for a scorer beside its name: some of policy, previous, template,
    dtype, batch_size and remote."""
    if spec == "answer":
        return set()
    if spec in ("implicit", "likelihood"):
        return {"policy", "dtype", "batch_size"} | ({"previous"} if spec == "implicit" else set())
    if spec.startswith("judge:"):
        url = _is_url(spec.removeprefix("judge:"))
        return {"template"} | ({"remote"} if url else {"dtype", "batch_size"})
    if _is_url(spec):
        pooled = spec.partition("#")[0].rstrip("/").endswith("/pooling")
        return {"remote"} if pooled else {"remote", "batch_size"}
    return set() if _is_function(spec) else {"dtype", "batch_size"}


def _is_function(spec: str) -> bool:
    return ":" in spec and not Path(spec).exists()


def _is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def _endpoint(url: str, remote: Remote, path: str = "") -> tuple[Endpoint, str]:
    """The endpoint of a URL, and the name after its #."""
    check_url(url)
    remote.key()  # where there is none, it is better said now
    address, _, model = url.partition("#")
    return Endpoint(address.rstrip("/") + path if path else address, remote), model


def _required(model: str, spec: str) -> str:
    if not model:
        raise ValueError(f"scorer {spec!r}: name the model that the server has after a #")
    return model


def score(scorer: Scorer, rows_dir: Path, out_dir: Path, *, progress: bool = True) -> None:
    """Score all candidates in `rows_dir` and write the scores to `out_dir` in parts.

    The scorer is called once per part; parts already there are skipped, unless they are of other
    candidates by their content: those are scored anew. What a server can't do for a moment is tried
    again by the scorer itself (`Remote`). What it has answered for a part that isn't complete is
    kept as `.part-00000.jsonl.partial`, and not asked again.

    Raises DataError when candidates are missing or malformed, when `out_dir` holds the scores of
    another scorer or of other candidates by their plan, and when the scorer raises or returns
    anything but one finite number per response: then nothing of that part is written, earlier parts
    stay.
    """
    from tqdm import tqdm

    parts = list_parts(rows_dir)
    plan = {"scorer": scorer.name, "candidates": read_plan(rows_dir), "parts": len(parts)}
    if scorer.settings:
        plan["settings"] = scorer.settings
    check_columns(scorer, _columns_of(parts) if scorer.columns else ())
    known = read_plan(out_dir) or {}
    with rendering_at(known.get(KEY)) as clock:  # scorers may render by templates too
        if scorer.endpoint is None and (KEY in known or not known):  # a server's are its own
            plan[KEY] = clock.time
        begin_stage(out_dir, plan)
        for path in tqdm(parts, desc="scoring", unit="part", disable=not progress):
            out_path = Path(out_dir) / path.name
            if not (out_path.exists() and _scored(out_path) == {_digest(path)}):
                _score_part(scorer, path, out_path)


def _columns_of(parts: list[Path]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for path in parts:
        for i, row in enumerate(read_jsonl(path)):
            if "extra" in row:  # what else is missing is said where it is scored
                yield f"{path}:{i + 1} (prompt {row.get('prompt_index')})", row["extra"]


def _score_part(scorer: Scorer, path: Path, out_path: Path) -> None:
    partial = out_path.with_name(f".{path.name}.partial")
    rows = read_jsonl(path)
    with scorer.endpoint.keeping(partial) if scorer.endpoint else nullcontext():
        scored = _score_rows(scorer, rows, path)
    write_jsonl_atomic(out_path, [{**row, "candidates": _digest(path)} for row in scored])
    partial.unlink(missing_ok=True)


def check_columns(scorer: Scorer, rows: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Raise DataError, naming row and column, where a prompt lacks what the scorer needs.

    Rows are their places and their columns beside the prompt. Call it before samples are drawn.
    """
    if not scorer.columns:
        return
    for where, extra in rows:
        for name in scorer.columns:
            values = extra.get(name)
            if values in (None, []) or (isinstance(values, list) and None in values):
                raise DataError(
                    f"{where}: scorer {scorer.name} needs the column {name!r}, which is "
                    f"{'missing' if name not in extra else repr(values)}. Fill it in, remove the "
                    "row, or use another scorer."
                )


def check_scored(candidates_dir: Path, scores_dir: Path) -> None:
    """Make sure that scores are of these candidates, by the content of the parts and not by place.

    Parts that `score` didn't write don't say what they are of, and pass.

    Raises DataError, naming both folders, when a part is of others; and as `read_jsonl` does.
    """
    for path in list_parts(candidates_dir):
        scores = Path(scores_dir) / path.name
        known = _scored(scores) - {None} if scores.is_file() else set()
        if known and known != {_digest(path)}:
            raise DataError(
                f"{scores}: these are scores of other candidates than {candidates_dir} has now. "
                f"Run fastdpo score with this scorer, --candidates {candidates_dir} and "
                f"--output_dir {scores_dir}: it scores the parts that differ anew."
            )


def _scored(path: Path) -> set[str | None]:
    """The parts of candidates that the scores in a file are of, by their digests."""
    return {row.get("candidates") for row in read_jsonl(path)}


def _digest(path: Path) -> str:
    known = checksum_path(path)
    return (known.read_text().split()[0] if known.is_file() else file_digest(path))[:16]


_TEXT = {"prompt_index", "sample_index", "prompt", "response"}
_NEEDED = {"text": _TEXT, "rows": _TEXT | {"prompt_ids", "response_ids", "extra"}}


def _score_rows(scorer: Scorer, rows: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    for i, row in enumerate(rows):
        missing = _NEEDED[scorer.on] - row.keys()
        if missing:
            raise DataError(f"{path}:{i + 1}: {min(missing)!r} is missing. Sample it again.")
    these = f"{path} (prompt {rows[0]['prompt_index']} to prompt {rows[-1]['prompt_index']})"
    try:
        if scorer.on == "rows":
            values = scorer(rows)
        else:
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


# Verifiable answers

_NUMBER = re.compile(
    r"""(?<![\w.]) -?
    (?: \d+ [ ]+ \d+/\d+ (?![\d/]) |  # 2 1/2
    (?: \d{1,3} (?:,\d{3})+ (?!\d|,\d) | \d+ | (?=\.\d) ) (?:\.\d+)?  # 1,234.5 or .5
    (?: [eE][-+]?\d{1,3}(?!\d) )?
    (?: /\d+ )? )""",
    re.VERBOSE,
)
_ARGUMENT = r"\s*(?:\{([^{}]+)\}|(\d))"  # \frac12 is \frac{1}{2}
_FRACTION = re.compile(rf"\\[dtc]?frac{_ARGUMENT}{_ARGUMENT}")
_LATEX = re.compile(r"\\(?:text|mathrm|mathbf)\{([^{}]*)\}|\\[!,;: ]|[$%]|\\(?=[$%])")
_THOUSANDS = re.compile(r"(?<=\d)(?:\\[,!:; ]|\{,\}|,\\!|[~\u00a0\u2009\u202f])(?=\d{3}(?!\d))")
_SPACE = re.compile(r"\\[,;: ]|~")
# 5\text{ cm}^2 and 5\,\mathrm{m}/\mathrm{s}
_WORDS = r"[\s/]*\\(?:text|mathrm|mathbf|operatorname)\{[^{}\d]*\}(?:\^(?:\d|\{-?\d+\}))?"
_UNIT = re.compile(rf"(?<=[\d}}])(?:{_WORDS})+|(?<=[\d}}])\s*\^(?:\\circ|\{{\\circ\}})")


def right_answer(rows: list[dict[str, Any]]) -> list[float]:
    """1 where a response gives the answer in its prompt's column `answer`, else 0.

    `answer` is a number, a text, or a list of any that are right; of a text with `####`, as in
    GSM8K, what follows counts. A response gives what is in its last `\\boxed{...}`; without one,
    what follows its last `####`; without either its last number if the answer is a number, and its
    last line that isn't blank, or that line's end after ":" or "is", if the answer is a text.

    Numbers are compared exactly as rationals, so 0.5, 1/2, .50 and \\frac12 are the same, and so
    are 5/2, 2 1/2 and 2\\frac{1}{2}; signs of currency and percent, units in \\text{...} and commas
    between thousands don't count. Texts are compared without case, outer punctuation and markup.

    Raises DataError when a row has no such column. Within a prompt all scores are often the same;
    those prompts give no pair.
    """
    scores = []
    for row in rows:
        answers = row["extra"].get("answer")
        answers = answers if isinstance(answers, list) else [answers]
        if not answers or any(x is None for x in answers):
            raise DataError(
                f"prompt {row['prompt_index']} has no answer to compare with. Give the prompts a "
                "column 'answer', or use another scorer."
            )
        scores.append(float(any(_gives(row["response"], str(x)) for x in answers)))
    return scores


def _gives(response: str, answer: str) -> bool:
    answer = _marked(answer) or answer
    said, number = _marked(response), _number(answer)
    if number is not None:
        if said is not None and _number(said) is not None:
            return _number(said) == number
        found = _NUMBER.findall(_spaced(response if said is None else said))
        return bool(found) and _value(found[-1]) == number
    if said is not None:
        return _same_text(said, answer)
    line = next((x for x in reversed(response.splitlines()) if x.strip()), "")
    ends = [line, line.rpartition(":")[2], line.rpartition(" is ")[2]]
    return any(_same_text(end, answer) for end in ends)


def _marked(text: str) -> str | None:
    """What is in the last `\\boxed{...}`, else what follows the last `####` on its line."""
    start = text.rfind("\\boxed{")
    if start >= 0:
        start += len("\\boxed{")
        depth = 1
        for end in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[start:end]
    _, mark, after = text.rpartition("####")
    return next(iter(after.strip().splitlines()), "") if mark else None


def _plain(text: str) -> str:
    return _LATEX.sub(r"\1", _FRACTION.sub(_slashed, text.replace("\u2212", "-")))


def _slashed(fraction: re.Match[str]) -> str:
    above, below = (fraction[1] or fraction[2]), (fraction[3] or fraction[4])
    return f"{above.strip()}/{below.strip()}"


def _spaced(text: str) -> str:
    """`_plain` of a text with numbers: what stands between two keeps them apart."""
    text = _UNIT.sub(" ", _SPACE.sub(" ", _THOUSANDS.sub("", text)))
    return _plain(re.sub(r"(?<=\d)\s*(?=\\[dtc]?frac)", " ", text))


def _number(text: str) -> Fraction | None:
    """The value of a text that is one number and nothing else."""
    text = _spaced(text).strip().strip("*").rstrip(".").strip()
    text = re.sub(r"^-\s+|(?<=\d)\s*/\s*(?=\d)", lambda mark: mark[0].strip(), text)
    return _value(text) if _NUMBER.fullmatch(text) else None


def _value(number: str) -> Fraction | None:
    """The value of what `_NUMBER` found; None of more digits than are read, and over 0."""
    sign = -1 if number.startswith("-") else 1
    whole, _, fraction = number.lstrip("-").replace(",", "").rpartition(" ")
    above, _, below = fraction.partition("/")
    try:
        part = Fraction(above) / Fraction(below or 1)
        if whole and part >= 1:  # two numbers, not a mixed one
            return None
        return sign * (Fraction(whole or 0) + part)
    except (ValueError, ZeroDivisionError):
        return None


def _same_text(a: str, b: str) -> bool:
    folded = [" ".join(_plain(x).casefold().split()).strip(" *_`\"'.,!?()") for x in (a, b)]
    return folded[0] == folded[1] != ""


# Plain language

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
    return [_plainness(text_of(p, role="user"), r) for p, r in zip(prompts, responses)]


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
