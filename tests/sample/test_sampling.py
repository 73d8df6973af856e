"""The samplers: stop strings, continuous batching, vLLM and its server, on tiny real models.

What the stage of sampling does whatever the sampler is in test_stage.py.
"""

import inspect
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from completions_server import draw, serve
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import GEMMA3, LLAMA, build_tokenizer, save_tiny

from bench import report as bench_report
from bench.sampling import main as bench_main
from bench.sampling import parting, surprise
from fastdpo import progress, storage
from fastdpo.data.rows import Rows, prompt_rows
from fastdpo.errors import ConfigError, DataError, ModelError
from fastdpo.model.load import load_causal_lm, policy_digest
from fastdpo.remote import RemoteError, Stop
from fastdpo.sample.config import SampleConfig
from fastdpo.sample.continuous import ContinuousSampler
from fastdpo.sample.generate import GenerateSampler
from fastdpo.sample.sampler import Ending, Output, prompt_seed
from fastdpo.sample.server import ServerSampler
from fastdpo.sample.stage import model_sampler, open_sampler, sample

HERE = Path(__file__).parents[1]
PROMPTS = ["tell me about walks", "be nice", "no idea at all about the weather and the beach", "hi"]
ENDS = [2, *range(40, 60)]  # so many that some responses end


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A policy on disk whose generation config has end tokens and habits of its own."""
    from transformers import GenerationConfig

    path = save_tiny(LLAMA, tmp_path_factory.mktemp("policy"))
    GenerationConfig(eos_token_id=ENDS, pad_token_id=0, top_k=3, do_sample=True).save_pretrained(
        path
    )
    return path


@pytest.fixture
def model(folder):
    return load_causal_lm(str(folder))


def config_of(**options: Any) -> SampleConfig:
    defaults = {"num_samples": 3, "max_new_tokens": 12, "batch_prompts": 2, "dtype": "float32"}
    return SampleConfig(**{**defaults, **options})


def run(source: Any, tokenizer: Any, out: Path, config: SampleConfig, prompts=PROMPTS, **options):
    rows = prompt_rows(Rows("here", [{"prompt": prompt} for prompt in prompts]))
    options = {"round_index": 1, "progress": False, **options}
    sample(source, tokenizer, rows, config, out, **options)
    return storage.read_parts(out)


def run_open(folder: Any, tokenizer: Any, out: Path, config: SampleConfig, **options: Any):
    with open_sampler(str(folder), tokenizer, config) as sampler:
        return run(sampler, tokenizer, out, config, **options)


def ids_of(rows: list[dict[str, Any]]) -> list[list[int]]:
    return [row["response_ids"] for row in rows]


def prompt_ids(tokenizer: Any, prompts: list[str] = PROMPTS) -> list[list[int]]:
    return [tokenizer(text)["input_ids"] for text in prompts]


# Where responses end


def shortest(ids: list[int], ends: list[int], stop: list[str], tokenizer: Any) -> Output:
    """By trying every length, one after the other."""
    for n in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:n], skip_special_tokens=False)
        if ids[n - 1] in ends or any(x in text for x in stop):
            return Output(ids[:n], "stop")
    return Output(ids, "length")


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 150), max_size=30),
    st.lists(st.sampled_from(["a", "he", " t", "<|im_start|>", "é", "ll"]), max_size=3),
)
def test_responses_end_at_the_first_end_token_or_stop_string(ids, stop):
    tokenizer = CACHED
    ending = Ending([2, 7], stop, tokenizer)
    expected = shortest(ids, [2, 7], stop, tokenizer)
    assert ending.cut(ids) == expected
    # Padding behind the end changes nothing, not even padding with an end token.
    if expected.finish_reason == "stop":
        assert ending.cut([*expected.ids, 7, 7, 0]) == expected
    text = tokenizer.decode(expected.ids, skip_special_tokens=True)
    cut = min([text.find(x) for x in stop if x in text], default=len(text))
    assert ending.text(expected.ids) == text[:cut]


CACHED = build_tokenizer()


def test_a_stop_string_of_several_tokens_is_found_in_the_making(tokenizer):
    """From the tail only, at the very token that completes it."""
    stop = "long walks on the beach"
    ids = tokenizer("tell me about the weather and " * 9 + stop + " no idea")["input_ids"]
    ending = Ending([], [stop], tokenizer)
    reached = [ending.reached(ids[:n]) for n in range(1, len(ids) + 1)]
    end = len(ending.cut(ids).ids)
    assert end < len(ids)
    assert reached.index(True) + 1 == end and tokenizer.decode(ids[:end]).endswith(stop)
    assert not Ending([], ["no such words"], tokenizer).reached(ids)
    # Of two stop strings that end together, the text ends before the longer one.
    assert Ending([], ["each", stop], tokenizer).text(ids).endswith("the weather and ")


def split_text(rows: list[dict[str, Any]], tokenizer: Any) -> str:
    """A string over the border of two tokens in the middle of a response."""
    for row in rows:
        ids = row["response_ids"]
        for i in range(2, len(ids) - 2):
            a, b = tokenizer.decode(ids[i : i + 1]), tokenizer.decode(ids[i + 1 : i + 2])
            if a.isascii() and b.isascii() and a.isprintable() and b.isprintable() and a and b:
                return a[-1] + b[0]
    raise AssertionError("no such response")


@pytest.mark.parametrize("backend", ["generate", "continuous"])
def test_a_stop_string_cuts_what_would_have_been_drawn(model, tokenizer, tmp_path, backend):
    config = config_of(max_new_tokens=24, backend=backend)
    whole = run(model, tokenizer, tmp_path / "whole", config)
    stop = [split_text(whole, tokenizer), "no such words"]
    rows = run(model, tokenizer, tmp_path / "stop", replace(config, stop=stop))
    for before, row in zip(whole, rows):
        expected = shortest(before["response_ids"], ENDS, stop, tokenizer)
        assert Output(row["response_ids"], row["finish_reason"]) == expected
        text = tokenizer.decode(row["response_ids"], skip_special_tokens=True)
        assert row["response"] == text.split(stop[0])[0]
    assert sum(len(a) > len(b) for a, b in zip(ids_of(whole), ids_of(rows))) >= 1
    assert any(row["finish_reason"] == "length" for row in rows)


def test_generation_ends_with_the_stop_string(model, tokenizer, tmp_path):
    greedy = config_of(temperature=0, num_samples=1, max_new_tokens=24, batch_prompts=1)
    (whole,) = run(model, tokenizer, tmp_path / "whole", greedy, PROMPTS[:1])
    end = tokenizer.decode(whole["response_ids"][3:5])
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    (row,) = run(model, tokenizer, tmp_path / "stop", replace(greedy, stop=[end]), PROMPTS[:1])
    assert row["finish_reason"] == "stop" and end not in row["response"]
    assert len(calls) == len(row["response_ids"]) <= 5 < len(whole["response_ids"])


def test_an_end_token_that_pads_is_no_end(model, tokenizer, tmp_path):
    """Rows that a stop string ended are padded while the others go on."""
    bare = build_tokenizer()
    bare.pad_token = None
    assert GenerateSampler(model, bare, config_of())._pad_id in ENDS
    config = config_of(max_new_tokens=24, batch_prompts=4)
    whole = run(model, tokenizer, tmp_path / "whole", config)
    stop = [split_text(whole, tokenizer)]
    with_pad = run(model, tokenizer, tmp_path / "a", replace(config, stop=stop))
    assert run(model, bare, tmp_path / "b", replace(config, stop=stop)) == with_pad


# Continuous batching


def test_continuous_batching_is_greedy_as_generate_is(model, tokenizer, tmp_path):
    """Prompts of one token and of many, in parts of several sizes."""
    greedy = config_of(temperature=0, num_samples=1, max_new_tokens=20)
    prompts = [*PROMPTS, "a" * 40]
    expected = run(model, tokenizer, tmp_path / "plain", replace(greedy, batch_prompts=1), prompts)
    assert {row["finish_reason"] for row in expected} == {"stop", "length"}
    for size in (1, 3, 5):
        config = replace(greedy, batch_prompts=size, backend="continuous")
        assert run(model, tokenizer, tmp_path / str(size), config, prompts) == expected


def test_continuous_batching_masks_a_sliding_window(tokenizer, tmp_path):
    torch.manual_seed(0)
    model = GEMMA3.build(len(tokenizer))
    greedy = config_of(temperature=0, num_samples=1, max_new_tokens=20, batch_prompts=1)
    expected = run(model, tokenizer, tmp_path / "plain", greedy)
    config = replace(greedy, batch_prompts=4, backend="continuous")
    assert ids_of(run(model, tokenizer, tmp_path / "continuous", config)) == ids_of(expected)


def test_a_call_of_continuous_batching_depends_on_seed_and_prompts_only(model, tokenizer):
    """Not on the calls before, which leave a cache behind."""
    ids = prompt_ids(tokenizer)
    config = config_of(batch_prompts=4)
    used = ContinuousSampler(model, tokenizer, config)
    used.generate(ids[2:3], 3, seed=1)
    used.generate([ids[2] * 20] * 2, 3, seed=2)  # needs a larger cache
    found = used.generate(ids, 3, seed=5)
    assert used.generate(ids, 3, seed=5) == found
    used.close()
    fresh = ContinuousSampler(model, tokenizer, config)
    assert fresh.generate(ids, 3, seed=5) == found
    assert fresh.generate(ids, 3, seed=6) != found
    fresh.close()
    assert all(len(of_prompt) == 3 for of_prompt in found)
    assert len({tuple(x.ids) for of_prompt in found for x in of_prompt}) > 9


def test_a_prompt_is_computed_again_by_a_later_call(model, tokenizer):
    """A cached part of it would give other sums, and so at times other samples."""
    sampler = ContinuousSampler(model, tokenizer, config_of(max_new_tokens=2))
    prompt = prompt_ids(tokenizer)[2] * 60
    assert len(prompt) > 2 * 256  # pages of the cache
    sizes: list[int] = []
    model.register_forward_pre_hook(
        lambda *x: sizes.append(x[2]["input_ids"].shape[1]), with_kwargs=True
    )
    sampler.generate([prompt], 1, seed=0)
    first = sizes.copy()
    sampler.generate([prompt], 1, seed=0)
    sampler.close()
    assert sum(first) >= len(prompt) and sizes == first * 2


@pytest.mark.parametrize("backend", ["generate", "continuous"])
def test_samples_are_of_the_models_distribution(model, tokenizer, backend):
    """The surprise of thousands of tokens; at a wrong temperature it would show."""
    config = config_of(num_samples=16, max_new_tokens=24, backend=backend)
    ids = prompt_ids(tokenizer)
    for temperature, right in ((1.0, True), (0.8, False)):
        sampler = model_sampler(model, tokenizer, replace(config, temperature=temperature))
        found = sampler.generate(ids, 16, seed=3)
        sampler.close()
        rows = [
            {"prompt_ids": prompt, "response_ids": output.ids}
            for prompt, outputs in zip(ids, found)
            for output in outputs
        ]
        assert (abs(surprise(model, rows)) < 4) == right


def test_single_tokens_have_their_probabilities(model, tokenizer):
    """After a prompt of one token, which can't be forked, and after one of two."""
    config = config_of(num_samples=100, max_new_tokens=1, batch_prompts=1)
    for prompt in ([5], [5, 6]):
        with torch.no_grad():
            p = model(input_ids=torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
        sampler = ContinuousSampler(model, tokenizer, config)
        found = [x.ids[0] for seed in range(12) for x in sampler.generate([prompt], 100, seed)[0]]
        sampler.close()
        counts = torch.bincount(torch.tensor(found), minlength=len(p))
        spread = (1200 * p * (1 - p)).sqrt().clamp(min=1.0)
        assert counts.sum() == 1200 and (counts > 0).sum() > 20
        assert ((counts - 1200 * p) / spread).abs().max() < 5


def test_continuous_batching_keeps_settings_random_state_and_threads(model, tokenizer, tmp_path):
    own, attention = model.generation_config, model.config._attn_implementation
    model.train()
    torch.manual_seed(5)
    state, threads = torch.get_rng_state(), set(threading.enumerate())
    config = config_of(backend="continuous", top_p=0.9, temperature=0.7)
    run(model, tokenizer, tmp_path, config)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and model.generation_config is own and own.top_k == 3
    assert model.config._attn_implementation == attention
    assert set(threading.enumerate()) <= threads
    assert not hasattr(model, "_cached_continuous_batching_manager")


def test_a_cold_or_narrow_continuous_sample_is_greedy(model, tokenizer, tmp_path):
    greedy = config_of(temperature=0, num_samples=1)
    expected = ids_of(run(model, tokenizer, tmp_path / "0", greedy))
    for name, options in (("1", {"temperature": 1e-6}), ("2", {"top_p": 1e-9})):
        config = config_of(num_samples=2, backend="continuous", **options)
        rows = ids_of(run(model, tokenizer, tmp_path / name, config))
        assert rows[0::2] == rows[1::2] == expected


def test_a_cache_that_doesnt_fit_is_an_error_and_leaves_no_thread(model, tokenizer):
    threads = set(threading.enumerate())
    sampler = ContinuousSampler(model, tokenizer, config_of(max_new_tokens=10**12))
    with pytest.raises(ModelError, match="lower batch_prompts"):
        sampler.generate(prompt_ids(tokenizer), 1, seed=0)
    sampler = ContinuousSampler(model, tokenizer, config_of())
    broken = model.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ModelError, match="division by zero"):
        sampler.generate(prompt_ids(tokenizer), 1, seed=0)
    broken.remove()
    assert set(threading.enumerate()) <= threads
    assert sampler.generate(prompt_ids(tokenizer), 1, seed=0)
    sampler.close()


