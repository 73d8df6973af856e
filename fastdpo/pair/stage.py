"""Pairing scored responses: the third stage of a round.

    pair(candidates_dir, scores_dir, Path("pairs.jsonl"), pairing=Pairing(rule="curriculum"))
    pairs = load_pairs(Path("pairs.jsonl"))

How responses are paired is in `fastdpo.pair.rules`, what drops and weighs pairs in
`fastdpo.pair.filters`, and where offline pairs come from in `fastdpo.pair.offline`.
"""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastdpo.data.batch import TokenizedPair
from fastdpo.data.rows import read_rows
from fastdpo.errors import DataError, is_default
from fastdpo.pair import filters
from fastdpo.pair.filters import Measured, Row
from fastdpo.pair.rules import (
    Pairs,
    all_ranked,
    best_random,
    best_worst,
    check_row,
    curriculum,
    family,
    is_finite,
    nearest_margin,
    prompt_of,
    tree_siblings,
)
from fastdpo.pair.transforms import References, Shaping, check_scorers, shape, unshaped
from fastdpo.score.stage import check_scored
from fastdpo.storage import check_rows, read_parts, write_json_atomic, write_jsonl_atomic

RULES = (
    "best_worst",
    "best_random",
    "all_ranked",
    "curriculum",
    "nearest_margin",
    "tree_siblings",
)
_EXTRA = ("prompt_index", "score_chosen", "score_rejected", "chosen_finish", "rejected_finish")
_OPTIONAL: dict[str, Callable[[Any], bool]] = {
    "weight": lambda x: is_finite(x) and x >= 0,
    "smoothing": lambda x: is_finite(x) and 0 <= x <= 1,
    "stage": lambda x: type(x) is int and x >= 0,
    "source": lambda x: x in ("sampled", "offline"),
}


