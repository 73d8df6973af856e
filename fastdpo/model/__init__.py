"""A causal language model comes in, one that computes pairs exactly goes out. Open `prepare.py`
first: it finds the layout of a model, and proves it before anything is trained.

`load.py` reads and writes models; `head.py` calls the language model's head as a module;
`attention.py`, `rope.py` and `noise.py` keep packed sequences apart; `balance.py` is the loss of a
mixture's routers. `logps.py` reads log-probabilities off. `adapters.py` is LoRA; `offload.py`,
`tiling.py` and `liger.py` take less memory for long sequences, and `sequence_parallel.py` shares
one between processes.
"""

from fastdpo.lazy import lazy

__getattr__ = lazy(
    __name__,
    {
        "ModelError": "load",
        "fuse_head": "prepare",
        "layout_of": "prepare",
        "prepare_model": "prepare",
    },
)
