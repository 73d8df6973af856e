"""Noise that models add in training mode, found by the random numbers that they draw.

Some of it fires rarely: the routing of PhiMoE draws for every token, and another expert answers
where two are within 2%.  No comparison of outputs is sure to meet that, the draw is.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_log = logging.getLogger(__name__)


def quiet(model: nn.Module, run: Callable[[], Any]) -> None:
    """Leave every module that draws random numbers while training in evaluation mode.

    There it computes the function that is sampled from.  Single numbers are no noise: models draw
    one to decide whether a layer is skipped, with a probability that is 0 here.

    Args:
        model: in training mode.
        run: a forward pass of it.

    Raises:
        ValueError: a module draws random numbers in evaluation mode as well.
    """
    drawing = _drawing(model, run)
    if drawing:
        name, module = next(iter(drawing.items()))
        _log.warning(
            "%s (%s, one of %d) draws random numbers in training; it is left in evaluation mode",
            name, type(module).__name__, len(drawing),
        )  # fmt: skip
    for module in drawing.values():
        # It alone: its children may be in need of training mode to be recomputed.
        module.train = MethodType(_train_children, module)  # type: ignore[method-assign]
        module.train()
    left = _drawing(model, run)
    if left:
        name, module = next(iter(left.items()))
        raise ValueError(
            f"{name} ({type(module).__name__}) draws random numbers in every forward pass, also in "
            "evaluation mode"
        )


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Leave the random state of the CPU and of all GPUs as it was."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield


def _train_children(self: nn.Module, mode: bool = True) -> nn.Module:
    self.training = False
    for child in self.children():
        child.train(mode)
    return self


def _drawing(model: nn.Module, run: Callable[[], Any]) -> dict[str, nn.Module]:
    """The innermost modules that draw more than a number at a time in a forward pass."""
    before = _state()
    with random_state_kept():
        run()
        if _equal(before, _state()):
            return {}
        found: dict[str, nn.Module] = {}
        inside: list[tuple[str, nn.Module]] = [("the model", model)]
        hooks = []
        for name, module in model.named_modules():
            entry = name, module
            hooks += [
                module.register_forward_pre_hook(lambda *_, entry=entry: inside.append(entry)),
                module.register_forward_hook(lambda *_: inside.pop() and None, always_call=True),
            ]
        try:
            with _Draws(lambda: found.update([inside[-1]])):
                run()
        finally:
            for hook in hooks:
                hook.remove()
    return found


class _Draws(TorchDispatchMode):
    """Calls ``report`` after every operation that draws more than one number."""

    def __init__(self, report: Callable[[], None]) -> None:
        super().__init__()
        self.report = report

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = _state()
        out = func(*args, **(kwargs or {}))
        several = not isinstance(out, Tensor) or out.numel() > 1
        if several and not _equal(before, _state()):
            self.report()
        return out


def _state() -> list[Tensor]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        states += torch.cuda.get_rng_state_all()
    return states


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))