@dataclass(frozen=True)
class Pairing:
    """How candidates become pairs; every option but `rule` is off by default.

    Raises ValueError, naming the field, when one is out of its range or has nothing to act on, and
    when two of the options that set label smoothing are on: tree_siblings, consistency, and
    flip_share or soft_label.

    Attributes:
        rule: one of `RULES`, the functions of `fastdpo.pair.rules`.
        min_gap: the scores of a pair must differ by more than this.
        target_margin: nearest_margin takes the pair whose gap in score is nearest to this.
        max_pairs: pairs of a prompt at most, of all_ranked and curriculum, where it is the number
            of stages; None takes all.
        equal_prompts: weigh each pair by 1 / (pairs of its prompt); see `filters.equal_prompts`.
        drop_truncated, drop_duplicates: leave out responses; see `filters`.
        consistency: "none", or label smoothing by the ranking's agreement with the round before,
            of each prompt ("prompt") or on average ("mean"); see `filters.smooth`.
        flip_share: turn round this share of pairs, the weakest by the scorers' weighted mean, of
            the sampled ones and of the offline ones; see `filters.flip_weakest`.
        soft_label: label smoothing of what is below 0 in that mean; see `filters.soften`. Neither
            does anything to a pair labelled by that very sum: see `check_votes`.
        ches_keep: keep this share of the sampled pairs, those of lowest length-normalized
            `filters.ches`.
        max_difficulty: drop sampled pairs above this `filters.difficulty`, nats.
        replay_share: share of offline pairs among all; see `filters.replay`.
        fresh_threshold: drop offline pairs by `filters.beats_fresh` at this threshold, 0 in the
            paper.
        seed: of what is drawn.
    """

    rule: str = "best_worst"
    min_gap: float = 0.0
    target_margin: float = 1.0
    max_pairs: int | None = None
    equal_prompts: bool = False
    drop_truncated: bool = False
    drop_duplicates: bool = False
    consistency: str = "none"
    flip_share: float = 0.0
    soft_label: float = 0.0
    ches_keep: float = 1.0
    max_difficulty: float | None = None
    replay_share: float = 0.0
    fresh_threshold: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, valid, wanted in (
            ("rule", self.rule in RULES, f"one of {', '.join(RULES)}"),
            ("min_gap", 0 <= self.min_gap < math.inf, "finite and >= 0"),
            ("target_margin", 0 < self.target_margin < math.inf, "finite and > 0"),
            ("max_pairs", (1 if self.max_pairs is None else self.max_pairs) >= 1, ">= 1"),
            ("consistency", self.consistency in ("none", "mean", "prompt"), "none, mean or prompt"),
            ("flip_share", 0 <= self.flip_share <= 1, "in [0, 1]"),
            ("soft_label", 0 <= self.soft_label <= 1, "in [0, 1]"),
            ("ches_keep", 0 < self.ches_keep <= 1, "in (0, 1]"),
            ("max_difficulty", math.isfinite(self.max_difficulty or 0), "finite"),
            ("replay_share", 0 <= self.replay_share < 1, "in [0, 1)"),
            ("fresh_threshold", math.isfinite(self.fresh_threshold or 0), "finite"),
            (
                "target_margin",
                self.rule == "nearest_margin" or is_default(self, "target_margin"),
                "left out, or the rule be nearest_margin, which alone looks for a gap",
            ),
            (
                "max_pairs",
                self.rule in ("all_ranked", "curriculum") or self.max_pairs is None,
                "left out, or the rule be all_ranked or curriculum; the others have a pair or none",
            ),
            (
                "equal_prompts",
                self.makes_several or not self.equal_prompts,
                "left out, or the rule be all_ranked, curriculum (with max_pairs other than 1) or "
                "tree_siblings; otherwise a prompt has one pair and all weigh the same",
            ),
        ):
            if not valid:
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)!r}")
        smoothing = {
            "rule=tree_siblings": self.rule == "tree_siblings",
            "consistency": self.consistency != "none",
            "flip_share or soft_label": self.needs_several_scorers,
        }
        chosen = [name for name, on in smoothing.items() if on]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} each say how far a label holds; choose one")

    @property
    def makes_several(self) -> bool:
        """Whether a prompt may have more than one pair."""
        if self.rule in ("all_ranked", "curriculum"):
            return self.max_pairs != 1
        return self.rule == "tree_siblings"

    def looks_at_gaps(self, shaping: Shaping) -> bool:
        """Whether anything depends on more than the order of a prompt's scores."""
        widest = self.rule == "all_ranked" and self.max_pairs is not None
        gaps = self.min_gap > 0 or self.rule == "nearest_margin" or widest
        return gaps or shaping.length_penalty != 0

    @property
    def needs_model(self) -> bool:
        """Whether `pair` measures pairs under a model."""
        return self.ches_keep < 1 or self.max_difficulty is not None

    @property
    def needs_several_scorers(self) -> bool:
        """Whether the scorers vote on the labels."""
        return self.flip_share > 0 or self.soft_label > 0


def check_votes(pairing: Pairing, shaping: Shaping | None, offline: bool) -> None:
    """Raise ValueError where `flip_share` and `soft_label` can change no label.

    Every rule takes the higher score as chosen, so with combine "weighted" and no length penalty no
    sampled pair is against the sum it was labelled by, whatever the rule and the transform. With
    another `combine` or a length penalty one can be, and so can an offline pair, whose label comes
    with the data; `offline` says whether there are any with the scores of all scorers.
    """
    reorders = shaping is not None and shaping.reorders
    if pairing.needs_several_scorers and not reorders and not offline:
        names = [name for name in ("flip_share", "soft_label") if getattr(pairing, name)]
        raise ValueError(
            f"{' and '.join(f'{name}={getattr(pairing, name):g}' for name in names)} can change no "
            "label: combine=weighted without length_penalty labels sampled pairs by the same sum "
            "of scores; give combine=log_sigmoid, a length_penalty or offline pairs (replay) "
            "scored by all scorers, or leave out what does nothing"
        )


