"""How many kernels a call launches, cuBLAS's included, at the sizes of real heads.

The tensors are PyTorch's meta tensors, which have sizes and no content, so everything runs but the
kernels: each launch of Triton's is counted, and so is each operation of PyTorch that would launch
one.  Copies of a few numbers from the host, and the gradient of the loss by itself, which autograd
fills, are no part of the call.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import MagicMock

import interpreter
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdpo.loss.choices import CHOICES, make_objective
from fastdpo.loss.plan import default_workspace_mib

pytestmark = interpreter.needs_kernels

N, PAIRS = 8192, 4
HEADS = {"Llama-3-8B": (4096, 128_256), "Llama-3.2-1B": (2048, 128_256), "SmolLM2": (576, 49_152)}
# What makes a view or memory without content, or asks for a dtype.
FREE = {
    "alias", "as_strided", "detach", "empty", "empty_like", "expand", "new_empty", "promote_types",
    "permute", "select", "slice", "t", "transpose", "unbind", "view",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """The names of what is launched, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name not in FREE:
            self.names.append(name)
        if func is torch.ops.aten.addmm.dtype_out:  # which torch 2.10 cannot for meta tensors
            return kwargs["out"]
        return func(*args, **(kwargs or {}))


class Kernel:
    """Stands for one of Triton's."""

    def __init__(self, name: str, launches: Launches) -> None:
        self.name, self.launches = name, launches

    def __getitem__(self, grid: Any) -> Any:
        assert all(size > 0 for size in grid)
        return lambda *_, **__: self.launches.names.append(self.name)


@pytest.fixture
def launches(monkeypatch) -> Launches:
    """A GPU that projects from descriptors, as far as the host can tell."""
    from fastdpo.kernels import fold, pair, project, scatter, support
    from fastdpo.loss import autograd, eager, examples

    found = Launches()
    for module in (fold, pair, project, scatter):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Kernel(name, found))
    monkeypatch.setattr(support, "unsupported_reason", lambda *_: None)
    monkeypatch.setattr(project, "tile_for", lambda device, narrow: project.HOPPER)
    monkeypatch.setattr(project, "can_project", lambda h_ND, w_VD: True)
    monkeypatch.setattr(project, "TensorDescriptor", MagicMock())
    for module in (autograd, eager):
        monkeypatch.setattr(module, "plainly", lambda device: nullcontext())
    empty = torch.empty(2 * PAIRS + 1, dtype=torch.int64, device="meta")
    for module in (eager, examples):
        monkeypatch.setattr(module, "device_numbers", lambda x, device: empty[: len(x)])
    return found


def test_the_heads_are_projected():
    """What the launches above take for granted of operands with the layout of real ones."""
    from fastdpo.kernels import project

    for D, _ in HEADS.values():
        rows = torch.empty(2, D, dtype=torch.bfloat16)
        assert project.can_project(rows, rows)


def test_the_default_workspace():
    assert default_workspace_mib(0) == default_workspace_mib(8 * 2**30) == 256
    assert default_workspace_mib(80 * 2**30) == 2560


