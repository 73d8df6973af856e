"""Sampling responses: the first stage of a round.

    config = SampleConfig(num_samples=8)
    with open_sampler("policy", tokenizer, config) as sampler:
        sample(sampler, tokenizer, prompt_rows(read_rows("prompts.jsonl")), config, out_dir,
               round_index=1)

Writes candidates as parts (see `fastdpo.storage`), a `fastdpo.data.records.Candidate` a row, and
beside them `throughput.json`: samples and tokens per second, and how many were cut off.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastdpo.data.clock import KEY, rendering_at
from fastdpo.data.records import Candidate, Prompt
from fastdpo.data.rendering import render_row
from fastdpo.data.tokenize import warn_of_unread
from fastdpo.errors import DataError, ModelError, require
from fastdpo.model.load import (
    context_of,
    end_ids,
    load_causal_lm,
    load_config,
    policy_digest,
    stop_ids,
)
from fastdpo.progress import Bar, bar
from fastdpo.sample.config import SampleConfig
from fastdpo.sample.continuous import ContinuousSampler, flash_attention
from fastdpo.sample.generate import GenerateSampler, LoadedSampler
from fastdpo.sample.sampler import Ending, Output, Sampler, shorter
from fastdpo.sample.server import open_server
from fastdpo.sample.vllm import VllmSampler
from fastdpo.storage import begin_stage, part_path, read_plan, write_json_atomic, write_jsonl_atomic

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

# Which backend drew the samples is in the plan by the name of the one that "auto" found.
# So is what its weights are kept in.
_UNPLANNED = {"backend", "dtype", "server_url", "server_command", "server_timeout", "api_key_env"}


def open_sampler(
    policy: str,
    tokenizer: "PreTrainedTokenizerBase",
    config: SampleConfig,
    *,
    max_length: int | None = None,
    log_path: Path | None = None,
) -> closing[Sampler]:
    """A sampler of the policy by `config.backend`, as a context that closes it at its end.

    `policy` is a folder or hub name in Hugging Face format. transformers' backends load it on the
    GPU if there is one. They, vLLM and a server started here are made anew by each call, so none
    has the weights of an earlier round; a server that runs already must have the policy among its
    models, by name or path. `max_length` is the most tokens of a prompt with its response, by which
    vLLM sizes its cache, and `sample` refuses longer ones; default is the model's context. A server
    started here writes to `log_path`, default a temporary file.

    Raises:
        ModelError: the model or its backend can't be used; says why.
        RemoteError: the server can't be reached, doesn't start, or serves another model.
    """
    if not config.asks_server and config.backend != "vllm":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_causal_lm(policy, dtype=getattr(torch, config.dtype)).to(device)
        sampler = model_sampler(model, tokenizer, config)
        sampler.policy = policy_digest(policy)
        sampler.context = shorter(max_length, sampler.context)
        return closing(sampler)
    longest = shorter(max_length, context_of(load_config(policy)))
    ends = end_ids(stop_ids(policy, tokenizer), tokenizer.eos_token_id)  # type: ignore[arg-type]
    ending = Ending(ends, config.stop, tokenizer)
    if config.asks_server:
        return closing(open_server(policy, ending, config, longest, log_path))
    return closing(VllmSampler(policy, ending, config, longest))


def model_sampler(model: Any, tokenizer: Any, config: SampleConfig) -> LoadedSampler:
    """The sampler of a loaded model: as `config.backend` says, "auto" as `SampleConfig` has it.

    Raises ModelError when the backend can't be used with a loaded model, or with this one.
    """
    if config.backend == "vllm" or config.asks_server:
        raise ModelError(
            "a loaded model can't be sampled by vLLM: give open_sampler its folder, or set backend "
            "to 'generate'"
        )
    if config.backend == "continuous":
        return ContinuousSampler(model, tokenizer, config)
    if config.backend == "auto" and model.device.type == "cuda":
        reason = _why_not_continuous(model, tokenizer, config)
        if reason is None:
            return ContinuousSampler(model, tokenizer, config)
        _log.warning("sampling in padded batches, not by continuous batching: %s", reason)
    return GenerateSampler(model, tokenizer, config)


def _why_not_continuous(model: Any, tokenizer: Any, config: SampleConfig) -> str | None:
    """None where continuous batching should pay on a GPU, and a trial of it works."""
    if config.stop:
        return "it can't end a response at a stop string"
    if flash_attention(model) is None:
        return "without flash-attn it compares every sequence with the cache of all others"
    try:
        trial = replace(config, num_samples=1, batch_prompts=1, max_new_tokens=2)
        sampler = ContinuousSampler(model, tokenizer, trial)
        sampler.generate([[0, 0]], 1, seed=0)
        sampler.forget()
    except ModelError as error:
        return str(error)
    return None


def sample(
    source: "PreTrainedModel | Sampler",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    config: SampleConfig,
    out_dir: Path,
    *,
    round_index: int,
    string_prompts: str = "chat",
    progress: bool = True,
) -> None:
    """Sample `config.num_samples` responses to every prompt and write them to `out_dir` in parts.

    `source` is a loaded model, sampled by `config.backend`, or what `open_sampler` gives for the
    same `config`. A string prompt becomes one user message where the tokenizer has a chat template,
    and with `string_prompts` "text" stays text, as `render_row` has it. A response ends at any end
    token of the model's generation config or of the tokenizer, or at a stop string.

    The plan beside the parts has the prompts and the seed of each, and is written before the first
    is sampled. Parts already there are skipped, so a run that was killed and started again draws
    what an uninterrupted one draws: bit for bit by transformers on a CPU, elsewhere as far as the
    backend repeats itself. The global random state and the model's settings are left as they were.

    Raises DataError when there are no prompts; naming the row, when a prompt can't be rendered, has
    no tokens, leaves no room for `max_new_tokens` in the model's context, or has columns that can't
    be written as JSON; and when `out_dir` holds parts of another plan. ConfigError when the sampler
    was opened with other settings. ModelError and RemoteError as `open_sampler`, at any time.
    """
    if not prompts:
        raise DataError("there are no prompts to sample from. Give at least one.")
    with _sampler_of(source, tokenizer, config) as sampler:
        with rendering_at((read_plan(out_dir) or {}).get(KEY)) as clock:
            longest = config.max_new_tokens
            prompt_ids = _render_all(sampler, tokenizer, prompts, longest, string_prompts)
        starts = range(0, len(prompts), config.batch_prompts)
        seeds = [_part_seed(config.seed, round_index, part) for part in range(len(starts))]
        plan = {
            "sampling": {k: v for k, v in asdict(config).items() if k not in _UNPLANNED},
            "backend": sampler.backend,
            "policy": sampler.policy,
            "dtype": sampler.dtype,
            "round_index": round_index,
            "prompts": _digest(prompts, prompt_ids),
            "parts": len(starts),
            "seeds": seeds,
        }
        begin_stage(out_dir, plan | ({KEY: clock.time} if clock.read else {}))
        undone = [part for part in range(len(starts)) if not part_path(out_dir, part).exists()]

        def draw(part: int) -> list[Output]:
            """Write a part; its responses."""
            first, last = starts[part], starts[part] + config.batch_prompts
            drawn = sampler.generate(prompt_ids[first:last], config.num_samples, seeds[part])
            candidates = []
            for i, outputs in enumerate(drawn, first):
                row, known = prompts[i], prompt_ids[i]
                for j, (ids, reason) in enumerate(outputs):
                    text = sampler.ending.text(ids)
                    candidate = Candidate(i, j, row.prompt, known, text, ids, reason, row.extra)
                    candidates.append(candidate.to_json())
            write_jsonl_atomic(part_path(out_dir, part), candidates)
            return [output for outputs in drawn for output in outputs]

        outputs = _each(draw, undone, sampler.at_once)
        left = sum(len(prompts[starts[i] :][: config.batch_prompts]) for i in undone)
        count = config.num_samples
        done = count * (len(prompts) - left)
        with bar("sampling", count * len(prompts), "response", done=done, shown=progress) as shown:
            rates = _measured(outputs, len(starts), len(undone), shown)
        found = {"backend": sampler.backend, **rates}
        if undone:
            write_json_atomic(Path(out_dir) / "throughput.json", found)


def _sampler_of(
    source: Any, tokenizer: Any, config: SampleConfig
) -> AbstractContextManager[Sampler]:
    """What samples, closed after the block where it is made here."""
    if isinstance(source, torch.nn.Module):
        return closing(model_sampler(source, tokenizer, config))
    for name in ("max_new_tokens", "temperature", "top_p", "stop"):
        mine, its = getattr(config, name), getattr(source.config, name)
        require(config, name, mine == its, f"the sampler's, {its}; open it with this one")
    return nullcontext(source)


def _measured(
    parts: Iterator[list[Output]], total: int, undone: int, shown: Bar
) -> dict[str, float]:
    """What was sampled and how fast, from the responses; shown as they come."""
    counts = {"parts": total, "sampled_parts": undone, "samples": 0, "tokens": 0, "truncated": 0}
    found: dict[str, float] = {**counts}
    start = time.perf_counter()
    for outputs in parts:
        found["samples"] += len(outputs)
        found["tokens"] += sum(len(x.ids) for x in outputs)
        found["truncated"] += sum(x.finish_reason == "length" for x in outputs)
        found["seconds"] = time.perf_counter() - start
        for name in ("samples", "tokens"):
            found[f"{name}_per_second"] = found[name] / found["seconds"]
        shown.note(f"{found['tokens_per_second']:,.0f} tokens/s")
    return found


def _each(
    work: Callable[[int], list[Output]], parts: list[int], at_once: int
) -> Iterator[list[Output]]:
    """The work's results as they come, of several parts at a time where the sampler allows it."""
    if at_once == 1:  # in this thread, whose settings torch keeps
        yield from map(work, parts)
        return
    pool = ThreadPoolExecutor(at_once)
    try:
        for done in as_completed([pool.submit(work, part) for part in parts]):
            yield done.result()
    finally:
        # Closing the sampler ends what still runs.
        pool.shutdown(wait=False, cancel_futures=True)


def _render_all(
    sampler: Sampler,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    string_prompts: str = "chat",
) -> list[list[int]]:
    """Token ids of all prompts, checked before the first is sampled."""
    result, context = [], sampler.context
    for row in prompts:
        ids = render_row(row, tokenizer, string_prompts)
        if not ids:
            raise DataError(f"{row.where}: the prompt has no tokens. Fill it in or remove the row.")
        if sampler.vocab is not None and max(ids) >= sampler.vocab:
            raise DataError(
                f"{row.where}: the prompt has token {max(ids)} "
                f"({tokenizer.convert_ids_to_tokens(max(ids))!r}), but the model has embeddings "
                f"for {sampler.vocab} only. Remove the row, or use the model's own tokenizer."
            )
        if context is not None and len(ids) + max_new_tokens > context:
            raise DataError(
                f"{row.where}: the prompt has {len(ids)} tokens; with max_new_tokens="
                f"{max_new_tokens} that is more than max_length or the model's context, {context}. "
                "Shorten or remove the prompt, lower max_new_tokens, or raise max_length."
            )
        result.append(ids)
    warn_of_unread(prompts, tokenizer)
    return result


def _digest(prompts: Sequence[Prompt], prompt_ids: list[list[int]]) -> str:
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
