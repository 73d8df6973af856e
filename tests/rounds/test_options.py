"""Options that nothing uses: each is refused where it is set, and taken where something uses it."""

from typing import Any

import pytest

from fastdpo.cli.commands import PlanCommand
from fastdpo.cli.options import build, options_of
from fastdpo.cli.stages import PairCommand, SampleCommand, ScoreCommand, TrainCommand
from fastdpo.errors import ConfigError
from fastdpo.rounds.config import IterateConfig
from fastdpo.rounds.resume import FREE

REWARD = "some/reward-model"
BASE: dict[type, dict[str, Any]] = {
    IterateConfig: {"model": "m", "prompts": "p", "score.scorer": "answer"},
    TrainCommand: dict(model="m", dataset="d"),
    PlanCommand: dict(model="m"),
    SampleCommand: dict(model="m", prompts="p"),
    ScoreCommand: dict(candidates="c", scorer="answer"),
    PairCommand: dict(candidates="c", scores=["s"]),
}
# The commands that have a stage's options; in a run they are in its section.
TRAIN = (IterateConfig, TrainCommand, PlanCommand)
SAMPLE = (IterateConfig, SampleCommand)
SCORE = (IterateConfig, ScoreCommand)
PAIR = (IterateConfig, PairCommand)
SECTION = {TRAIN: "train.", SAMPLE: "sample.", SCORE: "score.", PAIR: "pair."}
SERVED: dict[str, Any] = dict(server_url="http://127.0.0.1:1")
STARTED: dict[str, Any] = dict(backend="server")
START: dict[str, Any] = dict(reference_candidates="c", reference_scores=["s"])
# Commands, options without an effect, the one that is named, and what gives it an effect.
IDLE: list[tuple[tuple[type, ...], dict[str, Any], str, dict[str, Any]]] = [
    (TRAIN, dict(lora_r=4), "lora_r", dict(use_peft=True)),
    (TRAIN, dict(lora_alpha=4.0), "lora_alpha", dict(use_peft=True)),
    (TRAIN, dict(lora_target_modules=["q_proj"]), "lora_target_modules", dict(use_peft=True)),
    (
        TRAIN,
        dict(lora_target_parameters=["experts.up"]),
        "lora_target_parameters",
        dict(use_peft=True),
    ),
    (TRAIN, dict(target_length=9.0), "target_length", dict(alpha="auto")),
    (
        TRAIN,
        dict(reference_cache="x", precompute_ref_log_probs=False),
        "reference_cache",
        dict(precompute_ref_log_probs=True),
    ),
    (TRAIN, dict(loss_weights=[1.0, 2.0]), "loss_weights", dict(loss_type=["sigmoid", "sft"])),
    (TRAIN, dict(label_smoothing=0.1), "label_smoothing", dict(loss_type="robust")),
    (TRAIN, dict(f_divergence_type="js_divergence", loss_type="nca_pair"), "f_divergence_type",
     dict(loss_type="hinge")),
    (TRAIN, dict(f_alpha_divergence_coef=0.3), "f_alpha_divergence_coef",
     dict(f_divergence_type="alpha_divergence")),
    (TRAIN, dict(discopop_tau=0.1), "discopop_tau", dict(loss_type="discopop")),
    *(
        (TRAIN, {name: value, "loss_type": loss}, name, dict(loss_type="sigmoid"))
        for name, value, loss in (
            ("ld_alpha", 0.5, "sft"), ("use_weighting", True, "aot"),
            ("reference_scale", 0.5, "aot"),
            ("target_margin", 0.5, "nca_pair"), ("score_offset", "difference", "nca_pair"),
            ("score_label", True, "nca_pair"), ("score_weight", True, "kto"),
            ("precompute_ref_log_probs", False, "simpo"), ("reference_cache", "x", "simpo"),
            ("alpha", 0.5, "kto"), ("alpha", "auto", "kto"),
        )
    ),
    (TRAIN, dict(simpo_gamma=0.1), "simpo_gamma", dict(loss_type="simpo")),
    (TRAIN, dict(cpo_alpha=0.1), "cpo_alpha", dict(loss_type="cpo")),
    (TRAIN, dict(desirable_weight=2.0), "desirable_weight", dict(loss_type="kto")),
    (TRAIN, dict(undesirable_weight=2.0), "undesirable_weight", dict(loss_type="kto")),
    (TRAIN, dict(tdpo_alpha=0.1), "tdpo_alpha",
     dict(loss_type="tdpo2", precompute_ref_log_probs=False)),
    (TRAIN, dict(pro_sft_weight=0.1), "pro_sft_weight", dict(loss_type="pro")),
    (TRAIN, dict(max_skip=2), "max_skip", dict(loss_type="skip_ranknet")),
    (TRAIN, dict(list_size=4), "list_size", dict(loss_type="lipo_lambda")),
    (TRAIN, dict(score_offset_weight=2.0), "score_offset_weight",
     dict(score_offset="difference")),
    ((TrainCommand,), dict(candidates="c"), "candidates", dict(alpha="auto")),
    ((TrainCommand,), dict(control="c"), "control", dict(alpha="auto")),
    *(
        ((TrainCommand,), {name: value}, name, dict(eval_dataset="e"))
        for name, value in (
            ("eval_split", "test"), ("eval_steps", 5), ("load_best_model_at_end", True),
        )
    ),
    ((TrainCommand,), dict(metric_for_best_model="eval_loss", eval_dataset="e"),
     "metric_for_best_model", dict(load_best_model_at_end=True)),
    ((TrainCommand,), dict(greater_is_better=True, eval_dataset="e"), "greater_is_better",
     dict(load_best_model_at_end=True)),
    (SAMPLE, dict(server_timeout=9.0), "server_timeout", SERVED),
    (SAMPLE, dict(api_key_env="KEY"), "api_key_env", STARTED),
    (SAMPLE, dict(server_command="serve {model}"), "server_command", STARTED),
    (SAMPLE, dict(server_command="serve {model}", **SERVED), "server_command",
     dict(server_url=None, backend="server")),
    ((SampleCommand,), dict(top_p=0.9, temperature=0.0, num_samples=1), "top_p",
     dict(temperature=1.0)),
    ((IterateConfig,), {"score.previous_model": "q"}, "score.previous_model",
     {"score.scorer": "implicit", "evaluate.scorer": "answer"}),
    ((ScoreCommand,), dict(previous_model="q"), "previous_model", dict(scorer="implicit")),
    ((ScoreCommand,), dict(policy="q"), "policy", dict(scorer="likelihood")),
    (SCORE, dict(judge_template="x"), "judge_template", dict(scorer="judge:j")),
    ((IterateConfig,), {"score.judge_template": "x"}, "score.judge_template",
     {"evaluate.scorer": "judge:j"}),
    (SCORE, dict(dtype="bfloat16"), "dtype", dict(scorer=REWARD)),
    (SCORE, dict(device_map="auto"), "device_map", dict(scorer=REWARD)),
    ((IterateConfig,), {"score.device_map": "auto"}, "score.device_map",
     {"evaluate.scorer": REWARD}),
    ((PlanCommand,), dict(zero_stage=2), "zero_stage", dict(engine="deepspeed", gpus=2)),
    ((PlanCommand,), dict(link_gbs=9.0), "link_gbs", dict(gpus=2)),
    ((IterateConfig,), {"score.dtype": "bfloat16"}, "score.dtype", {"evaluate.scorer": REWARD}),
    ((ScoreCommand,), dict(dtype="bfloat16", scorer="judge:http://h/v1#m"), "dtype",
     dict(scorer="judge:j")),
    ((ScoreCommand,), dict(batch_size=2), "batch_size", dict(scorer=REWARD)),
    ((ScoreCommand,), dict(batch_size=2, scorer="http://h/pooling#m"), "batch_size",
     dict(scorer="http://h/score")),
    # The divergence on held-out prompts takes so many at a time.
    ((IterateConfig,), {"score.batch_size": 2, "evaluate.heldout": 0}, "score.batch_size",
     {"evaluate.heldout": 9}),
    *(
        (SCORE, {name: value}, name, {"scorer": "http://127.0.0.1:1/score"})
        for name, value in (
            ("timeout", 9.0), ("retries", 1), ("concurrency", 2),
            ("api_key_env", "KEY"),
        )
    ),
    ((IterateConfig,), {"evaluate.num_samples": 3, "evaluate.heldout": 0}, "evaluate.num_samples",
     {"evaluate.heldout": 4}),
    ((IterateConfig,), {"evaluate.scorer": "a:b", "evaluate.heldout": 0}, "evaluate.scorer",
     {"evaluate.heldout": 4}),
    ((IterateConfig,), {"reference_decay": 0.9}, "reference_decay", {"reference": "average"}),
    ((IterateConfig,), {"train.learning_rate": 0.1, "round_learning_rates": [0.2]},
     "train.learning_rate",
     {"round_learning_rates": None}),
    ((IterateConfig,), {"train.beta": 0.2, "round_betas": [0.3]}, "train.beta",
     {"round_betas": None}),
    ((IterateConfig,), {"pair.rule": "all_ranked", "sample.num_samples": 2}, "pair.rule",
     {"sample.num_samples": 3}),
    (PAIR, dict(target_margin=2.0), "target_margin", dict(rule="nearest_margin")),
    (PAIR, dict(max_pairs=2), "max_pairs", dict(rule="all_ranked")),
    (PAIR, dict(equal_prompts=True), "equal_prompts", dict(rule="all_ranked")),
    (PAIR, dict(equal_prompts=True, rule="curriculum", max_pairs=1), "equal_prompts",
     dict(max_pairs=2)),
    ((IterateConfig,), {"pair.transform": "par"}, "pair.transform", {"pair.min_gap": 0.1}),
    ((IterateConfig,), {"pair.transform": "mean_std", "pair.rule": "curriculum"}, "pair.transform",
     {"pair.rule": "nearest_margin"}),
    ((IterateConfig,), {"pair.transform": "log_sigmoid", "pair.rule": "all_ranked"},
     "pair.transform", {"pair.max_pairs": 2}),
    ((IterateConfig,), {"pair.combine": "log_sigmoid"}, "pair.combine",
     {"pair.length_penalty": 0.1}),
    ((IterateConfig,), {"pair.weights": [2.0]}, "pair.weights", {"pair.min_gap": 0.1}),
    ((PairCommand,), dict(drop_ties=True), "drop_ties", dict(rule="listwise")),
    ((IterateConfig,), {"pair.drop_ties": True}, "pair.drop_ties",
     {"train.loss_type": "ranknet"}),
    (PAIR, dict(weights=[0.0]), "weights", dict(weights=[-1.0])),
    ((IterateConfig,), {"pair.transform_reference": "start", "pair.transform": "mean_std",
     "pair.min_gap": 0.1},
     "reference_scores", {"pair.transform": "par"}),
    ((PairCommand,), dict(transform="par", min_gap=0.1, **START), "transform_reference",
     dict(transform_reference="start")),
    ((PairCommand,), dict(reference_scores=["s"]), "transform_reference",
     dict(transform_reference="start", transform="par", min_gap=0.1, **START)),
    ((PairCommand,), dict(previous_scores=["s"]), "previous_scores", dict(consistency="mean")),
    ((IterateConfig,), {"pair.consistency": "mean"}, "pair.consistency",
     {"score.scorer": "implicit", "score.previous_model": "q", "evaluate.scorer": "answer"}),
    ((PairCommand,), dict(model="q"), "model", dict(ches_keep=0.5)),
    ((PairCommand,), dict(max_length=9), "max_length",
     dict(replay="r", replay_share=0.5, model="q")),
    ((PairCommand,), dict(consistency="mean"), "consistency", dict(previous_scores=["s"])),
    ((PairCommand,), dict(transform="par", min_gap=0.1, transform_reference="start"),
     "transform_reference", START),
    ((PairCommand,), dict(fresh_threshold=0.0), "fresh_threshold", dict(fresh_threshold=None)),
    ((PairCommand,), dict(chat_template="t"), "chat_template",
     dict(replay="r", replay_share=0.5, model="q")),
    ((PairCommand,), dict(string_prompts="text"), "string_prompts",
     dict(replay="r", replay_share=0.5, model="q")),
    ((PairCommand,), dict(max_tokens=9), "max_tokens", dict(max_difficulty=1.0, model="q")),
    ((PairCommand,), dict(bf16=False), "bf16", dict(ches_keep=0.5, model="q")),
    (PAIR, dict(replay="r"), "replay", dict(replay_share=0.5, model="q")),
    (PAIR, dict(replay_share=0.5), "replay_share", dict(replay="r", model="q")),
    ((IterateConfig,), {"pair.fresh_threshold": 0.0}, "pair.fresh_threshold",
     {"pair.replay": "r", "pair.replay_share": 0.5}),
    *(
        ((IterateConfig,), {f"pair.{name}": 0.5}, f"pair.{name}",
         {"score.scorer": ["a:b", "a:c"], "evaluate.scorer": "answer",
          "pair.combine": "log_sigmoid"})
        for name in ("flip_share", "soft_label")
    ),
    *(
        ((PairCommand,), {name: 0.5}, name, dict(scores=["s", "t"], combine="log_sigmoid"))
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
    "num_samples", "max_new_tokens", "temperature", "stop", "batch_prompts", "backend",
    "server_url", "scorer", "reference", "extrapolation", "round_learning_rates",
    "round_betas", "rule", "length_penalty", "min_gap", "drop_truncated", "drop_duplicates",
    "ches_keep", "max_difficulty", "chat_template", "string_prompts",
    "loss_type", "combine",
    "prompt_in_likelihood", "from_first_difference",  # depend on the dataset, which says so
    "router_aux_loss_coef",  # depends on the model, which says so
    # Depend on the launch, and plan's on the number of GPUs, which say so.
    "engine", "dp_replicate_size", "sp_size", "offload_params", "reshard_after_forward", "gpus",
}  # fmt: skip


def of(config: type, commands: tuple[type, ...], options: dict[str, Any]) -> dict[str, Any]:
    """The options that a command has, by their names there."""
    section = SECTION.get(commands, "") if config is IterateConfig else ""
    named = {f"{section}{name}": value for name, value in options.items()}
    return {name: value for name, value in named.items() if name in options_of(config)}


@pytest.mark.parametrize(
    ("config", "commands", "idle", "name", "used"),
    [(config, *case) for case in IDLE for config in case[0]],
    ids=lambda value: getattr(value, "__name__", value if isinstance(value, str) else ""),
)
def test_an_option_that_nothing_uses_is_refused(config, commands, idle, name, used):
    base = BASE[config]
    build(config, base)
    with pytest.raises(ConfigError) as error:
        build(config, {**base, **of(config, commands, idle)})
    assert name in str(error.value) and "\n" not in str(error.value)
    build(config, {**base, **of(config, commands, idle), **of(config, commands, used)})


@pytest.mark.parametrize("config", BASE, ids=lambda config: config.__name__)
def test_every_option_is_always_used_or_in_the_table(config):
    """A new option belongs into one of the two."""
    listed = {name for commands, idle, *_ in IDLE for name in of(config, commands, idle)}
    names = {name for name in options_of(config) if name.rpartition(".")[2] not in ALWAYS}
    assert names <= listed


def test_what_may_change_on_resumption_gives_no_other_option_its_effect():
    """Or a run could be neither resumed with that option nor without it."""
    for commands, idle, _, used in IDLE:
        if IterateConfig in commands:
            idle, used = (of(IterateConfig, commands, x) for x in (idle, used))
            assert idle.keys() <= FREE or not used.keys() & FREE
