"""Model cards: the README.md of a policy's folder, by the conventions of the hub, with its chart.

A card says what the policy is, how to load it, how it was made and what was measured of it, from
the files of the run up to its round; so that of a round stays as it is when more rounds follow.
Whoever wants to edit a card removes its last line: without that it is not written again.
"""

import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import escape

from fastdpo.errors import DataError
from fastdpo.report.evaluation import by_prompt, number
from fastdpo.report.page import FOLDER, differing, pairs_tables, picture, title
from fastdpo.report.runfiles import KEPT, Run, read_run
from fastdpo.report.tables import (
    Cell,
    Table,
    by_round_charts,
    by_round_table,
    by_step_charts,
    distance,
    evaluation_table,
    rows_of,
)
from fastdpo.report.text import as_text, count, masked, plain
from fastdpo.storage import SUMS, atomic_file, read_json

NAME, CHART = "README.md", "results.svg"
OURS = "<!-- Written by fastdpo, which writes it again unless this line is removed. -->"
# What vLLM takes for max_lora_rank (vllm/config/lora.py).
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_FILES = {".jsonl", ".json", ".parquet", ".csv"}  # of datasets
# What a model may bring along that changes what it says, and the value that changes nothing; vLLM
# leaves them out where SamplingParams are given.
_NEUTRAL = {
    "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_p": 0.0, "typical_p": 1.0,
}  # fmt: skip

# Options of training that make a loss another one than its formula says.
_OF_LOSS = (
    "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef", "discopop_tau", "ld_alpha",
    "use_weighting", "reference_scale", "target_margin", "simpo_gamma", "cpo_alpha",
    "desirable_weight", "undesirable_weight", "tdpo_alpha", "pro_sft_weight", "max_skip",
    "score_offset", "score_offset_weight", "score_weight", "score_label",
)  # fmt: skip

_TEMPLATES = Environment(
    loader=FileSystemLoader(FOLDER), undefined=StrictUndefined, trim_blocks=True,
    lstrip_blocks=True, keep_trailing_newline=True,
)  # fmt: skip


def write_cards(
    out: Path,
    defaults: Mapping[str, Any],
    *,
    index: int | None = None,
    losses: Mapping[str, Any] = {},
) -> list[Path]:
    """Write the cards of what a training, or round `index` of a run, left in its folder.

    Args:
        out: folder of `fastdpo train` or `fastdpo iterate`.
        defaults: of all options, by their names with the section.
        losses: of each name of ``loss_type`` its ``formula``, ``source`` and ``options``, where
            they are known.

    Returns the cards.
    """
    run = read_run(out)
    if index is not None:
        rounds = [one for one in run.rounds if one.index <= index]
        run = replace(run, rounds=rounds, config=run.config | {"rounds": index})
    place = out if index is None else out / f"round-{index:02d}"
    written = []
    for folder in policies(place):
        if not _is_edited(folder):
            _write(run, folder, defaults, losses)
            written.append(folder / NAME)
    return written


def policies(place: Path) -> Iterator[Path]:
    """The policies and adapters in a folder, and in those of the stages of a curriculum."""
    for part in (place, *sorted(place.glob("stage-*"))):
        for name, file in (
            ("policy", "config.json"),
            ("extrapolated", "config.json"),
            ("adapter", "adapter_config.json"),
        ):
            if (part / name / file).is_file():
                yield part / name


def _is_edited(folder: Path) -> bool:
    """Whether the folder has a card of others: a user's, or peft's, which its checksums have."""
    path, sums = folder / NAME, folder / SUMS
    if not path.is_file():
        return False
    summed = sums.is_file() and re.search(rf"  {NAME}$", sums.read_text(), re.MULTILINE)
    return bool(summed) or OURS not in path.read_text(encoding="utf-8", errors="replace")


