"""The implicit reward: by plain forwards, and whose models it belongs to."""

from pathlib import Path
from typing import Any

import pytest
import torch
from scoring_server import candidate, run_score
from tiny import GEMMA, GEMMA3, LLAMA, MAMBA, save_tiny

from fastdpo import storage
from fastdpo.data.records import Candidate
from fastdpo.errors import DataError, ModelError
from fastdpo.model.load import load_causal_lm
from fastdpo.score.load import load_scorer

torch.set_num_threads(1)


def plain_logp(model: Any, prompt_ids: list[int], response_ids: list[int]) -> float:
    ids = torch.tensor([prompt_ids + response_ids])
    with torch.no_grad():
        logp = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0].double(), -1)
    rows = range(len(prompt_ids) - 1, ids.shape[1] - 1)
    return sum(logp[row, token].item() for row, token in zip(rows, response_ids))


def sampled_rows() -> list[Candidate]:
    """Three, two and one responses to three prompts, mixed, and an empty one."""
    generator = torch.Generator().manual_seed(1)

    def ids(count: int) -> list[int]:
        return torch.randint(3, 250, (count,), generator=generator).tolist()

    prompts = [ids(7), ids(30), ids(4)]
    lengths = [(0, 5), (1, 9), (0, 1), (2, 12), (1, 3), (0, 20), (2, 0)]
    return [
        candidate(i, j, "x", prompt_ids=prompts[i], response_ids=ids(count))
        for j, (i, count) in enumerate(lengths)
    ]


@pytest.mark.parametrize("family", [LLAMA, GEMMA, GEMMA3, MAMBA], ids=lambda f: f.name)
def test_the_implicit_reward_is_that_of_plain_forwards(tmp_path, family):
    folders = [str(save_tiny(family, tmp_path / name, seed)) for seed, name in enumerate("ab")]
    rows = sampled_rows()
    models = [load_causal_lm(name, dtype=torch.float64).eval() for name in folders]
    by_hand = [
        plain_logp(models[0], row.prompt_ids, row.response_ids)
        - plain_logp(models[1], row.prompt_ids, row.response_ids)
        for row in rows
    ]
    assert by_hand[-1] == 0 and min(map(abs, by_hand[:-1])) > 0.01
    # Norms and softmax are computed in fp32 in any dtype.
    for dtype, tolerance in ((torch.float64, 1e-5), (None, 1e-4)):
        scorer = load_scorer(
            "implicit", policy=folders[0], previous=folders[1], dtype=dtype, batch_size=2
        )
        assert scorer.on == "rows"
        assert scorer(rows) == pytest.approx(by_hand, abs=tolerance)
        assert scorer(rows[::-1]) == pytest.approx(by_hand[::-1], abs=tolerance)
    assert scorer(rows[-1:]) == [0.0]


def test_implicit_scores_belong_to_their_models(tmp_path):
    a, b, c = (str(save_tiny(LLAMA, tmp_path / name, i)) for i, name in enumerate("abc"))
    storage.write_jsonl_atomic(
        storage.part_path(tmp_path / "candidates", 0), [row.to_json() for row in sampled_rows()]
    )
    first = run_score(load_scorer("implicit", policy=a, previous=b), tmp_path)
    assert run_score(load_scorer("implicit", policy=a, previous=b), tmp_path, "two") == first
    with pytest.raises(DataError, match="another settings"):
        run_score(load_scorer("implicit", policy=a, previous=c), tmp_path)
    back = run_score(load_scorer("implicit", policy=b, previous=a), tmp_path, "back")
    assert back == pytest.approx([-x for x in first])
    # The same by another name is no reward at all, a moved folder the same scorer.
    with pytest.raises(ValueError, match="same weights"):
        load_scorer("implicit", policy=a, previous=a)
    Path(a).rename(tmp_path / "moved")
    moved = load_scorer("implicit", policy=str(tmp_path / "moved"), previous=b)
    assert run_score(moved, tmp_path) == first
    with pytest.raises(ModelError):
        load_scorer("implicit", policy=a, previous=b)