def test_an_interruption_of_continuous_batching_leaves_no_thread(model, tokenizer, monkeypatch):
    from transformers.generation.continuous_batching import ContinuousBatchingManager

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    threads = set(threading.enumerate())
    sampler = ContinuousSampler(model, tokenizer, config_of(max_new_tokens=500))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(ContinuousBatchingManager, "get_result", interrupt)
        sampler.generate(prompt_ids(tokenizer), 1, seed=0)
    assert set(threading.enumerate()) <= threads
    assert len(sampler.generate([[5, 6]], 1, seed=0)[0][0].ids) > 1
    sampler.close()


def test_a_model_that_cant_generate_is_told(model, tokenizer, tmp_path):
    """As when memory runs out, which names what takes it; and it is left as it was."""
    own = model.generation_config
    for error, said in (
        (torch.OutOfMemoryError("Tried to allocate\n9 GiB"), "OutOfMemoryError: .* 9 GiB"),
        (RuntimeError("device-side assert"), "device-side assert"),
    ):

        def fail(*_: Any, error: Exception = error) -> None:
            raise error

        broken = model.register_forward_hook(fail)
        with pytest.raises(ModelError, match=rf"generate failed \({said}|{said}") as caught:
            run(model, tokenizer, tmp_path, config_of())
        assert "lower batch_prompts if memory is short" in str(caught.value)
        assert "\n" not in str(caught.value)
        broken.remove()
        assert model.generation_config is own
    assert len(run(model, tokenizer, tmp_path, config_of())) == 12


