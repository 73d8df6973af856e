"""Sampling responses: the first stage of a round.

    sample(model, tokenizer, prompt_rows(read_rows("prompts.jsonl")), SamplingConfig(), out_dir,
           round_index=1)

Writes candidates as parts (see `fastdpo.storage`), one row per response:

    prompt_index, sample_index    place of the prompt in `prompts`, of the response among its own
    prompt, prompt_ids            as given, and the tokens the model saw
    response, response_ids        text without special tokens; tokens up to and with the end token
    finish_reason                 "stop" at an end token, "length" when cut at max_new_tokens
    extra                         the other columns of the prompt
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastdpo.data import DataError, PromptRow, render_prompt
from fastdpo.storage import begin_stage, part_path, write_jsonl_atomic

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class SamplingConfig:
    """How to sample. Raises ValueError, naming the field, when one is out of its range.

    Responses come from exactly this distribution: the top-k, repetition penalty and other settings
    that a model brings along in its generation config are left out. `batch_prompts` is a part of
    the plan: another value gives other random numbers.
    """

    num_samples: int = 4  # responses per prompt
    max_new_tokens: int = 256
    temperature: float = 1.0  # 0 takes the most probable token
    top_p: float = 1.0
    batch_prompts: int = 8  # prompts per part; num_samples times as many sequences at once
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_samples", "max_new_tokens", "batch_prompts"):
            value = getattr(self, name)
            _require(name, value, type(value) is int and value >= 1, "an int of at least 1")
        _require("seed", self.seed, type(self.seed) is int, "an int")
        finite = _is_number(self.temperature) and 0 <= self.temperature < float("inf")
        _require("temperature", self.temperature, finite, "a finite number of at least 0")
        in_range = _is_number(self.top_p) and 0 < self.top_p <= 1
        _require("top_p", self.top_p, in_range, "a number above 0 and at most 1")
        if self.temperature == 0:
            allowed = "1 with temperature 0, where all samples are the same"
            _require("num_samples", self.num_samples, self.num_samples == 1, allowed)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require(name: str, value: Any, valid: bool, allowed: str) -> None:
    if not valid:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def sample(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[PromptRow],
    config: SamplingConfig,
    out_dir: Path,
    *,
    round_index: int,
    progress: bool = True,
) -> None:
    """Sample `config.num_samples` responses to every prompt and write them to `out_dir` in parts.

    A string prompt becomes one user message where the tokenizer has a chat template. A response
    ends at any end token of the model's generation config or of the tokenizer. Parts already there
    are skipped, and every part has its own seed, so a run that was killed and started again writes
    what an uninterrupted one writes. The global random state and the model's settings are left as
    they were.

    Raises DataError when there are no prompts; naming the row, when a prompt can't be rendered, has
    no tokens, leaves no room for `max_new_tokens` in the model's context, or has columns that can't
    be written as JSON; and when `out_dir` holds parts of another plan.
    """
    from tqdm import tqdm

    if not prompts:
        raise DataError("there are no prompts to sample from. Give at least one.")
    prompt_ids = _render_all(model, tokenizer, prompts, config.max_new_tokens)
    starts = range(0, len(prompts), config.batch_prompts)
    plan = {
        "sampling": asdict(config),
        "round_index": round_index,
        "prompts": _digest(prompts, prompt_ids),
        "parts": len(starts),
    }
    begin_stage(out_dir, plan)
    todo = [part for part in range(len(starts)) if not part_path(out_dir, part).exists()]
    num_tokens, start_time = 0, time.perf_counter()
    with (
        _only_our_settings(model, tokenizer, config) as generation_config,
        tqdm(desc="sampling", unit="part", total=len(starts), disable=not progress) as bar,
    ):
        bar.update(len(starts) - len(todo))
        for part in todo:
            batch = range(starts[part], min(starts[part] + config.batch_prompts, len(prompts)))
            seed = _part_seed(config.seed, round_index, part)
            responses = _generate(
                model, [prompt_ids[i] for i in batch], config.num_samples, generation_config, seed
            )
            rows = [
                _candidate(i, j, prompts[i], prompt_ids[i], response, tokenizer, generation_config)
                for i, of_prompt in zip(batch, responses)
                for j, response in enumerate(of_prompt)
            ]
            write_jsonl_atomic(part_path(out_dir, part), rows)
            num_tokens += sum(len(row["response_ids"]) for row in rows)
            rate = num_tokens / (time.perf_counter() - start_time)
            bar.set_postfix_str(f"{rate:,.0f} tokens/s")
            bar.update()


def _render_all(
    model: Any, tokenizer: Any, prompts: Sequence[PromptRow], max_new_tokens: int
) -> list[list[int]]:
    """Token ids of all prompts, checked before the first is sampled."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    result = []
    for row in prompts:
        try:
            ids = render_prompt(
                row.prompt, tokenizer, row.tools, row.chat_template_kwargs, as_chat=True
            )
        except DataError as error:
            raise DataError(f"{row.where}: {error}") from error
        if not ids:
            raise DataError(f"{row.where}: the prompt has no tokens. Fill it in or remove the row.")
        if context is not None and len(ids) + max_new_tokens > context:
            raise DataError(
                f"{row.where}: the prompt has {len(ids)} tokens; with max_new_tokens="
                f"{max_new_tokens} that is more than the model's context of {context}. "
                "Shorten or remove the prompt, or lower max_new_tokens."
            )
        result.append(ids)
    return result


