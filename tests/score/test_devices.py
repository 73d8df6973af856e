"""Scorers over several devices: the same scores, inputs where the weights are, and what is refused.

Without a GPU the second device is the disk: accelerate's hooks bring weights of half the modules to
the CPU before these run. "meta" stands for another GPU where only places are looked at.
"""

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from scoring_server import candidate
from test_implicit import sampled_rows
from test_rope import PHI3
from tiny import GEMMA3, LLAMA, QWEN, build_tokenizer, save_tiny

from fastdpo.cli import main, parse
from fastdpo.data.examples import TokenizedPair
from fastdpo.errors import ConfigError, ModelError
from fastdpo.model import attention, logps
from fastdpo.model.devices import DEVICE_MAPS, device_of, offloaded, placed
from fastdpo.model.prepare import prepare_model
from fastdpo.score.config import ScoreConfig
from fastdpo.score.load import load_scorer
from fastdpo.score.stage import score

torch.set_num_threads(1)
PAIRS = [
    TokenizedPair([5, 6, 7], [8, 9, 10, 11], [12, 13]),
    TokenizedPair([15, 16], [17], [18, 19, 20]),
]


def halves(head: str = "lm_head", second: str = "disk", tied: bool = False) -> dict[str, str]:
    """The second layer, the norm and the head elsewhere."""
    first = ("model.embed_tokens", "model.layers.0", "model.rotary_emb")
    there = dict.fromkeys(("model.layers.1", "model.norm", head), second)
    return dict.fromkeys(first, "cpu") | there | ({head: "cpu"} if tied else {})


def save_valued(folder: Path) -> str:
    """A causal model with a `v_head`, as Starling-RM, in two files; its tokenizer is elsewhere."""
    from safetensors.torch import save_file

    torch.manual_seed(3)
    tokenizer = build_tokenizer()
    body = LLAMA.build(len(tokenizer)).model
    body.config.save_pretrained(folder)
    tensors = {f"transformer.{name}": x.clone() for name, x in body.state_dict().items()}
    tensors["v_head.weight"] = torch.randn(1, 32)
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    where = {name: names[i % 2] for i, name in enumerate(tensors)}
    for file in names:
        own = {name: x for name, x in tensors.items() if where[name] == file}
        save_file(own, folder / file, {"format": "pt"})
    index = json.dumps({"metadata": {"total_size": 0}, "weight_map": where})
    (folder / "model.safetensors.index.json").write_text(index)
    tokenizer.save_pretrained(folder.with_name("tokenizer"))
    return f"{folder}#{folder.with_name('tokenizer')}"


def model_in(scorer: Any) -> Any:
    return getattr(scorer.function, "ask", scorer.function).model


@pytest.mark.parametrize("family", [LLAMA, QWEN, GEMMA3, PHI3], ids=lambda f: f.name)
def test_log_probs_are_those_of_one_device(tmp_path, family):
    folder = str(save_tiny(family, tmp_path / "model"))
    want = logps.pair_logps(logps.load_packed(folder), PAIRS, batch_size=1)
    spread = halves(tied=family in (QWEN, GEMMA3))
    model = logps.load_packed(folder, device_map=spread)
    assert offloaded(model) > 5 and device_of(model) == torch.device("cpu")
    for _ in range(2):  # what was brought goes again
        torch.testing.assert_close(
            logps.pair_logps(model, PAIRS, batch_size=1), want, rtol=0, atol=0
        )
        assert offloaded(model) > 5


@pytest.mark.parametrize("dtype", [None, "auto", torch.bfloat16])
def test_scorers_give_the_scores_of_one_device(tmp_path, dtype):
    judge = save_tiny(LLAMA, tmp_path / "judge")
    valued = save_valued(tmp_path / "valued")
    rows = [candidate(0, j, text) for j, text in enumerate(["no idea", "be nice", "a", "é é é"])]
    texts = (["Why?", "the beach", "no"], ["long walks", "be", ""])
    for spec, head, given in (
        (f"judge:{judge}", "lm_head", (rows,)),
        (f"follow_up:{judge}", "lm_head", texts),
        (valued, "score", texts),
    ):
        one = load_scorer(spec, dtype=dtype, batch_size=2)
        several = load_scorer(spec, dtype=dtype, batch_size=2, device_map=halves(head))
        if "follow_up" not in spec:
            assert offloaded(model_in(several)) > 5 and not offloaded(model_in(one))
            assert model_in(several).dtype == (
                torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
            )
        assert several(*given) == one(*given)
        assert several.settings == one.settings  # a device is no part of what was scored


