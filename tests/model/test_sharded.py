"""The head called as a module under FSDP2: gradients equal those of one process."""

import copy
import multiprocessing
import os
import socket
from typing import Any

import pytest
import torch
from tiny import LLAMA, build_tokenizer
from torch.multiprocessing.spawn import spawn

from fastdpo.data.batch import pack_pairs
from fastdpo.data.examples import TokenizedPair
from fastdpo.model.prepare import packed_loss, prepare_model

WORLD = 2
VOCAB = len(build_tokenizer())
PAIRS = [
    TokenizedPair([5, 6, 7], [8, 9, 10, 11], [12, 13]),
    TokenizedPair([15, 16], [17], [18, 19, 20]),
]
REF = torch.tensor([[-9.0, -8.0], [-4.0, -11.0]], dtype=torch.float64)


def loss_of(model, pair, ref_logp_S):
    return packed_loss(model, pack_pairs([pair]), ref_logp_S, beta=0.1, alpha=0.01).loss


def worker(rank, port, own_unit, queue):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    torch.manual_seed(0)
    plain = LLAMA.build(VOCAB)
    sharded: Any = prepare_model(copy.deepcopy(plain))
    mesh = init_device_mesh("cpu", (WORLD,))
    units = [*sharded.model.layers, *([sharded.lm_head] if own_unit else []), sharded]
    for unit in units:
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    loss_of(sharded, PAIRS[rank], REF[rank]).backward()

    reference = prepare_model(plain)
    losses = [loss_of(reference, pair, ref) for pair, ref in zip(PAIRS, REF)]
    torch.stack(losses).mean().backward()
    worst = 0.0
    for (name, p), q in zip(sharded.named_parameters(), reference.parameters()):
        assert p.grad is not None and q.grad is not None, name
        error = (p.grad.full_tensor() - q.grad).norm() / q.grad.norm()
        worst = max(worst, error.item())
    queue.put(worst)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("own_unit", [False, True], ids=["head in the root", "head its own unit"])
def test_gradients_under_fsdp2(own_unit):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    spawn(worker, args=(port, own_unit, queue), nprocs=WORLD)
    assert max(queue.get() for _ in range(WORLD)) < 1e-5
