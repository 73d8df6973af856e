"""LoRA and QLoRA by peft: adapters on a frozen base, which without them is the reference.

The order of calls is `load_4bit` or ``load_causal_lm``, `add_lora`, ``prepare_model``; then the
reference log-probs within `reference_mode`, training, `save_adapter` and `merged`.  peft and
bitsandbytes are imported only where they are needed.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastdpo.errors import ModelError
from fastdpo.model import head
from fastdpo.model.load import load_causal_lm, one_line
from fastdpo.model.pieces import gathered, is_sharded
from fastdpo.storage import atomic_directory

ALL_LINEAR = "all-linear"
# Layers of experts and routers before transformers 5.
_EXPERTS_ONCE = {"gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"}
_log = logging.getLogger(__name__)


def add_lora(
    model: Any,
    *,
    r: int,
    alpha: float,
    target_modules: list[str] | str | None,
    target_parameters: list[str] | None = None,
    seed: int = 0,
) -> Any:
    """Freeze ``model`` and put LoRA adapters into it; they start as zero and have no dropout.

    Adapters are fp32 on a base of lower precision, which is peft's default.  TRL makes them bf16 on
    a quantized base; a step of a DPO learning rate would often be lost to rounding there.

    Transformers 5 keeps the experts of a mixture as parameters of three dimensions, and its routers
    as parameters too.  All linear layers are these as well, in every family and with the same rank.
    peft alone takes them in some families, where it leaves out dense layers of the same names.

    Args:
        model: a transformers causal LM; it is changed in place.
        r: rank.
        alpha: the adapters' product is scaled by ``alpha / r``.
        target_modules: names of linear layers, or the ends of their names ("q_proj"); None or
            "all-linear" is every linear layer but the head.  They are no regular expressions.
        target_parameters: names of parameters of experts and routers, or the ends of their names
            ("experts.down_proj"); None is all of them where ``target_modules`` is all linear
            layers, and none where it names some.
        seed: of the adapters' first halves; the global random state is left alone.

    Returns:
        A ``peft.PeftModel``.

    Raises:
        ModelError: peft is missing or refuses the model, there are adapters already, a name fits no
            layer or parameter, or it fits the head, an embedding or anything else that is not a
            linear layer.
    """
    peft = _import_peft()
    if getattr(model, "peft_config", None):
        raise ModelError(
            f"this {type(model).__name__} has adapters already; give a model in which they are "
            "merged (peft's merge_and_unload)"
        )
    of_mixture = mixture_parameters(model)
    names, modules, parameters = _targets(model, of_mixture, target_modules, target_parameters)
    wanted = {*parameters, *(f"{name}.weight" for name in modules)}
    # For models whose experts were modules before transformers 5, peft reads "gate_proj" as a name
    # of the experts: dense layers and shared experts of that name would stay without an adapter.
    taken = [n for n in modules if of_mixture and n.rpartition(".")[2] in _EXPERTS_ONCE]
    modules = names if names and not taken else [n for n in modules if n not in taken]
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=alpha,
        target_modules=modules,
        target_parameters=[*parameters, *(f"{name}.weight" for name in taken)] or None,
    )
    # peft draws on the CPU whatever the base's device is.
    with torch.random.fork_rng(devices=[]), _as_on_cpu(model):
        torch.default_generator.manual_seed(seed)
        try:
            adapted = peft.get_peft_model(model, config)
        except ValueError as error:
            raise ModelError(f"peft refuses this {type(model).__name__}: {error}") from error
    if left := wanted - adapted_parameters(adapted):
        raise ModelError(
            f"peft {peft.__version__} puts no adapter on {min(left)} of {type(model).__name__}"
        )
    frozen = [n for n, what in of_mixture.items() if what == "experts" and n not in parameters]
    if frozen:
        ends = sorted({".".join(n.split(".")[-2:]) for n in frozen})
        _log.warning("%s; lora_target_parameters=%s adapts them", trainable_share(adapted), ends)
    return adapted


@contextmanager
def _as_on_cpu(model: nn.Module) -> Iterator[None]:
    """Within the block weights on the meta device are of the CPU, of no more memory than a number.

    peft puts adapters on the device of their layer, and what it drew for them would be lost there.
    """
    places = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.is_meta
    ]
    hollow = {
        p: nn.Parameter(torch.empty((), dtype=p.dtype).expand(p.shape), p.requires_grad)
        for _, _, p in places
    }
    for module, name, parameter in places:
        module._parameters[name] = hollow[parameter]
    try:
        yield
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter
            parameter.requires_grad_(hollow[parameter].requires_grad)


def _targets(
    model: Any,
    of_mixture: dict[str, str],
    target_modules: list[str] | str | None,
    target_parameters: list[str] | None,
) -> tuple[list[str], list[str], list[str]]:
    """Names of layers that the user gave, if some, and full names of layers and parameters."""
    names = [target_modules] if isinstance(target_modules, str) else target_modules
    own_head, parameters = model.get_output_embeddings(), list(of_mixture)
    modules = [n for n, m in model.named_modules() if m is not own_head and _is_linear(m)]
    if names == [ALL_LINEAR]:
        names = None
    if names is not None:
        if names or not target_parameters:
            _check_targets(model, names)
        modules, parameters = [n for n in modules if _fits(n, names)], []
    if target_parameters is not None:
        parameters = _fitting_parameters(of_mixture, target_parameters, type(model).__name__)
    return names or [], modules, parameters


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ModelError("LoRA needs the peft package: pip install 'fastdpo[peft]'") from error
    return peft


def mixture_parameters(model: nn.Module) -> dict[str, str]:
    """Parameters of a mixture of experts that are linear maps without a linear layer.

    Returns:
        Their names, with "experts" (experts, in, out in either order) or "routers" (experts, in).
    """
    found: dict[str, str] = {}
    for module_name, module in model.named_modules():
        kind = type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False):
            if "expert" in kind and parameter.ndim == 3:
                found[f"{module_name}.{name}"] = "experts"
            elif "router" in kind and parameter.ndim == 2 and type(module) is not nn.Linear:
                found[f"{module_name}.{name}"] = "routers"
    return found


def adapted_parameters(model: nn.Module) -> set[str]:
    """Names of the base's parameters around which an adapter of `add_lora` stands."""
    found = set()
    for name, module in head.base_of(model).named_modules():
        if "lora_A" in module._modules:
            name = name.replace(".base_layer", "")  # one wrapper a parameter of a module
            found.add(f"{name}.{getattr(module, 'parameter_name', 'weight')}")
    return found


