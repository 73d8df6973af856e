"""A sample of `bench.sweep`: every rope type, cap, scale, window, mixture and recurrent kind."""

import pytest

from bench import architectures, log2, sweep
from fastdpo.data.examples import LAYOUTS

# Model -> the first layout that it has.
SAMPLE = {
    "llama": "shared",
    "llama, rope linear": "shared",
    "llama, rope dynamic": "shared",
    "llama, rope yarn": "shared",
    "llama, rope llama3": "shared",
    "phi3, rope longrope": "shared",
    "gemma4_text": "shared",  # proportional
    "gemma2": "shared",
    "recurrent_gemma, cap": "padded",
    "xlstm, cap": "padded",
    "gemma3, cap that its code leaves out": "shared",
    "cohere": "shared",
    "granite, scale": "shared",
    "hyperclovax, scale": "shared",
    "minicpm3, scale": "shared",
    "falcon_h1, scale": "padded",
    "mistral, window": "shared",
    "mixtral": "shared",
    "qwen3_moe": "shared",
    "mamba": "padded",
    "qwen3_next": "padded",
}


@pytest.mark.parametrize("name", SAMPLE)
def test_a_layout_gives_the_numbers_of_each_sequence_alone(name):
    case = next(case for case in sweep.cases() if case.name == name)
    if case.model_type not in architectures.model_types():
        pytest.skip(f"this transformers has no {case.model_type}")
    *others, layout = LAYOUTS[: LAYOUTS.index(SAMPLE[name]) + 1]
    outcome = sweep.try_case(case, [*others, layout])
    assert outcome[layout].kind == sweep.EQUAL, outcome
    assert {outcome[x].kind for x in others} <= {sweep.REFUSED}, outcome


def test_a_choice_of_keys_from_a_whole_row_is_refused():
    """Doge keeps the keys with most weight; padding beyond its window would be among them."""
    case = next(case for case in sweep.cases() if case.name == "doge")
    outcomes = sweep.try_case(case)
    assert {x.kind for x in outcomes.values()} == {sweep.REFUSED}, outcomes
    assert "keep_window_size" in outcomes["padded"].reason


def test_wrong_numbers_are_called_wrong(monkeypatch):
    from fastdpo.model import head

    real = head.head_settings
    monkeypatch.setattr(head, "check", lambda *_: None)
    monkeypatch.setattr(head, "head_settings", lambda c: {**real(c), "scale": 1.0})
    case = next(case for case in sweep.cases() if case.name == "hyperclovax, scale")
    assert sweep.try_case(case, ["padded"])["padded"].kind == sweep.WRONG


def test_cases_are_names_of_models():
    names = [case.name for case in sweep.cases()]
    assert len(names) == len(set(names)) and set(SAMPLE) < set(names)
    assert {case.name for case in log2.cases()} == set(log2.NAMES) and len(log2.NAMES) >= 20
