"""TRL's trainer and this package's with one option after another, on tiny models.

``python tests/trl_options.py`` runs every case and writes the table of TRL's options,
``bench/TRL_OPTIONS.md``.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import torch
import transformers
import trl
from datasets import Dataset
from PIL import Image
from tiny import (
    COHERE,
    GEMMA,
    GEMMA3,
    GRANITE,
    LLAMA,
    MIXTRAL,
    PHI,
    QWEN,
    build_tokenizer,
    save_tiny,
)
from tiny import Family as ModelFamily
from tiny import _family as tiny_family
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from fastdpo.integrations.trl import (
    HONOURED,
    LOSSES,
    NOT_LOGGED,
    REFUSED,
    LengthRegularizedDPOTrainer,
)

TABLE = Path(__file__).parent.parent / "bench" / "TRL_OPTIONS.md"
BETA, STEPS, BATCH, RATE = 0.3, 3, 4, 0.1
CLOCK = ("runtime", "per_second", "epoch")


class Case(NamedTuple):
    """Options of DPOConfig and, made from the saved model's folder, parameters of DPOTrainer."""

    options: dict[str, Any] = {}  # noqa: RUF012
    parameters: Callable[[Path], dict[str, Any]] = lambda path: {}
    family: ModelFamily = LLAMA
    tolerance: float = 1e-5


def rows(count: int) -> list[dict[str, Any]]:
    topics = ["dogs", "the weather", "bread and butter", "long walks on the beach", "maps"]
    return [
        {
            "prompt": [{"role": "user", "content": f"tell me about {topics[i % 5]} {i}"}],
            "chosen": [{"role": "assistant", "content": "they are nice " * (i % 4 + 1)}],
            "rejected": [{"role": "assistant", "content": "no idea at all " * (i % 3 + 1)}],
        }
        for i in range(count)
    ]


def make_trainer(
    trainer_class: Any, family: ModelFamily, folder: Path, *, more: Any = None, **changes: Any
) -> Any:
    """A trainer on a tiny saved model; eager attention is the only one that caps scores."""
    path = save_tiny(family, folder / "model")
    settings: dict[str, Any] = dict(
        output_dir=str(folder / "out"), beta=BETA, max_steps=STEPS, optim="sgd",
        per_device_train_batch_size=BATCH, learning_rate=RATE, lr_scheduler_type="constant",
        max_grad_norm=0.0, bf16=False, use_cpu=True, report_to="none", save_strategy="no",
        disable_tqdm=True, gradient_checkpointing=False, weight_decay=0.0, logging_steps=1,
        model_init_kwargs={"attn_implementation": "eager", "dtype": "float32"},
    )  # fmt: skip
    given: dict[str, Any] = {
        "model": str(path),
        "train_dataset": Dataset.from_list(rows(STEPS * BATCH)),
        "processing_class": build_tokenizer(),
    }
    extra: Any = more(path) if callable(more) else more
    given.update(extra or {})
    return trainer_class(args=DPOConfig(**{**settings, **changes}), **given)