def trainable_share(model: nn.Module) -> str:
    """One line that says what is trained: of all parameters, and of a mixture's experts."""

    def count(parameters: Iterable[Any]) -> int:
        return sum(getattr(p, "ds_numel", p.numel()) for p in parameters)  # of DeepSpeed's parts

    trained, total = (
        count(p for p in model.parameters() if p.requires_grad),
        count(model.parameters()),
    )
    line = f"{trained:,} of {total:,} parameters are trained ({trained / total:.2%})"
    if trained == total:
        return line
    base, adapted = head.base_of(model), adapted_parameters(model)
    parts = mixture_parameters(base)
    for what in ("experts", "routers"):
        named = {name: base.get_parameter(name) for name, kind in parts.items() if kind == what}
        if named:
            share = count(named.values()) / total
            done = {
                p.requires_grad or name.replace(".base_layer", "") in adapted
                for name, p in named.items()
            }
            state = "partly frozen" if len(done) == 2 else "trained" if done == {True} else "frozen"
            line += f", {what} ({share:.1%} of all) are {state}"
    return line


def _fits(name: str, targets: list[str]) -> bool:
    """peft's rule: a whole name, or its end."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    # Some models' routers and grouped layers are linear ones whose forward is another function.
    kind = type(module)
    own = kind.__module__.startswith("transformers.models.") and kind.forward != nn.Linear.forward
    return isinstance(module, (nn.Linear, Conv1D)) and not own


def _fitting_parameters(of_mixture: dict[str, str], targets: list[str], model: str) -> list[str]:
    """Full names of parameters that the user named, or an error that has the names that fit."""
    for target in targets:
        if not any(_fits(name, [target]) for name in of_mixture):
            ends = sorted({".".join(name.split(".")[-2:]) for name in of_mixture})
            known = f"it has {', '.join(ends)}" if ends else "it has none, so leave the option out"
            raise ModelError(
                f"lora_target_parameters={target!r} fits no parameter of experts or routers of "
                f"{model}; {known}"
            )
    return [name for name in of_mixture if _fits(name, targets)]


def _check_targets(model: Any, targets: list[str]) -> None:
    """Refuse names before peft changes the model; it ignores one unknown name among known ones."""
    fitting = {
        target: [m for n, m in model.named_modules() if _fits(n, [target])] for target in targets
    }
    unknown = [target for target, modules in fitting.items() if not modules]
    for name in mixture_parameters(model):
        module_name, _, own = name.rpartition(".")
        for target in targets:
            if (target in unknown and _fits(name, [target])) or _fits(module_name, [target]):
                value = target if _fits(name, [target]) else f"{target}.{own}"
                raise ModelError(
                    f"lora_target_modules={target!r} is no linear layer of {type(model).__name__} "
                    f"but experts or a router that are parameters; give "
                    f"lora_target_parameters={[value]!r} for them"
                )
    if unknown or not targets:
        raise ModelError(
            f"lora_target_modules={unknown or targets} fit no layer of {type(model).__name__}; "
            f"give names of its linear layers, or {ALL_LINEAR!r}"
        )
    own_head = model.get_output_embeddings()
    for target, modules in fitting.items():
        for module in modules:
            if module is own_head or not _is_linear(module):
                what = "the head" if module is own_head else f"a {type(module).__name__}"
                raise ModelError(
                    f"lora_target_modules={target!r} is {what} of {type(model).__name__}; an "
                    "adapter goes on linear layers other than the head, so leave it out"
                )


def check_adapted(model: Any) -> None:
    """Raise ModelError where a model has no adapters."""
    if not hasattr(model, "disable_adapter"):
        raise ModelError(
            f"{type(model).__name__} is no peft.PeftModel; wrap it by add_lora, and unwrap it from "
            "DistributedDataParallel"
        )


@contextmanager
def reference_mode(model: Any) -> Iterator[None]:
    """Within the block, ``model`` is its base: the reference, without a second model.

    Raises:
        ModelError: the model has no adapters.
    """
    check_adapted(model)
    # peft switches the gradients of all adapters off, and then of all active ones on.
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)


def load_4bit(name: str, dtype: torch.dtype) -> Any:
    """Causal LM with linear layers in 4 bits, on the current GPU (or the CPU), for `add_lora`.

    QLoRA (arXiv 2305.14314): NF4, quantized constants, products in bf16.  The head, embeddings and
    norms are kept in ``dtype``, and a mixture's experts where they are parameters.  peft's
    ``prepare_model_for_kbit_training`` casts these to fp32, which adds nothing to frozen weights;
    ``dtype=torch.float32`` is the same thing, and gives an fp32 residual stream.

    Raises:
        ModelError: bitsandbytes is missing, or the model cannot be loaded.
    """
    try:
        import bitsandbytes  # type: ignore[import-not-found]
    except ImportError as error:
        raise ModelError(
            "load_in_4bit=True needs the bitsandbytes package: pip install 'fastdpo[qlora]'"
        ) from error
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = load_causal_lm(name, dtype=dtype, quantization_config=quantization)
    module: Any
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):  # type: ignore[attr-defined]
            # On some CPUs an evaluation repacks the weights into a format without a backward.
            module.support_avx512bf16_for_cpu = False
    parts = mixture_parameters(model).items()
    experts = [model.get_parameter(n) for n, what in parts if what == "experts"]
    if experts:
        _log.warning(
            "load_in_4bit: the experts of %s are parameters and stay in %s, %.1f GiB of them; "
            "bitsandbytes quantizes linear layers only",
            name, dtype, sum(p.nbytes for p in experts) / 2**30,
        )  # fmt: skip
    return model


def save_adapter(model: Any, path: Path, tokenizer: Any = None) -> None:
    """Write the adapters in peft's format, whole or not at all; with them the tokenizer that they
    were trained with, as TRL does, since its chat template may be another than the base's.

    Of a model that is sharded over processes the first one writes; all of them call this.

    Raises:
        ModelError: the model has no adapters.
    """
    check_adapted(model)
    state = model.state_dict()
    if any(map(is_sharded, state.values())):
        state = {name: gathered(x).cpu() for name, x in state.items() if ".lora_" in name}
        if torch.distributed.get_rank() > 0:
            return
    with atomic_directory(path) as folder:
        # "auto" may ask the hub whether the embeddings have grown; they are frozen.
        model.save_pretrained(folder, save_embedding_layers=False, state_dict=state)
        # peft's card is a form to fill in; that of the run is written later, beside the checksums.
        (folder / "README.md").unlink(missing_ok=True)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter that is trained, once by its first name if it is tied; no copies."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def load_trainable_state(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy what `trainable_state` gave into ``model``.

    Raises:
        ModelError: the names or shapes are not those that the model trains.
    """
    state = trainable_state(model)
    check_trainable(*({k: tuple(x.shape) for k, x in each.items()} for each in (state, tensors)))
    for name, tensor in tensors.items():
        state[name].copy_(tensor)


