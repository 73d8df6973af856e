"""What a config makes of the examples it is given: their shape, and the use of their columns.

Of a pair with scores ``rw`` and ``rl``, those of its chosen and rejected response:

| option | what it sets | source |
|---|---|---|
| score_offset: log_difference | margin ``-k log(rw - rl)`` | ODPO, arXiv 2402.10571 |
| score_offset: log_ratio | margin ``-k log(rw / rl)`` | ODPO's released code |
| score_offset: difference | margin ``-k (rw - rl)`` | Secrets of RLHF II, arXiv 2401.06080, the loss of its reward model; on DPO's z it is ours |
| score_weight | weight ``rw - rl`` | ours |
| score_label | label_smoothing ``sigmoid(-(rw - rl))``: scores as rewards of a Bradley-Terry model | cDPO's label noise |

``k`` is ``score_offset_weight``.  A margin is added to ``z``, so an offset that is wanted of the
pair is subtracted from it.  Margins and weights of the row's own are kept: a margin is added to, a
weight multiplied.
"""  # noqa: E501

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from fastdpo.data.examples import TokenizedPair, TokenizedSingle
from fastdpo.errors import DataError
from fastdpo.loss.examples import BaseObjective
from fastdpo.train.config import TrainConfig

_NEEDED = {
    "pairs": "prompt, chosen and rejected",
    "lists": "prompt, responses and scores",
    "singles": "prompt, completion and label, or pairs, each of which is two",
}
_log = logging.getLogger(__name__)


def as_trained(examples: Sequence[Any], config: TrainConfig, name: str = "") -> list[Any]:
    """The examples as the config's objective sees them.

    Pairs are two single responses each where the objective takes those, desirable and not, all the
    chosen ones first (as TRL's ``unpair_preference_dataset``).  Scores that nothing reads are left
    out.

    Args:
        name: of the examples, where they are not those of training.

    Raises:
        DataError: an example is of another shape than the objective takes, lacks scores that are
            asked for, has scores that cannot be used so, or has a column that nothing uses; the
            message names the row.
    """
    objective = config.objective
    shapes = {example.shape for example in examples}
    if objective.shape == "singles" and shapes == {"pairs"}:
        examples = [*_unpaired(examples)]
    found = []
    for i, example in enumerate(examples):
        try:
            found.append(_as_trained(example, config, objective))
        except ValueError as error:
            raise DataError(f"{_place(examples, i, name)}: {error}") from None
    tied = _all_tied(found)
    if tied and len(tied) == len(found) and not name:  # to evaluate on, they may be
        raise DataError(
            f"{_place(found, 0, name)}: it has no response better than another, nor has any of "
            f"the {len(found)} lists: they teach loss_type={config.loss_type} nothing of an order; "
            "give scores that differ"
        )
    return found


def _place(examples: Sequence[Any], i: int, name: str = "") -> str:
    return examples[i].where or f"{name and f'{name}: '}example {i} (counting from 0)"


def warn_of_ties(examples: Sequence[Any], config: TrainConfig) -> None:
    """Say which lists a loss of lists learns nothing from; those that need ranks refuse them."""
    tied = _all_tied(examples)
    if tied:
        _log.warning(
            "%d of %d lists have no response better than another, the first is %s: they teach %s "
            "nothing of an order",
            len(tied), len(examples), _place(examples, tied[0]), config.loss_type,
        )  # fmt: skip


def _all_tied(examples: Sequence[Any]) -> list[int]:
    lists = ((i, x) for i, x in enumerate(examples) if x.shape == "lists")
    return [i for i, example in lists if len(set(example.scores)) == 1]


def _unpaired(pairs: Sequence[TokenizedPair]) -> Iterator[TokenizedSingle]:
    for desirable in (True, False):
        for pair in pairs:
            _, *given = _columns(pair)
            if given:
                raise DataError(
                    f"{pair.where or 'a pair'}: {given[0]} means something to a pair alone, but "
                    "the loss takes single responses; leave the column out"
                )
            side = 0 if desirable else 1
            prompt, response = pair.prompts[side], pair.responses[side]
            yield TokenizedSingle(
                prompt, response, desirable, extra=pair.extra, where=pair.where, weight=pair.weight
            )


def _columns(example: Any) -> list[str]:
    """What of an example moves its margin, each with its value, after a first entry of none."""
    names = ("margin", "label_smoothing")
    return ["", *(f"{x}={getattr(example, x)}" for x in names if getattr(example, x))]