# Which one


def test_auto_is_generate_on_a_cpu_and_the_server_with_a_url(model, tokenizer, folder):
    assert isinstance(model_sampler(model, tokenizer, config_of()), GenerateSampler)
    continuous = model_sampler(model, tokenizer, config_of(backend="continuous"))
    assert isinstance(continuous, ContinuousSampler)
    with serve(folder) as server:
        config = config_of(server_url=server.url)
        with open_sampler(str(folder), tokenizer, config) as sampler:
            assert sampler.backend == "server"
        for bad in (config, config_of(backend="server"), config_of(backend="vllm")):
            with pytest.raises(ModelError, match="open_sampler"):
                model_sampler(model, tokenizer, bad)


class OnGpu:
    """A model that says it is on a GPU; what it is asked tells how far the choice goes."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self._model, self.device, self.dtype = model, torch.device("cuda"), dtype

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def test_a_gpu_that_gets_padded_batches_is_told_why(model, tokenizer, caplog, monkeypatch):
    from fastdpo.model import attention

    monkeypatch.setattr(attention, "has_flash_attn", lambda: True)
    half = OnGpu(model, torch.bfloat16)
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (OnGpu(model, torch.float32), {}, "without flash-attn"),
        (half, {"stop": ["x"]}, "stop string"),
        (half, {}, "continuous batching failed"),  # there is no flash-attn in truth
    ]
    for source, options, reason in cases:
        caplog.clear()
        found = model_sampler(source, tokenizer, config_of(**options))
        assert isinstance(found, GenerateSampler) and reason in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "fast"}, "backend=fast must be one of"),
        ({"dtype": "int8"}, "dtype=int8 must be one of float32, "),
        ({"stop": "x"}, "stop=x must be a list"),
        ({"stop": ["x", ""]}, "stop=.* must be a list"),
        ({"seed": 1.5}, "seed=1.5 must be an int"),
        ({"server_url": "host:8000"}, "server_url: 'host:8000' is not a URL"),
        ({"server_url": "http://me:secret@host"}, "server_url: the URL has a name or key"),
        ({"server_url": "http://me:secret@host:port"}, "server_url: the URL has a name or key"),
        ({"server_url": "http://host?key=secret"}, "server_url: the URL has a query.*api_key_env"),
        ({"server_url": "http://host#model"}, "server_url must have no #"),
        ({"server_url": "http://host:port"}, "server_url: .*is not a URL"),
        ({"server_url": 8000}, "server_url=8000 must be a text"),
        ({"server_url": "http://h", "backend": "generate"}, "backend=generate must be 'server' or"),
        ({"server_command": "vllm serve"}, "server_command=vllm serve must be"),
        ({"server_command": "vllm '{model}"}, "server_command=.* must be a command line"),
        ({"server_command": "serve {model}"}, "server_command=.* must be left out"),
        ({"server_timeout": 0}, "server_timeout=0 must be"),
        ({"server_timeout": 9.0}, "server_timeout=9.0 must be left out"),
        ({"api_key_env": "sk-secret"}, "api_key_env must be the name"),
        ({"api_key_env": "gsk_secret"}, "api_key_env must be the name"),
    ],
)
def test_options_of_samplers_are_checked(options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        SampleConfig(**options)
    assert "secret" not in str(caught.value)


# Plan and throughput


def test_the_plan_has_seeds_backend_and_policy_before_a_sample_is_drawn(
    folder, tokenizer, tmp_path
):
    class Interrupt(Exception):
        pass

    class Broken(GenerateSampler):
        def generate(self, *_: Any) -> Any:
            raise Interrupt

    model = load_causal_lm(str(folder))
    with pytest.raises(Interrupt):
        run(Broken(model, tokenizer, config_of()), tokenizer, tmp_path / "a", config_of())
    early = storage.read_plan(tmp_path / "a")
    assert early and len(early["seeds"]) == early["parts"] == 2 and len(set(early["seeds"])) == 2
    run(model, tokenizer, tmp_path / "a", config_of())
    assert storage.read_plan(tmp_path / "a") == early

    run_open(folder, tokenizer, tmp_path / "b", config_of())
    plan = storage.read_plan(tmp_path / "b")
    assert plan is not None and plan["backend"] == "generate"
    assert plan["policy"] == policy_digest(str(folder)) and plan["dtype"] == "float32"
    with pytest.raises(DataError, match="another policy"):
        run(model, tokenizer, tmp_path / "b", config_of())
    with pytest.raises(DataError, match="another backend"):
        run_open(folder, tokenizer, tmp_path / "b", config_of(backend="continuous"))


@pytest.mark.parametrize("backend", ["generate", "continuous", "server", "vllm"])
def test_samples_of_another_dtype_are_refused(folder, tokenizer, tmp_path, vllm, backend):
    """A run that was killed and goes on would have some of either."""
    with serve(folder) as server:
        url = server.url if backend == "server" else None
        config = config_of(backend=backend, server_url=url, max_new_tokens=2)
        for dtype in ("bfloat16", "float32"):
            config = replace(config, dtype=dtype)
            with open_sampler(str(folder), tokenizer, config) as sampler:
                if dtype == "bfloat16":
                    run(sampler, tokenizer, tmp_path, config)
                    storage.part_path(tmp_path, 1).unlink()
                    continue
                with pytest.raises(DataError, match="another dtype"):
                    run(sampler, tokenizer, tmp_path, config)


def test_a_sampler_of_other_settings_is_refused(folder, tokenizer, tmp_path):
    with open_sampler(str(folder), tokenizer, config_of(stop=["x"])) as sampler:
        with pytest.raises(ConfigError, match=r"stop=\[\] must be the sampler's, \['x'\]"):
            run(sampler, tokenizer, tmp_path, config_of())
        run(sampler, tokenizer, tmp_path, config_of(stop=["x"], seed=3, num_samples=1))


def test_policies_differ_by_their_weights_not_by_their_place(folder, tmp_path):
    import shutil

    from fastdpo.model.load import load_tokenizer, save_policy

    shutil.copytree(folder, tmp_path / "copy")
    assert policy_digest(str(tmp_path / "copy")) == policy_digest(str(folder))
    model = load_causal_lm(str(folder))
    with torch.no_grad():
        model.model.norm.weight[0] += 1.0
    model.save_pretrained(tmp_path / "other")
    assert policy_digest(str(tmp_path / "other")) != policy_digest(str(folder))
    save_policy(model, load_tokenizer(str(folder)), tmp_path / "saved")
    with torch.no_grad():
        model.model.norm.weight[0] += 1.0
    save_policy(model, load_tokenizer(str(folder)), tmp_path / "again")
    saved = [policy_digest(str(tmp_path / name)) for name in ("saved", "again")]
    assert len(set(saved)) == 2
    assert policy_digest("org/name") == "org/name"


def test_weights_of_other_formats_are_told_apart(tmp_path):
    names = ["a", "b", "c"]
    for name, content in zip(names, (b"one", b"two", b"one")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pytorch_model.bin").write_bytes(content)
        (tmp_path / name / "config.json").write_text("{}")
    a, b, c = (policy_digest(str(tmp_path / name)) for name in names)
    assert a == c != b
    # What transformers prefers decides.
    (tmp_path / "a" / "model.safetensors").write_bytes(b"three")
    mixed = policy_digest(str(tmp_path / "a"))
    (tmp_path / "a" / "pytorch_model.bin").unlink()
    assert policy_digest(str(tmp_path / "a")) == mixed != a
    (tmp_path / "b" / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match=r"b has no file of weights \(\*.safetensors, .*; name"):
        policy_digest(str(tmp_path / "b"))


def test_throughput_is_written_for_what_was_sampled(model, tokenizer, tmp_path):
    rows = run(model, tokenizer, tmp_path, config_of())
    found = storage.read_json(tmp_path / "throughput.json")
    assert (found["backend"], found["parts"], found["sampled_parts"]) == ("generate", 2, 2)
    assert found["samples"] == len(rows) == 12
    assert found["tokens"] == sum(map(len, ids_of(rows)))
    assert found["truncated"] == sum(row["finish_reason"] == "length" for row in rows)
    for name in ("samples", "tokens"):
        rate = found[f"{name}_per_second"]
        assert rate == pytest.approx(found[name] / found["seconds"])
    run(model, tokenizer, tmp_path, config_of())  # nothing is sampled again
    assert storage.read_json(tmp_path / "throughput.json") == found
    storage.part_path(tmp_path, 1).unlink()
    run(model, tokenizer, tmp_path, config_of())
    resumed = storage.read_json(tmp_path / "throughput.json")
    assert (resumed["sampled_parts"], resumed["samples"]) == (1, 6)


def test_how_far_it_is_is_shown_within_a_part_too(model, tokenizer, tmp_path, capsys, monkeypatch):
    told = []

    def advance(count):
        told.append(count)
        progress.advance(count)

    monkeypatch.setattr("fastdpo.sample.generate.advance", advance)
    with progress.within("round 1 of 2"):
        run(model, tokenizer, tmp_path, config_of(), progress=True)
    shown = capsys.readouterr().err
    assert re.search(r"round 1 of 2: sampling: 100%.*12/12 .*response/s, .*tokens/s", shown)
    assert sum(told) == 12 and sum(count > 0 for count in told) > 2  # more often than once a part


# vLLM's server


@pytest.fixture
def quick(monkeypatch):
    """Retries without the wait."""
    from fastdpo import remote

    monkeypatch.setattr(remote, "_MAX_PAUSE", 0.02)


def server_rows(server: Any, tokenizer: Any, out: Path, **options: Any):
    config = config_of(server_url=server.url, **options)
    return run_open(server.root, tokenizer, out, config)


def test_the_server_gets_tokens_and_seeds_and_its_tokens_are_kept(folder, tokenizer, tmp_path):
    with serve(folder) as server:
        rows = server_rows(server, tokenizer, tmp_path, temperature=0.9, top_p=0.95, stop=["q"])
        bodies = {json.dumps(body["prompt"]): body for body in server.bodies}
        assert len(server.bodies) == len(bodies) == 4
        seeds = storage.read_json(tmp_path / "plan.json")["seeds"]
        for row in rows:
            body = bodies[json.dumps(row["prompt_ids"])]
            part, place = divmod(row["prompt_index"], 2)
            assert body["seed"] == prompt_seed(seeds[part], place) < 2**48
            choice = draw(server.model, tokenizer, body, row["sample_index"])
            assert row["response_ids"] == choice["token_ids"]
            assert row["finish_reason"] == choice["finish_reason"]
            assert body["stop_token_ids"] == ENDS and body["stop"] == ["q"]
            assert (body["top_k"], body["repetition_penalty"], body["n"]) == (0, 1.0, 3)
            # Its text has special tokens, so that a stop string may be one; ours hasn't.
            text = tokenizer.decode(row["response_ids"], skip_special_tokens=True)
            assert row["response"] == text.split("q")[0]
        assert {row["finish_reason"] for row in rows} == {"stop", "length"}
        assert len({tuple(ids) for ids in ids_of(rows)}) > 9


def test_the_server_is_greedy_as_generate_is(folder, model, tokenizer, tmp_path):
    greedy: dict[str, Any] = {"temperature": 0, "num_samples": 1}
    expected = run(model, tokenizer, tmp_path / "plain", config_of(**greedy))
    with serve(folder) as server:
        assert server_rows(server, tokenizer, tmp_path / "server", **greedy) == expected


def test_parts_of_a_server_are_sampled_at_the_same_time(folder, tokenizer):
    sampler = ServerSampler("http://h", Ending([], [], tokenizer), config_of())
    assert sampler.at_once == 256 // 6
    big = config_of(batch_prompts=500)
    assert ServerSampler("http://h", Ending([], [], tokenizer), big).at_once == 1


def test_a_run_with_a_server_goes_on_in_the_same_bytes(folder, tokenizer, tmp_path):
    with serve(folder) as server:
        whole = server_rows(server, tokenizer, tmp_path / "whole")
        sampled = len(server.bodies)
        out = tmp_path / "resumed"
        server_rows(server, tokenizer, out)
        storage.part_path(out, 0).unlink()
        before = storage.part_path(out, 1).read_bytes()
    with serve(folder) as moved:  # on another port
        assert server_rows(moved, tokenizer, out) == whole
        assert len(moved.bodies) == sampled // 2
        assert storage.part_path(out, 1).read_bytes() == before


class Waits(Stop):
    """Notes the pauses that are asked for, in seconds, and makes none."""

    def __init__(self) -> None:
        super().__init__()
        self.pauses: list[float] = []

    def check(self, wait_s: float = 0.0) -> None:
        pass

    def wait(self, timeout: float | None = None) -> bool:
        self.pauses.append(timeout or 0.0)
        return False


def test_a_server_may_be_away_for_minutes(folder, tokenizer):
    """While it is started again, or as long as it asks to be left alone."""
    for status, headers in ((503, {}), (529, {}), (429, {"Retry-After": "17"})):
        with serve(folder) as server:
            sampler = ServerSampler(server.url, Ending([], [], tokenizer), config_of())
            sampler.expect(str(folder))
            sampler._stop = waits = Waits()  # type: ignore[assignment]
            server.faults, server.fault_headers = [status] * 99, headers
            with pytest.raises(RemoteError, match=f"in 17 tries, the last one: status {status}"):
                sampler.generate([[5, 6]], 1, seed=0)
            assert len(server.bodies) == 17 and len(waits.pauses) == 16
            assert sum(waits.pauses) == 16 * 17 if headers else sum(waits.pauses) > 300
            assert max(waits.pauses) <= 60


@pytest.mark.parametrize("fault", [500, 503, 529, 429, "drop", "half", "garbage", "short", "abort"])
def test_a_passing_fault_changes_nothing(folder, tokenizer, tmp_path, quick, fault):
    with serve(folder) as server:
        expected = server_rows(server, tokenizer, tmp_path / "a")
        server.faults = [fault, fault, fault]
        assert server_rows(server, tokenizer, tmp_path / "b") == expected
        assert server.faults == [] and len(server.bodies) == 4 + 4 + 3


@pytest.mark.parametrize(
    ("fault", "message", "times"),
    [
        (500, r"status 500 \(.* broke.*the same command goes on", 17),
        ("garbage", "the reply can't be used", 17),
        (400, "status 400 .*it is not tried again", 1),
        ("no ids", "returns no token ids", 1),
        ("other prompt", "changed the tokens", 1),
    ],
)
def test_a_lasting_fault_ends_in_an_error_and_parts_stay(
    folder, tokenizer, tmp_path, quick, fault, message, times
):
    with serve(folder) as server:
        server.faults = [None, None] + [fault] * 99
        one = {"batch_prompts": 1, "num_samples": 256, "max_new_tokens": 1}  # a part at a time
        with pytest.raises(RemoteError, match=message):
            server_rows(server, tokenizer, tmp_path / "a", **one)
        assert len(server.bodies) == 2 + times
        parts = sorted(path.name for path in (tmp_path / "a").glob("part-*"))
        assert parts == ["part-00000.jsonl", "part-00001.jsonl"]
        server.faults = []
        rows = server_rows(server, tokenizer, tmp_path / "a", **one)
        assert len(rows) == 4 * 256 and len(server.bodies) == 2 + times + 2


def test_a_server_that_is_not_there(folder, tokenizer, tmp_path, quick, caplog):
    with serve(folder) as server:
        url = server.url
    with pytest.raises(RemoteError, match=r"ConnectionRefused.* the same command goes on"):
        run_open(folder, tokenizer, tmp_path, config_of(server_url=url))
    assert caplog.text.count("trying again") == 1
    assert not list(tmp_path.iterdir())


def test_a_server_that_dies_midway_keeps_what_is_written(folder, tokenizer, tmp_path, quick):
    config = config_of(batch_prompts=1, num_samples=256, max_new_tokens=1)
    with serve(folder) as server:
        expected = run_open(
            folder, tokenizer, tmp_path / "whole", replace(config, server_url=server.url)
        )
        url = replace(config, server_url=server.url)
        server.bodies.clear()

        def die() -> None:
            while len(server.bodies) < 2:
                time.sleep(0.001)
            server.socket.close()
            server.faults = ["drop"] * 99

        killer = threading.Thread(target=die)
        killer.start()
        with pytest.raises(RemoteError, match="goes on where this one stopped"):
            run_open(folder, tokenizer, tmp_path / "a", url)
        killer.join()
    written = sorted(path.name for path in (tmp_path / "a").glob("part-*"))
    assert 1 <= len(written) < 4
    with serve(folder) as server:
        again = replace(config, server_url=server.url)
        assert run_open(folder, tokenizer, tmp_path / "a", again) == expected
        assert len(server.bodies) == 4 - len(written)


def test_a_server_with_another_model_is_refused(folder, tokenizer, tmp_path):
    with serve(folder, name="other") as server:
        server.root = "/elsewhere"
        with pytest.raises(RemoteError, match=rf"serves 'other', not the policy '{folder}'"):
            server_rows_of(server, folder, tokenizer, tmp_path)
        server.root = str(folder)  # its path will do, whatever its name
        assert len(server_rows_of(server, folder, tokenizer, tmp_path)) == 12
        assert {body["model"] for body in server.bodies} == {"other"}
        with open_sampler(str(folder), tokenizer, config_of(server_url=server.url)) as sampler:
            server.name = "changed"
            with pytest.raises(RemoteError, match=r"404 \(The model `other` does not exist"):
                sampler.generate([[5, 6]], 1, seed=0)


def server_rows_of(server: Any, folder: Path, tokenizer: Any, out: Path):
    return run_open(folder, tokenizer, out, config_of(server_url=server.url))


def test_prompts_that_the_server_has_no_room_for_are_refused_first(folder, tokenizer, tmp_path):
    with (
        serve(folder, max_len=20) as server,
        pytest.raises(DataError, match=r"here, row 0.* model's context, 20"),
    ):
        server_rows(server, tokenizer, tmp_path, max_new_tokens=15)
    assert not list(tmp_path.iterdir()) and server.bodies == []


def test_the_key_comes_from_the_environment_and_is_never_shown(
    folder, tokenizer, tmp_path, quick, monkeypatch, caplog, capsys
):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("THE_KEY", "s3cret")
    with serve(folder, key="s3cret") as server:
        rows = server_rows(server, tokenizer, tmp_path / "a", api_key_env="THE_KEY")
        assert len(rows) == 12 and set(server.keys) == {"Bearer s3cret"}
        assert "s3cret" not in (tmp_path / "a" / "plan.json").read_text()
        messages = []
        for key, faults in ((None, []), ("wr0ng", []), ("s3cret", [503] * 99)):
            monkeypatch.setenv("THE_KEY", key or "")
            server.faults = faults
            with pytest.raises((ConfigError, RemoteError)) as caught:
                server_rows(server, tokenizer, tmp_path / str(key), api_key_env="THE_KEY")
            messages.append("".join(map(str, (caught.value, caught.value.__cause__))))
    assert "THE_KEY is not set" in messages[0]
    assert "status 401 (Unauthorized: Bearer ***)" in messages[1]
    assert "status 503 (Bearer *** broke)" in messages[2]
    shown = " ".join(messages) + caplog.text + "".join(capsys.readouterr())
    assert "s3cret" not in shown and "wr0ng" not in shown


@pytest.mark.parametrize("key", ["", "two\nlines", "schlüssel"])
def test_a_key_that_cant_be_sent_is_refused_without_its_value(folder, tokenizer, monkeypatch, key):
    monkeypatch.setenv("THE_KEY", key)
    config = config_of(server_url="http://127.0.0.1:1", api_key_env="THE_KEY")
    with (
        pytest.raises(ConfigError, match=r"api_key_env: .* THE_KEY ") as caught,
        open_sampler(str(folder), tokenizer, config),
    ):
        pass
    assert not key or key not in str(caught.value)


def test_a_response_that_hangs_is_given_up_when_the_sampler_closes(folder, tokenizer):
    with serve(folder) as server:
        config = config_of(server_url=server.url)
        with open_sampler(str(folder), tokenizer, config) as sampler:
            failed: list[BaseException] = []

            def wait() -> None:
                try:
                    sampler.generate([[5, 6]], 1, seed=0)
                except RemoteError as error:
                    failed.append(error)

            with server.lock:  # no request is answered
                waiting = threading.Thread(target=wait)
                waiting.start()
                while not server.keys[1:]:
                    time.sleep(0.001)
                sampler.close()
                waiting.join(timeout=30)
                assert not waiting.is_alive()
        assert "given up" in str(failed[0])


# A server started here


def command(*extra: str) -> str:
    script = str(HERE / "completions_server.py")
    return shlex.join([sys.executable, script, "{model}", *extra])


def pid_in(log: Path) -> int:
    return int(log.read_text().rsplit("process ", 1)[1].split()[0])


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"


def ends(pid: int) -> bool:
    """Whether the process ends within a minute."""
    deadline = time.monotonic() + 60
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pid)


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@on_linux
def test_a_started_server_samples_and_ends(folder, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("THE_KEY", "s3cret")
    log = tmp_path / "logs" / "server.log"
    config = config_of(backend="server", server_command=command(), api_key_env="THE_KEY")
    with open_sampler(str(folder), tokenizer, config, max_length=100, log_path=log) as sampler:
        assert sampler.context == 100
        rows = run(sampler, tokenizer, tmp_path / "a", config)
        pid = pid_in(log)
        assert alive(pid) and "with key s3cret" in log.read_text()
        assert "s3cret" not in Path(f"/proc/{pid}/cmdline").read_text()
    assert ends(pid)
    with serve(folder) as server:
        assert server_rows(server, tokenizer, tmp_path / "b") == rows


def test_a_server_that_cant_start_shows_its_log(folder, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("THE_KEY", "s3cret")
    for command_line, reason in (
        (command("--no-such"), "unrecognized"),
        ("nowhere {model}", "No "),
    ):
        config = config_of(backend="server", server_command=command_line, api_key_env="THE_KEY")
        with (
            pytest.raises(RemoteError, match=r"ended with status [12]; the end of") as caught,
            open_sampler(str(folder), tokenizer, config, log_path=tmp_path / "log"),
        ):
            pass
        assert reason in str(caught.value) and "s3cret" not in str(caught.value)


def test_a_started_server_that_dies_midway_is_told_with_its_log(
    folder, tokenizer, tmp_path, monkeypatch, quick
):
    monkeypatch.setenv("THE_KEY", "s3cret")
    one: dict[str, Any] = {"batch_prompts": 1, "num_samples": 256, "max_new_tokens": 1}
    config = config_of(
        backend="server", server_command=command("--die-after", "2"), api_key_env="THE_KEY", **one
    )
    with pytest.raises(RemoteError, match=r"ended with status 3[\s\S]*worker died") as caught:
        run_open(folder, tokenizer, tmp_path / "a", config)
    assert "s3cret" not in str(caught.value)  # which its log has
    assert len(list((tmp_path / "a").glob("part-*"))) == 2
    config = replace(config, server_command=command())
    assert len(run_open(folder, tokenizer, tmp_path / "a", config)) == 4 * 256


@on_linux
def test_a_started_server_ends_with_a_killed_process(folder, tmp_path):
    """SIGKILL leaves no time to stop it; memory of a GPU must come free all the same."""
    code = (
        "import sys, time\n"
        "from fastdpo.model.load import load_tokenizer\n"
        "from fastdpo.sample.config import SampleConfig\n"
        "from fastdpo.sample.stage import open_sampler\n"
        "folder, command, log = sys.argv[1:]\n"
        "config = SampleConfig(backend='server', dtype='float32', server_command=command)\n"
        "with open_sampler(folder, load_tokenizer(folder), config, log_path=log):\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(600)\n"
    )
    log = tmp_path / "log"
    arguments = [sys.executable, "-c", code, str(folder), command(), str(log)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, cwd=HERE.parent, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    pid = pid_in(log)
    assert alive(pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert ends(pid)


# As torchrun and accelerate launch set them.
LAUNCH = {
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE",
    "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE", "ACCELERATE_USE_FSDP", "FSDP_VERSION",
    "PARALLELISM_CONFIG_SP_SIZE",
}  # fmt: skip


def test_what_is_started_hears_nothing_of_a_launch(folder, tokenizer, tmp_path, monkeypatch):
    """It would join the processes of the launch, or wait for them."""
    for name in LAUNCH:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("FSDPLUS", "1")
    before = dict(os.environ)
    show = shlex.join([sys.executable, "-c", "import json, os; print(json.dumps({**os.environ}))"])
    config = config_of(backend="server", server_command=f"{show} {{model}}")
    with pytest.raises(RemoteError, match="ended with status 0"):
        open_sampler(str(folder), tokenizer, config, log_path=tmp_path / "log")
    heard = json.loads((tmp_path / "log").read_text())
    assert heard["FSDPLUS"] == "1" and not LAUNCH & {*heard}

    def load(**_: Any) -> Any:
        heard.clear()
        heard.update(os.environ)
        raise RuntimeError("no GPU")

    module = types.ModuleType("vllm")
    module.LLM = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    with pytest.raises(ModelError, match="no GPU"):
        open_sampler(str(folder), tokenizer, config_of(backend="vllm"))
    assert heard["FSDPLUS"] == "1" and not LAUNCH & {*heard}
    assert dict(os.environ) == before


# vLLM in this process: a recorder of its published signatures, drawing from the real model.
# docs.vllm.ai, API reference: LLM, LLM.generate, SamplingParams, EngineArgs.

LLM_OPTIONS = """
    runner convert tokenizer tokenizer_mode skip_tokenizer_init trust_remote_code
    allowed_local_media_path allowed_media_domains tensor_parallel_size dtype quantization revision
    tokenizer_revision seed gpu_memory_utilization cpu_offload_gb enforce_eager
    disable_custom_all_reduce hf_token hf_overrides mm_processor_kwargs pooler_config
    compilation_config max_model_len generation_config enable_prefix_caching max_num_seqs
