"""``fastdpo demo``: what a length penalty does, on a laptop.

From the same answers to the same questions two policies are trained, one by plain DPO and one with
the length penalty, and compared on questions that neither was trained on.
"""

from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import fastdpo
from fastdpo.cli.commands import quiet_loading, save_options
from fastdpo.cli.options import Given, made, read_file
from fastdpo.loss.gemm import has_native_bf16
from fastdpo.model.load import DEMO_MODEL, demo_model
from fastdpo.progress import overall, within
from fastdpo.report import compare
from fastdpo.report.compare import Comparison
from fastdpo.report.evaluation import Estimate
from fastdpo.report.text import fixed
from fastdpo.rounds.config import IterateConfig
from fastdpo.rounds.folder import take_start
from fastdpo.rounds.run import iterate

PLAIN, PENALIZED = "plain DPO", "with alpha"
RECIPE = Path(fastdpo.__file__).parent / "recipes" / "demo.yaml"
# Seconds of each part on two cores of a server, by which the bar knows how much is left.
_SECONDS = {
    "start: held-out: sampling": 40.0,
    "round 1 of 1: sampling": 100.0,
    "round 1 of 1: reference": 10.0,
    "round 1 of 1: training": 100.0,
    "round 1 of 1: held-out: sampling": 40.0,
    "round 1 of 1: distance from the start": 10.0,
}
_OF_START = 2  # parts that the second run takes from the first


@dataclass(kw_only=True)
class DemoCommand:
    """What a length penalty does: plain DPO and DPO with it side by side, minutes on a laptop.

    Attributes:
        model: folder or hub name; default SmolLM2-135M-Instruct, which is kept in ~/.cache/fastdpo,
            or in XDG_CACHE_HOME where that is set.
        output_dir: folder of the two runs and their comparison; resumed if it exists.
        seed: of the split, the samples and the order of pairs.
    """

    model: str | None = None
    output_dir: str = "runs/demo"
    seed: int = 0


def run_demo(config: DemoCommand) -> None:
    quiet_loading()
    out, recipe = Path(config.output_dir), _recipe(config)
    print(_opening(recipe), flush=True)
    penalized = replace(recipe, model=config.model or demo_model())
    train = replace(penalized.train, alpha=0.0)
    plain = replace(penalized, output_dir=str(out / "plain"), train=train)
    runs = {PLAIN: plain, PENALIZED: penalized}
    out.mkdir(parents=True, exist_ok=True)
    # What the stages say of themselves is for a run that is looked at stage by stage.
    with overall(_plan()), (out / "log.txt").open("a") as log, redirect_stdout(log):
        for name, run in runs.items():
            if name == PENALIZED:
                take_start(Path(run.output_dir), Path(plain.output_dir))
            with within(name):
                iterate(run)
            save_options(run.to_dict(), Path(run.output_dir))
    found = compare.compare({name: Path(run.output_dir) for name, run in runs.items()})
    print(f"\n{compare.text_table(found)}\n")
    print("\n".join(_notes(penalized)))
    facts = [("model ", Path(penalized.model).name), ("alpha = ", f"{penalized.train.alpha}")]
    compare.write_page(
        found, out, title="What a length penalty does", facts=facts, notes=_notes(penalized)
    )
    print(f"\n{_closing(found, out)}")


def _recipe(config: DemoCommand) -> IterateConfig:
    """The run with the penalty; of a model that isn't given the name."""
    bf16 = torch.cuda.is_available() or has_native_bf16()
    changes = {
        "model": config.model or DEMO_MODEL,
        "prompts": str(RECIPE.with_name("demo_prompts.jsonl")),
        "output_dir": str(Path(config.output_dir) / "alpha"),
        "seed": str(config.seed),
        "sample.dtype": "bfloat16" if bf16 else "float32",
        "train.bf16": str(bf16),
    }
    given = [Given(name, value, "") for name, value in changes.items()]
    return made(IterateConfig, [*read_file(str(RECIPE), IterateConfig), *given])


def _plan() -> Mapping[str, float]:
    first = {f"{PLAIN}: {name}": x for name, x in _SECONDS.items()}
    return first | {f"{PENALIZED}: {name}": x for name, x in [*_SECONDS.items()][_OF_START:]}


def _opening(config: IterateConfig) -> str:
    """What will be done, and how long it takes."""
    prompts, heldout = config.max_prompts, config.evaluate.heldout
    minutes = round(sum(_plan().values()) / 60)
    return (
        "The scorer of this demo likes long answers, as many reward models do: a score is how\n"
        "plainly an answer reads, from 0 to 1, and 0.01 more for each word.\n\n"
        f"1. {Path(config.model).name} answers {prompts} questions {config.sample.num_samples} "
        "times each. The best and the worst\n   answer to a question become a pair.\n"
        "2. Two policies are trained on the pairs. Plain DPO (alpha = 0) learns all that the "
        "scorer likes.\n"
        f"   With alpha = {config.train.alpha}, each extra token has a price.\n"
        f"3. Both answer {heldout} other questions, and are compared with the start.\n\n"
        f"That takes about {minutes} minutes on two cores. Ctrl-C stops it, the same command goes "
        "on.\n"
    )


def _notes(config: IterateConfig) -> list[str]:
    """What the columns of the table mean."""
    return [
        f"Each ± is half a 95% interval over {config.evaluate.heldout} questions, with "
        f"{config.evaluate.num_samples} answers to each.",
        "score: how plainly an answer reads, without the 0.01 for each word: reading ease times "
        "variety times how much of the question it takes up, each from 0 to 1.",
        "win rate: how often an answer scores higher than one of the start to the same question; "
        "50% is as often as not.",
        "KL: how far a policy is from the start, in nats an answer; where it is large, text "
        "degrades.",
        f"cut off: answers that reached the limit of {config.sample.max_new_tokens} tokens.",
    ]


def _closing(found: Comparison, out: Path) -> str:
    """What happened, where to look, what to do next."""
    plain, penalized = (found.growth(name) for name in (PLAIN, PENALIZED))
    policies = [out / name / "round-01" / "policy" for name in ("alpha", "plain")]
    return (
        f"What happened: {PLAIN} made answers {_change(plain)}; {PENALIZED} they are "
        f"{_change(penalized)}.\n"
        f"Where to look: {out / 'report.html'} has pictures and answers side by side; to ask both: "
        f"fastdpo chat --model {policies[0]} --beside {policies[1]}\n"
        f"What next: your own prompts and scorer: fastdpo iterate --config "
        f"{out / 'alpha' / 'config.yaml'} --prompts FILE --score.scorer MODULE:FUNCTION "
        "--output_dir runs/mine"
    )


def _change(growth: Estimate) -> str:
    """Tokens longer or shorter, with the 95% interval, or that it cannot be told."""
    value, half = growth.value, growth.half or 0.0
    change, low, high = (fixed(x, 1, signed=True) for x in (value, value - half, value + half))
    interval = f"95% interval {low} to {high}"
    if abs(value) <= half:
        return f"about as long as before ({change} tokens, {interval})"
    longer = "longer" if value > 0 else "shorter"
    return f"{fixed(abs(value), 1)} tokens {longer} ({interval})"
