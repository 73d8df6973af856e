"""What a run is given, checked before a folder is made: prompts, models, scorers, offline pairs."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fastdpo.data.records import PreferenceRow, Prompt
from fastdpo.data.rendering import render_row
from fastdpo.data.rows import preference_rows, prompt_rows, read_rows
from fastdpo.errors import ConfigError, DataError
from fastdpo.model.load import check_start, load_tokenizer
from fastdpo.pair.offline import offline_pairs
from fastdpo.rounds.config import OWN_POLICIES, IterateConfig
from fastdpo.rounds.processes import Processes
from fastdpo.rounds.resume import release
from fastdpo.score.stage import check_columns
from fastdpo.storage import file_digest
from fastdpo.train.prepare import check_model


def check_inputs(config: IterateConfig, processes: Processes) -> None:
    """Refuse what would fail later.

    Models are loaded as training loads them, on all processes.

    Raises:
        ConfigError, DataError, ModelError: an option, a row or a model; says which and why.
    """
    references = {} if config.reference in OWN_POLICIES else {"reference": config.reference}
    models = references | {"model": config.model}
    for option, name in models.items():
        check_start(name, option=option)
    tokenizer = load_tokenizer(config.model, config.chat_template)
    prompts, held = split_prompts(config, tokenizer)
    if len(prompts) < len(held):
        print(
            f"evaluate.heldout={len(held)} leaves {len(prompts)} prompts to train on; lower it to "
            "train on more"
        )
    replay = config.pair.replay
    replayed = [] if replay is None else preference_rows(read_rows(replay))
    config.score.check_servers(config.all_scorers)
    for spec in dict.fromkeys(config.all_scorers):
        scorer = config.score.load(spec, config.model, config.score.previous_model)
        rows: list[Any] = [*prompts] if spec in config.score.scorers else []
        rows += held if spec == config.evaluated_by else []
        rows += replayed if spec in config.score.scorers and config.scores_offline else []
        check_columns(scorer, ((row.where, row.extra) for row in rows))
        del scorer
    for name in models.values():
        tokens = _tokens(prompts, replayed, held, config, tokenizer)
        check_model(processes.load(name, config.train), tokenizer, config.train, tokens)
    release()


def _tokens(
    prompts: Sequence[Prompt],
    replay: Sequence[PreferenceRow],
    heldout: Sequence[Prompt],
    config: IterateConfig,
    tokenizer: Any,
) -> Iterator[tuple[str, list[int]]]:
    """The tokens that a run is given, each with its place; samples have those of the model."""
    yield "the tokenizer's end token", [tokenizer.eos_token_id]
    for row in (*prompts, *heldout):
        yield row.where, render_row(row, tokenizer, config.string_prompts)
    if replay:
        longest = config.train.max_length
        pairs, _ = offline_pairs(
            replay, tokenizer, max_length=longest, exclude=heldout,
            string_prompts=config.string_prompts, progress=False,
        )  # fmt: skip
        for pair in pairs:
            assert pair.origin is not None
            yield pair.origin.where, pair.prompt_ids + pair.chosen_ids + pair.rejected_ids


def split_prompts(config: IterateConfig, tokenizer: Any) -> tuple[list[Prompt], list[Prompt]]:
    """Training and held-out prompts, split by the seed."""
    rows, count = prompt_rows(read_rows(config.prompts)), config.evaluate.heldout

    def require_more(rows: list[Prompt], what: str) -> None:
        if len(rows) <= count:
            some = f"{len(rows) // 5 or 1}, or to " if len(rows) > 1 else ""
            raise ConfigError(
                f"evaluate.heldout={count} must be < the {len(rows)} prompts {what}: they are kept "
                f"out of training. Set it to {some}0, which evaluates nothing, or give more prompts"
            )

    require_more(rows, f"of {config.prompts}")
    rows = _that_fit(rows, config, tokenizer)
    require_more(rows, f"that fit train.max_length={config.train.max_length}")
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(rows), generator=generator).tolist()
    held = [rows[i] for i in sorted(order[:count])]
    known = {row.key for row in held}
    kept = [rows[i] for i in sorted(order[count:])]
    fresh = [row for row in kept if row.key not in known]
    if not fresh:
        raise ConfigError(
            f"evaluate.heldout={count} holds out all prompts of {config.prompts}, of which the "
            "others are copies; lower it, set it to 0, which evaluates nothing, or give more"
        )
    if len(fresh) < len(kept):
        print(f"{len(kept) - len(fresh)} prompts are those of held-out rows, and left out")
    return fresh[: config.max_prompts], held


def _that_fit(rows: list[Prompt], config: IterateConfig, tokenizer: Any) -> list[Prompt]:
    """The rows whose prompts leave room for a response."""
    room, fitting = config.train.max_length - config.sample.max_new_tokens, []
    for row in rows:
        ids = render_row(row, tokenizer, config.string_prompts)
        if len(ids) <= room:
            fitting.append(row)
        elif config.train.overlong != "drop":
            raise DataError(
                f"{row.where}: the prompt has {len(ids)} tokens, but train.max_length="
                f"{config.train.max_length} - sample.max_new_tokens={config.sample.max_new_tokens} "
                f"leaves {room}; raise train.max_length, lower sample.max_new_tokens, or leave "
                "such prompts out with train.overlong=drop"
            )
    if len(fitting) < len(rows):
        print(f"{len(rows) - len(fitting)} prompts of over {room} tokens are left out")
    return fitting


def decides(
    config: IterateConfig, tokenizer: Any, prompts: list[Prompt], heldout: list[Prompt]
) -> dict[str, Any]:
    """All that decides a run: its options, and the content of the files that they name."""
    digest = hashlib.sha256()
    for row in [*prompts, None, *heldout]:
        source = row and [row.prompt, row.tools, row.chat_template_kwargs]  # decides its tokens
        content = row and [json.dumps(source, sort_keys=True), row.extra]
        digest.update(json.dumps(content, default=str).encode())
    found = {**config.to_dict(), "content of prompts": digest.hexdigest()}
    if config.pair.replay is not None and Path(config.pair.replay).is_file():
        found["content of replay"] = file_digest(Path(config.pair.replay))
    template = json.dumps(tokenizer.chat_template)
    found["content of chat_template"] = hashlib.sha256(template.encode()).hexdigest()
    return found
