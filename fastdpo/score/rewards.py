"""The scorers behind `fastdpo.score.stage.load_scorer`.

Reward models with a scalar head, pairwise judges (a causal language model or a chat endpoint), HTTP
endpoints, and the implicit reward of a policy against the one before it.
"""

import json
import logging
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdpo.data.batch import TokenizedPair
from fastdpo.data.records import Text
from fastdpo.data.rendering import content_of, text_of
from fastdpo.model import rope
from fastdpo.model.load import check_folder, load_tokenizer, weights_digest
from fastdpo.model.logps import load_packed, pair_logps, response_logps
from fastdpo.remote import Endpoint, RemoteError

_log = logging.getLogger(__name__)


# Reward models


def load_reward_model(
    name: str, device: torch.device | str | None, dtype: torch.dtype | None, batch_size: int
) -> "RewardModel":
    """A reward model of a folder or hub name, with its tokenizer; see `load_scorer`.

    Two kinds of checkpoints: transformers' sequence classifiers with one label, and causal models
    with a linear `v_head` in place of the language model's head, as of Starling-RM, which are
    loaded as such classifiers.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    spec = name
    tokenizer_name = name
    if "#" in name and not Path(name).exists():
        name, _, tokenizer_name = name.partition("#")
    check_folder(name)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        value_head = "v_head.weight" in _tensor_names(name)
        num_labels = 1 if value_head else config.num_labels
        model: Any = None
        if num_labels == 1:
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                name,
                dtype=dtype or "auto",
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                **(_as_classifier(config) if value_head else {}),
            )
            tokenizer = AutoTokenizer.from_pretrained(tokenizer_name, trust_remote_code=False)
    except Exception as error:
        first_line = next(iter(str(error).splitlines()), "")
        raise ValueError(
            f"scorer {spec!r}: can't be loaded as a reward model ({type(error).__name__}: "
            f"{first_line}). Name its folder or its hub name; a Python function is written "
            "module:function."
        ) from error
    if model is None:
        raise ValueError(
            f"scorer {spec!r}: the model has {num_labels} labels. "
            "A reward model is a sequence classifier with one."
        )
    if loading["missing_keys"]:
        raise ValueError(
            f"scorer {spec!r}: the checkpoint has no {', '.join(sorted(loading['missing_keys']))}. "
            "A reward model is a sequence classifier with a trained head."
        )
    text_config = config.get_text_config()
    pad_id = model.config.get_text_config().pad_token_id
    if pad_id is None and tokenizer.pad_token_id not in (None, tokenizer.eos_token_id):
        # An end token can't pad: the model scores at the last token that isn't padding.
        pad_id = tokenizer.pad_token_id
        model.config.get_text_config().pad_token_id = pad_id
    model.config.use_cache = False
    context = min(
        getattr(text_config, "max_position_embeddings", None) or math.inf,
        tokenizer.model_max_length,
    )
    if pad_id is None:
        batch_size = 1
    model = model.eval().to(_device(device))
    by_length = bool(rope.attach(model))
    return RewardModel(
        model, tokenizer, pad_id, batch_size, context, until_end=value_head, by_length=by_length
    )


def _device(device: torch.device | str | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _tensor_names(name: str) -> set[str]:
    """Names of the tensors in a checkpoint's safetensors files."""
    from safetensors import safe_open
    from transformers.utils.hub import cached_file

    missing: Any = {"_raise_exceptions_for_missing_entries": False}
    index = cached_file(name, "model.safetensors.index.json", **missing)
    if index is not None:
        return set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"])
    file = cached_file(name, "model.safetensors", **missing)
    if file is None:
        return set()
    with safe_open(file, "pt") as tensors:
        return set(tensors.keys())


