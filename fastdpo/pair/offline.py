"""Offline preference pairs beside sampled ones: read, scored, and compared with fresh samples.

    offline, dropped = offline_pairs(preference_rows(read_rows(path)), tokenizer, max_length=1024)
    write_candidates(offline, folder / "candidates")  # then scored as samples are
    offline = with_scores(offline, folder / "candidates", [folder / "scores"])
    fresh = fresh_scores(samples / "candidates", [samples / "scores"])
    pair(..., PairConfig(replay_share=0.5, fresh_threshold=0.0), replay=offline, fresh=[fresh])

Only the first step and the last are needed to replay pairs; scores are for `fresh_threshold`, and
those of several scorers for `flip_share` and `soft_label`. Fresh samples are of `prompt_rows`.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdpo.data.columns import COUNTS
from fastdpo.data.lost import is_empty
from fastdpo.data.parts import read_scored
from fastdpo.data.records import PairRow, PreferenceRow, Prompt, Scored, prompt_key
from fastdpo.data.rendering import last_token, render_row, special_ids
from fastdpo.data.tokenize import tokenize_dataset
from fastdpo.errors import ConfigError, DataError
from fastdpo.storage import begin_stage, part_path, write_jsonl_atomic

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def offline_pairs(
    rows: Sequence[PreferenceRow],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None,
    exclude: Sequence[Prompt] = (),
    max_new_tokens: int | None = None,
    stop_ids: Collection[int] | None = None,
    string_prompts: str = "chat",
    progress: bool = True,
) -> tuple[list[PairRow], dict[str, int]]:
    """Preference data as rows of pairs, tokenized as samples are; and what was dropped by reason.

    String prompts are taken as `string_prompts` says, as in sampling. A pair with a side, prompt +
    response, over `max_length` tokens is dropped. So is one whose prompt is among `exclude`, by its
    messages or by its tokens, as those held out to evaluate on; and with `max_new_tokens`, one
    whose prompt leaves no room in `max_length` for a fresh sample of so many tokens. The
    other reasons, and `stop_ids`, are those of `tokenize_dataset`.

    prompt_index is the place in `rows`, scores are None, source is "offline", weight, margin and
    label_smoothing are the row's, and origin has the data's other columns. The finish reason of a
    response is "stop" where it ends in an end token; where its row has `append_eos` false, and it
    doesn't, it is "length".

    Raises DataError when a row can't be rendered, has two prompts or steps before its responses, or
    when no pair is left.
    """
    for row in rows:
        if row.rejected_prompt is not None or row.prefix is not None:
            what = "two prompts" if row.prefix is None else "initial_reason_steps"
            raise DataError(
                f"{row.where}: it has {what}, and pairs are replayed that have one prompt and end. "
                "Leave the row out, or train on it by fastdpo train."
            )
    room = None
    if max_length is not None and max_new_tokens is not None:
        room = max_length - max_new_tokens
    places, dropped = _usable(rows, tokenizer, exclude, room, string_prompts)
    if rows and not places:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in dropped.items())
        raise DataError(
            f"{rows[0].where} to {rows[-1].where}: no pair is left to replay ({reasons}). Give "
            "pairs of other prompts."
        )
    result = tokenize_dataset(
        [replace(rows[i], extra={"place": i}) for i in places],
        tokenizer,
        max_length=max_length,
        overlong="drop",
        stop_ids=stop_ids,
        string_prompts=string_prompts,
        progress=progress,
    )
    pairs = []
    for pair in result.pairs:
        place = pair.extra["place"]
        row, sides = rows[place], [pair.chosen_ids, pair.rejected_ids]
        found = [tokenizer.decode(ids, skip_special_tokens=True) for ids in sides]
        finish = ["stop" if row.append_eos else _finish(ids, tokenizer) for ids in sides]
        origin = Prompt(row.where, row.prompt, row.tools, row.chat_template_kwargs, row.extra)
        columns: Any = row.prompt, pair.prompt_ids, *found, *sides, None, None, *finish
        counts: Any = {name: row.numbers[name] for name in COUNTS if name in row.numbers}
        pairs.append(PairRow(place, *columns, source="offline", origin=origin, **counts))
    return pairs, dropped | result.dropped


def prompt_rows(pairs: Sequence[PairRow]) -> list[Prompt]:
    """The prompts of offline pairs, in order, with all that sampling and scoring them takes: tools,
    chat_template_kwargs and the data's other columns, as `answer`."""
    return [row.origin for row in pairs if row.origin]


