"""The tables of objectives in ``fastdpo/loss/README.md``, from what they say of themselves."""

import shlex
import sys
from pathlib import Path
from typing import Any

from fastdpo.cli import parse
from fastdpo.loss.choices import CHOICES, NOTATION
from fastdpo.loss.examples import BaseObjective

ROOT = Path(__file__).resolve().parents[1]
# What a method of the literature is here: the commands that do it, and the source.
METHODS: list[tuple[str, tuple[str, ...], str]] = [
    ("R-DPO, iLR-DPO", ("train --alpha 0.01",), "arXiv 2403.19159, eq. 9; 2406.11817"),
    ("f-DPO", ("train --f_divergence_type js_divergence --alpha 0",), "arXiv 2309.16240"),
    ("rDPO", ("train --loss_type robust --label_smoothing 0.1",), "arXiv 2403.00409"),
    ("LD-DPO", ("train --ld_alpha 0.5 --alpha 0",), "arXiv 2409.06411"),
    ("WPO", ("train --use_weighting true --alpha 0",), "arXiv 2406.11827, eq. 2"),
    ("DPO^γ", ("train --reference_scale 0.8 --alpha 0",), "arXiv 2405.19534, its code"),
    (
        "AIPO",
        (
            "train --loss_type '[sigmoid, nll_mean]' --loss_weights '[1.0, 0.1]' "
            "--reference_scale 1.03 --target_margin 0.05",
        ),
        "arXiv 2409.08845, its code: 1 + α, βγ and λ",
    ),
    (
        "RPO", ("train --loss_type '[sigmoid, sft]' --loss_weights '[1.0, 0.2]'",), "TRL's form"
    ),
    (
        "RPO, average form",
        ("train --loss_type '[sigmoid, nll_mean]' --loss_weights '[1.0, 0.2]'",),
        "arXiv 2405.16436, its code; the second weight is η",
    ),
    (
        "RPO, cumulative form",
        ("train --loss_type '[sigmoid, nll_sum]' --loss_weights '[1.0, 0.0005]'",),
        "arXiv 2405.16436, its code; the second weight is βη",
    ),
    (
        "MPO",
        ("train --loss_type '[sigmoid, bco_pair, sft]' --loss_weights '[0.8, 0.2, 1.0]'",),
        "TRL's form of arXiv 2411.10442",
    ),
    (
        "SLiC, no reference", ("train --loss_type hinge --reference_scale 0",), "TRL's CPOTrainer"
    ),
    ("CPO", ("train --loss_type cpo",), "arXiv 2401.08417, eq. 3; TRL's CPOTrainer"),
    (
        "SimPO", ("train --loss_type simpo --beta 2 --simpo_gamma 1",),
        "arXiv 2405.14734, eq. 6; TRL's CPOTrainer",
    ),
    (
        "CPO-SimPO", ("train --loss_type simpo --beta 2 --simpo_gamma 1 --cpo_alpha 1",),
        "TRL's CPOTrainer",
    ),
    ("ORPO", ("train --loss_type orpo",), "arXiv 2403.07691; TRL's ORPOTrainer"),
    (
        "ODPO", ("train --score_offset log_difference --alpha 0",),
        "arXiv 2402.10571; of rows with score_chosen and score_rejected",
    ),
    (
        "ODPO, ratio", ("train --score_offset log_ratio --alpha 0",),
        "its code; of rows with scores above 0",
    ),
    (
        "Secrets of RLHF II, adaptive margin", ("train --score_offset difference --alpha 0",),
        "arXiv 2401.06080, of its reward model; in DPO ours",
    ),
    (
        "PAR as an offset",
        ("iterate --pair.transform par --train.score_offset difference --train.alpha 0",),
        "arXiv 2502.18770; in DPO ours",
    ),
    (
        "CREAM",
        (
            "iterate --score.scorer implicit --score.previous_model MODEL --pair.consistency mean "
            "--train.alpha 0",
        ),
        "arXiv 2410.12735; a row's label_smoothing is 1 - consistency",
    ),
    (
        "SPPO", ("iterate --train.loss_type sppo --train.beta 0.001 --pair.transform win_rate",),
        "arXiv 2405.00675, eq. 4.7",
    ),
    (
        "GPO's form", ("train --loss_type preference_score --beta 0.001",),
        "after arXiv 2410.02197; of rows with preference scores",
    ),
    ("LiPO-λ", ("iterate --train.loss_type lipo_lambda",), "arXiv 2402.01878"),
    ("PRO", ("iterate --train.loss_type pro",), "arXiv 2306.17492, its code"),
    (
        "DPO on rankings (Plackett-Luce)", ("iterate --train.loss_type plackett_luce",),
        "arXiv 2305.18290, appendix A.3",
    ),
    ("RankNet", ("iterate --train.loss_type ranknet",), "Burges et al. 2005"),
    ("KTO", ("train --loss_type kto",), "arXiv 2402.01306; TRL's KTOTrainer"),
    ("BCO", ("train --loss_type bco",), "TRL's form of arXiv 2404.04656, without UDM"),
    (
        "TDPO1", ("train --loss_type tdpo1 --precompute_ref_log_probs false",), "arXiv 2404.11999"
    ),
    (
        "TDPO2",
        ("train --loss_type tdpo2 --tdpo_alpha 0.5 --precompute_ref_log_probs false",),
        "arXiv 2404.11999",
    ),
    (
        "Step-DPO", ("train --beta 0.5 --alpha 0",),
        "arXiv 2406.18629; of rows with initial_reason_steps",
    ),
    (
        "MCTS-DPO", ("pair --rule tree_siblings", "train --from_first_difference true --alpha 0"),
        "arXiv 2405.00451, its code",
    ),
    (
        "DOVE", ("train --prompt_in_likelihood true --alpha 0",),
        "arXiv 2404.00530; of rows with two prompts",
    ),
]  # fmt: skip
# What its command needs beside what says the method.
_GIVEN = {
    "train": {"model": "m", "dataset": "d"},
    "pair": {"candidates": "c", "scores": "[s]"},
    "iterate": {"model": "m", "prompts": "p", "score.scorer": "a:b", "evaluate.scorer": "answer"},
}
GROUPS = {
    "of ratios": ("ld_alpha", "use_weighting", "reference_scale"),
    "of margins": ("alpha", "target_margin", "f_divergence_type", "f_alpha_divergence_coef"),
}


def parsed(command: str) -> Any:
    """The options of a method's command.

    Raises ConfigError where the command would refuse them.
    """
    name, *options = shlex.split(command)
    given = {f"--{key}": value for key, value in _GIVEN[name].items()}
    given |= dict(zip(options[::2], options[1::2], strict=True))
    return parse([name, *(x for pair in given.items() for x in pair)])[1]


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
    methods = [["method", "commands", "source"], ["---"] * 3]
    for name, commands, source in METHODS:
        for command in commands:
            parsed(command)
        methods.append([name, ", ".join(f"`{command}`" for command in commands), source])
    parts = (f"{group}: {', '.join(f'`{x}`' for x in names)}" for group, names in GROUPS.items())
    parts = (
        NOTATION,
        f"Options {'; '.join(parts)}.",
        rows(cells),
        "Methods, by the commands of `fastdpo` that do them; their numbers are examples:",
        rows(methods),
    )
    return "\n\n".join(part.strip() for part in parts) + "\n"
