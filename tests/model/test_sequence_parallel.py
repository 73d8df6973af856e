"""Sequence parallel: log-probs and gradients of a row on several processes are those on one."""

import copy
from typing import Any

import torch
import torch.distributed as dist
from checks import relative_error
from ranks import on_ranks
from tiny import GEMMA, GEMMA3, LLAMA, MISTRAL, MIXTRAL, OLMO2, QWEN, Family, _family

from fastdpo.data.batch import pack_pairs
from fastdpo.data.examples import TokenizedPair
from fastdpo.model import sequence_parallel
from fastdpo.model.prepare import layout_of, packed_loss, prepare_model

# Of grouped heads: as many groups as processes, fewer, and a number that they don't divide.
FEW = _family("llama, one group", "LlamaConfig", num_key_value_heads=1)
ODD = _family("llama, odd groups", "LlamaConfig", num_attention_heads=12, num_key_value_heads=3)
FAMILIES = {x.name: x for x in (LLAMA, QWEN, GEMMA, GEMMA3, MISTRAL, OLMO2, MIXTRAL, FEW, ODD)}
VOCAB = 320
PAIRS = [
    TokenizedPair([*range(5, 17)], [*range(40, 71)], [*range(90, 99)]),
    TokenizedPair([15, 16], [17], [18, 19, 20]),
    TokenizedPair([*range(100, 131)], [*range(140, 149)], [*range(150, 177)]),
]
REF = torch.tensor([-170.0, -60.0, -7.0, -20.0, -50.0, -150.0], dtype=torch.float64)


def one_and_all(family: Family, dtype: torch.dtype, group: Any, **options: Any) -> tuple[Any, Any]:
    """The model on one process, and the same one shared by the group."""
    torch.manual_seed(0)
    plain = family.build(VOCAB).to(dtype)
    shared = copy.deepcopy(plain)
    sequence_parallel.use(shared, group)
    return prepare_model(plain, **options), prepare_model(shared, **options)


def result_of(model: Any, batch: Any, **options: Any) -> Any:
    result = packed_loss(model, batch, REF, beta=0.1, alpha=0.02, stats=("logp",), **options)
    result.loss.backward()
    return result


def errors(one: Any, shared: Any, batch: Any, **options: Any) -> dict[str, float]:
    """Largest differences of log-probs, losses and gradients, the latter summed over the group."""
    wanted, found = (result_of(model, batch, **options) for model in (one, shared))
    worst = 0.0
    for p, q in zip(shared.parameters(), one.parameters()):
        dist.all_reduce(p.grad)
        if q.grad.norm() > 0:
            worst = max(worst, relative_error(p.grad, q.grad))
    values = {"loss": (found.loss, wanted.loss), "sums": (found.logp_S, wanted.logp_S)}
    values |= {"logp": (found.stats["logp"], wanted.stats["logp"])}
    out = {name: relative_error(a.detach(), b.detach()) for name, (a, b) in values.items()}
    return {**out, "gradients": worst}


def compared(rank: int, names: list[str], dtype: torch.dtype) -> dict[str, dict[str, float]]:
    found = {}
    for family in (FAMILIES[name] for name in names):
        one, shared = one_and_all(family, dtype, dist.group.WORLD)
        batch = pack_pairs(PAIRS, layout=layout_of(shared))
        assert layout_of(shared) == layout_of(one) == "shared"
        found[family.name] = errors(one, shared, batch)
    return found


def test_llama_on_two_processes():
    for found in on_ranks(2, compared, ["llama"], torch.float64):
        assert max(found["llama"].values()) < 1e-12, found
