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
from torch.utils.module_tracker import ModuleTracker

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
        if torch.equal(before, _state()):
            return {}
        found: list[str] = []
        with ModuleTracker() as inside, _Draws(lambda: found.append(max(inside.parents, key=len))):
            run()
    # The tracker's names begin with the class of the model.
    paths = [name.partition(".")[2] for name in found]
    return {path or "the model": model.get_submodule(path) for path in paths}


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
        if several and not torch.equal(before, _state()):
            self.report()
        return out


def _state() -> Tensor:
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return torch.cat([torch.get_rng_state(), *gpus])