"""
SAMPLING_PARAMS = """
    n presence_penalty frequency_penalty repetition_penalty temperature top_p top_k min_p seed stop
    stop_token_ids ignore_eos max_tokens min_tokens logprobs prompt_logprobs detokenize
    skip_special_tokens spaces_between_special_tokens include_stop_str_in_output output_kind
    logit_bias allowed_token_ids extra_args bad_words
"""


def keywords(names: str, *first: str) -> inspect.Signature:
    positional = [inspect.Parameter(x, inspect.Parameter.POSITIONAL_OR_KEYWORD) for x in first]
    rest = [
        inspect.Parameter(x, inspect.Parameter.KEYWORD_ONLY, default=None) for x in names.split()
    ]
    return inspect.Signature(positional + rest)


class SamplingParamsRecorder:
    def __init__(self, **options: Any) -> None:
        keywords(SAMPLING_PARAMS).bind(**options)
        assert options["detokenize"] or not options["stop"]  # vLLM refuses that
        self.options = options


class LLMRecorder:
    made: "list[LLMRecorder]" = []  # noqa: RUF012

    def __init__(self, model: str, **options: Any) -> None:
        keywords(LLM_OPTIONS, "model").bind(model, **options)
        self.options, self.ended = {"model": model, **options}, 0
        self._model = load_causal_lm(model)
        self._tokenizer = build_tokenizer()
        core = types.SimpleNamespace(shutdown=self._end)
        self.llm_engine = types.SimpleNamespace(engine_core=core)
        self.made.append(self)

    def _end(self) -> None:
        self.ended += 1

    def generate(
        self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None, priority=None
    ):
        assert isinstance(sampling_params, list) and len(sampling_params) == len(prompts)
        assert use_tqdm is False
        found = []
        for prompt, params in zip(prompts, sampling_params):
            options = params.options
            body = {**options, "prompt": prompt["prompt_token_ids"], "return_token_ids": True}
            choices = [draw(self._model, self._tokenizer, body, i) for i in range(options["n"])]
            outputs = [types.SimpleNamespace(**choice) for choice in choices[::-1]]
            found.append(types.SimpleNamespace(outputs=outputs, finished=True))
        return found


@pytest.fixture
def vllm(monkeypatch):
    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = LLMRecorder, SamplingParamsRecorder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    LLMRecorder.made.clear()
    return LLMRecorder


@pytest.mark.parametrize("stop", [[], ["q"]])
def test_vllm_is_called_as_published_and_draws_as_its_server(
    folder, tokenizer, tmp_path, vllm, stop
):
    config = config_of(backend="vllm", stop=stop, top_p=0.95)
    with open_sampler(str(folder), tokenizer, config, max_length=100) as sampler:
        rows = run(sampler, tokenizer, tmp_path / "a", config)
    (llm,) = vllm.made
    assert llm.options == {
        "model": str(folder),
        "dtype": "float32",
        "max_model_len": 100,
        "generation_config": "vllm",
    }
    assert llm.ended == 1
    with serve(folder) as server:
        assert server_rows(server, tokenizer, tmp_path / "b", stop=stop, top_p=0.95) == rows
    plan = storage.read_plan(tmp_path / "a")
    assert plan is not None and plan["backend"] == "vllm"


def test_a_vllm_that_is_missing_or_fails_is_told(folder, tokenizer, tmp_path, monkeypatch, vllm):
    config = config_of(backend="vllm")
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ModelError, match=r"pip install 'fastdpo\[vllm\]'"):
        run_open(folder, tokenizer, tmp_path, config)
    broken = types.ModuleType("vllm")
    broken.LLM = lambda **_: 1 / 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", broken)
    with pytest.raises(ModelError, match=r"vLLM can't load model=.*division by zero"):
        run_open(folder, tokenizer, tmp_path, config)
    with pytest.raises(ModelError, match="nowhere"):
        run_open("/nowhere", tokenizer, tmp_path, config)


@pytest.mark.parametrize("fault", ["dies", "aborts"])
def test_an_engine_that_dies_is_told(folder, tokenizer, tmp_path, vllm, monkeypatch, fault):
    """Midway; its end, which fails too, doesn't hide why."""

    def dead(*_: Any, **__: Any) -> None:
        raise RuntimeError("EngineCore is dead")

    def aborted(self: Any, *args: Any, **options: Any) -> Any:
        found = generate(self, *args, **options)
        found[0].outputs[0].finish_reason = "abort"
        return found

    generate = LLMRecorder.generate
    monkeypatch.setattr(LLMRecorder, "generate", dead if fault == "dies" else aborted)
    monkeypatch.setattr(LLMRecorder, "_end", dead)
    reason = "RuntimeError: EngineCore" if fault == "dies" else "finish_reason 'abort'"
    with pytest.raises(ModelError, match=rf"vLLM failed \(.*{reason}.*batch_prompts"):
        run_open(folder, tokenizer, tmp_path, config_of(backend="vllm"))