def write_candidates(pairs: Sequence[PairRow], directory: Path, *, part_pairs: int = 64) -> None:
    """Write offline pairs as candidates, for `fastdpo.score`: sample 0 is chosen, 1 not.

    Parts of `part_pairs` pairs, both sides of a pair in one; those already there are skipped.

    Raises DataError when `directory` holds parts of other pairs.
    """
    ids = [[row.prompt_ids, row.chosen_ids, row.rejected_ids] for row in pairs]
    starts = range(0, len(pairs), part_pairs)
    plan = {
        "offline": hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
        "part_pairs": part_pairs,
        "parts": len(starts),
    }
    begin_stage(directory, plan)
    for part, start in enumerate(starts):
        path = part_path(directory, part)
        if not path.exists():
            these = pairs[start : start + part_pairs]
            write_jsonl_atomic(path, [x.to_json() for row in these for x in row.candidates()])


def with_scores(
    pairs: Sequence[PairRow],
    candidates_dir: Path,
    scores_dirs: Sequence[Path],
    weights: Sequence[float] | None = None,
) -> list[PairRow]:
    """Offline pairs with the scores of what `write_candidates` wrote of them.

    Several scorers are added with `weights`, by default 1; their transforms are left out, since two
    responses are no group of samples to compare within. Each one's own score is kept in
    scores_chosen and scores_rejected, as the rules of pairing keep those of samples.

    Raises DataError when the candidates are of other pairs, or scores are missing; ConfigError when
    there isn't a weight for each scorer.
    """
    found = {row.place: row for row in _added(candidates_dir, scores_dirs, weights)}
    result = []
    for row in pairs:
        chosen, rejected = (found.get((row.prompt_index, index)) for index in (0, 1))
        known = [x.response_ids for x in (chosen, rejected) if x]
        if known != [row.chosen_ids, row.rejected_ids] or not (chosen and rejected):
            raise DataError(
                f"{candidates_dir}: holds other responses for offline pair {row.prompt_index}. "
                "Write the candidates of these pairs to a new directory and score them."
            )
        scored = PairRow.of(chosen, rejected)
        names = ("score_chosen", "score_rejected", "scores_chosen", "scores_rejected")
        result.append(replace(row, **{name: getattr(scored, name) for name in names}))
    return result


def fresh_scores(
    candidates_dir: Path, scores_dirs: Sequence[Path], weights: Sequence[float] | None = None
) -> dict[str, float]:
    """The score of each prompt's first sample, by `Prompt.key`, for `filters.beats_fresh`.

    Several scorers are added as in `with_scores`. Raises as that does.
    """
    rows = _added(candidates_dir, scores_dirs, weights)
    return {prompt_key(row.prompt): row.score for row in reversed(rows)}  # the first counts


def _added(
    candidates_dir: Path, scores_dirs: Sequence[Path], weights: Sequence[float] | None
) -> list[Scored]:
    """Candidates in order, each with the weighted sum of its scores."""
    weights = [1.0] * len(scores_dirs) if weights is None else weights
    if not scores_dirs or len(weights) != len(scores_dirs):
        raise ConfigError(
            f"needs a weight for each of at least one scorer, got {len(weights)} weights for "
            f"{len(scores_dirs)} scorers"
        )
    return [
        replace(row, score=sum(w * x for w, x in zip(weights, row.scores)))
        for row in read_scored(candidates_dir, scores_dirs)
    ]


def _usable(
    rows: Sequence[PreferenceRow],
    tokenizer: Any,
    exclude: Sequence[Prompt],
    room: int | None,
    string_prompts: str,
) -> tuple[list[int], dict[str, int]]:
    """Places of the rows whose prompt is not excluded and has at most `room` tokens."""
    # Messages alone miss a template's defaults written out, tokens alone other tools.
    keys = {row.key for row in exclude}
    tokens = {tuple(render_row(row, tokenizer, string_prompts)) for row in exclude}
    places, dropped = [], Counter[str]()
    for i, row in enumerate(rows):
        if is_empty(row.chosen) or is_empty(row.rejected):
            places.append(i)  # dropped with its reason, whatever the prompt
            continue
        ids = render_row(row, tokenizer, string_prompts)
        if prompt_key(row.prompt) in keys or tuple(ids) in tokens:
            dropped["offline: prompt is held out"] += 1
        elif room is not None and len(ids) > room:
            dropped["offline: prompt leaves no room for max_new_tokens"] += 1
        else:
            places.append(i)
    return places, dict(dropped)


def _finish(ids: list[int], tokenizer: Any) -> str:
    last = last_token(ids, tokenizer)
    return "stop" if last >= 0 and ids[last] in special_ids(tokenizer) else "length"
