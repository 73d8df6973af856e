"""Several processes of one test: a function runs on each of them, joined by gloo."""

import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn


def on_ranks(world: int, f: Callable[..., Any], *args: Any) -> list[Any]:
    """``f(rank, *args)`` of each process, in order; what one raises is raised here.

    ``f`` is a function of a module, and what it returns can be pickled.
    """
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        spawn(_run, args=(world, str(Path(folder, "store")), queue, f, args), nprocs=world)
        found = dict(queue.get() for _ in range(world))
    return [found[rank] for rank in range(world)]


def _run(rank: int, world: int, store: str, queue: Any, f: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.manual_seed(0)
    queue.put((rank, f(rank, *args)))
    dist.barrier()
    dist.destroy_process_group()


def not_noted(own: bool) -> Any:
    """Makes transformers double weights in a way that notes don't tell."""
    from transformers import core_model_loading

    plain = core_model_loading.WeightRenaming.convert

    def convert(self, *args, **kwargs):
        found: dict[str, Any] = plain(self, *args, **kwargs)
        for name, x in found.items():
            x = x[0] if isinstance(x, list) else x
            found[name] = x + torch.ones(x.shape, device=x.device) if own else x.mul_(2)
        return found

    return mock.patch.object(core_model_loading.WeightRenaming, "convert", convert)
