"""The tables of objectives in ``fastdpo/loss/README.md``, from what they say of themselves."""

import json
import sys
from pathlib import Path
from typing import Any

from fastdpo.loss.choices import CHOICES, NOTATION, make_objective
from fastdpo.loss.examples import BaseObjective

ROOT = Path(__file__).resolve().parents[1]
# What a method of the literature is here, where that is more than a name.
METHODS: list[tuple[str, dict[str, Any], str]] = [
    ("R-DPO, iLR-DPO", {"alpha": 0.01}, "arXiv 2403.19159, eq. 9; 2406.11817"),
    ("ODPO", {"score_offset": "log_difference"}, "arXiv 2402.10571; or log_ratio"),
    ("Secrets of RLHF II, adaptive margin", {"score_offset": "difference"}, "arXiv 2401.06080"),
    (
        "CREAM", {"loss_type": "sigmoid"},
        "arXiv 2410.12735; a row's label_smoothing is 1 - consistency",
    ),
    ("RPO", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]}, "TRL's form"),
    (
        "RPO, average form", {"loss_type": ["sigmoid", "nll_mean"], "loss_weights": [1.0, 0.2]},
        "arXiv 2405.16436, its code; the second weight is η",
    ),
    (
        "RPO, cumulative form",
        {"loss_type": ["sigmoid", "nll_sum"], "loss_weights": [1.0, 0.0005]},
        "arXiv 2405.16436, its code; the second weight is βη",
    ),
    (
        "MPO",
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        "TRL's form of arXiv 2411.10442",
    ),
    ("DPO^γ", {"reference_scale": 0.8}, "arXiv 2405.19534, its code"),
    (
        "AIPO",
        {
            "loss_type": ["sigmoid", "nll_mean"], "loss_weights": [1.0, 0.1],
            "reference_scale": 1.03, "target_margin": 0.05,
        },
        "arXiv 2409.08845, its code: 1 + α, βγ and λ",
    ),
    ("SLiC, no reference", {"loss_type": "hinge", "reference_scale": 0.0}, "TRL's CPOTrainer"),
    ("CPO-SimPO", {"loss_type": "simpo", "cpo_alpha": 1.0}, "TRL's CPOTrainer"),
    ("LD-DPO", {"ld_alpha": 0.5}, "arXiv 2409.06411"),
    ("WPO", {"use_weighting": True}, "arXiv 2406.11827, eq. 2"),
    ("f-DPO", {"f_divergence_type": "js_divergence"}, "arXiv 2309.16240"),
]  # fmt: skip
GROUPS = {
    "of ratios": ("ld_alpha", "use_weighting", "reference_scale"),
    "of margins": ("alpha", "target_margin", "f_divergence_type", "f_alpha_divergence_coef"),
}
# Options that a trainer turns into the margin, weight or label of a pair.
OF_DATA = ("score_offset",)


def needs(objective: BaseObjective) -> str:
    """What it reads beside the policy's log-probs."""
    found = {
        "reference": objective.needs_reference,
        "reference's logits": objective.needs_kl,
        "scores": objective.needs_scores,
        "prompt's likelihood": objective.needs_prompt,
        "labels": objective.shape == "singles",
        "the whole step": objective.couples,
        "the step's KL": objective.shift_is == "kl",
        "the run's mean reward": objective.shift_is == "mean_reward",
    }
    return ", ".join(name for name, needed in found.items() if needed) or "nothing"


def route(objective: BaseObjective) -> str:
    """How it is computed."""
    if objective.needs_kl:
        return "both models' logits, streamed"
    if objective.couples:
        return "two passes over the step"
    return "PyTorch on the sums" if objective.code is None else "pair kernel"


def shortened(options: tuple[str, ...]) -> list[str]:
    """Names of options, of which many objectives have the same ones."""
    found = []
    for group, names in GROUPS.items():
        if set(names) <= set(options):
            found.append(group)
            options = tuple(x for x in options if x not in names)
    return [*(f"`{option}`" for option in options), *found]


def costs() -> dict[str, float]:
    """Time over DPO's loss, as `bench.losses` measured it last; none where it did not."""
    sys.path.append(str(ROOT))  # bench is not installed
    from bench.losses import newest_costs

    return newest_costs(sorted((ROOT / "bench" / "results").glob("*losses*.jsonl")))


def rows(cells: list[list[str]]) -> str:
    """Lines of a Markdown table."""
    return "".join(
        f"| {' | '.join(x.replace('|', chr(92) + '|') for x in row)} |\n" for row in cells
    )


def tables() -> str:
    """Markdown: notation, objectives, methods."""
    head = ["objective", "of", "formula", "source", "needs", "route", "options beside `beta`"]
    known = costs()
    head += ["x DPO"] if known else []
    cells = [head, ["---"] * len(head)]
    for name, choice in CHOICES.items():
        objective = choice.build()
        options = ", ".join(shortened(choice.options))
        facts = [choice.formula, choice.source, needs(objective), route(objective), options]
        facts += [f"{known[name]:.2f}" if name in known else ""] if known else []
        cells.append([f"`{name}`", objective.shape, *facts])
    methods = [["method", "options", "source"], ["---"] * 3]
    for name, options, source in METHODS:
        make_objective(**{key: x for key, x in options.items() if key not in OF_DATA})
        spelled = " ".join(f"{key}={json.dumps(value)}" for key, value in options.items())
        methods.append([name, f"`{spelled}`", source])
    parts = (f"{group}: {', '.join(f'`{x}`' for x in names)}" for group, names in GROUPS.items())
    parts = (
        NOTATION,
        f"Options {'; '.join(parts)}.",
        rows(cells),
        "Further methods:",
        rows(methods),
    )
    return "\n\n".join(part.strip() for part in parts) + "\n"