def check_shaping(pairing: Pairing, shaping: Shaping | None, scorers: int) -> None:
    """Raise ValueError where a part of `shaping` can change no pair.

    A transform keeps the order of a prompt's scores, and so do, of a single scorer, combine
    "log_sigmoid" and a positive weight. The loss doesn't see scores, so that matters only where
    gaps do: see `Pairing.looks_at_gaps`. `fresh_threshold` compares weighted scores with a number.
    """
    if shaping is None or pairing.looks_at_gaps(shaping):
        return
    weight = shaping.weights[0] if shaping.weights and scorers == 1 else 1.0
    scales = weight > 0 and weight != 1 and not pairing.fresh_threshold
    for what, idle in (
        (f"transform={shaping.transform}", shaping.transform != "none"),
        (f"combine={shaping.combine} of one scorer", shaping.combine != "weighted" and scorers < 2),
        (f"scorer_weights={shaping.weights} of one scorer", scales),
    ):
        if idle:
            raise ValueError(
                f"{what} changes no pair: it keeps the order of a prompt's scores, and nothing "
                "looks at more than that. Leave it out, or give min_gap, a length_penalty, the "
                "rule nearest_margin, or all_ranked with max_pairs"
            )


def check_references(pairing: Pairing, shaping: Shaping | None) -> None:
    """Raise ValueError where scores of reference responses have no use, or no meaning."""
    if shaping is None or not shaping.refers:
        raise ValueError(
            "reference_scores need transform=par or log_sigmoid, or combine=log_sigmoid, which "
            "compare with them; leave them out"
        )
    if pairing.consistency != "none":  # the reference's scores are of one of the two
        raise ValueError(
            f"consistency={pairing.consistency} ranks by the scorers of two rounds, which can't "
            "share reference_scores; leave out one of the two"
        )


def select(rows: Sequence[Row], pairing: Pairing) -> Pairs:
    """Drop responses and apply the rule, as `pairing` says: all of `pair` that needs only scores.

    Beside the rule's reasons to drop, "truncated response" and "duplicate response" count
    responses; a prompt that loses all of them counts as "fewer than two responses".

    Raises as the rules do.
    """
    for row in rows:
        check_row(row)
    unit = family if pairing.rule == "tree_siblings" else prompt_of
    kept, dropped = _responses(rows, pairing)
    lost = len(set(map(unit, rows))) - len(set(map(unit, kept)))
    gap, most = pairing.min_gap, pairing.max_pairs
    rule: Callable[[], Pairs] = {
        "best_worst": lambda: best_worst(kept, min_gap=gap),
        "best_random": lambda: best_random(kept, min_gap=gap, seed=pairing.seed),
        "all_ranked": lambda: all_ranked(kept, min_gap=gap, max_pairs=most),
        "curriculum": lambda: curriculum(kept, min_gap=gap, max_pairs=most),
        "nearest_margin": lambda: nearest_margin(kept, target=pairing.target_margin, min_gap=gap),
        "tree_siblings": lambda: tree_siblings(kept, min_gap=gap),
    }[pairing.rule]
    pairs, counts = rule()
    dropped |= counts
    if lost:
        reason = "fewer than two responses"
        dropped[reason] = dropped.get(reason, 0) + lost
    return pairs, dropped


def _responses(rows: Sequence[Row], pairing: Pairing) -> tuple[list[Row], dict[str, int]]:
    """The responses that may be in a pair, and how many are not, by reason."""
    kept, dropped = list(rows), {}
    for wanted, drop in (
        (pairing.drop_truncated, filters.drop_truncated),
        (pairing.drop_duplicates, filters.drop_duplicates),
    ):
        if wanted:
            kept, counts = drop(kept)
            dropped |= counts
    return kept, dropped