def test_each_module_gets_its_inputs_where_its_weights_are(monkeypatch):
    """A layer and the head on a device without values: what they are called with is there too."""
    from accelerate import dispatch_model

    places = []

    def attend(_: Any, q: Any, k: Any, v: Any, *__: Any, segments: Any, **___: Any) -> Any:
        indices = segments.cu_q, segments.key_rows_K
        places.append({x.device.type for x in (q, k, v, *indices)})
        return torch.empty_like(q).transpose(1, 2), None

    def head(h: Any, w: Any, target: Any, *, rows_N: Any, **_: Any) -> Any:
        places.append({x.device.type for x in (h, w, target, rows_N)})
        return torch.zeros(len(target))

    monkeypatch.setattr(attention, "packed_attention", attend)
    monkeypatch.setattr(logps, "linear_logp", head)
    spread: Any = halves(second="meta")
    model = dispatch_model(LLAMA.build(100), spread, main_device="cpu")  # type: ignore[arg-type]
    prepare_model(model.requires_grad_(False), prove=False).eval()
    found = logps.pair_logps(model, PAIRS)
    assert places == [{"cpu"}, {"meta"}, {"meta"}] and found.shape == (2, 2)


def test_policies_are_told_apart_on_several_devices(tmp_path):
    names = [str(save_tiny(LLAMA, tmp_path / name, seed)) for seed, name in enumerate("ab")]
    rows = sampled_rows()
    for spec, previous in (("implicit", names[1]), ("likelihood", None)):
        load = partial(load_scorer, spec, policy=names[0], previous=previous)
        one, several = load(), load(device_map="auto")
        assert several(rows) == one(rows) and several.settings == one.settings
        with pytest.raises(ModelError, match=r"no room for all of .*dtype=bfloat16"):
            load(device_map=halves())


def test_a_launch_under_fsdp_leaves_the_hooks(tmp_path, monkeypatch):
    """transformers doesn't dispatch where accelerate's launch said FSDP, but a scorer is no part
    of what is sharded."""
    from transformers.integrations import accelerate as dispatching

    folder = str(save_tiny(LLAMA, tmp_path / "model"))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    fsdp = lambda: os.environ.get("ACCELERATE_USE_FSDP") == "true"  # noqa: E731
    monkeypatch.setattr(dispatching, "is_fsdp_enabled", fsdp)
    model = logps.load_packed(folder, device_map=halves())
    assert offloaded(model) and os.environ["ACCELERATE_USE_FSDP"] == "true"


def test_options_of_devices(tmp_path, capsys):
    for value in (*DEVICE_MAPS, "cpu", "cuda:1"):
        assert ScoreConfig(scorer="owner/model", device_map=value).device_map == value
    for value in ("even", "meta", "cuda:x", ""):
        with pytest.raises(ConfigError, match=rf"device_map={value} must be one of auto, .*cuda:1"):
            ScoreConfig(device_map=value)
    with pytest.raises(ConfigError, match=r"dtype=half must be one of float32, .*auto"):
        ScoreConfig(dtype="half")
    with pytest.raises(ConfigError, match="device=cpu must be left out beside device_map=auto"):
        load_scorer("owner/model", device="cpu", device_map="auto")
    words = [f"--candidates={tmp_path}", "--device_map=auto"]
    assert main(["score", "--scorer=answer", *words]) == 2
    assert "device_map=auto must be left out" in capsys.readouterr().err
    assert parse(["score", "--scorer=owner/model", *words])[1].device_map == "auto"


def test_another_dtype_is_another_run_and_other_devices_are_not(tmp_path):
    from scoring_server import write_candidates

    from fastdpo.errors import DataError

    judge = save_tiny(LLAMA, tmp_path / "judge")
    write_candidates(tmp_path / "candidates", [["a", "bb"], ["be", "nice"]])
    spec, out = f"judge:{judge}", tmp_path / "scores"
    score(load_scorer(spec), tmp_path / "candidates", out)
    score(load_scorer(spec, dtype="auto", device_map=halves()), tmp_path / "candidates", out)
    with pytest.raises(DataError, match="another settings"):
        score(load_scorer(spec, dtype=torch.bfloat16), tmp_path / "candidates", out)


def test_a_device_without_room_says_what_to_give():
    class Full(torch.nn.Linear):
        dtype = torch.float32

        def to(self, *_: Any, **__: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    wanted = r"scorer='x' in float32 does not fit cuda:0; give device_map=auto, .*dtype=bfloat16"
    with pytest.raises(ModelError, match=wanted):
        placed(Full(2, 2), "cuda:0", "scorer='x'")