def _as_trained(example: Any, config: TrainConfig, objective: BaseObjective) -> Any:
    named = f"loss_type={config.loss_type}"
    if example.shape != objective.shape:
        raise ValueError(
            f"{named} takes {objective.shape}, rows of {_NEEDED[objective.shape]}, and this is one "
            f"of {example.shape}; give another loss_type or dataset"
        )
    _, *given = _columns(example)
    if given and not objective.takes_margin:
        raise ValueError(f"{named} has no use for {given[0]}; leave the column out")
    if example.label_smoothing and config.label_smoothing:
        raise ValueError(
            f"it has label_smoothing={example.label_smoothing} of its own, beside the option "
            f"label_smoothing={config.label_smoothing}; give one of them"
        )
    size, wanted = len(example.responses), config.list_size
    if wanted is not None and size != wanted:
        raise ValueError(
            f"it has {size} responses, not list_size={wanted}; give it as many, leave the row out, "
            "or leave list_size out to take lists of any length"
        )
    if example.shape == "pairs":
        example = _with_scores(example, config)
        _check_smoothing(example.label_smoothing, named, objective)
    scores = example.scores
    if objective.needs_scores and scores is None:
        raise ValueError(f"{named} needs scores; give columns score_chosen and score_rejected")
    problem = objective.problem(scores) if objective.needs_scores else None
    if problem is not None:
        alone = problem.startswith(f"{config.loss_type} ")
        raise ValueError(f"loss_type={problem}" if alone else f"{named}: {problem}")
    if example.shape == "pairs":
        changes: dict[str, Any] = {}
        if not objective.needs_scores and scores is not None:
            changes |= {"score_chosen": None, "score_rejected": None}
        if objective.needs_prompt and len(example.prompt_ids) > 1:
            changes["prompt_nll"] = True
        example = replace(example, **changes) if changes else example
    return example


def _check_smoothing(eps: float, named: str, objective: BaseObjective) -> None:
    above, below = objective.smoothing_above, objective.smoothing_below
    if above is not None and eps <= above:
        raise ValueError(
            f"{named} needs label_smoothing > {above:g}, and this row has {eps:g}; give the option "
            "label_smoothing (the paper's is 1e-3), a column label_smoothing in every row, or "
            "score_label"
        )
    if below is not None and eps >= below:
        raise ValueError(f"{named} needs label_smoothing < {below:g}, and this row has {eps:g}")


def _with_scores(pair: TokenizedPair, config: TrainConfig) -> TokenizedPair:
    """The pair with what the options make of its scores; the table is in the module's docstring."""
    asked = [x for x in ("score_offset", "score_weight", "score_label") if config.uses(x)]
    if not asked:
        return pair
    option = f"{asked[0]}={getattr(config, asked[0])}"
    chosen, rejected = pair.score_chosen, pair.score_rejected
    if chosen is None or rejected is None:
        raise ValueError(
            f"{option} needs scores, and this row has none; give columns score_chosen and "
            "score_rejected"
        )
    gap, changes = chosen - rejected, {}
    scores = f"score_chosen={chosen} and score_rejected={rejected}"
    if config.uses("score_offset"):
        kind = config.score_offset
        if kind == "log_ratio" and not (chosen > 0 and rejected > 0):
            raise ValueError(f"score_offset=log_ratio needs scores above 0, and it has {scores}")
        if kind == "log_difference" and not gap > 0:
            raise ValueError(
                f"score_offset=log_difference needs a chosen response that scores higher, and it "
                f"has {scores}; leave the row out"
            )
        offset = gap
        if kind != "difference":
            offset = math.log(gap) if kind == "log_difference" else math.log(chosen / rejected)
        changes["margin"] = pair.margin - config.score_offset_weight * offset
    if config.score_weight:
        if gap < 0:
            raise ValueError(
                f"score_weight needs a chosen response that scores no lower, and it has {scores}; "
                "leave the row out"
            )
        changes["weight"] = pair.weight * gap
    if config.score_label:
        if pair.label_smoothing:
            raise ValueError(
                f"it has label_smoothing={pair.label_smoothing} of its own, beside score_label; "
                "leave one of them out"
            )
        # Of a large gap, not its rounded complement.
        changes["label_smoothing"] = math.exp(-_softplus(gap))
    return replace(pair, **changes)


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def chosen_tokens(example: Any, objective: BaseObjective) -> int:
    """Tokens of an example that a mean over the step's chosen tokens counts."""
    first, *rest = map(len, example.responses)
    return first + (sum(rest[1:]) if objective.needs_prompt else 0)
