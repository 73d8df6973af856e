"""Training: tokenized pairs and a start come in, a policy in Hugging Face format goes out.

Open `trainer.py` first: its loop reads from top to bottom.  `config.py` has the options,
`prepare.py` what is done to a model and its pairs before the first step, `reference.py` the
reference's log-probs, `steps.py` which pairs a process takes at a step, and how, `evaluate.py` the
evaluations between them.
"""

from fastdpo.lazy import lazy

__getattr__ = lazy(__name__, {"train": "trainer", "TrainConfig": "config", "packed_loss": "steps"})