def _write(run: Run, folder: Path, defaults: Mapping[str, Any], losses: Mapping[str, Any]) -> None:
    rows = rows_of(run)
    figures = by_step_charts(run)[0][:3] if run.alone else by_round_charts({"": (run, rows)})
    if figures:
        with atomic_file(folder / CHART) as scratch:
            scratch.write_text(picture(figures, steps=run.alone), encoding="utf-8")
    evaluations = evaluation_table(run)
    results = _with_head(by_round_table(run, rows), "" if run.alone else "Policy")
    first, (drops, kept) = ("" if run.alone else "Round"), pairs_tables(run)
    changed = differing(run.config, defaults)
    changed.pop("output_dir", None)
    text = _TEMPLATES.get_template("card.md.jinja").render(
        metadata=_metadata(run, folder),
        run=run,
        title=_text(f"{title(run)}: {_what(run, folder)}"),
        what=folder.name,
        round=run.rounds[-1].index if run.rounds and not run.alone else None,
        start=_code(run.option("model")),
        hub_start=_hub(run.option("model")),
        beta=as_text(_beta(run)),
        alpha=as_text(run.option("train.alpha")),
        losses=_losses(run, losses),
        of_loss=", ".join(
            _code(f"{name}={as_text(x)}") or ""
            for name in _OF_LOSS
            for x in (changed.get(name, changed.get(f"train.{name}")),)
            if x is not None
        ),
        penalized=any("alpha" in losses[x].options for x in _names(run) if x in losses),
        examples=next((KEPT[x] for one in run.rounds for x in KEPT if x in one.pairing), "Pairs"),
        extrapolates=bool(run.option("extrapolation")),
        scorer=_code(run.option("score.scorer")),
        peft=bool(run.option("train.use_peft")),
        **_loading(run, folder),
        recipe=_recipe(changed),
        hides=any(_last_part(x) != x for x in changed.values()),
        command="train" if run.alone else "iterate",
        as_text=_has_text(run),
        prompts=_code(run.option("prompts")),
        dataset=_code(run.option("dataset")),
        held=_held(run),
        held_pairs=evaluations is not None,
        drops=_markdown(_with_head(drops, first)),
        pairs=_markdown(_with_head(kept, first)),
        results=_markdown(_with_head(evaluations, "After step") or results),
        distance=distance(run) if any("kl" in row for row in rows.values()) else None,
        chart=CHART if figures else None,
        ours=OURS,
    )
    with atomic_file(folder / NAME) as scratch:
        scratch.write_text(text, encoding="utf-8")


def _losses(run: Run, losses: Mapping[str, Any]) -> list[str]:
    """The losses of a run in words, none where it is the length-regularized DPO of all defaults."""
    names = _names(run)
    weights = run.option("train.loss_weights") or [1.0] * len(names)
    told = []
    for name, weight in zip(names, weights):
        factor = f"{as_text(weight)} times " if weight != 1 else ""
        known = losses.get(name)
        what = f", {_code(known.formula)} ({_text(known.source)})" if known else ""
        told.append(f"{factor}{_code(name)}{what}")
    return told


def _names(run: Run) -> list[str]:
    """The names of other losses than the default one."""
    names = run.option("train.loss_type")
    names = names if isinstance(names, list) else [names]
    return [] if names in ([None], ["sigmoid"]) else list(map(str, names))


def _what(run: Run, folder: Path) -> str:
    """The folder in words."""
    what = {"policy": "the policy", "adapter": "the LoRA adapter"}
    found = what.get(folder.name, "the policy, extrapolated")
    stage = f", stage {folder.parent.name[6:]}" if folder.parent.name.startswith("stage-") else ""
    return f"{found} of round {run.rounds[-1].index}{stage}" if not run.alone else found


def _metadata(run: Run, folder: Path) -> str:
    """The YAML at the top, by which the hub finds a model; what is only here is left out."""
    from huggingface_hub import ModelCardData

    adapter = folder.name == "adapter"
    start = _hub(_base(folder) if adapter else run.option("model"))
    alpha, data = run.option("train.alpha"), _hub(run.option("dataset" if run.alone else "prompts"))
    tags = ["dpo", *(["length-regularized-dpo"] if alpha not in (None, 0) else [])]
    tags += [] if run.alone else ["iterative-dpo"]
    tags = ["fastdpo", *(_names(run) or tags)]
    tags += ["lora"] if run.option("train.use_peft") else []
    more = {"base_model_relation": "adapter" if adapter else "finetune"} if start else {}
    return ModelCardData(
        base_model=start,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=tags,
        datasets=[data] if data else None,
        **more,  # type: ignore[arg-type]
    ).to_yaml()


def _hub(name: Any) -> str | None:
    """The name, where it is one of the hub and no folder or file here."""
    named = isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name)
    is_file = isinstance(name, str) and Path(name).suffix in _FILES
    return name if named and not is_file and not Path(name).exists() else None


def _base(folder: Path) -> str:
    """What an adapter is to be put on."""
    name = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(name, str):
        raise DataError(f"{folder}/adapter_config.json names no base model. Train again.")
    return name


