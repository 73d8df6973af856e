"""Options that nothing uses: each is refused where it is set, and taken where something uses it."""

from dataclasses import fields
from typing import Any

import pytest

from fastdpo.cli import PlanConfig, TrainCommand
from fastdpo.errors import ConfigError
from fastdpo.rounds.run import _FREE, IterateConfig
from fastdpo.rounds.stages import PairConfig, SampleConfig, ScoreConfig

REWARD = "some/reward-model"
BASE: dict[type, dict[str, Any]] = {
    IterateConfig: dict(model="m", prompts="p", scorer="answer"),
    TrainCommand: dict(model="m", dataset="d"),
    PlanConfig: dict(model="m"),
    SampleConfig: dict(model="m", prompts="p"),
    ScoreConfig: dict(candidates="c", scorer="answer"),
    PairConfig: dict(candidates="c", scores=["s"]),
}
TRAINING = (IterateConfig, TrainCommand, PlanConfig)
SAMPLING = (IterateConfig, SampleConfig)
SCORING = (IterateConfig, ScoreConfig)
PAIRING = (IterateConfig, PairConfig)
SERVED: dict[str, Any] = dict(server_url="http://127.0.0.1:1")
STARTED: dict[str, Any] = dict(sampler="server")
REMOTE: dict[str, Any] = dict(scorer="http://127.0.0.1:1/score", eval_scorer="answer")
START: dict[str, Any] = dict(reference_candidates="c", reference_scores=["s"])
# Commands, options without an effect, the one that is named, and what gives it an effect.
IDLE: list[tuple[tuple[type, ...], dict[str, Any], str, dict[str, Any]]] = [
    (TRAINING, dict(lora_r=4), "lora_r", dict(use_peft=True)),
    (TRAINING, dict(lora_alpha=4.0), "lora_alpha", dict(use_peft=True)),
    (TRAINING, dict(lora_target_modules=["q_proj"]), "lora_target_modules", dict(use_peft=True)),
    (
        TRAINING,
        dict(lora_target_parameters=["experts.up"]),
        "lora_target_parameters",
        dict(use_peft=True),
    ),
    (TRAINING, dict(target_length=9.0), "target_length", dict(alpha="auto")),
    (
        TRAINING,
        dict(reference_cache="x", precompute_ref_log_probs=False),
        "reference_cache",
        dict(precompute_ref_log_probs=True),
    ),
    ((TrainCommand,), dict(candidates="c"), "candidates", dict(alpha="auto")),
    ((TrainCommand,), dict(control="c"), "control", dict(alpha="auto")),
    (SAMPLING, dict(server_timeout=9.0), "server_timeout", SERVED),
    (SAMPLING, dict(server_api_key_env="KEY"), "server_api_key_env", STARTED),
    (SAMPLING, dict(server_command="serve {model}"), "server_command", STARTED),
    (SAMPLING, dict(server_command="serve {model}", **SERVED), "server_command",
     dict(server_url=None, sampler="server")),
    ((SampleConfig,), dict(top_p=0.9, temperature=0.0, num_samples=1), "top_p",
     dict(temperature=1.0)),
    ((IterateConfig,), dict(previous_model="q"), "previous_model",
     dict(scorer="implicit", eval_scorer="answer")),
    ((ScoreConfig,), dict(previous_model="q"), "previous_model", dict(scorer="implicit")),
    ((ScoreConfig,), dict(policy="q"), "policy", dict(scorer="likelihood")),
    (SCORING, dict(judge_template="x"), "judge_template", dict(scorer="judge:j")),
    ((IterateConfig,), dict(judge_template="x"), "judge_template", dict(eval_scorer="judge:j")),
    (SCORING, dict(scorer_dtype="bfloat16"), "scorer_dtype", dict(scorer=REWARD)),
    ((IterateConfig,), dict(scorer_dtype="bfloat16"), "scorer_dtype", dict(eval_scorer=REWARD)),
    ((ScoreConfig,), dict(scorer_dtype="bfloat16", scorer="judge:http://h/v1#m"), "scorer_dtype",
     dict(scorer="judge:j")),
    ((ScoreConfig,), dict(scorer_batch_size=2), "scorer_batch_size", dict(scorer=REWARD)),
    ((ScoreConfig,), dict(scorer_batch_size=2, scorer="http://h/pooling#m"), "scorer_batch_size",
     dict(scorer="http://h/score")),
    # The divergence on held-out prompts takes so many at a time.
    ((IterateConfig,), dict(scorer_batch_size=2, heldout=0), "scorer_batch_size", dict(heldout=9)),
    *(
        (SCORING, {name: value}, name, {"scorer": "http://127.0.0.1:1/score"})
        for name, value in (
            ("scorer_timeout", 9.0), ("scorer_retries", 1), ("scorer_concurrency", 2),
            ("scorer_api_key_env", "KEY"),
        )
    ),
    ((IterateConfig,), dict(eval_samples=3, heldout=0), "eval_samples", dict(heldout=4)),
    ((IterateConfig,), dict(eval_scorer="a:b", heldout=0), "eval_scorer", dict(heldout=4)),
    ((IterateConfig,), dict(reference_decay=0.9), "reference_decay", dict(reference="average")),
    ((IterateConfig,), dict(learning_rate=0.1, round_learning_rates=[0.2]), "learning_rate",
     dict(round_learning_rates=None)),
    ((IterateConfig,), dict(beta=0.2, round_betas=[0.3]), "beta", dict(round_betas=None)),
    ((IterateConfig,), dict(pairing="all_ranked", num_samples=2), "pairing", dict(num_samples=3)),
    (PAIRING, dict(target_margin=2.0), "target_margin", dict(pairing="nearest_margin")),
    (PAIRING, dict(max_pairs=2), "max_pairs", dict(pairing="all_ranked")),
    (PAIRING, dict(equal_prompts=True), "equal_prompts", dict(pairing="all_ranked")),
    (PAIRING, dict(equal_prompts=True, pairing="curriculum", max_pairs=1), "equal_prompts",
     dict(max_pairs=2)),
    (PAIRING, dict(transform="par"), "transform", dict(min_gap=0.1)),
    (PAIRING, dict(transform="mean_std", pairing="curriculum"), "transform",
     dict(pairing="nearest_margin")),
    (PAIRING, dict(transform="log_sigmoid", pairing="all_ranked"), "transform", dict(max_pairs=2)),
    (PAIRING, dict(combine="log_sigmoid"), "combine", dict(length_penalty=0.1)),
    (PAIRING, dict(scorer_weights=[2.0]), "scorer_weights", dict(min_gap=0.1)),
    (PAIRING, dict(scorer_weights=[0.0]), "scorer_weights", dict(scorer_weights=[-1.0])),
    ((IterateConfig,), dict(transform_reference="start", transform="mean_std", min_gap=0.1),
     "reference_scores", dict(transform="par")),
    ((PairConfig,), dict(transform="par", min_gap=0.1, **START), "transform_reference",
     dict(transform_reference="start")),
    ((PairConfig,), dict(reference_scores=["s"]), "transform_reference",
     dict(transform_reference="start", transform="par", min_gap=0.1, **START)),
    ((PairConfig,), dict(previous_scores=["s"]), "previous_scores", dict(consistency="mean")),
    ((IterateConfig,), dict(consistency="mean"), "consistency",
     dict(scorer="implicit", previous_model="q", eval_scorer="answer")),
    ((PairConfig,), dict(model="q"), "model", dict(ches_keep=0.5)),
    ((PairConfig,), dict(max_length=9), "max_length",
     dict(replay="r", replay_share=0.5, model="q")),
    ((PairConfig,), dict(consistency="mean"), "consistency", dict(previous_scores=["s"])),
    ((PairConfig,), dict(transform="par", min_gap=0.1, transform_reference="start"),
     "transform_reference", START),
    ((PairConfig,), dict(fresh_threshold=0.0), "fresh_threshold", dict(fresh_threshold=None)),
    ((PairConfig,), dict(chat_template="t"), "chat_template",
     dict(replay="r", replay_share=0.5, model="q")),
    ((PairConfig,), dict(max_tokens=9), "max_tokens", dict(max_difficulty=1.0, model="q")),
    ((PairConfig,), dict(bf16=False), "bf16", dict(ches_keep=0.5, model="q")),
    (PAIRING, dict(replay="r"), "replay", dict(replay_share=0.5, model="q")),
    (PAIRING, dict(replay_share=0.5), "replay_share", dict(replay="r", model="q")),
    ((IterateConfig,), dict(fresh_threshold=0.0), "fresh_threshold",
     dict(replay="r", replay_share=0.5)),
    *(
        ((IterateConfig,), {name: 0.5}, name,
         dict(scorer=["a:b", "a:c"], eval_scorer="answer", combine="log_sigmoid"))
        for name in ("flip_share", "soft_label")
    ),
    *(
        ((PairConfig,), {name: 0.5}, name, dict(scores=["s", "t"], combine="log_sigmoid"))
        for name in ("flip_share", "soft_label")
    ),
]  # fmt: skip
# What every run uses, whatever the other options are.
ALWAYS = {
    "model", "prompts", "dataset", "candidates", "scores", "output_dir", "output", "rounds",
    "heldout", "max_prompts", "seed", "round_index", "gpu_gib", "split",
    "alpha", "beta", "learning_rate", "top_p",
    "warmup_ratio", "weight_decay", "max_grad_norm", "num_train_epochs", "batch_size",
    "max_length", "max_tokens", "overlong", "layout", "precompute_ref_log_probs", "dtype",
    "gradient_checkpointing", "bf16", "save_steps", "workspace_mib", "impl",
    "activation_offloading", "mlp_tile_tokens", "use_liger_kernel", "use_peft", "load_in_4bit",
    "num_samples", "max_new_tokens", "temperature", "stop", "batch_prompts", "sampler",
    "sample_dtype", "server_url", "scorer", "reference", "extrapolation", "round_learning_rates",
    "round_betas", "pairing", "length_penalty", "min_gap", "drop_truncated", "drop_duplicates",
    "ches_keep", "max_difficulty", "chat_template",
    "router_aux_loss_coef",  # depends on the model, which says so
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "idle", "name", "used"),
    [(config, *case) for configs, *case in IDLE for config in configs],
    ids=lambda value: getattr(value, "__name__", value if isinstance(value, str) else ""),
)
def test_an_option_that_nothing_uses_is_refused(config, idle, name, used):
    def build(**options: Any) -> Any:
        known = {field.name for field in fields(config)}
        options = {**BASE[config], **options}
        return config(**{key: value for key, value in options.items() if key in known})

    build()
    with pytest.raises(ConfigError) as error:
        build(**idle)
    assert name in str(error.value) and "\n" not in str(error.value)
    build(**{**idle, **used})


@pytest.mark.parametrize("config", BASE, ids=lambda config: config.__name__)
def test_every_option_is_always_used_or_in_the_table(config):
    """A new option belongs into one of the two."""
    listed = {name for configs, idle, *_ in IDLE if config in configs for name in idle}
    names = {field.name for field in fields(config)}
    assert names <= listed | ALWAYS


def test_what_may_change_on_resumption_gives_no_other_option_its_effect():
    """Or a run could be neither resumed with that option nor without it."""
    for configs, _, name, used in IDLE:
        assert IterateConfig not in configs or name in _FREE or not used.keys() & _FREE
