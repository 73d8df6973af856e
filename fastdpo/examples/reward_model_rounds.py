"""Rounds of iterative DPO with a reward model: sample, score, pair, train, and again.

    python -m fastdpo.examples.reward_model_rounds --model MODEL --prompts prompts.jsonl \
        --scorer REWARD_MODEL

The same run from the command line is ``fastdpo iterate`` with these options.  ``--scorer`` takes a
reward model, ``module:function``, or the URL of `fastdpo.examples.reward_server`.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from fastdpo.pair.config import PairConfig
from fastdpo.rounds import iterate
from fastdpo.rounds.config import EvaluateConfig, IterateConfig
from fastdpo.sample.config import SampleConfig
from fastdpo.score.config import ScoreConfig
from fastdpo.train import TrainConfig


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run all rounds; returns the report's rows, a dict a round, the start first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--prompts", required=True, help="rows with a prompt; file or hub")
    parser.add_argument("--scorer", required=True)
    parser.add_argument("--output_dir", default="runs/rounds")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--heldout", type=int, default=32, help="prompts to evaluate on")
    parser.add_argument("--max_new_tokens", type=int, default=256)
    args = parser.parse_args(argv)

    config = IterateConfig(
        model=args.model,
        prompts=args.prompts,
        output_dir=args.output_dir,
        rounds=args.rounds,
        sample=SampleConfig(num_samples=4, max_new_tokens=args.max_new_tokens),
        score=ScoreConfig(scorer=args.scorer),
        pair=PairConfig(rule="best_worst", drop_truncated=True),
        train=TrainConfig(beta=0.1, alpha=0.01, learning_rate=1e-6),
        evaluate=EvaluateConfig(heldout=args.heldout),
    )
    rows = iterate(config)  # killed at any moment, the same call goes on
    for row in rows:
        print(f"round {row['round']}: score {row.get('score')}, length {row.get('length')}")
    return rows


if __name__ == "__main__":
    main()
