"""Training whose processes have each sequence's tokens among them: the run of one process."""

from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from test_losses import ALL, assert_same_training, run_one
from test_parts import join
from tiny import LLAMA, save_tiny

SOME = ("sft", "kto", "tdpo2")


def on_a_rank(rank, world, names, model_path, folder, options):
    join(rank, world)
    for name in names:
        run_one(model_path, Path(folder) / name, name, sp_size=2, **options)
    return torch.distributed.get_world_size()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "names", "options"),
    [(2, tuple(ALL), {}), (4, SOME, {"engine": "fsdp2"})],
    ids=["ddp, a group", "fsdp2, two groups"],
)
def test_every_objective_trains_as_in_one_process(world, names, options, tmp_path):
    model_path = save_tiny(LLAMA, tmp_path / "model")
    shared = tmp_path / "shared"
    on_ranks(world, on_a_rank, world, names, model_path, str(shared), options)
    for name in names:
        run_one(model_path, tmp_path / "alone" / name, name)
        assert_same_training(shared / name, tmp_path / "alone" / name)