def _digest(prompts: Sequence[PromptRow], prompt_ids: list[list[int]]) -> str:
    digest = hashlib.sha256()
    for row, ids in zip(prompts, prompt_ids):
        try:
            text = json.dumps([row.prompt, ids, row.extra], allow_nan=False, ensure_ascii=False)
            digest.update(text.encode("utf-8"))
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{row.where}: a column can't be written as JSON ({error}). "
                "Convert it to text, or remove it."
            ) from error
    return digest.hexdigest()


def _part_seed(seed: int, round_index: int, part: int) -> int:
    digest = hashlib.sha256(f"{seed}/{round_index}/{part}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@contextmanager
def _only_our_settings(
    model: Any, tokenizer: Any, config: SamplingConfig
) -> Iterator["GenerationConfig"]:
    """The model in eval mode and without a generation config of its own."""
    from transformers import GenerationConfig

    own, was_training = model.generation_config, model.training
    end_ids = _end_ids(own.eos_token_id, tokenizer.eos_token_id)
    pad_id = tokenizer.pad_token_id
    if pad_id is None:
        pad_id = end_ids[0] if end_ids else 0
    options: dict[str, Any] = {"do_sample": False}
    if config.temperature > 0:
        # top_k is 50 where it isn't set.
        options = {
            "do_sample": True,
            "temperature": float(config.temperature),
            "top_p": float(config.top_p),
            "top_k": 0,
        }
    generation_config = GenerationConfig(
        max_new_tokens=config.max_new_tokens,
        eos_token_id=end_ids or None,
        pad_token_id=pad_id,
        bos_token_id=own.bos_token_id,
        use_cache=True,
        **options,
    )
    # generate fills whatever a given config leaves open from the model's own.
    model.generation_config = GenerationConfig()
    model.eval()
    try:
        yield generation_config
    finally:
        model.generation_config = own
        model.train(was_training)


def _end_ids(*ids: int | list[int] | None) -> list[int]:
    lists = [[x] if isinstance(x, int) else list(x) for x in ids if x is not None]
    return list(dict.fromkeys(i for one in lists for i in one))


@torch.no_grad()
def _generate(
    model: Any,
    prompts: list[list[int]],
    num_samples: int,
    generation_config: "GenerationConfig",
    seed: int,
) -> list[list[list[int]]]:
    """Response ids, `[prompt][sample]`, each up to and with its first end token."""
    width = max(map(len, prompts))
    pad: Any = generation_config.pad_token_id
    # On the left, so that every response continues its prompt.
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    ids, mask = (x.repeat_interleave(num_samples, 0).to(model.device) for x in (ids, mask))
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=ids, attention_mask=mask, generation_config=generation_config
        )
    end_ids: Any = generation_config.eos_token_id or []
    responses = [_until_end(row, end_ids) for row in output[:, width:].tolist()]
    return [responses[i : i + num_samples] for i in range(0, len(responses), num_samples)]


def _until_end(ids: list[int], end_ids: list[int]) -> list[int]:
    stop = next((i for i, token in enumerate(ids) if token in end_ids), len(ids))
    return ids[: stop + 1]


def _candidate(
    prompt_index: int,
    sample_index: int,
    row: PromptRow,
    prompt_ids: list[int],
    response_ids: list[int],
    tokenizer: Any,
    generation_config: Any,
) -> dict[str, Any]:
    stopped = response_ids[-1] in (generation_config.eos_token_id or [])
    return {
        "prompt_index": prompt_index,
        "sample_index": sample_index,
        "prompt": row.prompt,
        "prompt_ids": prompt_ids,
        "response": tokenizer.decode(response_ids, skip_special_tokens=True),
        "response_ids": response_ids,
        "finish_reason": "stop" if stopped else "length",
        "extra": row.extra,
    }