def pair(
    candidates_dir: Path,
    scores_dirs: Path | Sequence[Path],
    out_path: Path,
    *,
    pairing: Pairing | None = None,
    shaping: Shaping | None = None,
    previous_scores: Path | Sequence[Path] | None = None,
    reference_scores: tuple[Path, Sequence[Path]] | None = None,
    replay: Sequence[Row] = (),
    fresh: Sequence[Mapping[str, float]] = (),
    measure: Callable[[list[TokenizedPair]], Measured] | None = None,
) -> dict[str, Any]:
    """Join candidates with their scores, pair them and write the pairs.

    Args:
        candidates_dir: parts of candidates, as sampling writes them.
        scores_dirs: parts of scores of all these candidates, a folder for each scorer.
        out_path: a `.jsonl` file for the pairs.
        pairing: what to do; by default `best_worst`.
        shaping: how scores become one score (`fastdpo.pair.transforms`). Needed for several
        scorers; one scorer's scores are used as they are without it.
        previous_scores: for `Pairing.consistency`, scores of the same candidates as the round
            before would give them, as many folders as `scores_dirs`; shaped alike.
        reference_scores: for what `shaping` compares with reference responses, candidates to the
            same prompts (by prompt_index) and their scores, as many folders as `scores_dirs`; the
            model before training in the papers. By default a prompt's own samples.
        replay: for `Pairing.replay_share`, offline pairs (`fastdpo.pair.offline`); with the scores
            of all scorers for flip_share and soft_label to change them.
        fresh: for `Pairing.fresh_threshold`, `offline.fresh_scores` of each round so far.
        measure: for `Pairing.ches_keep` and `max_difficulty`, `filters.measure` with its model.

    Pairs are selected, then voted on by the scorers, then measured the way round they now are, then
    offline pairs are added, themselves voted on: so their share holds in what is written. Beside
    the columns of the rules a pair has smoothing, weight, stage, source ("sampled" or "offline")
    and flipped where an option gives them.

    The summary is written beside `out_path` as `.summary.json` and returned: pairs, dropped by
    reason, mean scores (of sampled pairs) and lengths (tokens) of both sides, and the correlation
    of score and length over all candidates, None where one of them is constant; and what the
    options did: shaping, the mean consistency, flipped and softened pairs, mean CHES and difficulty
    of the pairs measured, replayed pairs and their share, pairs by stage.

    Raises DataError when a candidate has no score or a score no candidate, a prompt no reference
    response, or when no pair is left; then nothing is written. ValueError when an option lacks what
    it needs or can do nothing.
    """
    out_path = Path(out_path)
    if out_path.suffix != ".jsonl":
        raise ValueError(f"out_path must end in .jsonl, got {str(out_path)!r}")
    pairing = pairing or Pairing()
    folders, before = _folders(scores_dirs), _folders(previous_scores)
    _require_inputs(pairing, len(folders), len(before), replay, fresh, measure)
    weights = check_scorers(shaping, len(folders))
    voted = pairing.replay_share > 0 and any(_has_votes(row, len(weights)) for row in replay)
    check_votes(pairing, shaping, offline=voted)
    check_shaping(pairing, shaping, len(folders))
    rows, facts = scored_candidates(candidates_dir, folders, shaping, pairing, reference_scores)
    pairs, dropped = select(rows, pairing)
    if pairing.consistency != "none" and pairs:
        if shaping is not None and shaping.length_penalty == "auto":  # one penalty for both
            shaping = replace(shaping, length_penalty=facts["shaping"]["length_penalty"])
        previous, _ = scored_candidates(candidates_dir, before, shaping)
        agreement = filters.consistency(rows, {_key(x): filters.order(x) for x in previous})
        pairs = filters.smooth(pairs, agreement, pairing.consistency)
        facts["consistency"] = statistics.fmean(agreement.values())
    pairs = _voted(pairs, pairing, weights, facts)
    if pairing.needs_model and pairs:
        assert measure is not None
        pairs = _measured(pairs, pairing, measure, dropped, facts)
    if not pairs:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(dropped.items()))
        raise DataError(
            f"{candidates_dir}: no pair is left ({reasons}). Sample more responses per prompt or "
            "at a higher temperature, lower min_gap, or use a scorer that tells them apart."
        )
    if pairing.replay_share:
        drawn = _drawn(pairs, pairing, replay, fresh, dropped, facts)
        drawn = _voted(drawn, pairing, weights, facts)
        pairs = [{**row, "source": "sampled"} for row in pairs] + drawn
    if pairing.equal_prompts:
        pairs = filters.equal_prompts(pairs)
    if pairing.rule == "curriculum":
        stages = Counter(row["stage"] for row in pairs)
        facts["stages"] = [stages[stage] for stage in range(max(stages) + 1)]
    summary = {**_summary(rows, pairs, dropped), **facts}
    # The pairs come last: where they are, the stage is complete.
    write_json_atomic(out_path.with_suffix(".summary.json"), summary)
    write_jsonl_atomic(out_path, pairs)
    return summary


