"""Pairing scored responses: the third stage of a round.

    pair(candidates_dir, [scores_dir], Path("pairs.jsonl"), PairConfig(rule="curriculum"))
    pairs = load_pairs(Path("pairs.jsonl"))

With the rule listwise it writes lists, which `load_lists` reads: all responses to a prompt in one.

How responses are paired is in `fastdpo.pair.rules`, what drops and weighs pairs in
`fastdpo.pair.filters`, what scorers say of a label in `fastdpo.pair.votes`, and where offline pairs
come from in `fastdpo.pair.offline`.
"""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from fastdpo.data.examples import TokenizedExample, TokenizedList, TokenizedPair
from fastdpo.data.parts import read_scored
from fastdpo.data.records import ListRow, PairRow, Scored, prompt_key
from fastdpo.data.rows import read_rows
from fastdpo.errors import ConfigError, DataError
from fastdpo.pair import filters, rules, votes
from fastdpo.pair.config import PairConfig
from fastdpo.pair.transforms import References, shape, unshaped
from fastdpo.storage import check_rows, write_json_atomic, write_jsonl_atomic

_COUNTS = ("score_chosen", "score_rejected", "weight", "label_smoothing", "margin")
_EXTRA = ("prompt_index", "score_chosen", "score_rejected", "chosen_finish", "rejected_finish",
          "finish_reasons", "stage", "source")  # fmt: skip
_SATURATED = "scores equal after shaping"
Measure = Callable[[list[TokenizedPair]], filters.Measured]
Fresh = Mapping[str, float]  # the score of a fresh sample by `Prompt.key`
Chosen = TypeVar("Chosen", PairRow, ListRow)
Tokenized = TypeVar("Tokenized", TokenizedPair, TokenizedList)
Example = TypeVar("Example", bound=TokenizedExample)


def select(rows: Sequence[Scored], config: PairConfig) -> rules.Pairing:
    """Drop responses and apply the rule, as `config` says: all of `pair` that needs only scores.

    Beside the rule's reasons to drop, "truncated response" and "duplicate response" count
    responses; a prompt that loses all of them counts as "fewer than two responses".

    Raises as the rules do.
    """
    name = config.rule or "best_worst"
    options: dict[str, Any] = {
        "best_random": {"seed": config.seed},
        "all_ranked": {"max_pairs": config.max_pairs},
        "curriculum": {"max_pairs": config.max_pairs},
        "nearest_margin": {"target": config.target_margin},
    }
    unit = rules.family if name == "tree_siblings" else rules.prompt_of
    rule: Callable[..., rules.Pairing] = getattr(rules, name)
    return _apply(partial(rule, **options.get(name, {})), unit, rows, config)


def select_lists(
    rows: Sequence[Scored], config: PairConfig
) -> tuple[list[ListRow], dict[str, int]]:
    """Drop responses and make a list of the others of each prompt; counts as `select`."""
    rule = partial(rules.listwise, drop_ties=config.drop_ties)
    return _apply(rule, rules.prompt_of, rows, config)


def _apply(
    rule: Callable[..., tuple[list[Chosen], dict[str, int]]],
    unit: Callable[[Scored], Any],
    rows: Sequence[Scored],
    config: PairConfig,
) -> tuple[list[Chosen], dict[str, int]]:
    kept, dropped = _responses(rows, config)
    found, counts = rule(kept, min_gap=config.min_gap)
    dropped |= counts
    if lost := len(set(map(unit, rows))) - len(set(map(unit, kept))):
        reason = "fewer than two responses"
        dropped[reason] = dropped.get(reason, 0) + lost
    return found, dropped


def _responses(rows: Sequence[Scored], config: PairConfig) -> tuple[list[Scored], dict[str, int]]:
    """The responses that may be in a pair, and how many are not, by reason."""
    kept, dropped = list(rows), {}
    for name in ("drop_truncated", "drop_duplicates"):
        if getattr(config, name):
            kept, counts = getattr(filters, name)(kept)
            dropped |= counts
    return kept, dropped


