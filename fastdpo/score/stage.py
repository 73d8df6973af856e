"""Scoring responses: the second stage of a round.

    score(load_scorer("my_rewards:helpful"), candidates_dir, scores_dir)

Writes one part of scores per part of candidates, see `fastdpo.data.parts`. Several scorers write a
folder each; `fastdpo.pair.transforms` makes one score of them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdpo.data.clock import KEY, rendering_at
from fastdpo.data.parts import part_digest, score_row, scored_digests
from fastdpo.data.records import Candidate, Text
from fastdpo.errors import DataError, is_number
from fastdpo.progress import bar
from fastdpo.remote import Endpoint
from fastdpo.score.function import defined_at, own_lines
from fastdpo.storage import begin_stage, list_parts, read_jsonl, read_plan, write_jsonl_atomic


@dataclass(frozen=True)
class Scorer:
    """A function to as many finite numbers as there are responses, higher is better.

    It takes prompts and as many responses (`on` is "text"), or candidates, with all samples of a
    prompt (`on` is "rows"). Prompts are strings or message lists, as they were given to sampling.

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


def score(scorer: Scorer, rows_dir: Path, out_dir: Path, *, progress: bool = True) -> None:
    """Score all candidates in `rows_dir` and write the scores to `out_dir` in parts.

    The scorer is called once per part; parts already there are skipped, unless they are of other
    candidates by their content: those are scored anew. What a server can't do for a moment is tried
    again by the scorer itself (`Remote`). What it has answered for a part that isn't complete is
    kept as `.part-00000.jsonl.partial`, and not asked again.

    Raises DataError when candidates are missing or malformed, when `out_dir` holds the scores of
    another scorer or of other candidates by their plan, and when the scorer raises or returns
    anything but one finite number per response, with its own lines: then nothing of that part is
    written, earlier parts stay.
    """
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
        with bar("scoring", len(parts), "part", shown=progress) as shown:
            for path in parts:
                out_path = Path(out_dir) / path.name
                with shown.part():
                    if not (out_path.exists() and scored_digests(out_path) == {part_digest(path)}):
                        _score_part(scorer, path, out_path)


def _columns_of(parts: list[Path]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for path in parts:
        for i, row in enumerate(read_jsonl(path)):
            yield f"{path}:{i + 1} (prompt {row.get('prompt_index')})", row.get("extra") or {}


def _score_part(scorer: Scorer, path: Path, out_path: Path) -> None:
    partial = out_path.with_name(f".{path.name}.partial")
    rows = [
        Candidate.from_json(row, f"{path}:{i + 1}", text_only=scorer.on == "text")
        for i, row in enumerate(read_jsonl(path))
    ]
    with scorer.endpoint.keeping(partial) if scorer.endpoint else nullcontext():
        scores = _scores_of(scorer, rows, path)
    digest = part_digest(path)
    write_jsonl_atomic(out_path, [score_row(row, x, digest) for row, x in zip(rows, scores)])
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


def _scores_of(scorer: Scorer, rows: list[Candidate], path: Path) -> list[float]:
    lines, prompts = f"lines 1 to {len(rows)}", (rows[0].prompt_index, rows[-1].prompt_index)
    these = f"{path}, {lines} (prompt {prompts[0]} to prompt {prompts[1]})"
    at = defined_at(scorer.function)
    try:
        if scorer.on == "rows":
            values = scorer(rows)
        else:
            values = scorer([row.prompt for row in rows], [row.response for row in rows])
    except Exception as error:
        raise DataError(
            f"scorer {scorer.name} raised {type(error).__name__} for {these}: {error}"
            + (own_lines(error, skip=(__file__,)) or at)
        ) from error
    if hasattr(values, "tolist"):  # an array or a tensor
        values = values.tolist()
    if not isinstance(values, list | tuple) or len(values) != len(rows):
        found = len(values) if isinstance(values, list | tuple) else f"a {type(values).__name__}"
        raise DataError(
            f"scorer {scorer.name} returned {'None' if values is None else found} for {these}. "
            f"It must return a list of {len(rows)} numbers, one per response.{at}"
        )
    for i, (row, value) in enumerate(zip(rows, values)):
        if not is_number(value):
            raise DataError(
                f"scorer {scorer.name} returned {value!r} for prompt {row.prompt_index}, sample "
                f"{row.sample_index} ({path}:{i + 1}). Every score must be a finite number.{at}"
            )
    return list(map(float, values))
