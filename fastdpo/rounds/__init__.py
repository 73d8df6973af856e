"""Rounds of sampling, scoring, pairing and training: an `IterateConfig` in, a folder of a run out.

Open `run` first: what a round does, from top to bottom. `resume` has which stage depends on what,
`folder` what lies where on disk, `config` the options.
"""

from fastdpo.lazy import lazy

__getattr__ = lazy(__name__, {"iterate": "run", "IterateConfig": "config"})