# The benchmark


def test_parting_is_where_two_responses_part(model):
    prompt = [5, 6, 7]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, 9]])).logits[0, -1]
    assert parting(model, prompt, [9, 10, 11], [9, 10, 11]) is None
    found = parting(model, prompt, [9, 10, 11], [9, 12])
    assert found == pytest.approx((logits[10] - logits[12]).abs().item())
    assert parting(model, prompt, [9, 10], [9]) == float("inf")


def test_the_benchmark_checks_and_times_every_sampler(folder, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    with serve(folder) as server:
        arguments = dict(
            model=folder, prompts=prompts, max_new_tokens=12, batch_prompts=2, rounds=2,
            backends="generate,continuous,server,vllm", server_url=server.url,
            out=tmp_path / "out.jsonl", commit="none", dtype="float32",
        )  # fmt: skip
        bench_main([f"--{name}={value}" for name, value in arguments.items()])
    rows = [json.loads(row) for row in (tmp_path / "out.jsonl").open()]
    assert [row["backend"] for row in rows] == ["generate", "continuous", "server", "vllm"]
    for row in rows[:3]:
        assert row["note"] is None and row["greedy_equal"] == row["greedy_of"] == 4
        assert row["samples_per_second"]["median"] > 0 and abs(row["surprise_z"]) < 4
        assert row["tokens_per_sample"] <= 12
    assert "fastdpo[vllm]" in rows[3]["note"] and "samples_per_second" not in rows[3]
    document = tmp_path / "RESULTS.md"
    assert bench_report.main([str(tmp_path / "out.jsonl"), f"--out={document}"]) == 0
    lines = [line for line in document.read_text().splitlines() if line.startswith("| ")]
    assert len(lines) == 6 and "not measured" in lines[-1] and "4 of 4" in lines[2]
    speeds = [float(line.split(" | ")[1].split(" ")[0]) for line in lines[2:5]]
    assert speeds == sorted(speeds, reverse=True)