def check_trainable(
    shapes: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise `ModelError` where a saved state is not of the names and shapes that a model trains."""
    if shapes != given:
        name = min(name for name in {**shapes, **given} if shapes.get(name) != given.get(name))
        raise ModelError(
            f"the saved state has {name!r} with shape {given.get(name)}, but the model trains it "
            f"with {shapes.get(name)}; give the model and LoRA options that it was saved with"
        )


def merged(
    base_name: str, adapter_folder: Path, dtype: torch.dtype, *, option: str = "model"
) -> Any:
    """A plain transformers model on the CPU: the base, loaded anew, with saved adapters merged in.

    The training model is not touched.  After QLoRA this base is the unquantized one, so the policy
    differs from the trained one by the quantization error of the base.  `merged_in_place` says why
    ``dtype`` should be fp32.  `option` is what gave the base's name, for messages.

    Raises:
        ModelError: peft is missing, or the base or the adapters cannot be loaded.
    """
    base = load_causal_lm(base_name, dtype=dtype, option=option)
    return merged_in_place(with_adapters(base, base_name, adapter_folder))


def with_adapters(base: Any, base_name: str, adapter_folder: Path) -> Any:
    """A base in memory, or on the meta device, with saved adapters around its layers.

    Raises:
        ModelError: peft is missing, or the adapters cannot be loaded.
    """
    peft = _import_peft()
    try:
        with _as_on_cpu(base):
            model = peft.PeftModel.from_pretrained(base, str(adapter_folder), torch_device="cpu")
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"adapters {str(adapter_folder)!r} cannot be loaded: {one_line(error)}"
        ) from error
    # peft takes some names for those of older checkpoints, and leaves their adapters at zero.
    saved = load_file(adapter_folder / "adapter_model.safetensors")
    state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    if saved.keys() != state.keys():
        name = min(saved.keys() ^ state.keys())
        raise ModelError(
            f"adapters {str(adapter_folder)!r} are of another model than {base_name!r}: only "
            f"one of them has {name}"
        )
    for name, tensor in saved.items():
        state[name].copy_(tensor)
    return model


def merged_in_place(model: Any, dtype: torch.dtype | None = None) -> Any:
    """Merge the adapters into their own base and return it; ``model`` is of no use afterwards.

    Args:
        model: what `add_lora` gave.
        dtype: the base is cast to it first; by default it keeps its own.  Sums are rounded once.
            bfloat16 loses a change under 1/500 of a weight.  A short run at a low learning rate may
            make none that is larger, and its policy would be the reference again.

    Raises:
        ModelError: the model has no adapters, or its base is quantized.
    """
    check_adapted(model)
    if getattr(model, "is_quantized", False):
        raise ModelError(
            "adapters cannot be merged into a quantized base, which would be rounded to 4 bits "
            "again; save_adapter, and merged with the name of the unquantized base"
        )
    if dtype is not None:
        model.get_base_model().to(dtype)
    return model.merge_and_unload()