def _as_classifier(config: Any) -> dict[str, Any]:
    """Options that load `transformer` and `v_head` as the body and head of a classifier."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    model_class: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    body = model_class.base_model_prefix
    names = {r"^transformer\.": f"{body}.", r"^v_head\.": "score."}
    return {"num_labels": 1, "key_mapping": names}


@dataclass(frozen=True)
class RewardModel:
    """Scores of a sequence classifier with one label, read at the last token.

    Of what is longer than its context it reads the end; a warning counts these.
    """

    model: Any
    tokenizer: Any
    pad_id: int | None
    batch_size: int
    context: float
    # The published text of models with a v_head ends in the end token; templates add a line break.
    until_end: bool = False
    # Its rotary frequencies depend on a row's length, which its positions tell (`model.rope`).
    by_length: bool = False

    @torch.inference_mode()
    def __call__(self, prompts: list[Text], responses: list[str]) -> list[float]:
        ids = [self._render(prompt, response) for prompt, response in zip(prompts, responses)]
        long = sum(len(x) > self.context for x in ids)
        if long:
            _log.warning(
                "%d of %d prompts with their responses are longer than the reward model's context "
                "of %d tokens; it reads their ends",
                long, len(ids), self.context,
            )  # fmt: skip
            ids = [x[-int(self.context) :] if len(x) > self.context else x for x in ids]
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
            return self.tokenizer(text=text_of(prompt) + "\n" + response)["input_ids"]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        messages = [*messages, {"role": "assistant", "content": response}]
        if self.until_end:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False).rstrip()
            return self.tokenizer(text=text, add_special_tokens=False)["input_ids"]
        encoded = self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
        return encoded["input_ids"]

    def _logits(self, batch: list[list[int]]) -> Tensor:
        width = max(map(len, batch))
        pad = self.pad_id or 0
        # On the right: absolute positions then start at 0 in every row.
        ids = torch.tensor([x + [pad] * (width - len(x)) for x in batch])
        mask = torch.tensor([[1] * len(x) + [0] * (width - len(x)) for x in batch])
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self.by_length:
            inputs["position_ids"] = (mask.cumsum(1) - 1) * mask
        return self.model(**{k: x.to(self.model.device) for k, x in inputs.items()}).logits.float()


def load_implicit(
    policy: str,
    previous: str,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    batch_size: int,
) -> "ImplicitReward":
    """The implicit reward of two folders or hub names."""
    names = {"policy": policy, "previous": previous}
    models = {key: load_packed(x, device, dtype or torch.float32) for key, x in names.items()}
    digests = {key: weights_digest(model)[:16] for key, model in models.items()}
    if digests["policy"] == digests["previous"]:
        raise ValueError(
            f"scorer 'implicit': {policy} and {previous} have the same weights, so every score "
            "would be 0. previous must be the policy before."
        )
    return ImplicitReward(**models, batch_size=batch_size, digests=digests)


@dataclass(frozen=True)
class ImplicitReward:
    """log pi_t(y|x) - log pi_{t-1}(y|x), summed over the response's tokens, in nats; without beta.

    DPO's implicit reward (arXiv 2305.18290, equation 5, up to beta and a term of the prompt alone)
    used as a score, as DICE does (arXiv 2406.09760). A response without tokens scores 0.
    """

    policy: Any
    previous: Any
    batch_size: int
    digests: dict[str, str]  # of both models' weights

    def __call__(self, rows: list[dict[str, Any]]) -> list[float]:
        """Rows are candidates, with prompt_ids and response_ids."""
        new_R, old_R = (
            response_logps(model, rows, batch_size=self.batch_size)
            for model in (self.policy, self.previous)
        )
        return (new_R - old_R).tolist()


def load_likelihood(
    policy: str, device: torch.device | str | None, dtype: torch.dtype | None, batch_size: int
) -> "Likelihood":
    """The mean log-probability under a folder or hub name."""
    model = load_packed(policy, device, dtype or torch.float32)
    return Likelihood(model, batch_size, {"policy": weights_digest(model)[:16]})


@dataclass(frozen=True)
class Likelihood:
    """log pi(y|x) / |y|, the mean over the response's tokens, in nats a token.

    How CREAM (arXiv 2410.12735; its released code) ranks by a model that has no reference, which in
    its first round is M0. A response without tokens scores 0.
    """

    policy: Any
    batch_size: int
    digests: dict[str, str]  # of the model's weights

    def __call__(self, rows: list[dict[str, Any]]) -> list[float]:
        """Rows are candidates, with prompt_ids and response_ids."""
        logp_R = response_logps(self.policy, rows, batch_size=self.batch_size)
        counts_R = torch.tensor([max(1, len(row["response_ids"])) for row in rows])
        return (logp_R / counts_R).tolist()


# Judges

JUDGE_TEMPLATE = """\
Two answers to the same message follow. Decide which one is better: more correct, more helpful and \
more to the point. Neither its length nor its place makes an answer better.

[Message]
{prompt}

[Answer A]
{first}

[Answer B]
{second}

