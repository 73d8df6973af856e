"""A language model made ready for pairs: how it takes them, its fused head, and the loss on it.

`prepare_model` finds the layout in which a model computes pairs exactly.  Sharing the prompt needs
every layer to attend through transformers' interface; recurrent and hybrid layers and own attention
code don't, and get a row for each sequence instead.  What a layout gives is compared with the model
as it was loaded, a sequence at a time, before anything is trained.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from fastdpo.data.batch import PackedPairs, pack_pairs
from fastdpo.data.examples import ANY_LENGTH, LAYOUTS, Layout, LengthClasses, TokenizedPair
from fastdpo.errors import ModelError
from fastdpo.loss.examples import BaseObjective
from fastdpo.loss.objectives import lr_dpo
from fastdpo.loss.ops import PreferenceLoss, linear_preference_loss
from fastdpo.model import attention, head, liger, noise, offload, rope, sequence_parallel, tiling
from fastdpo.model.balance import balancing_loss, token_mask
from fastdpo.model.devices import device_of
from fastdpo.model.load import one_line
from fastdpo.model.shard import reset, reshard

_log = logging.getLogger(__name__)
_FAILURES = (ValueError, TypeError, RuntimeError, AttributeError, LookupError)
_PASSES = 3  # in which noise would show
_ATTENTION = {"full_attention", "sliding_attention"}  # transformers' names of layers that pack


def packed_loss(
    model: nn.Module,
    batch: PackedPairs,
    ref_logp_S: Tensor | None,
    *,
    beta: float | None = None,
    alpha: float | None = None,
    objective: BaseObjective | None = None,
    reference: Mapping[str, Tensor | None] | None = None,
    num_pairs: float | None = None,
    mean_chosen_length: float | None = None,
    shift: float = 0.0,
    stats: tuple[str, ...] = (),
    workspace_mib: float | None = None,
    impl: str = "auto",
    router_aux_loss_coef: float = 0.0,
) -> PreferenceLoss:
    """The loss of a batch under a model prepared by `prepare_model`.

    Of a model that is `sequence_parallel`, each process of the group has the whole result, and the
    gradient of its own tokens.

    With ``router_aux_loss_coef`` the loss is the sum of that and of ``router_aux_loss_coef`` times
    the model's own balancing loss over the tokens of the batch: padding does not count, and a
    shared prompt counts once.  The metrics then have both, ``preference_loss`` and ``aux_loss``
    (TRL's name, and as there not multiplied).

    Args:
        ref_logp_S: summed log-probs under the reference, (S,) fp32 or fp64; None where the
            objective needs none, or with ``reference``.
        beta, alpha: of length-regularized DPO.
        objective: another objective instead.
        reference: `reference_rows` of the reference, for an objective that needs its KL.
        num_pairs, mean_chosen_length, shift, stats: as in `fastdpo.linear_preference_loss`.

    Raises:
        TypeError: both an objective and the numbers of another are given, or neither.
    """
    batch = sequence_parallel.chunk(model, batch)
    chunk = batch.chunk
    if objective is None and beta is not None:
        objective, beta, alpha = lr_dpo(beta, 0.0 if alpha is None else alpha), None, None
    if objective is None or beta is not None or alpha is not None:
        raise TypeError("give packed_loss beta and alpha, or an objective, which has its own")
    loss = partial(
        linear_preference_loss,
        target_N=batch.target_N,
        bounds_S1=batch.bounds_S1,
        ref_logp_S=ref_logp_S,
        objective=objective,
        rows_N=batch.rows_N,
        firsts_P1=batch.firsts,
        margin_P=batch.margin_P,
        weight_P=batch.weight_P,
        smoothing_P=batch.smoothing_P,
        # What pairing wrote has scores, whatever the loss is.
        scores_S=batch.scores_S if objective.needs_scores else None,
        desirable_P=batch.desirable_P,
        num_pairs=num_pairs,
        mean_chosen_length=mean_chosen_length,
        shift=shift,
        stats=stats,
        workspace_mib=workspace_mib,
        impl=impl,
        group=chunk and chunk.parallel.group,
        **(reference or {}),
    )

    routers = _balanced(batch, router_aux_loss_coef) if router_aux_loss_coef else None
    result = head.packed_forward(model, batch, loss, routers)
    if chunk is not None:
        result.stats = {name: chunk.targets(x_N) for name, x_N in sorted(result.stats.items())}
    return result


def _balanced(batch: PackedPairs, coef: float) -> Callable[..., PreferenceLoss]:
    """What adds a batch's balancing loss to its result."""

    def with_routers(base: Any, gate_logits: Any, result: PreferenceLoss) -> PreferenceLoss:
        if batch.chunk is not None and isinstance(gate_logits, tuple):
            gate_logits = tuple(map(batch.chunk.rows, gate_logits))
        aux = balancing_loss(base, gate_logits, token_mask(batch)).to(result.loss.device)
        parts = {"preference_loss": result.loss.detach(), "aux_loss": aux.detach()}
        result["loss"], result.metrics = result.loss + coef * aux, result.metrics | parts
        return result

    return with_routers


@torch.no_grad()
def reference_rows(model: nn.Module, batch: PackedPairs) -> dict[str, Tensor | None]:
    """Hidden rows and head of a reference on a batch: the ``ref_*`` arguments of the ops.

    ``model`` is prepared as the policy is; the head's scale and cap are the policy's.
    """

    def rows(h_TD: Tensor, w_VD: Tensor, bias_V: Tensor | None, **_: Any) -> dict[str, Any]:
        ref_bias_V = None if bias_V is None else bias_V.detach()
        return {"ref_h_TD": h_TD, "ref_w_VD": w_VD.detach(), "ref_bias_V": ref_bias_V}

    return head.packed_forward(model, sequence_parallel.chunk(model, batch), rows)


def prepare_model(
    model: nn.Module,
    *,
    layout: str = "auto",
    gradient_checkpointing: bool = False,
    bf16: bool = False,
    impl: str = "auto",
    activation_offloading: bool = False,
    mlp_tile_tokens: int | None = None,
    use_liger_kernel: bool = False,
    prove: bool = True,
) -> nn.Module:
    """Packed attention, the fused head, no dropout, in training mode; on the model's own device.

    Args:
        model: a transformers causal LM, or a PEFT model of one; changed in place and returned. One
            that is sharded over processes (`fastdpo.model.shard`) is proven on all of them at once.
        layout: of `fastdpo.data.batch.pack_pairs`; "auto" takes the first that this model computes
            exactly, and says so where it is not the first. `layout_of` reads it back.
        gradient_checkpointing: recompute activations in the backward.
        bf16: check under the autocast that training uses.
        impl: of the fused head.
        activation_offloading, mlp_tile_tokens, use_liger_kernel: see the modules
            `offload`, `tiling` and `liger` of this room.
        prove: compare what the model computes with what it computed as it was loaded.  False is
            for `fastdpo.plan` alone, whose models have no content: nothing is run, and "auto" takes
            the first layout that the model's kind allows.

    Raises:
        ModelError: the model computes pairs in no layout, or not in the one asked for; its head is
            one that the fused one does not reproduce; or it is not deterministic.
    """
    head.attach(model)
    attention.keep_softcap(model)
    _disable_dropout(model)
    _evaluate(model)
    classes, alone = rope.attach(model) if prove else ANY_LENGTH, None
    if sequence_parallel.of(model) is not None:
        rope.refuse_in_layers(model)
    vars(head.base_of(model)).pop("_fastdpo_layout", None)  # of an earlier time, to be found again
    with _probing(model, bf16) if prove else nullcontext():
        if prove:
            with attention.own_attention(model):
                alone = _run_alone(model, classes)
                head.check(model, impl)
        if use_liger_kernel:
            liger.use_liger(model)
            if alone is not None:
                alone.check_liger(model)
        if mlp_tile_tokens is not None:
            tiling.tile_mlp(model, mlp_tile_tokens)
        if activation_offloading:
            offload.offload(model)
        names = LAYOUTS if layout == "auto" else (layout,)
        chosen = _first_exact(model, alone, [Layout(name, classes) for name in names])
        head.base_of(model)._fastdpo_layout = chosen
        if gradient_checkpointing:
            checkpoint_activations(model)
        if alone is None:
            model.train()
        else:
            _silence(model, alone, chosen)
    reshard(model)
    return model


@contextmanager
def _probing(model: nn.Module, bf16: bool) -> Iterator[None]:
    """What a model computes within it leaves no graph and draws no random numbers for good."""
    kind = device_of(model).type
    random = noise.random_state_kept()
    with torch.no_grad(), torch.autocast(kind, torch.bfloat16, enabled=bf16), random:
        yield


def _silence(model: nn.Module, alone: "_Alone", layout: Layout) -> None:
    """Put a model in training mode, where it is to compute what it does in evaluation."""
    wanted = alone.in_batch(model, layout)
    model.train()
    try:
        noise.quiet(model, lambda: alone.in_batch(model, layout))
        if not all(torch.equal(alone.in_batch(model, layout), wanted) for _ in range(_PASSES)):
            raise ValueError("noise or dropout that cannot be switched off")
    except ValueError as error:
        raise ModelError(
            f"{type(model).__name__} gives two forward passes different hidden states: it has "
            f"{error}; policy and reference would differ"
        ) from error


def checkpoint_activations(model: Any) -> None:
    """Recompute each layer's activations in the backward."""
    kwargs = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # renamed before transformers 6
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def fuse_head(model: Any, impl: str = "auto") -> None:
    """`head.attach`, and compare the fused head's log-probs with those of the model's logits.

    Its layout stays its own; it is run in evaluation mode and left in the mode it was in.

    Raises:
        ModelError: the head cannot be fused, or is not the one that gives the model's logits.
    """
    head.attach(model)
    was_training = model.training
    _evaluate(model)
    with torch.no_grad(), attention.own_attention(model):
        head.check(model, impl)
    model.train(was_training)


def layout_of(model: Any) -> Layout:
    """The layout that `prepare_model` found for a model: a str that also knows its frequencies."""
    return head.base_of(model)._fastdpo_layout


def _first_exact(model: Any, alone: "_Alone | None", layouts: Sequence[Layout]) -> Layout:
    """Switch the model to the first of `layouts` it computes exactly; unproven, that it takes."""
    own = model.config._attn_implementation
    reasons = []
    for layout in layouts:
        try:
            if layout != "padded":
                attention.use_packed_attention(model)
            elif own == attention.NAME:  # prepared before
                attention.use_own_attention(model)
            parallel = sequence_parallel.of(model)
            if layout == "padded" and parallel is not None:
                raise ValueError(sequence_parallel.padded(parallel))
            _refuse_state(model, layout)
            if alone is not None:
                alone.check(model, layout)
        # A model that was not made for packed rows can fail in any way.
        except _FAILURES as problem:
            reasons.append(f"{layout}: {one_line(problem)}")
            reset(model)  # where the error was in a forward
            if model.config._attn_implementation != own:
                model.set_attn_implementation(own)
            continue
        if reasons and alone is not None:
            _log.warning(
                "%s: pairs are %s, which costs more than a shared prompt. %s",
                type(head.base_of(model)).__name__, layout, "; ".join(reasons),
            )  # fmt: skip
        return layout
    raise ModelError(
        f"{type(head.base_of(model)).__name__} computes pairs exactly in no layout asked for. "
        + "; ".join(reasons)
    )


def _refuse_state(model: Any, layout: str) -> None:
    """Refuse what no short probe shows: a state from token to token, keys chosen from a whole row.

    Such a state only forbids to pack; Doge's choice of keys forbids every batch.
    """
    base = head.base_of(model)
    config = base.config.get_text_config()
    kept = getattr(config, "keep_window_size", None)
    if kept:
        raise ValueError(
            f"its attention keeps {kept} keys of a whole row (keep_window_size), padding and other "
            "sequences among them"
        )
    kinds = set(getattr(config, "layer_types", None) or ())
    if layout == "padded" or not (base._is_stateful or kinds - _ATTENTION):
        return
    what = ", ".join(sorted(kinds - _ATTENTION)) or "a recurrent state"
    raise ValueError(f"the model's layers have {what}, which runs across packed sequences")


def _run_alone(model: Any, classes: LengthClasses) -> "_Alone":
    """`_Alone`, or one line that says why a model can't be run on plain sequences of tokens."""
    try:
        return _Alone(model, classes)
    except _FAILURES as error:
        raise ModelError(
            f"{type(head.base_of(model)).__name__} cannot be trained on pairs: for sequences of "
            f"tokens it gives {type(error).__name__}: {one_line(error, 200)}"
        ) from error


class _Alone:
    """Short pairs, and what the model with its own attention gives for each sequence by itself."""

    def __init__(self, model: Any, classes: LengthClasses = ANY_LENGTH) -> None:
        device = device_of(model)
        # CPM-Ant embeds tokens that its head does not give.
        tables = model.get_input_embeddings(), model.get_output_embeddings()
        vocab = min(map(head.table_rows, tables))
        self.padded = Layout("padded", classes)
        sizes = [(7, 5, 9), (11, 8, 4)]
        modules = model.named_modules()
        experts = any("expert" in f"{name} {type(x).__name__}".lower() for name, x in modules)
        if experts:  # many tokens, so that most of them answer
            sizes = [(21, 15, 27), (33, 24, 12)] * 2
        ids = [i * 7919 % vocab for i in range(sum(map(sum, sizes)))]
        self.pairs = _cut_into(ids, sizes)
        hidden = []
        for pair in self.pairs:
            for response in (pair.chosen_ids, pair.rejected_ids):
                inputs = torch.tensor([pair.prompt_ids + response], device=device)
                rows = slice(len(pair.prompt_ids) - 1, -1)
                call = head.HeadCall(lambda h_TD, **_: h_TD)
                hidden.append(model(input_ids=inputs, head_call=call)[rows])
        self.hidden_ND = torch.cat(hidden).float()
        *others, last = _cut_into([(token + 1) % vocab for token in ids], sizes)
        # The last response and its prompt stay, everything beside them is another.
        stays = self.pairs[-1]
        self.changed = [*others, replace(stays, chosen_ids=last.chosen_ids)]
        half = any(x.dtype in (torch.bfloat16, torch.float16) for x in hidden)
        half = half or torch.is_autocast_enabled(device.type)
        self.tolerance = 0.05 if half else 1e-3
        # Rounding sends a token to another expert, in half precision now and then, in fp32 rarely
        # and in deep models only: the share of a sequence's tokens that has to be within tolerance.
        self.share = 1.0 if not experts else 0.5 if half else 0.75
        # Experts round by how many tokens they get, which is no leak; those are of order one.
        self.rounding = self.tolerance if experts else 0.0
        # Rounding differences stay near eps times the depth; leaked attention is of order one.
        self.padded_leak = self.leak(model, self.padded)
        self.in_fp32: _Alone | None = None
        exact = all(p.dtype == torch.float32 for p in model.parameters())
        if experts and half and exact and not head.gathers_bf16(model):
            with torch.autocast(device.type, enabled=False):
                self.in_fp32 = _Alone(model, classes)
            self.in_fp32.padded_leak = 0.0  # in fp32 nothing excuses a leak

    def check_liger(self, model: nn.Module) -> None:
        """Refuse kernels that compute another function, before a layout is blamed for it."""
        with attention.own_attention(model):
            error = self.error(model, self.padded)
        if not error < self.tolerance:
            raise ModelError(
                f"use_liger_kernel: Liger's kernels give {type(model).__name__} other hidden states"
                f" (by {error:.2g} of their size); leave them off"
            )

    def leak(self, model: nn.Module, layout: Layout) -> float:
        """How much the last response's hidden states depend on what is beside it, relative.

        The same kernels run on the same shapes, so without a leak the bits are the same.
        """
        count = len(self.pairs[-1].rejected_ids)
        before, after = (self.in_batch(model, layout, x)[-count:] for x in (None, self.changed))
        return float(_relative(after, before.float()).quantile(self.share))

    def check(self, model: nn.Module, layout: Layout) -> None:
        """Refuse a layout in which a sequence is not what it is alone."""
        with attention.refuse_lost_windows(), rope.received() as received:
            error = self.error(model, layout)
        batch = pack_pairs(self.pairs, layout=layout)
        if layout != "padded":
            batch = sequence_parallel.chunk(model, batch)
        wanted_BT = batch.position_ids_BT
        for positions in received:
            rows = positions.reshape(-1, *positions.shape[-2:]).cpu()
            if wanted_BT is not None and not all(torch.equal(row, wanted_BT) for row in rows):
                raise ValueError("it counts positions itself, by which its frequencies are chosen")
        if self.in_fp32 is not None:
            # bf16's rounding of a mixture of experts may hide a difference.
            with torch.autocast(device_of(model).type, enabled=False):
                self.in_fp32.check(model, layout)
        # Rounding of a mixture of experts may depend on what else is in a batch, in any layout.
        leak = 0.0 if layout == "padded" else self.leak(model, layout)
        if not (error < self.tolerance and leak <= max(4 * self.padded_leak, self.rounding)):
            raise ValueError(
                f"pairs are not isolated, hidden states differ by {error:.2g} of their "
                f"size from those of each sequence alone and by {leak:.2g} with what is beside it; "
                "its layers do not all attend through transformers' AttentionInterface"
            )

    def in_batch(
        self, model: nn.Module, layout: Layout, pairs: list[TokenizedPair] | None = None
    ) -> Tensor:
        """Hidden states that predict the targets, from both pairs in one batch."""
        device = device_of(model)
        whole = batch = pack_pairs(pairs or self.pairs, layout=layout).to(device)
        if layout != "padded":
            batch = sequence_parallel.chunk(model, batch)
        h_TD = head.packed_forward(model, batch, lambda h_TD, **_: h_TD)
        return (h_TD if batch.chunk is None else batch.chunk.rows(h_TD))[whole.rows_N]

    def error(self, model: nn.Module, layout: Layout) -> float:
        """Largest difference of a hidden state, relative to its size; of a mixture of experts that
        of the `share` of each sequence's tokens that differ least."""
        error_N = _relative(self.in_batch(model, layout), self.hidden_ND)
        if self.share < 1:
            sides = [len(x) for pair in self.pairs for x in (pair.chosen_ids, pair.rejected_ids)]
            error_N = torch.stack([x.quantile(self.share) for x in error_N.split(sides)])
        return float(error_N.max())


def _relative(found_ND: Tensor, wanted_ND: Tensor) -> Tensor:
    return (found_ND.float() - wanted_ND).norm(dim=-1) / wanted_ND.norm(dim=-1)


def _evaluate(model: nn.Module) -> None:
    """Evaluation mode, but not for bitsandbytes' layers.

    In it they repack 4-bit weights for inference on a CPU, and pass no gradient from then on.
    """
    for module in model.eval().modules():
        if type(module).__module__.startswith("bitsandbytes."):
            module.train()


def _cut_into(ids: list[int], sizes: list[tuple[int, int, int]]) -> list[TokenizedPair]:
    """Pairs with so many tokens of prompt, chosen and rejected response, one after the other."""
    rest = iter(ids)
    taken = [[list(islice(rest, n)) for n in size] for size in sizes]
    return [TokenizedPair(prompt, chosen, rejected) for prompt, chosen, rejected in taken]


def _disable_dropout(model: nn.Module) -> None:
    """Zero every dropout, also those that models keep as plain numbers (attention, layerdrop)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("dropout" in name or "layerdrop" in name):
                setattr(module, name, 0.0)


def check_range(model: Any, token: int, length: int, whose: str, what: str) -> None:
    """Refuse token ids and lengths that the model has no embedding for."""
    rows = head.table_rows(model.get_input_embeddings())
    if token >= rows:
        raise ModelError(
            f"{whose} token ids go up to {token}, but {type(model).__name__} has {rows} "
            "embeddings; use the tokenizer that belongs to the model, or leave out rows with such "
            "tokens"
        )
    positions = getattr(model.config, "max_position_embeddings", None)
    grows = layout_of(model).classes.grows_from is not None  # dynamic NTK has no end
    if positions is not None and length > positions and not grows:
        raise ModelError(
            f"{what}={length} is over the {positions} positions of {type(model).__name__}; "
            "lower max_length"
        )