def _loading(run: Run, folder: Path) -> dict[str, Any]:
    """What the lines that load a policy are made of; they are for the folder of the card."""
    adapter = folder.name == "adapter"
    policy = folder.with_name("policy") if adapter else folder
    base = _base(folder) if adapter else ""
    if adapter and not Path(base).is_absolute() and Path(base).exists():
        base = Path(os.path.relpath(base, folder)).as_posix()
    rank = read_json(folder / "adapter_config.json").get("r") if adapter else None
    tokenizer = None
    # With a template of its own, its tokenizer is another than the base's.
    if adapter and run.option("chat_template") is not None:
        tokenizer = "." if (folder / "tokenizer_config.json").is_file() else "../policy"
    return {
        "base": json.dumps(base, ensure_ascii=False),
        "shell_base": shlex.quote(base),
        "tokenizer": tokenizer,
        "chat": _has_template(policy),
        # That of training says nothing here, and vLLM has no adapters in fp32.
        "dtype": "bfloat16" if run.alone or adapter else run.option("sample.dtype"),
        "max_tokens": run.option("sample.max_new_tokens") or 256,
        **_sampling(run, policy),
        "vllm_rank": next((x for x in VLLM_RANKS if x >= (rank or 0)), None),
    }


def _sampling(run: Run, policy: Path) -> dict[str, dict[str, Any]]:
    """Options of transformers' `generate` and of vLLM's SamplingParams for one distribution: that
    of the run's samples, or the most probable tokens after a training by itself.
    """
    path = policy / "generation_config.json"
    own = read_json(path) if path.is_file() else {}
    neutral = {name: x for name, x in _NEUTRAL.items() if own.get(name) not in (None, x)}
    temperature = number(run.option("sample.temperature"))
    if not temperature or run.alone:
        return {"generate": {"do_sample": False} | neutral, "params": {"temperature": 0.0}}
    drawn = {"temperature": temperature, "top_p": number(run.option("sample.top_p")) or 1.0}
    # top_k is 50 where it isn't set.
    return {"generate": {"do_sample": True, **drawn, "top_k": 0, **neutral}, "params": drawn}


def _has_text(run: Run) -> bool:
    """Whether prompts that were strings were trained on without the chat template."""
    if run.alone:
        return any(one.pairing.get("prompts_as_text") for one in run.rounds)
    return run.option("string_prompts") == "text"


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    path = folder / "tokenizer_config.json"
    return path.is_file() and "chat_template" in read_json(path)


def _recipe(changed: Mapping[str, Any]) -> str:
    """Options as a file for --config."""
    nested: dict[str, Any] = {}
    for name, value in changed.items():
        section, _, key = name.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[key] = _last_part(value)
    return masked(yaml.safe_dump(nested, sort_keys=False, allow_unicode=True, width=100))


def _last_part(value: Any) -> Any:
    """Of a whole path on the machine of the run only its last part, all else as it was given."""
    if isinstance(value, list):
        return [_last_part(x) for x in value]
    # A "/" or "/end" may be anything, and tells nothing.
    return re.sub(r"^(judge:)?/.+/(.+)$", r"\1\2", value) if isinstance(value, str) else value


def _beta(run: Run) -> Any:
    """That of the last round."""
    betas = run.option("round_betas")
    if not isinstance(betas, list) or not betas:
        return run.option("train.beta")
    return betas[min(run.rounds[-1].index, len(betas)) - 1]


def _held(run: Run) -> str | None:
    """How many prompts were held out, None where none was."""
    held = next((one.held for one in reversed(run.rounds) if one.held), None)
    return count(len(by_prompt(held))) if held else None


def _with_head(table: Table | None, first: str) -> Table | None:
    return table and ([first, *table[0]], table[1])


def _markdown(table: Table | None) -> str:
    """A table of Markdown; its head has the name of the first column too."""
    if not table or not table[1]:
        return ""
    head, body = table
    lines = [head, ["---", *("---:" for _ in head[1:])], *body]
    rows = (
        " | ".join(x if x.startswith("---") else _text(x) for x in map(_shown, row))
        for row in lines
    )
    return "\n".join(f"| {row} |" for row in rows)


def _shown(cell: Cell) -> str:
    if isinstance(cell, str):
        return cell
    text = f"{cell.value} ± {cell.half}" if cell.half else cell.value
    return f"{text} ({_shown(cell.moved)})" if cell.moved else text


def _text(text: str) -> str:
    """Text of any kind in a line of Markdown."""
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", str(escape(" ".join(plain(text).split()))))


def _code(value: Any) -> str | None:
    """A value in a code span, several in one each; of a path on this machine only its last part."""
    if value is None:
        return None
    if isinstance(value, list):
        return ", ".join(filter(None, map(_code, value)))
    text = " ".join(plain(masked(as_text(_last_part(value)))).split())
    if PurePath(text).is_absolute() or Path(text).exists():
        text = PurePath(text).name
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{text}{pad}{fence}"
