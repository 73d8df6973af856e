"""A model sharded over processes: each holds some rows of every parameter (torch's FSDP2).

`shard` takes a model that is in memory, or one on the meta device whose rows
`fastdpo.model.pieces` reads.  Adapters are put in and the head attached before; what is computed
with the model, the proof of `prepare_model` too, comes after, on all processes at once and in the
same order.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from fastdpo.errors import ModelError
from fastdpo.model import head


def shard(
    model: Any,
    mesh: Any,
    *,
    bf16: bool = False,
    reshard_after_forward: bool = True,
    offload_params: bool = False,
    head_in_root: bool = False,
    layer_names: Sequence[str] | None = None,
) -> Any:
    """Shard the parameters of a model along their first dimension, with torch's ``fully_shard``.

    Units that are gathered at once are each decoder layer, the embeddings, and the head.  Where
    embeddings and head are one parameter, it is gathered with the root, which has all that is left.
    The root and the head are needed first in the backward, so they stay gathered after a forward;
    call `reshard` before parameters are read after a forward without a backward.

    Args:
        model: a transformers causal LM or a PEFT model of one, with the same weights in every
            process or on the meta device; changed in place.
        mesh: of one dimension, or of two: copies, and the processes that hold a copy together.
        bf16: gather layers and an untied head in bfloat16, and sum gradients in fp32.  Embeddings
            and what the root has, as the last norm, are gathered in the dtype of the weights, and
            so the residual stream keeps it.
        reshard_after_forward: free a layer after its forward and gather it again for the backward.
        offload_params: keep parameters, gradients and the optimizer's state in CPU memory.
        head_in_root: gather the head with the root.
        layer_names: classes of the layers; by default transformers' ``_no_split_modules``.

    Raises:
        ModelError: the model has no layers of these classes, or weights that take no gradient by
            their kind.
    """
    base = head.base_of(model)
    kind = type(base).__name__
    _check_weights(model, kind)
    base._fastdpo_gathers_bf16 = bf16
    layers = _layers(base, layer_names)
    embeddings: Any = base.get_input_embeddings()
    own_head = cast(Any, base.get_output_embeddings())
    # What another part has too, as the table of embeddings that is the head, is the root's.
    units = [x for x in (*layers, embeddings) if not _shared(model, x)]
    apart = own_head is not None and not (head_in_root or _shared(model, own_head))
    heads: list[Any] = [own_head] if apart else []
    # The autocast of training casts what goes into a layer; norms and sums keep what they get.
    exact = policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if bf16:
        # Of weights that are products' alone this is the rounding of autocast.
        exact = replace(exact, reduce_dtype=torch.float32)
        policy = replace(exact, param_dtype=torch.bfloat16)
    offload: OffloadPolicy = OffloadPolicy()
    if offload_params:
        offload = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu")
    given: dict[str, Any] = {"mesh": mesh, "offload_policy": offload}
    after: dict[str, Any] = {**given, "reshard_after_forward": reshard_after_forward}
    kept: dict[str, Any] = {**given, "reshard_after_forward": False}
    try:
        for unit in units:
            fully_shard(unit, mp_policy=exact if unit is embeddings else policy, **after)
        for unit in heads:
            fully_shard(unit, mp_policy=policy, **kept)
        fully_shard(model, mp_policy=exact, **kept)
        if embeddings in units and isinstance(embeddings, nn.Embedding):
            cast(Any, embeddings).set_unshard_in_backward(False)  # a sum of rows, without the table
        for unit in _units(model):
            _keep_name(type(unit))
    except (ValueError, NotImplementedError) as error:
        raise ModelError(f"FSDP2 cannot shard this {kind}: {error}; set engine=ddp") from error
    return model


def _keep_name(kind: type) -> None:
    """Name a class that ``fully_shard`` made as the one that it was made of: messages have its
    name, and functions of a model are looked for in its module."""
    own = next(x for x in kind.__mro__[1:] if x.__module__ != FSDPModule.__module__)
    kind.__name__, kind.__qualname__, kind.__module__ = (
        own.__name__,
        own.__qualname__,
        own.__module__,
    )


def _check_weights(model: nn.Module, kind: str) -> None:
    """Refuse weights that cannot be sharded, as those in 4 bits."""
    if _units(model):
        raise ModelError(f"this {kind} is sharded already")
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise ModelError(
                f"{name} of {kind} is kept in {parameter.dtype}, which FSDP2 cannot shard; set "
                "load_in_4bit=false, or engine=ddp"
            )


def _layers(base: Any, names: Sequence[str] | None) -> list[nn.Module]:
    wanted = set(names or base._no_split_modules or ())
    found = [x for x in base.modules() if type(x).__name__ in wanted]
    if not found:
        kind, what = type(base).__name__, f"fsdp_transformer_layer_cls_to_wrap={sorted(wanted)}"
        if not names:
            what = "its _no_split_modules"
        raise ModelError(
            f"{kind} has no layers of the classes in {what}; name the class of its decoder "
            "layers in fsdp_transformer_layer_cls_to_wrap, or set engine=ddp"
        )
    return found[::-1]  # what is inside another comes first


def _shared(model: nn.Module, part: nn.Module) -> bool:
    """Whether a module outside of ``part`` has one of its parameters too."""
    inside = {id(module) for module in part.modules()}
    outside = {
        id(p) for m in model.modules() if id(m) not in inside for p in m.parameters(recurse=False)
    }
    return any(id(p) in outside for p in part.parameters())


# ----------------------------------------------------------------------- of a model that is sharded
def _units(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Free what a forward left gathered: the parameters are each process's own rows again."""
    for unit in _units(model):
        unit.reshard()


def reset(model: nn.Module) -> None:
    """Let a model run again after its forward raised an error, on all processes alike."""
    if not _units(model):
        return
    unit: Any = model
    if hasattr(unit, "reset_iter_state"):  # torch 2.13
        unit.reset_iter_state()
        return
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

    for state in (unit._get_fsdp_state() for unit in _units(model)):
        state._state_ctx.iter_forward_root = None
        groups = getattr(state, "_fsdp_param_groups", None)  # several from some torch on
        for part in (state, *(groups or [state._fsdp_param_group])):
            if part is not None:
                part._training_state = TrainingState.IDLE
    reshard(model)
