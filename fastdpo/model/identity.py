"""What tells the weights of one model from those of another: their digest and their dtype."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from fastdpo.errors import ModelError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")  # that models are loaded in

# What weights are kept in, in the order in which transformers looks for them.
_WEIGHTS = (("*.safetensors",), ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack"))


def dtype_name(dtype: "torch.dtype") -> str:
    """As in `DTYPES`, and as vLLM spells it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def policy_digest(policy: str) -> str:
    """What tells a policy's weights from those of another, wherever its folder lies.

    From the checksums in the folder where it has some, else from the names, sizes and last MiB of
    its weight files; a hub name stands for itself.

    Raises ModelError when a folder has neither.
    """
    folder = Path(policy)
    if not folder.is_dir():
        return policy
    digest, sums = hashlib.sha256(), folder / "SHA256SUMS"
    if sums.is_file():
        digest.update(sums.read_bytes())
        return digest.hexdigest()[:16]
    found = ([x for one in names for x in folder.glob(one) if x.is_file()] for names in _WEIGHTS)
    paths = next(filter(None, found), None)
    if paths is None:
        known = ", ".join(one for names in _WEIGHTS for one in names)
        raise ModelError(
            f"{policy} has no file of weights ({known}), so they can't be told from others; name "
            "the folder that has them"
        )
    for path in sorted(paths):
        size = path.stat().st_size
        with open(path, "rb") as file:
            file.seek(max(0, size - 2**20))
            digest.update(f"{path.name}/{size}/".encode() + file.read())
    return digest.hexdigest()[:16]