def pair(
    candidates_dir: Path,
    scores_dirs: Path | Sequence[Path],
    out_path: Path,
    config: PairConfig | None = None,
    *,
    previous_scores: Path | Sequence[Path] = (),
    reference_scores: tuple[Path, Sequence[Path]] | None = None,
    replay: Sequence[PairRow] = (),
    fresh: Sequence[Fresh] = (),
    measure: Measure | None = None,
    ordered: bool = False,
) -> dict[str, Any]:
    """Join candidates with their scores, pair them and write the pairs, or the lists.

    Args:
        candidates_dir: parts of candidates, as sampling writes them.
        scores_dirs: parts of scores of all these candidates, a folder for each scorer.
        out_path: a `.jsonl` file for the pairs.
        config: what to do; by default `best_worst`.
        previous_scores: for `consistency`, scores of the same candidates as the round before would
            give them, as many folders as `scores_dirs`; shaped alike.
        reference_scores: for what compares with reference responses, candidates to the same prompts
            (by prompt_index) and their scores, as many folders as `scores_dirs`; the model before
            training in the papers. By default a prompt's own samples.
        replay: for `replay_share`, offline pairs (`fastdpo.pair.offline`); with the scores of all
            scorers for flip_share and soft_label to change them.
        fresh: for `fresh_threshold`, `offline.fresh_scores` of each round so far.
        measure: for `ches_keep` and `max_difficulty`, `filters.measure` with its model.
        ordered: drop pairs whose chosen response doesn't score higher, for a loss that takes the
            logarithm of the difference: sampled ones whose scores shaping rounded to the same
            value, and offline ones, whose label comes with the data.

    Pairs are selected, then voted on by the scorers, then measured the way round they now are, then
    offline pairs are added, themselves voted on: so their share holds in what is written.

    The summary is written beside `out_path` as `.summary.json` and returned: pairs, dropped by
    reason, mean scores (of sampled pairs) and lengths (tokens) of both sides, and the correlation
    of score and length over all candidates, None where one of them is constant; and what the
    options did: shaping, the mean consistency, flipped and softened pairs, mean CHES and difficulty
    of the pairs measured, replayed pairs and their share, pairs by stage. Of lists it has their
    number, that of their responses, and scores and lengths of the best and the worst of each.

    Raises DataError when a candidate has no score or a score no candidate, a prompt no reference
    response, or when no pair or list is left; then nothing is written. ConfigError when an option
    lacks what it needs or can do nothing.
    """
    out_path, config = Path(out_path), (config or PairConfig()).named()
    if out_path.suffix != ".jsonl":
        raise ConfigError(f"out_path={out_path} must end in .jsonl")
    folders, before = _folders(scores_dirs), _folders(previous_scores)
    scorers = len(folders)
    _require_inputs(config, scorers, len(before), replay, fresh, measure)
    work = _Work(config, config.weights_of(scorers))
    config.check_votes(scorers, config.replay_share > 0 and any(map(work.has_votes, replay)))
    rows, work.facts = scored_candidates(candidates_dir, folders, config, reference_scores)
    made: Sequence[PairRow | ListRow]
    if config.makes_lists:
        lists, work.dropped = select_lists(rows, config)
        _require_some(lists, "list", candidates_dir, rows, work)
        made, found = lists, _of_lists(lists)
    else:
        pairs, work.dropped = select(rows, config)
        if ordered:
            pairs = work.ordered(pairs, _SATURATED)
            replay = work.ordered(replay, "offline: chosen scores no higher")
        if config.consistency != "none" and pairs:
            pairs = work.smoothed(pairs, rows, candidates_dir, before)
        pairs = work.voted(pairs)
        if measure is not None and config.needs_model and pairs:
            pairs = work.measured(pairs, measure)
        _require_some(pairs, "pair", candidates_dir, rows, work)
        pairs = work.finished(pairs, replay, fresh)
        made, found = pairs, _of_pairs(pairs)
    counts = {"lists" if config.makes_lists else "pairs": len(made), "dropped": work.dropped}
    summary = {**counts, **found, "score_length_correlation": _correlation(rows), **work.facts}
    # The pairs come last: where they are, the stage is complete.
    write_json_atomic(out_path.with_suffix(".summary.json"), summary)
    write_jsonl_atomic(out_path, [row.to_json() for row in made])
    return summary


def _require_some(
    made: Sequence[Any], what: str, candidates_dir: Path, rows: Sequence[Scored], work: "_Work"
) -> None:
    if not made:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(work.dropped.items()))
        ways = ". ".join(_ways_out(rows, work.dropped, work.config))
        raise DataError(f"{candidates_dir}: no {what} is left ({reasons}). {ways}.")


