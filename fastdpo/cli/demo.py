"""``fastdpo demo``: what a length penalty does, on a laptop.

From the same answers to the same questions two policies are trained, one by plain DPO and one with
the length penalty, and compared on questions that neither was trained on.
"""

import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

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
from fastdpo.report.text import fixed, short
from fastdpo.rounds.config import IterateConfig
from fastdpo.rounds.folder import take_start
from fastdpo.rounds.run import iterate

PLAIN, PENALIZED = "plain DPO", "with alpha"
RECIPE = Path(fastdpo.__file__).parent / "recipes" / "demo.yaml"
# Seconds of each part on two cores of a server, by which the bar knows how much is left.
_SECONDS = {
    "start: held-out: sampling": 42.0,
    "round 1 of 1: sampling": 125.0,
    "round 1 of 1: reference": 12.0,
    "round 1 of 1: training": 95.0,
    "round 1 of 1: held-out: sampling": 52.0,
    "round 1 of 1: distance from the start": 27.0,
}
_MEMORY, _DISK = "6 GB", "1.1 GB"
_OF_START = 3  # parts whose results the second run takes from the first


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
    # What the stages say of themselves would break the bar.
    with overall(_plan()), (out / "log.txt").open("a", 1) as log, _into(log):
        for name, run in runs.items():
            if name == PENALIZED:
                take_start(Path(run.output_dir), Path(plain.output_dir))
            with within(name):
                iterate(run)
            save_options(run.to_dict(), Path(run.output_dir))
    found = compare.compare({name: Path(run.output_dir) for name, run in runs.items()})
    steps, notes = _steps(penalized), _notes(penalized, found)
    print(f"\n{compare.text_table(found)}\n")
    print("\n".join(map(_filled, notes)))
    compare.write_page(
        found, out, title="What a length penalty does", status=_happened(found), intro=steps,
        facts=[("model ", Path(penalized.model).name), ("alpha = ", f"{penalized.train.alpha}")],
        notes=notes,
    )  # fmt: skip
    print(f"\n{_closing(found, penalized, out)}")


@contextmanager
def _into(log: TextIO) -> Iterator[None]:
    """Output and warnings of the block go to a file."""
    with redirect_stdout(log), redirect_stderr(log):
        yield


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
    minutes = round(sum(_plan().values()) / 60)
    out = Path(config.output_dir).parent
    return "\n\n".join(
        [
            *map(_filled, _steps(config)),
            _filled(
                f"It takes about {minutes} minutes on two cores and {_MEMORY} of memory, and "
                f"leaves {_DISK} in {out}. Ctrl-C stops it, the same command goes on."
            ),
            "",
        ]
    )


def _steps(config: IterateConfig) -> list[str]:
    """What the demo does, a paragraph each."""
    prompts, heldout = config.max_prompts, config.evaluate.heldout
    return [
        "The scorer of this demo likes long answers, as many reward models do: an answer gets up "
        "to 1 for how plainly it reads, and 0.01 more for each word.",
        f"1. {Path(config.model).name}, a small language model, answers {prompts} questions "
        f"{config.sample.num_samples} times each. The answers with the best and the worst score "
        "become a pair.",
        "2. Two models are trained to prefer the better answer of each pair. Plain DPO (direct "
        "preference optimization, alpha = 0) learns all that the scorer likes. With alpha, each "
        f"extra token has a price, which training sets (alpha = {config.train.alpha}) to keep "
        "answers as long as they were.",
        f"3. Both answer {heldout} other questions, and are compared with the start, the model "
        "before training.",
    ]


def _notes(config: IterateConfig, found: Comparison) -> list[str]:
    """What the columns of the table mean."""
    sample, alpha = config.sample, found.policies[PENALIZED]["alpha"].value
    return [
        f"Each ± is half a 95% interval over {config.evaluate.heldout} questions, with "
        f"{config.evaluate.num_samples} answers to each. It does not say what another run would "
        "give: --seed 1 is one.",
        "tokens: the mean length of an answer; a token is a word or a part of one. growth: how "
        "much longer than the start's answers to the same questions.",
        "score: how plainly an answer reads, from 0 to 1, without the 0.01 for each word. It is "
        "the product of reading ease, variety, and the share of the question's words that the "
        "answer takes up. It does not tell whether the answer is right.",
        "win rate: how often an answer has a higher score than one of the start to the same "
        "question; 50% is as often as not.",
        "KL: how far the model has moved from the start; 0 is not at all, and far away text "
        f"degrades. In nats an answer, at temperature {sample.temperature:g}, at which answers "
        "are drawn.",
        f"cut off: answers that were stopped at {sample.max_new_tokens} tokens, before their end.",
        f"The price of a token, alpha, was {short(alpha)} in the mean over training.",
    ]


def _filled(text: str) -> str:
    """A paragraph for a terminal of 80 columns."""
    return textwrap.fill(text, 80, break_long_words=False, break_on_hyphens=False)


def _happened(found: Comparison) -> str:
    plain, penalized = (_change(found.growth(name)) for name in (PLAIN, PENALIZED))
    return f"{PLAIN} made answers {plain}; {PENALIZED} they are {penalized}."


def _closing(found: Comparison, config: IterateConfig, out: Path) -> str:
    """What happened, where to look, what to do next."""
    after, beside = (out / name / "round-01" / "policy" for name in ("alpha", "plain"))
    drawn = f"--temperature {config.sample.temperature:g}"
    return (
        f"What happened: {_happened(found)}\n"
        f"Where to look: {out / 'report.html'}, charts and answers side by side; or ask both "
        f"models: fastdpo chat --model {after} --beside {beside} {drawn}\n"
        'What next: your own questions, a FILE with a line {"prompt": "..."} for each, and as '
        "SCORER a reward model or module:function; fastdpo iterate --help says more: fastdpo "
        "iterate --model MODEL --prompts FILE --score.scorer SCORER --train.alpha auto"
    )


def _change(growth: Estimate) -> str:
    """Tokens longer or shorter, with the 95% interval, or that it cannot be told."""
    value, half = growth.value, growth.half or 0.0
    low, high = (fixed(x, 1, signed=True) for x in (value - half, value + half))
    if abs(value) <= half:
        change = fixed(value, 1, signed=True)
        return f"about as long as before ({change} tokens, 95% interval {low} to {high})"
    longer = "longer" if value > 0 else "shorter"
    return f"{fixed(abs(value), 1)} tokens {longer} (95% interval {low} to {high})"
