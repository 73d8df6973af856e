"""What the loss of an example takes from all the others of its step, on all processes.

Three things are of a whole step, however it is packed: sorted batches (`BaseObjective.couples`),
KTO's estimate of a KL, and BCO's running mean of the rewards.  Each takes a pass without gradients
before that which trains, and the random state is put back between the two.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor, nn

from fastdpo.data.batch import PackedPairs, plan_batches
from fastdpo.data.examples import TokenizedSingle
from fastdpo.errors import DataError
from fastdpo.loss.examples import BaseObjective, Examples
from fastdpo.loss.objectives import given_slopes
from fastdpo.loss.singles import RunningMean
from fastdpo.model.noise import random_state_kept
from fastdpo.train.steps import Reference, Setup, Totals, batch_logps, of_reference

_MISMATCHES = 0  # seed of which completion each prompt gets


@dataclass(frozen=True)
class Shared:
    """What a step's first pass found.

    Attributes:
        objective: the one to train with.
        shift: as in `Examples`.
        slopes: of the sequences of each example, by its number, where they are known.
        loss: mean of the step's examples, where ``objective`` does not give it.
        metrics: of the step.
    """

    objective: BaseObjective
    shift: float = 0.0
    slopes: dict[int, list[float]] | None = None
    loss: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def batch(self, batch: PackedPairs) -> PackedPairs:
        """A micro-batch as the objective takes it."""
        if self.slopes is None:
            return batch
        slopes = []
        for p, example in enumerate(batch.pair_index_P.tolist()):
            size = batch.firsts[p + 1] - batch.firsts[p]
            slopes += self.slopes.get(example, [0.0] * size)  # an idle process's is of no step
        scores_S = torch.tensor(slopes, dtype=torch.float64)
        scores_S = scores_S.to(batch.target_N.device, non_blocking=True)
        # They have the weights, margins and labels in them.
        return replace(batch, scores_S=scores_S, weight_P=None, margin_P=None, smoothing_P=None)


def couple(
    setup: Setup,
    model: nn.Module,
    batches: list[list[int]],
    objective: BaseObjective,
    reference: Reference,
    running: RunningMean,
    totals: Totals,
    *,
    learn: bool,
) -> Shared:
    """The first pass of a step, if its objective needs one.

    Args:
        running: the running mean of the rewards, which gets those of this step if it is to
            ``learn``.
    """
    if not objective.couples and objective.shift_is is None:
        return Shared(objective)
    plain = setup.engine.plain(model)
    with torch.no_grad(), random_state_kept():
        if objective.shift_is == "kl":
            kl = _estimate_kl(setup, plain, batches, reference, totals.examples)
            return Shared(objective, kl, metrics={"kl": kl})
        if objective.shift_is == "mean_reward" and not learn:  # the rewards change nothing
            return _with_mean(objective, running)
        numbers, x = _whole_step(setup, plain, batches, objective, reference, totals)
    if objective.shift_is == "mean_reward":
        running.update(objective.beta * x.ratio_S)
        return _with_mean(objective, running)
    weight_P = torch.tensor([setup.pairs[i].weight for i in numbers], dtype=torch.float64)
    with torch.enable_grad():
        x.logp_S.requires_grad_()
        loss = (objective.losses(x) * weight_P).sum()
        (slope_S,) = torch.autograd.grad(loss, x.logp_S)
    slopes = dict(zip(numbers, map(Tensor.tolist, slope_S.split(x.sizes))))
    mean = loss.item() / totals.examples
    return Shared(given_slopes(objective), slopes=slopes, loss=mean)


def _with_mean(objective: BaseObjective, running: RunningMean) -> Shared:
    return Shared(objective, running.mean, metrics={"rewards/running_mean": running.mean})


def _whole_step(
    setup: Setup,
    model: nn.Module,
    batches: list[list[int]],
    objective: BaseObjective,
    reference: Reference,
    totals: Totals,
) -> tuple[list[int], Examples]:
    """The step's examples by number, and what the objective sees of them, alike on all processes.

    They are in the order of their numbers, which does not depend on how they are dealt out.
    """
    found: list[tuple[int, list[float], list[float]]] = []
    for index, real in setup.engine.forwards(batches, setup.filler):
        batch = setup.batch(index)
        logp_S = batch_logps(setup, model, batch, objective.ld_alpha).logp_S
        ref_S = of_reference(setup, model, batch, objective, reference)["ref_logp_S"]
        ref_S = torch.zeros_like(logp_S) if ref_S is None else ref_S
        if not real:
            continue
        logps, refs = torch.stack((logp_S, ref_S)).tolist()  # one wait for the device
        for example, start, stop in zip(index, batch.firsts, batch.firsts[1:]):
            found.append((example, logps[start:stop], refs[start:stop]))
    gathered = sorted(setup.engine.gather(found))
    numbers = [example for example, *_ in gathered]
    examples = [setup.pairs[i] for i in numbers]
    sizes = [len(example.responses) for example in examples]
    scores = [example.scores for example in examples]
    singles = objective.shape == "singles"

    def flat(values: Sequence[Sequence[float]]) -> Tensor:
        return torch.tensor(list(chain.from_iterable(values)), dtype=torch.float64)

    def each(name: str) -> Tensor:
        return torch.tensor([float(getattr(x, name)) for x in examples], dtype=torch.float64)

    return numbers, Examples(
        logp_S=flat([logp for _, logp, _ in gathered]),
        ref_logp_S=flat([ref for _, _, ref in gathered]),
        lengths_S=flat([[len(ids) for ids in example.responses] for example in examples]),
        firsts=(0, *accumulate(sizes)),
        margin_P=each("margin"),
        smoothing_P=each("label_smoothing"),
        scores_S=None if None in scores else flat(scores),
        desirable_P=each("desirable") if singles else None,
        mean_chosen_length=totals.chosen / totals.examples,
    )


def _estimate_kl(
    setup: Setup,
    model: nn.Module,
    batches: list[list[int]],
    reference: Reference,
    examples: int,
) -> float:
    """KTO's KL of a step: mean log-ratio of its mismatched completions, at least 0 (arXiv
    2402.01306, section 4.1)."""
    others, engine = setup.mismatched, setup.engine
    assert others is not None
    given = replace(reference, logps=reference.mismatched)
    mine = [i for batch in batches for i in batch]
    lengths = [others.lengths[i] for i in mine]
    padded, most = others.layout == "padded", others.config.max_tokens
    total = torch.zeros((), dtype=torch.float64, device=setup.device)
    plan = plan_batches(lengths, max_tokens=most, padded=padded) if mine else []
    planned = [[mine[i] for i in places] for places in plan]
    for index, real in engine.forwards(planned, others.filler):
        batch = others.batch(index)
        logp_S = batch_logps(others, model, batch).logp_S
        ref_S = of_reference(others, model, batch, setup.config.objective, given)["ref_logp_S"]
        total += (logp_S - ref_S).sum() if real else 0.0
    return max(0.0, float(engine.sum(total)) / examples)


def mismatched(examples: Sequence[Any], most: int, name: str = "") -> list[TokenizedSingle]:
    """Each example's prompt with the completion of another whose prompt differs.

    Which one is fixed by the examples alone, so that the reference's log-probs of them are known
    beforehand: a permutation of the completions, in which one that meets its own prompt gives way
    to the next that does not.  (KTO's own code and TRL take the batch's next completion, which
    makes them depend on how batches are drawn.)  Completions are cut where ``most`` tokens end.
    Prompts must be whole, none of their tokens among those that are scored.

    Args:
        name: of the examples, where they are not those of training.

    Raises:
        DataError: all prompts are the same.
    """
    generator = torch.Generator().manual_seed(_MISMATCHES)
    count = len(examples)
    numbers: dict[tuple[int, ...], int] = {}
    order = torch.randperm(count, generator=generator).tolist()
    # Prompts by number; `changes[i]` is the next place in the order that has another than place i.
    prompts = [numbers.setdefault(tuple(x.prompt_ids), len(numbers)) for x in examples]
    if len(numbers) < 2:
        of = f"{name}: " if name else ""
        other = f"leave {name} out" if name else "loss_type=apo_zero_unpaired"
        raise DataError(
            f"{of}loss_type=kto estimates a KL from completions of other prompts, and all {count} "
            f"rows have the prompt of {examples[0].where or 'the first'}; give rows of other "
            f"prompts too, or {other}"
        )
    changes = [0] * count
    for place in reversed(range(2 * count)):  # twice round: at first the end's are not known
        i, following = place % count, (place + 1) % count
        same = prompts[order[i]] == prompts[order[following]]
        changes[i] = changes[following] if same else following
    found = []
    for i, example in enumerate(examples):
        met = prompts[order[i]] == prompts[i]
        other = examples[order[changes[i] if met else i]]
        prompt, room = list(example.prompt_ids), most - len(example.prompt_ids)
        found.append(TokenizedSingle(prompt, other.response_ids[:room], True, where=other.where))
    return found