def _ways_out(
    rows: Sequence[Scored], dropped: Mapping[str, int], config: PairConfig
) -> Iterator[str]:
    """What would leave a pair, for each reason that there is none."""
    same = len({row.score for row in rows}) == 1
    longest = max(len(row.response_ids) for row in rows)
    of_length = f"the longest has {longest} tokens"
    for reason, way in {
        "tie": "Scores of a prompt's responses are equal"
        + (f", all of them {rows[0].score:g}" if same else "")
        + ": use a scorer that tells them apart, or sample more of them (num_samples)",
        "gap at most min_gap": f"Lower min_gap={config.min_gap:g}",
        "truncated response": "Sample with a larger max_new_tokens, at which responses were cut "
        f"off ({of_length}), or set drop_truncated=false",
        "fewer than two responses": "Sample more responses per prompt (num_samples)",
        "empty response": "Look at the candidates: responses are empty",
        "identical responses": "Sample at a higher temperature",
        "duplicate response": "Sample at a higher temperature",
        "difficulty above max_difficulty": f"Raise max_difficulty={config.max_difficulty}",
        _SATURATED: f"Give a transform that tells high scores apart, not {config.transform}",
    }.items():
        if reason in dropped:
            yield way


def _folders(scores_dirs: Path | Sequence[Path]) -> list[Path]:
    return [Path(scores_dirs)] if isinstance(scores_dirs, str | Path) else list(scores_dirs)


def _require_inputs(
    config: PairConfig, scorers: int, previous: int, replay: Any, fresh: Any, measure: Any
) -> None:
    """Refuse an option that would do nothing for want of its input."""
    compared = config.replay_share > 0 and len(fresh) > 0
    for lacks, message in (
        (scorers < 1, "scores_dirs must name at least one folder of scores"),
        (
            config.consistency != "none" and previous != scorers,
            f"consistency needs previous_scores of {scorers} scorers, got {previous}; leave it out "
            "in the first round, which has none before it",
        ),
        (config.needs_model and measure is None, "ches_keep or max_difficulty needs measure"),
        (config.replay_share > 0 and not replay, "replay_share needs offline pairs in replay"),
        (
            config.fresh_threshold is not None and not compared,
            "fresh_threshold needs replay_share > 0 and scores of fresh samples in fresh",
        ),
    ):
        if lacks:
            raise ConfigError(message)


