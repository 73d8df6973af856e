"""What a launcher tells a process of the others, kept from an engine that is started by it.

Such an engine connects processes of its own, and would look for those of the launch instead.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

# torch.distributed's and torchrun's, and accelerate's by their first words.
_NAMES = {
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE",
    "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
}  # fmt: skip
_BEGINNINGS = ("TORCHELASTIC_", "ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")


def own_environment() -> dict[str, str]:
    """The environment of this process, as if nothing had launched it together with others."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in _NAMES and not name.startswith(_BEGINNINGS)
    }


@contextmanager
def alone() -> Iterator[None]:
    """Within it, `own_environment` is that of this process."""
    own = own_environment()
    told = {name: value for name, value in os.environ.items() if name not in own}
    for name in told:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(told)
