"""Names that are no options, and what stands for them: old ones, TRL's, and misspelt ones."""

import difflib
from collections.abc import Iterable, Mapping, Sequence

from fastdpo.cli.options import Given, Option
from fastdpo.errors import ConfigError
from fastdpo.rounds.config import IterateConfig
from fastdpo.rounds.old_names import RENAMED, moved, old_names

_MODEL, _SAMPLES = ("{model}, a folder or hub name",), ("{num_samples}, responses to a prompt",)
_NO_TRUNCATION = ("{max_length}, tokens of prompt and response together, and {overlong}",)
_ALWAYS_LOGS = (
    "no option: a run writes every step to metrics/, as JSON lines and for TensorBoard",
)
_RESUMES = ("no option: the same command goes on where it stopped; {output_dir} starts anew",)
_EVALUATES = ("{evaluate}", "no option: sample and score the policy on prompts that were held out")
_LOSS = ("no option: the loss is length-regularized DPO; fastdpo.objectives has others, for a loop "
         "of your own",)  # fmt: skip
# What TRL's and transformers' options are here; of several lines the first whose options exist.
TRL: dict[str, tuple[str, ...]] = {
    "model_name_or_path": _MODEL,
    "model_name": _MODEL,
    "ref_model": ("{reference}",),
    "ref_model_name_or_path": ("{reference}",),
    "sync_ref_model": ("{reference}: average",),
    "dataset_name": ("{dataset}", "{prompts}"),
    "train_dataset": ("{dataset}", "{prompts}"),
    "dataset_train_split": ("{split}",),
    "per_device_train_batch_size": (
        "{batch_size}, pairs of a step over all processes, and {max_tokens}, tokens at a time",
    ),
    "gradient_accumulation_steps": (
        "{batch_size}, pairs of a step, which is split by {max_tokens}, tokens at a time",
    ),
    "train_batch_size": ("{batch_size}, pairs of an optimizer step",),
    "max_prompt_length": _NO_TRUNCATION,
    "max_completion_length": ("{max_new_tokens}", *_NO_TRUNCATION),
    "truncation_mode": ("{overlong}",),
    "padding_free": ("{layout}; packed is the default",),
    "ld_alpha": ("{alpha}, the length penalty",),
    "loss_type": _LOSS,
    "label_smoothing": _LOSS,
    "use_weighting": _LOSS,
    "lr": ("{learning_rate}",),
    "lr_scheduler_type": ("no option: a cosine after {warmup_ratio}",),
    "warmup_steps": ("{warmup_ratio}, a share of the steps",),
    "max_steps": ("{num_train_epochs}, passes over the pairs",),
    "optim": ("no option: AdamW, with {weight_decay}",),
    "torch_dtype": ("{dtype}",),
    "fp16": ("{bf16}",),
    "load_in_8bit": ("{load_in_4bit}",),
    "use_lora": ("{use_peft}",),
    "lora_dropout": ("no option: adapters have no dropout",),
    "use_liger_loss": ("no option: the loss is fused already",),
    "precompute_ref_batch_size": ("{max_tokens}, tokens at a time",),
    "report_to": _ALWAYS_LOGS,
    "logging_steps": _ALWAYS_LOGS,
    "logging_dir": _ALWAYS_LOGS,
    "logging_strategy": _ALWAYS_LOGS,
    "run_name": ("{output_dir}, the folder of the run",),
    "save_strategy": ("{save_steps}, steps between checkpoints",),
    "save_total_limit": ("no option: a run keeps its last checkpoint",),
    "resume_from_checkpoint": _RESUMES,
    "overwrite_output_dir": _RESUMES,
    "push_to_hub": ("no option: the policy is a folder in {output_dir}",),
    "eval_strategy": _EVALUATES,
    "eval_steps": _EVALUATES,
    "do_eval": _EVALUATES,
    "data_seed": ("{seed}",),
    "reward_model_path": ("{scorer}",),
    "reward_funcs": ("{scorer}",),
    "judge": ("{scorer}: judge:NAME",),
    "num_generations": _SAMPLES,
    "n": _SAMPLES,
    "use_vllm": ("{backend}: vllm",),
}


def refuse(unknown: Sequence[Given], command: str, options: Mapping[str, Option]) -> None:
    """Raise ConfigError, in one line with the place, for names that are no options of a command."""
    first = unknown[0]
    old, where = _old(command, first.place), first.place
    found = list(dict.fromkeys(given.name for given in unknown if given.name in old))
    if found and command in ("iterate", "plan") and where:
        raise ConfigError(
            f"{where}these options are in sections now, nested under them: {moved(found, old)}"
        )
    if found:
        pairs = ", ".join(f"--{name} is --{old[name]}" for name in found)
        raise ConfigError(f"{where}options of fastdpo {command} have other names now: {pairs}")
    meant = _of_trl(first.name, options)
    if meant is not None:
        raise ConfigError(f"{where}{first} is {meant}")
    close = nearest(first.name, options)
    guess = f"; did you mean {'' if where else '--'}{close}?" if close else ""
    raise ConfigError(
        f"{where}{first} is no option of fastdpo {command}{guess} "
        f"(fastdpo {command} --help lists them)"
    )


def _old(command: str, place: str) -> dict[str, str]:
    """Old names of a command's options, or of those in a file of a whole run, and the new ones."""
    if command == "iterate" or (command == "plan" and place):
        return old_names(IterateConfig)
    ours = {old: new.partition(".") for old, new in RENAMED.items()}
    return {old: name for old, (section, _, name) in ours.items() if section == command}


def _of_trl(name: str, options: Mapping[str, Option]) -> str | None:
    """What stands for an option of TRL, if it is one of those listed."""
    places = {short: f"--{name}" for short, name in _short(options).items()}
    if "heldout" in places:
        places["evaluate"] = "the section evaluate: --evaluate.heldout and its other options"
    for line in TRL.get(name, ()):
        try:
            return line.format_map(places)
        except KeyError:
            continue
    return None


def nearest(name: str, options: Mapping[str, Option]) -> str | None:
    """The option whose name is most like this one, with or without its section."""
    names = _short(options) | {option: option for option in options}
    names |= {option.section: option.section for option in options.values() if option.section}
    bare = name.rpartition(".")[2]
    found = bare if bare in names else closest(name, names) or closest(bare, names)
    return names[found] if found else None


def closest(name: str, names: Iterable[str]) -> str | None:
    """The one of several names that is most like this one, if any is."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1)), None)


def _short(options: Mapping[str, Option]) -> dict[str, str]:
    """Options by their names without a section; where several share one, the trainer's first."""
    found: dict[str, str] = {}
    for name in sorted(options, key=lambda name: not name.startswith("train.")):
        found.setdefault(name.rpartition(".")[2], name)
    return found
