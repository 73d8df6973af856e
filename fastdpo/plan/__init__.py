"""Memory, before any is rented: a model's configuration and training options in, bytes out.

`estimate` says what a step takes, `longest_pair` which pairs fit a GPU.  Read `step.py` for what is
reported, then `memory.py`: how a real step runs on tensors without content, and is counted.
"""

from fastdpo.lazy import lazy

__getattr__ = lazy(
    __name__,
    {"StepMemory": "step", "estimate": "step", "Fit": "longest", "longest_pair": "longest"},
)