@contextmanager
def counted(launches: Launches) -> Iterator[list[str]]:
    launches.names = []
    with launches:
        yield launches.names


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def call(
    launches: Launches,
    head: str | tuple[int, int],
    dtype: torch.dtype = torch.bfloat16,
    *,
    tokens: int = N,
    pairs: int = PAIRS,
    train_head: bool = True,
    named_rows: bool = False,
    objective: Any = None,
    **options: Any,
) -> tuple[Any, list[str]]:
    """The plan of a call and what it launched, backward included."""
    from fastdpo import linear_preference_loss

    D, V = HEADS[head] if isinstance(head, str) else head
    bounds_S1 = torch.arange(0, tokens + 1, tokens // (2 * pairs))
    rows_N = meta(tokens, dtype=torch.int64) if named_rows else None
    h_TD, w_VD = meta(tokens, D, dtype=dtype, grad=True), meta(V, D, dtype=dtype, grad=train_head)
    objective = objective or make_objective()
    ref = {}
    if objective.needs_reference:
        ref = {"ref_logp_S": meta(2 * pairs, dtype=torch.float32)}
    if options.pop("ref_head", False):
        ref = {"ref_h_TD": meta(tokens, D, dtype=dtype), "ref_w_VD": meta(V, D, dtype=dtype)}
    upstream = meta(dtype=torch.float32)
    target_N = meta(tokens, dtype=torch.int64)
    edges = bounds_S1.tolist()
    bounds_S1.tolist = lambda: edges  # reading them is no launch
    with counted(launches) as names:
        result = linear_preference_loss(
            h_TD, w_VD, target_N, bounds_S1, ref.pop("ref_logp_S", None), objective, rows_N=rows_N,
            impl="triton", **ref, **options,
        )  # fmt: skip
        result.loss.backward(upstream)
    assert h_TD.grad is not None and (w_VD.grad is not None) == train_head
    return result.plan, names


@pytest.mark.parametrize("workspace_mib", [2560, default_workspace_mib(79 * 2**30)])
@pytest.mark.parametrize("head", HEADS)
def test_a_stash_of_all_rows_takes_at_most_16(launches, head, workspace_mib):
    plan, names = call(launches, head, workspace_mib=workspace_mib)
    assert plan.route == "stash" and plan.workspace_bytes == workspace_mib * 2**20
    assert len(names) <= 16, names
    assert names.count("project_kernel") == 1 and names.count("shift_kernel") == 1
    assert not {"sort", "cumsum", "_assert_async", "zeros", "cat"} & {*names}


KERNEL_LOSSES = [name for name, choice in CHOICES.items() if choice.build().code is not None]


@pytest.mark.parametrize("name", KERNEL_LOSSES)
def test_an_objective_of_the_kernel_launches_what_dpo_does(launches, name):
    _, plain = call(launches, "SmolLM2", workspace_mib=2560)
    _, names = call(launches, "SmolLM2", workspace_mib=2560, objective=CHOICES[name].build())
    assert names == plain
    assert {"sigmoid_norm", "ipo", "robust", "discopop", "exo_pair", "simpo"} <= {*KERNEL_LOSSES}


@pytest.mark.parametrize("head", HEADS)
def test_rows_that_tokens_name_take_three_more(launches, head):
    """They are gathered in either pass, and grouped for the sum."""
    _, plain = call(launches, head, workspace_mib=2560)
    plan, names = call(launches, head, named_rows=True, workspace_mib=2560)
    assert plan.route == "stash" and len(names) == len(plain) + 3, names


def test_a_reference_head_takes_three_more(launches):
    """Its shift, projection and merge, after the policy's."""
    _, plain = call(launches, "Llama-3-8B", workspace_mib=2560)
    _, names = call(launches, "Llama-3-8B", ref_head=True, workspace_mib=2560)
    assert len(names) == len(plain) + 3, names
    assert names[:6] == ["shift_kernel", "project_kernel", "merge_kernel"] * 2


def test_a_group_adds_its_product_to_the_sum(launches):
    """Each group's gradient of the head is one product in fp32, whatever its size."""
    plan, names = call(launches, "Llama-3-8B", workspace_mib=1024)
    assert plan.route == "grouped" and len(plan.groups) == PAIRS
    assert names.count("mm") == 1 + PAIRS and names.count("addmm") == PAIRS - 1
    assert len(names) <= 16 * PAIRS, names


def test_a_long_pair_with_a_frozen_head_takes_two_products(launches):
    plan, names = call(
        launches, (3584, 152_064), tokens=131_072, pairs=1, train_head=False, workspace_mib=256
    )
    blocks = len(list(plan.spans))
    assert plan.in_place and blocks > 100
    assert names.count("project_kernel") == names.count("mm") == blocks
    assert len(names) <= 6 * blocks + 8, names[-20:]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes(launches, dtype, monkeypatch):
    """fp16 also finds the power of two that keeps its factors in range; fp32 folds tiles."""
    from fastdpo.kernels import project

    monkeypatch.setattr(project, "can_project", lambda h_ND, w_VD: dtype != torch.float32)
    plan, names = call(launches, "SmolLM2", dtype, workspace_mib=2560)
    assert plan.route == "stash"
    if dtype == torch.float16:
        assert len(names) <= 20, names
    else:
        tiles = names.count("fold_kernel")
        assert len(names) <= 2 * tiles + 8 and "project_kernel" not in names, names


def test_lists_are_summed_in_one_launch(launches):
    """Then PyTorch computes their loss from a number a sequence, without a wait for them."""
    _, pairs = call(launches, "Llama-3-8B", workspace_mib=2560)
    plan, names = call(
        launches, "Llama-3-8B", objective=make_objective("lipo_lambda"), workspace_mib=2560,
        scores_S=meta(2 * PAIRS, dtype=torch.float32), firsts_P1=(0, 3, 2 * PAIRS),
    )  # fmt: skip
    assert plan.route == "stash" and "pair_kernel" not in names
    assert not {"nonzero", "_local_scalar_dense"} & {*names}
    kernels = [name for name in names if name.endswith("_kernel")]
    assert kernels == [x.replace("pair", "sums") for x in pairs if x.endswith("_kernel")]