def _folders(scores_dirs: Path | Sequence[Path] | None) -> list[Path]:
    if scores_dirs is None:
        return []
    return [Path(scores_dirs)] if isinstance(scores_dirs, str | Path) else list(scores_dirs)


def _require_inputs(
    pairing: Pairing, scorers: int, previous: int, replay: Any, fresh: Any, measure: Any
) -> None:
    """Refuse an option that would do nothing for want of its input."""
    if scorers < 1:
        raise ValueError("scores_dirs must name at least one folder of scores")
    for name, on, has, wanted in (
        (
            "consistency",
            pairing.consistency != "none",
            previous == scorers,
            f"previous_scores of {scorers} scorers, got {previous}; leave it out in the first "
            "round, which has none before it",
        ),
        (
            "flip_share or soft_label",
            pairing.needs_several_scorers,
            scorers > 1,
            "the scores of at least two scorers",
        ),
        ("ches_keep or max_difficulty", pairing.needs_model, measure is not None, "measure"),
        ("replay_share", pairing.replay_share > 0, len(replay) > 0, "offline pairs in replay"),
        (
            "fresh_threshold",
            pairing.fresh_threshold is not None,
            pairing.replay_share > 0 and len(fresh) > 0,
            "replay_share > 0 and scores of fresh samples in fresh",
        ),
    ):
        if on and not has:
            raise ValueError(f"{name} needs {wanted}")


def _has_votes(row: Row, scorers: int) -> bool:
    return len(row.get("scores_chosen", ())) == scorers


def _voted(
    pairs: list[Row], pairing: Pairing, weights: Sequence[float], facts: dict[str, Any]
) -> list[Row]:
    """The pairs, flipped and softened by their scorers, those without the scores of all as they
    are; how many is added up in `facts`."""
    places = [i for i, row in enumerate(pairs) if _has_votes(row, len(weights))]
    voted = [pairs[i] for i in places]
    for name, strength, change in (
        ("flipped", pairing.flip_share, filters.flip_weakest),
        ("softened", pairing.soft_label, filters.soften),
    ):
        if strength:
            voted, count = change(voted, strength, weights)
            facts[name] = facts.get(name, 0) + count
    changed = dict(zip(places, voted))
    return [changed.get(i, row) for i, row in enumerate(pairs)]


def _measured(
    pairs: list[Row],
    pairing: Pairing,
    measure: Callable[[list[TokenizedPair]], Measured],
    dropped: dict[str, int],
    facts: dict[str, Any],
) -> list[Row]:
    """The pairs that CHES and difficulty leave; drops are counted in `dropped`."""
    ids = ("prompt_ids", "chosen_ids", "rejected_ids")
    found = measure([TokenizedPair(*(row[name] for name in ids)) for row in pairs])
    facts["mean_ches"] = statistics.fmean(found.ches)
    facts["mean_difficulty"] = statistics.fmean(found.difficulty)
    most = math.inf if pairing.max_difficulty is None else pairing.max_difficulty
    easy = [i for i in range(len(pairs)) if found.difficulty[i] <= most]
    kept = [easy[j] for j in filters.keep_lowest([found.ches[i] for i in easy], pairing.ches_keep)]
    for reason, count in (
        ("difficulty above max_difficulty", len(pairs) - len(easy)),
        ("CHES above the share kept", len(easy) - len(kept)),
    ):
        if count:
            dropped[reason] = count
    return [pairs[i] for i in kept]


def _drawn(
    pairs: list[Row],
    pairing: Pairing,
    offline: Sequence[Row],
    fresh: Sequence[Mapping[str, float]],
    dropped: dict[str, int],
    facts: dict[str, Any],
) -> list[Row]:
    """The offline pairs drawn beside the sampled ones, dealt evenly to the stages."""
    if pairing.fresh_threshold is not None:
        offline, worse = filters.beats_fresh(offline, fresh, pairing.fresh_threshold)
        dropped.update(worse)
    drawn, taken = filters.replay(pairs, offline, pairing.replay_share, pairing.seed)
    dropped.update(taken)
    unwritten = ("extra", "prompt_row")
    drawn = [{k: v for k, v in row.items() if k not in unwritten} for row in drawn]
    if pairing.rule == "curriculum":
        stages = 1 + max(row["stage"] for row in pairs)
        drawn = [{**row, "stage": i % stages} for i, row in enumerate(drawn)]
    facts["replayed"] = len(drawn)
    facts["replay_share"] = len(drawn) / (len(pairs) + len(drawn))
    return drawn