Which answer is better? Reply with one letter, A or B."""


@dataclass(frozen=True)
class Judge:
    """A pairwise judge; every comparison is made in both orders and averaged.

    Judges favour a place: swapping and averaging takes that out (arXiv 2305.17926, "balanced
    position calibration"). `ask` gives the probability that the answer is the letter A, of each
    text. The same two responses are a tie, without asking.
    """

    ask: Callable[[list[str]], list[float]]
    template: str = JUDGE_TEMPLATE

    def compare(
        self, prompts: Sequence[Text], first: Sequence[str], second: Sequence[str]
    ) -> list[float]:
        """Probability that `first[i]` is the better response to `prompts[i]`."""
        asked = [i for i in range(len(prompts)) if first[i] != second[i]]
        texts = []
        for i in asked:
            texts.append(self._text(prompts[i], first[i], second[i]))
            texts.append(self._text(prompts[i], second[i], first[i]))
        wins = [0.5] * len(prompts)
        answers = self.ask(texts) if texts else []
        for i, forward, backward in zip(asked, answers[0::2], answers[1::2]):
            wins[i] = (forward + 1 - backward) / 2
        return wins

    def __call__(self, rows: list[dict[str, Any]]) -> list[float]:
        """Mean probability of each response to win against the others of its prompt.

        0.5 where there are none. `rows` hold whole prompts: n responses take n (n - 1) questions.
        """
        members: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            members.setdefault(row["prompt_index"], []).append(i)
        contests = [pair for group in members.values() for pair in combinations(group, 2)]
        wins = self.compare(
            [rows[i]["prompt"] for i, _ in contests],
            [rows[i]["response"] for i, _ in contests],
            [rows[j]["response"] for _, j in contests],
        )
        sums = [0.0] * len(rows)
        for (i, j), win in zip(contests, wins):
            sums[i] += win
            sums[j] += 1 - win
        others = [len(members[row["prompt_index"]]) - 1 for row in rows]
        return [total / count if count else 0.5 for total, count in zip(sums, others)]

    def _text(self, prompt: Text, first: str, second: str) -> str:
        return self.template.format(prompt=_conversation(prompt), first=first, second=second)


def check_template(template: str) -> None:
    """Raise ValueError unless a judge's template has the fields prompt, first and second only."""
    names = "{prompt}, {first} and {second}"
    try:
        filled = template.format(prompt="\0p", first="\0f", second="\0s")
    except (LookupError, ValueError, AttributeError) as error:
        raise ValueError(
            f"judge_template must have the fields {names} only ({type(error).__name__}: {error}); "
            "write a brace that is meant as {{ or }}"
        ) from error
    if not all(mark in filled for mark in ("\0p", "\0f", "\0s")):
        raise ValueError(f"judge_template must have the fields {names}, got {template!r}")


def _conversation(prompt: Text) -> str:
    """What the answers reply to; roles are named where there is more than one message."""
    if isinstance(prompt, str) or len(prompt) == 1:
        return text_of(prompt)
    return "\n\n".join(f"{message['role']}: {content_of(message)}" for message in prompt)


def load_local_judge(
    name: str, device: torch.device | str | None, dtype: torch.dtype | None, batch_size: int
) -> "LocalJudge":
    """A causal language model that answers by the log-probabilities of the letters."""
    tokenizer = load_tokenizer(name)
    judge = LocalJudge(load_packed(name, device, dtype or "auto"), tokenizer, batch_size)
    judge.letters("x")
    return judge


@dataclass(frozen=True)
class LocalJudge:
    """Probability of A against B as the next token of a causal language model."""

    model: Any
    tokenizer: Any
    batch_size: int

    def __call__(self, texts: list[str]) -> list[float]:
        pairs = []
        for text in texts:
            ids, a, b = self.letters(text)
            pairs.append(TokenizedPair(ids, [a], [b]))
        logp_P2 = pair_logps(self.model, pairs, batch_size=self.batch_size)
        return torch.sigmoid(logp_P2[:, 0] - logp_P2[:, 1]).tolist()

    def letters(self, text: str) -> tuple[list[int], int, int]:
        """Token ids of a question, and of A and B after it.

        Raises ValueError where the letters aren't one token each.
        """
        if self.tokenizer.chat_template is None:
            rendered, special = text + "\nAnswer:", True
        else:
            special = False
            # Models that can think first are told not to; other templates pass the option over.
            rendered = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,
            )

        def ids_of(ending: str) -> list[int]:
            return self.tokenizer(text=rendered + ending, add_special_tokens=special)["input_ids"]

        ids = ids_of("")
        # A word begins with a space, unless there is one already.
        for space in ("",) if rendered[-1:].isspace() else (" ", ""):
            a, b = ids_of(space + "A"), ids_of(space + "B")
            if a[:-1] == ids == b[:-1] and a[-1] != b[-1]:
                return ids, a[-1], b[-1]
        raise ValueError(
            "the judge's tokenizer doesn't make one token each of the letters A and B after a "
            "question. Use another model, or serve it and name its URL."
        )


# Servers


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
        found = self.endpoint.ask_all(bodies, self._scores, lambda x: all(map(_is_finite, x)))
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
        bodies = []
        for prompt, response in zip(prompts, responses):
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            messages = [*messages, {"role": "assistant", "content": response}]
            body = {"model": self.model, "messages": messages, "use_activation": False}
            bodies.append({**body, "add_generation_prompt": False})
        return self.endpoint.ask_all(bodies, self._last, _is_finite)

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


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


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