@dataclass
class _Work:
    """What is done to the selected pairs, and what came of it for the summary."""

    config: PairConfig
    weights: list[float]
    facts: dict[str, Any] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)

    def has_votes(self, row: PairRow) -> bool:
        """Whether all scorers scored the pair."""
        return len(row.scores_chosen or ()) == len(self.weights)

    def ordered(self, pairs: Sequence[PairRow], reason: str) -> list[PairRow]:
        """The pairs whose chosen response has the higher score, as both are written.

        Raises DataError when one has no scores.
        """
        kept = []
        for row in pairs:
            if row.score_chosen is None or row.score_rejected is None:
                raise DataError(
                    f"offline pair {row.prompt_index} has no scores, which the loss reads. Score "
                    "the offline pairs by the scorers of the run."
                )
            if row.score_chosen > row.score_rejected:
                kept.append(row)
        self.dropped |= filters.counted(reason, len(pairs) - len(kept))
        return kept

    def smoothed(
        self, pairs: list[PairRow], rows: list[Scored], candidates_dir: Path, before: list[Path]
    ) -> list[PairRow]:
        """The pairs with the label smoothing of `consistency`."""
        alike = self.config
        if alike.length_penalty == "auto":  # one penalty for both
            alike = replace(alike, length_penalty=self.facts["shaping"]["length_penalty"])
        previous, _ = scored_candidates(candidates_dir, before, alike)
        agreement = votes.consistency(rows, {x.place: x.rank for x in previous})
        self.facts["consistency"] = statistics.fmean(agreement.values())
        return votes.smooth(pairs, agreement, self.config.consistency)

    def voted(self, pairs: list[PairRow]) -> list[PairRow]:
        """The pairs, flipped and softened by their scorers, those without all votes as they are."""
        places = [i for i, row in enumerate(pairs) if self.has_votes(row)]
        voted = [pairs[i] for i in places]
        for name, strength, change in (
            ("flipped", self.config.flip_share, votes.flip_weakest),
            ("softened", self.config.soft_label, votes.soften),
        ):
            if strength:
                voted, count = change(voted, strength, self.weights)
                self.facts[name] = self.facts.get(name, 0) + count
        changed = dict(zip(places, voted))
        return [changed.get(i, row) for i, row in enumerate(pairs)]

    def measured(self, pairs: list[PairRow], measure: Measure) -> list[PairRow]:
        """The pairs that CHES and difficulty leave."""
        found = measure([TokenizedPair(x.prompt_ids, x.chosen_ids, x.rejected_ids) for x in pairs])
        self.facts["mean_ches"] = statistics.fmean(found.ches)
        self.facts["mean_difficulty"] = statistics.fmean(found.difficulty)
        most = math.inf if self.config.max_difficulty is None else self.config.max_difficulty
        easy = [i for i in range(len(pairs)) if found.difficulty[i] <= most]
        lowest = filters.keep_lowest([found.ches[i] for i in easy], self.config.ches_keep)
        kept = [easy[j] for j in lowest]
        self.dropped |= filters.counted("difficulty above max_difficulty", len(pairs) - len(easy))
        self.dropped |= filters.counted("CHES above the share kept", len(easy) - len(kept))
        return [pairs[i] for i in kept]

    def finished(
        self, pairs: list[PairRow], offline: Sequence[PairRow], fresh: Sequence[Fresh]
    ) -> list[PairRow]:
        """The pairs with offline ones and weights, and those of each stage counted."""
        if self.config.replay_share:
            drawn = self.voted(self.drawn(pairs, offline, fresh))
            pairs = [replace(row, source="sampled") for row in pairs] + drawn
        if self.config.equal_prompts:
            pairs = filters.equal_prompts(pairs)
        if self.config.rule == "curriculum":
            stages = Counter(row.stage or 0 for row in pairs)
            self.facts["stages"] = [stages[stage] for stage in range(max(stages) + 1)]
        return pairs

    def drawn(
        self, pairs: list[PairRow], offline: Sequence[PairRow], fresh: Sequence[Fresh]
    ) -> list[PairRow]:
        """The offline pairs drawn beside the sampled ones, dealt evenly to the stages."""
        config = self.config
        if config.fresh_threshold is not None:
            offline, worse = filters.beats_fresh(offline, fresh, config.fresh_threshold)
            self.dropped |= worse
        drawn, taken = filters.replay(pairs, offline, config.replay_share, config.seed)
        self.dropped |= taken
        if config.rule == "curriculum":
            stages = 1 + max(row.stage or 0 for row in pairs)
            drawn = [replace(row, stage=i % stages) for i, row in enumerate(drawn)]
        self.facts["replayed"] = len(drawn)
        self.facts["replay_share"] = len(drawn) / (len(pairs) + len(drawn))
        return drawn


def _of_pairs(pairs: Sequence[PairRow]) -> dict[str, float]:
    """Mean scores and lengths of both sides."""
    # Offline pairs have no score, or one that was not shaped.
    sampled = [x for x in pairs if x.source != "offline"]
    sides = ("score_chosen", "score_rejected")
    return {
        **{f"mean_{side}": statistics.fmean(getattr(x, side) for x in sampled) for side in sides},
        "mean_length_chosen": statistics.fmean(len(x.chosen_ids) for x in pairs),
        "mean_length_rejected": statistics.fmean(len(x.rejected_ids) for x in pairs),
    }


def _of_lists(lists: Sequence[ListRow]) -> dict[str, float]:
    """The number of responses, and the mean score and length of the best and the worst."""
    facts: dict[str, float] = {"responses": sum(len(x.scores) for x in lists)}
    for side, place in (("best", 0), ("worst", -1)):
        facts[f"mean_score_{side}"] = statistics.fmean(x.scores[place] for x in lists)
        lengths = [len(x.responses_ids[place]) for x in lists]
        facts[f"mean_length_{side}"] = statistics.fmean(lengths)
    return facts


def _correlation(rows: Sequence[Scored]) -> float | None:
    """Of score and length over all candidates."""
    scores, lengths = [x.score for x in rows], [len(x.response_ids) for x in rows]
    try:
        return statistics.correlation(scores, lengths)
    except statistics.StatisticsError:
        return None


def load_pairs(path: Path) -> list[TokenizedPair]:
    """Read pairs that `pair` wrote, with scores, weight and label smoothing where they have them.

    Scores and finish reasons are in `extra` too, and stage and source where a pair has them.

    Raises DataError, naming file and line, when a row isn't such a pair.
    """
    pairs = []
    for row, where in _rows_of(path):
        found = PairRow.from_json(row, where)
        ids = found.prompt_ids, found.chosen_ids, found.rejected_ids
        known = {name: getattr(found, name) for name in _COUNTS}
        counts = {name: value for name, value in known.items() if value is not None}
        pairs.append(_tokenized(TokenizedPair, ids, row, where, **counts))
    return pairs


