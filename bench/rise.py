"""Does the score on held-out prompts rise?  Iterative runs over several seeds, with intervals.

    python -m bench.rise --model MODEL --prompts prompts.jsonl --out runs/rise

Each seed is a whole `fastdpo iterate` run, resumed if it was interrupted.  The seed also decides
which prompts are held out.  For every held-out prompt the change is its mean score after the last
round minus that of the start; the interval over prompts uses all of them, the interval over seeds
only the seeds' means.
"""

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

import torch

from fastdpo.report.evaluation import (
    NORMAL,
    by_length,
    by_score,
    heldout,
    means_by_prompt,
    quantile,
)
from fastdpo.rounds.config import EvaluateConfig, IterateConfig
from fastdpo.rounds.run import iterate
from fastdpo.sample.config import SampleConfig
from fastdpo.score.config import ScoreConfig
from fastdpo.storage import write_json_atomic
from fastdpo.train.config import TrainConfig


def interval(values: torch.Tensor) -> dict[str, float | None]:
    """Mean and 95% interval of independent values; a single value has none."""
    mean = values.mean().item()
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None, "n": len(values)}
    error = values.std().item() / math.sqrt(len(values))
    half = quantile(len(values) - 1) * error
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": len(values)}


def wilson(mean: float, count: int) -> tuple[float, float]:
    """The ends of the 95% interval of a share, Wilson's score interval (JASA 22, 1927).

    It is right for few and for shares of 0 and 1 too, where mean +- 1.96 standard errors is empty.
    """
    weight = NORMAL**2 / count
    middle = (mean + weight / 2) / (1 + weight)
    half = math.sqrt(weight * mean * (1 - mean) + weight**2 / 4) / (1 + weight)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def prompt_means(folder: Path) -> torch.Tensor:
    """Mean score and mean length in tokens of each prompt's responses, (prompts, 2) fp64.

    `folder` holds the `candidates` and `scores` of an evaluation.
    """
    held = heldout(folder)
    columns = [means_by_prompt(held, what) for what in (by_score, by_length)]
    return torch.tensor(columns, dtype=torch.float64).T


def study(config: IterateConfig, seeds: list[int], out: Path) -> list[dict]:
    """Run every seed; rows for score and length, after each round against the start."""
    changes: dict[int, list[torch.Tensor]] = {}
    starts, correlations = [], []
    for seed in seeds:
        iterate(replace(config, seed=seed, output_dir=str(out / f"seed-{seed}")))
        folder = out / f"seed-{seed}"
        start = prompt_means(folder / "round-00" / "eval")
        starts.append(start.mean(0))
        correlations.append(torch.corrcoef(start.T)[0, 1].item())
        for index in range(1, config.rounds + 1):
            after = prompt_means(folder / f"round-{index:02d}" / "eval")
            changes.setdefault(index, []).append(after - start)
    rows = []
    for index, by_seed in changes.items():
        for column, name in enumerate(("score", "length")):
            rows.append(
                {
                    "round": index,
                    "what": name,
                    "start": torch.stack(starts)[:, column].mean().item(),
                    "over_prompts": interval(torch.cat(by_seed)[:, column]),
                    "over_seeds": interval(torch.stack([x[:, column].mean() for x in by_seed])),
                }
            )
    rows.append({"score_length_correlation_at_start": correlations, "seeds": seeds})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Held-out score over seeds")
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--scorer", default="fastdpo.scoring:plain_language")
    parser.add_argument("--out", type=Path, default=Path("runs/rise"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--train_prompts", type=int, default=128)
    parser.add_argument("--heldout", type=int, default=64)
    parser.add_argument("--results", type=Path, help="write config and rows to this JSON file")
    options = parser.parse_args()
    config = IterateConfig(
        model=options.model,
        prompts=options.prompts,
        rounds=options.rounds,
        max_prompts=options.train_prompts,
        sample=SampleConfig(num_samples=4, max_new_tokens=64, batch_prompts=16),
        score=ScoreConfig(scorer=options.scorer),
        train=TrainConfig(
            learning_rate=2e-5,
            warmup_ratio=0.0,
            batch_size=8,
            max_length=512,
            max_tokens=2048,
            gradient_checkpointing=False,
        ),
        evaluate=EvaluateConfig(heldout=options.heldout, num_samples=2),
    )
    rows = study(config, [int(seed) for seed in options.seeds.split(",")], options.out)
    for row in rows:
        print(json.dumps(row))
    if options.results:
        unnamed = {"output_dir", "model", "prompts", "seed"}
        kept = {name: value for name, value in config.to_dict().items() if name not in unnamed}
        files = {"model": Path(config.model).name, "prompts": Path(config.prompts).name}
        write_json_atomic(options.results, {"config": files | kept, "rows": rows})


if __name__ == "__main__":
    main()