def _summary(rows: list[Row], pairs: list[Row], dropped: dict[str, int]) -> dict[str, Any]:
    # Offline pairs have no score, or one that was not shaped.
    scored = [x for x in pairs if x.get("source") != "offline"]
    return {
        "pairs": len(pairs),
        "dropped": dropped,
        "mean_score_chosen": statistics.fmean(x["score_chosen"] for x in scored),
        "mean_score_rejected": statistics.fmean(x["score_rejected"] for x in scored),
        "mean_length_chosen": statistics.fmean(len(x["chosen_ids"]) for x in pairs),
        "mean_length_rejected": statistics.fmean(len(x["rejected_ids"]) for x in pairs),
        "score_length_correlation": _correlation(
            [row["score"] for row in rows], [len(row["response_ids"]) for row in rows]
        ),
    }


def load_pairs(path: Path) -> list[TokenizedPair]:
    """Read pairs that `pair` wrote, with weight and smoothing where they have them.

    Scores and finish reasons are in `extra`, and stage and source where a pair has them.

    Raises DataError, naming file and line, when a row isn't such a pair.
    """
    check_rows(path)
    rows = read_rows(path)
    pairs = []
    for i, row in enumerate(rows.rows):
        optional = {key: row[key] for key in _OPTIONAL if key in row}
        for key, value in optional.items():
            if not _OPTIONAL[key](value):
                raise DataError(f"{rows.where(i)}: {key} is {value!r}. Pair again.")
        counts = {key: optional.pop(key) for key in ("weight", "smoothing") if key in optional}
        try:
            pairs.append(
                TokenizedPair(
                    row["prompt_ids"],
                    row["chosen_ids"],
                    row["rejected_ids"],
                    {key: row[key] for key in _EXTRA} | optional,
                    rows.where(i),
                    **counts,
                )
            )
        except KeyError as error:
            raise DataError(f"{rows.where(i)}: {error} is missing. Pair again.") from error
        except (TypeError, ValueError) as error:
            raise DataError(f"{rows.where(i)}: {error}. Pair again.") from error
    return pairs


def split_stages(pairs: Sequence[TokenizedPair]) -> list[list[TokenizedPair]]:
    """The pairs of each stage of a curriculum in turn, stages without pairs left out.

    Pairs without a stage belong to the first, so pairs of other rules are one stage.
    """
    stages: dict[int, list[TokenizedPair]] = {}
    for pair in pairs:
        stages.setdefault(pair.extra.get("stage", 0), []).append(pair)
    return [stages[stage] for stage in sorted(stages)]


def scored_candidates(
    candidates_dir: Path,
    scores_dirs: Sequence[Path],
    shaping: Shaping | None = None,
    pairing: Pairing | None = None,
    reference_scores: tuple[Path, Sequence[Path]] | None = None,
) -> tuple[list[Row], dict[str, Any]]:
    """Candidates in order, each with its final "score", and with "scores" where several gave one;
    shaped ones with what `filters.order` and `is_above` take.

    Also returns what `shaping` found, under "shaping"; empty without it. A length penalty is found
    on the responses that `pairing` does not drop. `reference_scores` are as for `pair`.

    Raises DataError when a candidate has no score or a score no candidate, or one isn't a finite
    number, or a prompt has no reference response; ValueError when `shaping` is not for so many
    scorers, and as `check_references`.
    """
    check_scorers(shaping, len(scores_dirs))
    pairing = pairing or Pairing()
    if reference_scores is not None:
        check_references(pairing, shaping)
    candidates = _by_key(candidates_dir)
    raw = _all_scores(candidates_dir, candidates.keys(), scores_dirs)
    rows = [{**candidates[key], "score": raw[0][key]} for key in sorted(candidates)]
    for row in rows:
        check_row(row)
    if len(raw) > 1:
        rows = [{**x, "scores": [scores[_key(x)] for scores in raw]} for x in rows]
    references_K = None
    if reference_scores is not None:
        references_K = _references(rows, *reference_scores, scorers=len(raw))
    if shaping is None:
        return rows, {}
    kept = {_key(row) for row in _responses(rows, pairing)[0]}
    scores_K = [[scores[_key(x)] for x in rows] for scores in raw]
    final, facts = shape(
        rows, scores_K, shaping, paired=lambda row: _key(row) in kept, references_K=references_K
    )
    shaped = {"penalized": shaping.length_penalty != 0}
    order = unshaped(scores_K, check_scorers(shaping, len(raw)))
    return [
        {**row, **shaped, "score": value, "unshaped": before}
        for row, value, before in zip(rows, final, order)
    ], {"shaping": facts}


