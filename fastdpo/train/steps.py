"""The steps of a round: which examples a process takes, and what it computes of a micro-batch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdpo.data.batch import (
    PackedPairs,
    pack_pairs,
    padded_tokens,
    plan_batches,
    plan_steps,
    share_step,
)
from fastdpo.loss.examples import BaseObjective
from fastdpo.loss.objectives import given_slopes, lr_dpo
from fastdpo.loss.ops import PreferenceLoss
from fastdpo.model.adapters import reference_mode
from fastdpo.model.prepare import packed_loss, reference_rows
from fastdpo.train.config import TrainConfig
from fastdpo.train.examples import chosen_tokens
from fastdpo.train.logps import LogProbs


@dataclass(frozen=True)
class Setup:
    """What stays the same from step to step.

    Attributes:
        engine: how the processes hold the model, and what they exchange.
        out: folder of the run.
        reference: folder or hub name of another reference than the start.
        progress: whether this process shows how far it is.
        pairs: all examples of the round; once a model is known, those that it gets.
        keep_checkpoint: whether the state after the last step is left, for more epochs.
        unpaired: whether the examples are single responses that were given as pairs.
        name: of the examples, where they are not those of training.
        logps_name: of the file that keeps the reference's log-probs of them.
        layout: of the micro-batches; None until a model is known, as are the fields below.
        lengths: tokens of each example in that layout.
        too_long: how many pairs were dropped and truncated.
        aux_loss_coef: of a mixture's balancing loss; 0 is none.
        mismatched: prompts with completions of others, as many as examples, where the objective
            estimates a KL from them.
    """

    engine: Any
    config: TrainConfig
    out: Path
    reference: str | Path | None
    progress: bool
    pairs: Sequence[Any]
    keep_checkpoint: bool = True
    unpaired: bool = False
    name: str = ""
    logps_name: str = "ref_logps"
    layout: Any = None
    lengths: Sequence[int] = ()
    too_long: dict[str, int] = field(default_factory=dict)
    aux_loss_coef: float = 0.0
    mismatched: "Setup | None" = None

    @property
    def device(self) -> torch.device:
        return self.engine.accelerator.device

    @property
    def is_main(self) -> bool:
        """Whether this is the first process, which writes files and talks."""
        return self.engine.is_main

    @property
    def filler(self) -> list[int]:
        """The shortest example, for a micro-batch that counts for nothing."""
        return [min(range(len(self.pairs)), key=self.lengths.__getitem__)]

    @property
    def noun(self) -> str:
        """What the examples are called."""
        return f"{self.pairs[0].name}s"

    def tokens(self, index: list[int]) -> int:
        """Tokens that a micro-batch of these examples computes."""
        lengths = [self.lengths[i] for i in index]
        if self.layout != "padded":
            return sum(lengths)
        return padded_tokens(lengths, [self.pairs[i].num_computed for i in index])

    def routed(self, index: list[int]) -> int:
        """Tokens that a micro-batch sends through routers, padding left out."""
        layout = "packed" if self.layout == "padded" else self.layout
        return sum(self.pairs[i].num_tokens(layout) for i in index)

    def batch(self, index: list[int]) -> PackedPairs:
        """The micro-batch of these examples, on the device."""
        batch = pack_pairs([self.pairs[i] for i in index], index, layout=self.layout)
        return batch.to(self.device)


def plan_epoch(setup: Setup, epoch: int) -> list[list[list[int]]]:
    """Micro-batches of examples' numbers for each step of an epoch, of this process.

    It has none in a step of fewer examples than processes.
    """
    config, lengths, world = setup.config, setup.lengths, setup.engine.dp_size
    fit = {"max_tokens": config.max_tokens, "padded": setup.layout == "padded"}
    counts = [pair.num_computed for pair in setup.pairs]
    size, seed = config.batch_size, config.seed
    steps = plan_steps(lengths, batch_pairs=size, seed=seed, epoch=epoch, sequences=counts, **fit)
    if world == 1:
        return steps
    own = []
    for step in steps:
        pairs = list(chain.from_iterable(step))
        mine = share_step(pairs, lengths, world)[setup.engine.dp_rank]
        of_mine = [lengths[i] for i in mine], [counts[i] for i in mine]
        plan = plan_batches(of_mine[0], sequences=of_mine[1], **fit)
        own.append([[mine[i] for i in batch] for batch in plan])
    return own


@dataclass(frozen=True)
class Reference:
    """Where the reference's log-probs come from: known beforehand, or a model in each step.

    Attributes:
        logps: those of the setup's examples.
        mismatched: those of ``setup.mismatched``.
        model: computes them in each step where they are not known; None is the policy with its
            adapters off.
    """

    logps: LogProbs | None = None
    mismatched: LogProbs | None = None
    model: nn.Module | None = None


def batch_loss(
    setup: Setup, model: nn.Module, batch: PackedPairs, ref_logp_S: Tensor | None, **options: Any
) -> PreferenceLoss:
    """The loss of a micro-batch; ``options`` are the others of `packed_loss`."""
    config = setup.config
    with _autocast(setup, batch):
        return packed_loss(
            model,
            batch,
            ref_logp_S,
            workspace_mib=config.workspace_mib,
            impl=config.impl,
            **options,
        )


def _autocast(setup: Setup, batch: PackedPairs) -> Any:
    # Autocast's cache would keep a copy of every weight until the loss; each is used once.
    kind = batch.target_N.device.type
    return torch.autocast(kind, torch.bfloat16, enabled=setup.config.bf16, cache_enabled=False)


def batch_logps(
    setup: Setup, model: nn.Module, batch: PackedPairs, ld_alpha: float | None = None
) -> PreferenceLoss:
    """Log-probs of a batch by the route that training takes, without a gradient.

    Its sums are fp64, with the longer side's tail weighted by ``ld_alpha``; its ``stats`` have
    "logp", those of tokens.
    """
    objective = setup.config.objective
    S = len(batch.bounds_S1) - 1
    zeros_S: Tensor | None = torch.zeros(S, dtype=torch.float64, device=batch.target_N.device)
    if objective.shape == "pairs" and not objective.needs_prompt:
        measuring: BaseObjective = replace(lr_dpo(setup.config.beta), ld_alpha=ld_alpha)
        batch = replace(batch, scores_S=None)
    else:
        measuring, batch = given_slopes(objective), replace(batch, scores_S=zeros_S)
        zeros_S = zeros_S if measuring.needs_reference else None
    batch = replace(batch, margin_P=None, smoothing_P=None)
    with torch.no_grad():
        return batch_loss(setup, model, batch, zeros_S, objective=measuring, stats=("logp",))


@contextmanager
def _as_reference(setup: Setup, model: nn.Module) -> Iterator[nn.Module]:
    """The reference without DDP; ``model`` is it, or has adapters that are switched off for it."""
    plain = setup.engine.plain(model)
    adapters_off = setup.config.use_peft and setup.reference is None
    with reference_mode(plain) if adapters_off else nullcontext():
        yield plain


def reference_logps_of(
    setup: Setup, model: nn.Module, batch: PackedPairs, ld_alpha: float | None = None
) -> PreferenceLoss:
    """`batch_logps` under the reference: ``model``, or ``model`` with its adapters off."""
    with _as_reference(setup, model) as plain:
        return batch_logps(setup, plain, batch, ld_alpha)


def of_reference(
    setup: Setup,
    model: nn.Module,
    batch: PackedPairs,
    objective: BaseObjective,
    reference: Reference,
) -> dict[str, Any]:
    """What the loss of a batch gets of the reference: nothing, its sums, or its rows and head."""
    if not objective.needs_reference:
        return {"ref_logp_S": None}
    of_model = model if reference.model is None else reference.model
    if objective.needs_kl:
        with _as_reference(setup, of_model) as plain, _autocast(setup, batch):
            return {"ref_logp_S": None, "reference": reference_rows(plain, batch)}
    if reference.logps is not None:
        index = batch.pair_index_P.tolist()
        ref_logp_S = reference.logps.sums(index, objective.ld_alpha)
        return {"ref_logp_S": ref_logp_S.to(batch.target_N.device, non_blocking=True)}
    logp_S = reference_logps_of(setup, of_model, batch, objective.ld_alpha).logp_S
    if reference.model is not None:
        setup.engine.release(reference.model)
    return {"ref_logp_S": logp_S}


class Totals(NamedTuple):
    """Of a step, over all processes; ``chosen`` are the tokens of `chosen_tokens`."""

    examples: int
    tokens: int
    batches: int
    routed: int
    chosen: int


def totals_of(setup: Setup, batches: list[list[int]], objective: BaseObjective) -> Totals:
    examples = [setup.pairs[i] for i in chain.from_iterable(batches)]
    tokens, routed = (sum(map(count, batches)) for count in (setup.tokens, setup.routed))
    chosen = sum(chosen_tokens(x, objective) for x in examples)
    counts = torch.tensor([len(examples), tokens, len(batches), routed, chosen])
    return Totals(*setup.engine.sum(counts.to(setup.device)).tolist())
