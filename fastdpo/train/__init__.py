"""Training: tokenized pairs and a start come in, a policy in Hugging Face format goes out.

Open `trainer.py` first: its loop reads from top to bottom.  `config.py` has the options and makes
the objective of them, `examples.py` says what it makes of the rows, `prepare.py` what is done to a
model and its examples before the first step.  `reference.py` computes the reference's log-probs,
which `logps.py` keeps; `steps.py` says which examples a process takes at a step, and what it
computes of a micro-batch, `coupling.py` what the examples of a step take from each other, and
`update.py` is one optimizer step.  `evaluate.py` has the evaluations between them.
"""

from fastdpo.lazy import lazy

__getattr__ = lazy(__name__, {"train": "trainer", "TrainConfig": "config", "packed_loss": "steps"})
