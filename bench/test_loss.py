"""The same variants under pytest-benchmark: `pytest bench/ [-k fastdpo]`.

`python -m bench` interleaves the variants and is what results are made with; this is for comparing
commits with `--benchmark-save` and `--benchmark-compare`.
"""

from __future__ import annotations

import pytest
import torch

from bench.measure import DTYPES, errors, refusal
from bench.oracle import Oracle
from bench.variants import SHAPES, TRAIN, VARIANTS, floor_step, make_problem, step

pytest.importorskip("pytest_benchmark")


@pytest.fixture(scope="module", params=["bf16", "fp32"])
def problem_and_gold(request):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    problem = make_problem(SHAPES["smollm2"], DTYPES[request.param], device)
    return problem, Oracle(problem).gold(TRAIN)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_forward_and_backward(benchmark, problem_and_gold, variant):
    problem, gold = problem_and_gold
    if variant.loss is None:
        call = floor_step(problem, TRAIN)
    else:
        try:
            _, found = errors(variant, problem, TRAIN, gold)
        except (ImportError, NotImplementedError) as error:
            pytest.skip(str(error))
        assert refusal(found) is None

        def call():
            step(variant, problem, TRAIN)
            if problem.h_ND.is_cuda:
                torch.cuda.synchronize()

    benchmark.pedantic(call, rounds=3, warmup_rounds=1)
