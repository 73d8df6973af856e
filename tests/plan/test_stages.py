"""What each stage of a run takes: the storm-7b recipe, and every kind of stage."""

from typing import Any

import pytest
import torch
import transformers
from test_memory import configuration

from fastdpo.cli import main, parse
from fastdpo.errors import ConfigError
from fastdpo.plan.stages import plan_run
from fastdpo.recipes.files import files
from fastdpo.rounds.config import IterateConfig

# Shapes of public model cards: openchat-3.5-0106, which is Mistral 7B with two more tokens, and
# Starling-RM-34B, which is Yi 34B with a head of one value.
_OPENCHAT = transformers.MistralConfig(
    vocab_size=32002, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192,
    sliding_window=None, dtype="bfloat16",
)  # fmt: skip
_STARLING = transformers.LlamaConfig(
    vocab_size=64000, hidden_size=7168, intermediate_size=20480, num_hidden_layers=60,
    num_attention_heads=56, num_key_value_heads=8, max_position_embeddings=4096, dtype="bfloat16",
)  # fmt: skip


@pytest.mark.slow
def test_storm_fits_eight_gpus_of_80_gb():
    _, config = parse(["iterate", f"--config={files()['storm-7b.yaml']}"])
    shapes = {config.model: _OPENCHAT, config.score.scorer.partition("#")[0]: _STARLING}
    found = plan_run(config, 8, 80.0, shapes)
    assert [stage.name for stage in found.stages] == [
        "sampling", "scoring", "training", "evaluation", "evaluation", "evaluation",
    ]  # fmt: skip
    assert not found.too_large, str(found)
    sampling, scoring, training = found.stages[:3]
    # 32 layers of 8 heads of keys and of values, in bf16.
    rows = config.sample.batch_prompts * config.sample.num_samples
    cache = rows * config.train.max_length * 32 * 2 * 8 * 128 * 2
    weights = 2 * 7.24e9
    assert weights + cache < sampling.takes < 1.25 * (weights + cache)
    assert scoring.gpus == 8 and 2 * 34.4e9 / 8 < scoring.takes < 16 * 2**30
    assert 16 * 7.24e9 / 8 < training.takes < 36 * 2**30
    # On one GPU nothing but sampling would.
    whole = plan_run(config, 8, 40.0, shapes)
    assert [stage.name for stage in whole.too_large] == ["sampling"]
    assert "DOES NOT FIT" in str(whole) and "lower sample.batch_prompts" in str(whole)


def run(**options: Any) -> IterateConfig:
    values = {"model": "policy", "prompts": "prompts.jsonl", **options}
    given = [f"--{name}={value}" for name, value in values.items()]
    return parse(["iterate", "--train.max_length=256", "--sample.max_new_tokens=64", *given])[1]


def plan(gpus: int = 2, gpu_gib: float = 4.0, **options: Any) -> Any:
    small = configuration("Llama", num_hidden_layers=2)
    shapes: dict[str, Any] = dict.fromkeys(("policy", "judge", "reward", "before"), small)
    return plan_run(run(**options), gpus, gpu_gib, shapes)


def scoring(**options: Any) -> Any:
    found = plan(**{"evaluate.heldout": 0, **options})
    (stage,) = [stage for stage in found.stages if stage.name == "scoring"]
    return stage


def test_scorers_take_what_they_load():
    weights = sum(
        p.numel()
        for p in transformers.AutoModelForCausalLM.from_config(
            configuration("Llama", num_hidden_layers=2)
        ).parameters()
    )
    reward = scoring(**{"score.scorer": "reward"})
    assert reward.gpus == 1 and 4 * weights * 0.7 < reward.takes
    half = scoring(**{"score.scorer": "reward", "score.dtype": "bfloat16"})
    assert half.takes < reward.takes
    spread = scoring(**{"score.scorer": "reward", "score.device_map": "auto"})
    assert spread.gpus == 2 and spread.takes < reward.takes
    judge = scoring(**{"score.scorer": "judge:judge"})
    assert judge.takes > 4 * weights
    own = scoring(**{"score.scorer": "implicit", "score.previous_model": "before"})
    assert own.takes > 2 * 4 * weights and "and the one before" in own.what
    for spec in ("answer", "fastdpo.scoring:plain_language", "http://localhost:1/v1"):
        assert scoring(**{"score.scorer": spec}).gpus == 0
    missing = scoring(**{"score.scorer": "no/such/folder"})
    assert missing.gpus == 0 and missing.what.startswith("not estimated: the folder model=")


def test_samples_take_their_cache():
    def sampling(**options: Any) -> Any:
        return plan(**{"evaluate.heldout": 0, "sample.backend": "generate", **options}).stages[0]

    # Keys and values of 2 layers of 2 heads in bf16, for each token of each sample.
    cache = 2 * 2 * 2 * 32 * 2 * 256
    few, many = (sampling(**{"sample.batch_prompts": n}).takes for n in (64, 128))
    assert many - few > 64 * 4 * cache
    paged = sampling(**{"sample.backend": "continuous", "sample.batch_prompts": 64}).takes
    assert paged > few
    server = {"sample.backend": "server", "sample.server_url": "http://localhost:1"}
    assert sampling(**server).gpus == 0
    assert "vLLM" in sampling(**{"sample.backend": "vllm"}).what


def test_every_stage_that_has_a_model():
    found = plan(**{"pair.max_difficulty": 0.5, "train.engine": "fsdp2", "evaluate.heldout": 4})
    assert [stage.name for stage in found.stages] == [
        "sampling", "scoring", "pairing", "training", "evaluation", "evaluation", "evaluation",
    ]  # fmt: skip
    training = found.stages[3]
    assert training.gpus == 2 and training.what.startswith("fsdp2, ")
    said = str(found)
    assert said.startswith("Estimates of each stage on 2 x 4 GiB") and "fits: " in said
    assert not torch.distributed.is_initialized()
    with pytest.raises(ConfigError, match=r"^engine=fsdp2 shards a model over GPUs, and gpus=1"):
        plan(1, 4.0, **{"train.engine": "fsdp2"})


def test_the_file_of_a_whole_run(tmp_path, capsys):
    model = tmp_path / "model"
    configuration("Llama", num_hidden_layers=1).save_pretrained(model)
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {model}\nprompts: prompts.jsonl\nsample: {{max_new_tokens: 16}}\n"
        "train: {max_length: 64, engine: fsdp2}\n"
    )
    assert main(["plan", f"--config={path}", "--gpus=2", "--gpu_gib=8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Estimates of each stage on 2 x 8 GiB")
    assert [line.split()[0] for line in lines[1:4]] == ["sampling", "scoring", "training"]
    assert "training, in a step:" in lines
    # What training gets on the command line, its stage gets too.
    assert main(["plan", f"--config={path}", "--gpus=2", "--gpu_gib=8", "--engine=ddp"]) == 0
    assert "2 GPUs; ddp, " in capsys.readouterr().out
    assert main(["plan", f"--config={path}"]) == 2
    assert "engine=fsdp2 shards a model over GPUs, and gpus=1" in capsys.readouterr().err