def load_lists(path: Path) -> list[TokenizedList]:
    """Read lists that `pair` wrote; prompt_index and finish reasons are in `extra`.

    Raises DataError, naming file and line, when a row isn't such a list.
    """
    lists = []
    for row, where in _rows_of(path):
        found = ListRow.from_json(row, where)
        columns = found.prompt_ids, found.responses_ids, found.scores
        lists.append(_tokenized(TokenizedList, columns, row, where))
    return lists


def load_examples(path: Path) -> list[TokenizedExample]:
    """Read what `pair` wrote, pairs or lists by the first row. Raises DataError as these two do."""
    first, _ = next(_rows_of(path))
    return [*(load_lists(path) if "responses_ids" in first else load_pairs(path))]


def _rows_of(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The rows of a file, each with its place."""
    check_rows(path)
    rows = read_rows(path)
    return ((row, rows.where(i)) for i, row in enumerate(rows.rows))


def _tokenized(
    kind: Callable[..., Tokenized], columns: Any, row: dict[str, Any], where: str, **counts: float
) -> Tokenized:
    extra = {name: row[name] for name in _EXTRA if name in row}
    try:
        return kind(*columns, extra=extra, where=where, **counts)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: {error}. Pair again.") from error


def split_stages(examples: Sequence[Example]) -> list[list[Example]]:
    """The pairs of each stage of a curriculum in turn, stages without pairs left out.

    Pairs without a stage belong to the first, so pairs of other rules are one stage, and lists.
    """

    def stage(example: Example) -> int:
        return example.extra.get("stage", 0)

    return [list(group) for _, group in groupby(sorted(examples, key=stage), key=stage)]


def scored_candidates(
    candidates_dir: Path,
    scores_dirs: Sequence[Path],
    config: PairConfig,
    reference_scores: tuple[Path, Sequence[Path]] | None = None,
) -> tuple[list[Scored], dict[str, Any]]:
    """Candidates in order, each with its final score.

    Also returns what shaping found, under "shaping"; empty where `config` shapes nothing. A length
    penalty is found on the responses that `config` does not drop. `reference_scores` are as for
    `pair`.

    Raises DataError as `read_scored`, and when a prompt has no reference response; ConfigError when
    `config` is not for so many scorers, and as `PairConfig.check_references`.
    """
    weights = config.weights_of(len(scores_dirs))
    rows, references_K = read_scored(candidates_dir, scores_dirs), None
    if reference_scores is not None:
        config.check_references()
        references_K = _references(rows, *reference_scores, scorers=len(scores_dirs))
    if not config.shapes(len(scores_dirs)):
        return rows, {}
    kept = {row.place for row in _responses(rows, config)[0]}
    scores_K = [list(of) for of in zip(*(row.scores for row in rows))]
    final, facts = shape(
        rows, scores_K, config, paired=lambda row: row.place in kept, references_K=references_K
    )
    before, penalized = unshaped(scores_K, weights), config.length_penalty != 0
    return [
        replace(row, score=score, unshaped=order, penalized=penalized)
        for row, score, order in zip(rows, final, before)
    ], {"shaping": facts}


def _references(
    rows: Sequence[Scored], candidates_dir: Path, scores_dirs: Sequence[Path], scorers: int
) -> list[References]:
    """Each scorer's scores of the reference responses to the prompts of `rows`."""
    if len(scores_dirs) != scorers:
        raise ConfigError(
            f"reference_scores must have a folder for each of the {scorers} scorers, got "
            f"{len(scores_dirs)}; score the reference responses by the same scorers"
        )
    found: dict[int, list[Scored]] = {}
    for row in read_scored(candidates_dir, scores_dirs):
        found.setdefault(row.prompt_index, []).append(row)
    prompts = {row.prompt_index: row.prompt for row in rows}
    for index, prompt in prompts.items():
        there = index in found
        if not there or prompt_key(found[index][0].prompt) != prompt_key(prompt):
            raise DataError(
                f"{candidates_dir}: prompt {index} has {'another text' if there else 'no response'}"
                ", so there is none to compare with. Sample the reference responses to the same "
                "prompts."
            )
    return [
        {index: [row.scores[k] for row in found[index]] for index in prompts}
        for k in range(scorers)
    ]