def load(path: Path, moved: float = 0.0) -> Any:
    """The saved model, or one near it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, attn_implementation="eager", dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(moved * torch.randn(p.shape, generator=generator))
    return model


def evaluation(path: Path) -> dict[str, Any]:
    """Five pairs, so that a batch of three is followed by one of two; metrics of the logits."""

    def of_logits(found: Any) -> dict[str, float]:
        return {"spread": float(np.nanstd(np.where(found[0] == -100, np.nan, found[0])))}

    return {"eval_dataset": Dataset.from_list(rows(5)), "compute_metrics": of_logits}


def lora(**changes: Any) -> Any:
    settings = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False, **changes}
    return peft.LoraConfig(**settings)


def adapted(path: Path) -> dict[str, Any]:
    """An adapter trained before: TRL copies it, and the copy is the reference."""
    torch.manual_seed(0)
    return {"model": peft.get_peft_model(load(path), lora())}


def prompt(kind: str) -> Callable[[Path], dict[str, Any]]:
    def parameters(path: Path) -> dict[str, Any]:
        return {
            "peft_config": getattr(peft, kind)(
                task_type="CAUSAL_LM", num_virtual_tokens=3,
                **({"encoder_hidden_size": 32} if kind == "PromptEncoderConfig" else {}),
            )
        }  # fmt: skip

    return parameters


def quantized(path: Path) -> dict[str, Any]:
    """QLoRA."""
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    return {"quantization_config": settings, "peft_config": lora()}


def _with_pictures(token: str, tokenizer: Any, processor: Any) -> dict[str, Any]:
    """Pairs that ask about a picture each, and the processor that places its tokens."""
    processor.chat_template = tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
        f"{{% if c['type'] == 'image' %}}{token}{{% else %}}"
        "{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    generator = np.random.default_rng(0)
    data = [
        {**row, "images": [Image.fromarray(generator.integers(0, 255, (20, 20, 3), np.uint8))]}
        for row in rows(STEPS * BATCH)
    ]
    return {"train_dataset": Dataset.from_list(data), "processing_class": processor}


_SEEN: dict[str, Any] = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
    image_size=16, patch_size=8,
)  # fmt: skip


def _reader(name: str) -> Any:
    """An image processor that needs no torchvision; in older releases all are such."""
    return getattr(transformers, name + "Pil", None) or getattr(transformers, name)


def llava(path: Path) -> dict[str, Any]:
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = {"height": 16, "width": 16}
    images = _reader("CLIPImageProcessor")(size={"shortest_edge": 16}, crop_size=size)
    processor = transformers.LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=8,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        text_config=LLAMA.build(len(tokenizer)).config, image_seq_length=4,
        vision_config=transformers.CLIPVisionConfig(**_SEEN),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(path)
    return _with_pictures("<image>", tokenizer, processor)


def gemma3(path: Path) -> dict[str, Any]:
    """Its batches have token types too: a picture's tokens see each other."""
    names = {"boi_token": "<boi>", "image_token": "<image>", "eoi_token": "<eoi>"}
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(names.values())})
    for name, token in names.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, name + "_id", tokenizer.convert_tokens_to_ids(token))
    images = _reader("Gemma3ImageProcessor")(size={"height": 16, "width": 16})
    processor = transformers.Gemma3Processor(images, tokenizer, image_seq_length=4)
    config = transformers.Gemma3Config(
        text_config=GEMMA3.build(len(tokenizer)).config, mm_tokens_per_image=4,
        vision_config=transformers.SiglipVisionConfig(**_SEEN),
        **{name + "_index": tokenizer.convert_tokens_to_ids(x) for name, x in names.items()},
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(path)
    return _with_pictures("<boi>", tokenizer, processor)


def losses(*names: str, **options: Any) -> Case:
    """One loss or several, with a reference near the policy, so that no first loss is that of 0."""
    settings = {"loss_type": list(names), "learning_rate": 1e-3, **options}
    return Case(settings, lambda path: {"ref_model": load(path, 0.01)})


def stiff(*names: str, **options: Any) -> Case:
    """Squares and exponentials of margins: those of fp32 round by as much more, here and there."""
    return losses(*names, learning_rate=1e-4, **options)._replace(tolerance=1e-4)


STIFF = ("discopop", "sppo_hard")
LOSS_CASES = {
    **{name: losses(name) for name in LOSSES if name not in ("exo_pair", "sigmoid", *STIFF)},
    **{name: stiff(name) for name in STIFF},
    "exo_pair": losses("exo_pair", label_smoothing=1e-3),
    "robust, smoothed": losses("robust", label_smoothing=0.2),
    "aot, smoothed and accumulated": losses(
        "aot", label_smoothing=0.1, per_device_train_batch_size=2, gradient_accumulation_steps=2
    ),
    "aot_unpaired, smoothed": losses("aot_unpaired", label_smoothing=0.1),
    "discopop, another temperature": losses("discopop", discopop_tau=0.2),
    "forward KL": stiff("sigmoid", f_divergence_type="forward_kl"),
    "Jensen-Shannon": losses("hinge", "sft", f_divergence_type="js_divergence"),
    "alpha-divergence": stiff(
        "ipo", f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.7
    ),
    "MPO": losses("sigmoid", "bco_pair", "sft", loss_weights=[0.8, 0.2, 1.0]),
    "RPO, accumulated": losses(
        "sigmoid", "sft", per_device_train_batch_size=2, gradient_accumulation_steps=2
    ),
    "sorted and not, smoothed": losses("aot", "robust", label_smoothing=0.1, loss_weights=[2, 0.5]),
    "LD-DPO": losses("sigmoid", ld_alpha=0.4),
    "LD-DPO, precomputed": losses(
        "ipo", "apo_down", ld_alpha=0.0, precompute_ref_log_probs=True, precompute_ref_batch_size=3
    ),
    "WPO": losses("sigmoid", use_weighting=True),
    "WPO of several, LD-DPO": losses(
        "sigmoid", "nca_pair", use_weighting=True, ld_alpha=0.4, loss_weights=[1.0, 0.3]
    ),
    "a loss of tokens, evaluated": losses(
        "sft", "sigmoid", eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=3
    )._replace(parameters=lambda path: {"ref_model": load(path, 0.01), **evaluation(path)}),
}


# Quantized in blocks of 64.
WIDE = tiny_family("llama", "LlamaConfig", hidden_size=64, intermediate_size=64, head_dim=16)
CASES: dict[str, Case] = {
    "full, evaluated": Case(
        {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 3}, evaluation
    ),
    "own reference, accumulated, clipped": Case(
        {
            "loss_weights": [0.3], "gradient_accumulation_steps": 2, "max_grad_norm": 0.1,
            "per_device_train_batch_size": 2, "lr_scheduler_type": "linear",
        },
        lambda path: {"ref_model": load(path, 0.05)}, GEMMA,
    ),
    "precomputed": Case(
        {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 3}, evaluation, QWEN
    ),
    "reference that follows": Case(
        {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5},
        family=GRANITE,
    ),
    "cut and padded": Case(
        {"max_length": 24, "truncation_mode": "keep_end", "pad_to_multiple_of": 16,
         "pad_token": "<|pad|>", "dataset_num_proc": 1},
        family=COHERE,
    ),
    "checkpointed": Case({"gradient_checkpointing": True, "beta": 0.05}),
    "noisy": Case({"disable_dropout": False}, family=PHI),
    "mixture of experts": Case({"router_aux_loss_coef": 0.0}, family=MIXTRAL),
    "new adapter": Case({}, lambda path: {"peft_config": lora()}),
    "trained adapter": Case({}, adapted),
    # TRL makes the adapters bf16: one step's rounding is 2**-8 of a weight.
    "quantized": Case({}, quantized, WIDE, STEPS * 2**-8),
    "prompt tuning": Case({}, prompt("PromptTuningConfig")),
    "P-tuning": Case({}, prompt("PromptEncoderConfig")),
    "prefix tuning": Case({}, prompt("PrefixTuningConfig")),
    "pictures": Case({}, llava, LLAMA._replace(name="llava")),
    "pictures with token types": Case({}, gemma3, LLAMA._replace(name="gemma3 with siglip")),
    "compiled": Case({"torch_compile": True, "torch_compile_backend": "aot_eager"}),
    **LOSS_CASES,
}  # fmt: skip


def train(trainer: Any) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """What a run logs, without its clock, and the weights it ends in."""
    trainer.train()
    logged = [row for row in trainer.state.log_history if "train_loss" not in row]
    kept = [{k: v for k, v in x.items() if not k.endswith(CLOCK)} for x in logged]
    weights = trainer.model.named_parameters()
    return kept, {name: p.detach().clone() for name, p in weights if p.requires_grad}


def compare(case: Case, folder: Path, **ours: Any) -> dict[str, float]:
    """Largest differences between the two trainers, relative to one or to the value.

    ``logged`` is the largest of everything that TRL logs and does not name `NOT_LOGGED`; nor the
    rewards of sft alone, which runs no reference for them.
    """

    def run(trainer_class: Any, name: str, **extra: Any) -> Any:
        torch.manual_seed(0)

        def more(path: Path) -> dict[str, Any]:
            return case.parameters(path) | extra

        options = {**case.options, "output_dir": str(folder / name)}
        return train(make_trainer(trainer_class, case.family, folder, more=more, **options))

    theirs, wanted = run(DPOTrainer, "theirs")
    mine, got = run(LengthRegularizedDPOTrainer, "ours", **{"alpha": 0.0, **ours})
    assert len(theirs) == len(mine) and got.keys() == wanted.keys()
    unknown = (*NOT_LOGGED, "rewards/") if case.options.get("loss_type") == ["sft"] else NOT_LOGGED
    worst = {"loss": 0.0, "grad_norm": 0.0, "logged": 0.0, "weights": 0.0}
    for a, b in zip(theirs, mine):
        names = {name for name in a if not name.removeprefix("eval_").startswith(unknown)}
        assert names <= b.keys(), names - b.keys()
        for name in names:
            kind = name.removeprefix("eval_")
            kind = kind if kind in worst else "logged"
            worst[kind] = max(worst[kind], abs(a[name] - b[name]) / max(1.0, abs(a[name])))
    for name, p in got.items():
        size = wanted[name].float().norm().clamp(min=0.01)  # a key's bias only ever gets rounding
        difference = (p.float() - wanted[name].float()).norm() / size
        worst["weights"] = max(worst["weights"], difference.item())
    return worst


def options_table() -> str:
    """What becomes of each option, from the code's own lists; the cases that set it."""
    uses = {name: [case for case, x in CASES.items() if name in x.options] for name in _own()}
    lines = ["| option | here | shown by |", "|---|---|---|"]
    inherited = []
    for group, names in HONOURED.items():
        own = [name for name in names.split() if name in uses]
        lines += [f"| `{name}` | honoured | {'; '.join(uses[name])} |" for name in own]
        rest = ", ".join(f"`{name}`" for name in names.split() if name not in uses)
        if rest:
            inherited.append(f"| {group}: {rest} | honoured, by `transformers.Trainer` | |")
    refused = [f"| `{name}` | refused: {why} | |" for name, why in REFUSED.items()]
    return "\n".join([*lines, *inherited, *refused])


def _own() -> set[str]:
    """TRL's own options, and those of the Trainer's that a case sets."""
    inherited = {x.name for x in dataclasses.fields(transformers.TrainingArguments)}
    own = {x.name for x in dataclasses.fields(DPOConfig)} - inherited
    return own | {name for case in CASES.values() for name in case.options}


def cases_table(figures: dict[str, dict[str, float]]) -> str:
    """Largest differences from TRL's, a row for each case."""
    kinds = ["loss", "grad_norm", "logged", "weights"]
    lines = [f"| case | model | {' | '.join(kinds)} | bound |", "|---" * (len(kinds) + 3) + "|"]
    for name, found in figures.items():
        case = CASES[name.removesuffix(TWICE)]
        cells = " | ".join(f"{found[kind]:.1e}" for kind in kinds)
        lines.append(f"| {name} | {case.family.name} | {cells} | {case.tolerance:.1e} |")
    return "\n".join(lines)


TWICE = ", two processes"
DOUBLED = ("full, evaluated", "new adapter", "aot", "MPO")


def in_two_processes(name: str) -> dict[str, float]:
    """`compare` of a case under DDP; the larger figures of the two."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", __file__, name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    found = [json.loads(line[len(MARK) :]) for line in lines if line.startswith(MARK)]
    assert len(found) == 2, done.stderr
    return {kind: max(x[kind] for x in found) for kind in found[0]}


MARK = "figures: "


def main(names: list[str]) -> None:
    """Print the figures of the named cases, or run all and write the table."""
    with tempfile.TemporaryDirectory() as folder:
        figures = {}
        for i, name in enumerate(names or CASES):
            figures[name] = compare(CASES[name], Path(folder) / str(i))
            print(MARK + json.dumps(figures[name]), flush=True)
    if names:
        return
    for name in DOUBLED:
        figures[name + TWICE] = in_two_processes(name)
    versions = ", ".join(f"{x.__name__} {x.__version__}" for x in (trl, transformers, peft, torch))
    TABLE.write_text(
        f"""# TRL's options in `LengthRegularizedDPOTrainer`

Written by `python tests/trl_options.py` ({versions}).

## Equal to `trl.DPOTrainer`

Three steps of either trainer on the same tiny model and pairs, in fp32 on a CPU, at `alpha=0`:
largest differences of losses, gradient norms, everything else that is logged and the weights at
the end, relative to the value or to one.  `sft` alone runs no reference and logs no rewards, unless
they are precomputed.

{cases_table(figures)}

## Options of `DPOConfig`

An option that is in neither list is refused unless it has its default.

{options_table()}
"""
    )


if __name__ == "__main__":
    main(sys.argv[1:])