def _all_scores(
    candidates_dir: Path, keys: Any, scores_dirs: Sequence[Path]
) -> list[dict[tuple[int, int], float]]:
    """Each scorer's scores of the candidates, which must be of what the candidates now say."""
    found = [_scores(folder, keys) for folder in scores_dirs]
    for folder in scores_dirs:
        check_scored(candidates_dir, folder)
    return found


def _references(
    rows: Sequence[Row], candidates_dir: Path, scores_dirs: Sequence[Path], scorers: int
) -> list[References]:
    """Each scorer's scores of the reference responses to the prompts of `rows`."""
    if len(scores_dirs) != scorers:
        raise ValueError(
            f"reference_scores must have a folder for each of the {scorers} scorers, got "
            f"{len(scores_dirs)}; score the reference responses by the same scorers"
        )
    candidates = _by_key(candidates_dir)
    raw = _all_scores(candidates_dir, candidates.keys(), scores_dirs)
    keys: dict[int, list[tuple[int, int]]] = {}
    for key in sorted(candidates):
        keys.setdefault(key[0], []).append(key)
    prompts = {row["prompt_index"]: row["prompt"] for row in rows}
    for index, prompt in prompts.items():
        found = keys.get(index)
        if not found or candidates[found[0]].get("prompt") != prompt:
            raise DataError(
                f"{candidates_dir}: prompt {index} has {'another text' if found else 'no response'}"
                ", so there is none to compare with. Sample the reference responses to the same "
                "prompts."
            )
    return [{index: [scores[key] for key in keys[index]] for index in prompts} for scores in raw]


def _scores(directory: Path, candidates: Any) -> dict[tuple[int, int], float]:
    scores = _by_key(directory)
    for keys, message in (
        (candidates - scores.keys(), "has no score"),
        (scores.keys() - candidates, "has a score but is no candidate"),
    ):
        if keys:
            prompt_index, sample_index = min(keys)
            raise DataError(
                f"{directory}: prompt {prompt_index}, sample {sample_index} {message} "
                f"({len(keys)} in all). Score these candidates again into a new directory."
            )
    for (prompt_index, sample_index), row in scores.items():
        where = f"{directory}: prompt {prompt_index}, sample {sample_index}"
        if "score" not in row:
            raise DataError(f"{where} has no score.")
        if not is_finite(row["score"]):
            raise DataError(
                f"{where}: the score is {row['score']!r}, not a finite number. Score it again."
            )
    return {key: row["score"] for key, row in scores.items()}


def _key(row: Row) -> tuple[int, int]:
    return row["prompt_index"], row["sample_index"]


def _by_key(directory: Path) -> dict[tuple[int, int], Row]:
    result: dict[tuple[int, int], Row] = {}
    for row in read_parts(directory):
        key = (row.get("prompt_index"), row.get("sample_index"))
        if not all(type(index) is int for index in key):
            raise DataError(
                f"{directory}: a row has prompt_index {key[0]!r} and sample_index {key[1]!r}. "
                "Both must be ints."
            )
        if key in result:
            raise DataError(
                f"{directory}: prompt {key[0]}, sample {key[1]} is there twice. "
                "Write the directory again."
            )
        result[key] = row  # type: ignore[index]
    return result


def _correlation(scores: list[float], lengths: list[int]) -> float | None:
    """Pearson's, None where it isn't defined."""
    try:
        return statistics.correlation(scores, lengths)
    except statistics.StatisticsError:
        return None
