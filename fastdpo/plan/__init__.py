"""Memory, before any is rented: a model's configuration and training options in, bytes out.

`estimate` says what a step takes, `longest_pair` which pairs fit a GPU, `plan_run` what each stage
of a whole run takes.  Read `step.py` for what is reported, then `memory.py`: how a real step runs
on tensors without content, `live.py` how it is counted, and `cluster.py` how one process stands
for all of several GPUs.
"""

from fastdpo.lazy import lazy

__getattr__ = lazy(
    __name__,
    {
        "StepMemory": "step",
        "estimate": "step",
        "Fit": "longest",
        "longest_pair": "longest",
        "RunPlan": "stages",
        "plan_run": "stages",
    },
)
