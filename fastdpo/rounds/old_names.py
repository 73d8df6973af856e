"""The flat options that `fastdpo iterate` had before its sections, and what they are called now.

Runs and YAML files made with them are refused with one line that says so.
"""

from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from functools import cache
from typing import get_type_hints

# Only those whose own name changed; the others only got a section.
RENAMED = {
    "sampler": "sample.backend",
    "sample_dtype": "sample.dtype",
    "server_api_key_env": "sample.api_key_env",
    "scorer_dtype": "score.dtype",
    "scorer_batch_size": "score.batch_size",
    "scorer_timeout": "score.timeout",
    "scorer_retries": "score.retries",
    "scorer_concurrency": "score.concurrency",
    "scorer_api_key_env": "score.api_key_env",
    "pairing": "pair.rule",
    "scorer_weights": "pair.weights",
    "eval_samples": "evaluate.num_samples",
    "eval_scorer": "evaluate.scorer",
}
_SECTIONS = ("train", "sample", "score", "pair", "evaluate")  # which of two had the bare name


@cache
def old_names(config: type) -> dict[str, str]:
    """The new name of each old one, of the dataclass of a run."""
    kinds = get_type_hints(config)
    sections = [name for name in _SECTIONS if is_dataclass(kinds[name])]
    found = dict(RENAMED)
    for section in sections:
        for field in fields(kinds[section]):
            if field.name not in kinds and f"{section}.{field.name}" not in RENAMED.values():
                found.setdefault(field.name, f"{section}.{field.name}")
    return found


def moved(names: Iterable[str], new: dict[str, str]) -> str:
    """The new places of old options, in a line: "sample: num_samples, dtype (was sample_dtype)"."""
    sections: dict[str, list[str]] = {}
    for old in names:
        section, _, name = new[old].rpartition(".")
        sections.setdefault(section, []).append(name if name == old else f"{name} (was {old})")
    return "; ".join(f"{section}: {', '.join(x)}" for section, x in sections.items())
