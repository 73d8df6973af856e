"""`python -m bench.sweep`: every causal language model of transformers through every layout.

A tiny model of each (`bench.architectures`) is prepared as for training, and log-probs and
gradients of a loss over pairs in one batch are compared with the model's own forward, as loaded, a
sequence at a time.  Both run in fp64; a model whose code has no fp64 runs in fp32.  The table is
written to ``bench/ARCHITECTURES.md``.  Each model has a process of its own.

    python -m bench.sweep                    all models, two at a time, and the table
    python -m bench.sweep llama gemma2       some of them, printed
"""

import argparse
import copy
import importlib.metadata
import logging
import multiprocessing
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import architectures
from bench.rows import append, matching, resume, where
from fastdpo.data.batch import pack_pairs
from fastdpo.data.examples import LAYOUTS, TokenizedPair
from fastdpo.errors import ModelError
from fastdpo.loss import reference
from fastdpo.model.prepare import layout_of, packed_loss, prepare_model

TABLE = Path(__file__).with_name("ARCHITECTURES.md")
SECONDS = 240.0  # of one model
BETA, ALPHA = 0.1, 0.02
# Tokens of prompt, chosen and rejected: on both sides of windows, chunks and rotary thresholds,
# and the third pair's two sides on different ones.
LENGTHS = ((20, 90, 50), (9, 14, 31), (40, 25, 12))
EQUAL, REFUSED, NOT_BUILT, WRONG, CRASH = "equal", "refused", "not built", "wrong", "crash"


class Case(NamedTuple):
    """A model type, or a variant of one with changed fields."""

    name: str
    model_type: str
    changes: dict[str, Any]


class Outcome(NamedTuple):
    """What a layout gave: one of the words above, a reason, and the largest error relative."""

    kind: str
    reason: str = ""
    error: float = 0.0


def _rope(kind: str, **rest: Any) -> dict[str, Any]:
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, **rest}
    return {"rope_parameters": rope}


_ORIGINAL = {"original_max_position_embeddings": architectures.ORIGINAL}
_LONGROPE = (
    _rope("longrope", short_factor=[1.0] * 8, long_factor=[4.0] * 8, **_ORIGINAL) | _ORIGINAL
)
VARIANTS = [
    Case("llama, rope linear", "llama", _rope("linear")),
    Case("llama, rope dynamic", "llama", _rope("dynamic") | {"max_position_embeddings": 60}),
    Case("llama, rope yarn", "llama", _rope("yarn", **_ORIGINAL)),
    Case(
        "llama, rope llama3", "llama",
        _rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0, **_ORIGINAL),
    ),
    Case("phi3, rope longrope", "phi3", _LONGROPE),
    Case("phi3, window", "phi3", {"sliding_window": architectures.WINDOW}),
    Case("gemma3_text, cap", "gemma3_text", {"final_logit_softcapping": 5.0}),
    Case(
        "gemma3, cap that its code leaves out", "gemma3",
        {"text_config": {"final_logit_softcapping": 5.0}},
    ),
    Case("granite, scale", "granite", {"logits_scaling": 4.0}),
    Case("hyperclovax, scale", "hyperclovax", {"logits_scaling": 4.0}),
    Case("minicpm3, scale", "minicpm3", {"dim_model_base": 16}),
    Case("falcon_h1, scale", "falcon_h1", {"lm_head_multiplier": 0.25}),
    Case("mpt, scale that its code leaves out", "mpt", {"logit_scale": 0.25}),
    Case("recurrent_gemma, cap", "recurrent_gemma", {"logits_soft_cap": 5.0}),
    Case("xlstm, cap", "xlstm", {"output_logit_soft_cap": 5.0}),
    Case("inkling_text, padded vocabulary", "inkling_text", {"unpadded_vocab_size": 300}),
    Case(
        "minimax_m3_vl_text, sparse", "minimax_m3_vl_text",
        {"layer_types": ["full_attention", "minimax_m3_sparse"], "index_topk_blocks": 2},
    ),
    Case("mistral, window", "mistral", {"sliding_window": architectures.WINDOW}),
    Case("qwen2, window", "qwen2", {"use_sliding_window": True, "max_window_layers": 0}),
]  # fmt: skip


def cases() -> list[Case]:
    """All model types, then the variants."""
    return [Case(name, name, {}) for name in architectures.model_types()] + VARIANTS


def random_pairs(
    vocab: int, lengths: Sequence[tuple[int, int, int]] = LENGTHS
) -> list[TokenizedPair]:
    generator = torch.Generator().manual_seed(1)

    def ids(count: int) -> list[int]:
        return torch.randint(3, vocab - 1, (count,), generator=generator).tolist()

    return [TokenizedPair(ids(a), ids(b), ids(c)) for a, b, c in lengths]


def try_case(case: Case, layouts: Sequence[str] = LAYOUTS) -> dict[str, Outcome]:
    """Outcome of each layout; "" stands for all of them where there is no model to lay out."""
    try:
        plain = architectures.build(case.model_type, **case.changes).eval()
    except Exception as error:
        return {"": Outcome(NOT_BUILT, _line(error))}
    text = vars(plain.config.get_text_config())
    sizes = (text.get(name) for name in ("vocab_size", "unpadded_vocab_size"))
    pairs = random_pairs(min(filter(None, sizes), default=architectures.VOCAB))
    ref_logp_S = torch.linspace(-900, -300, 2 * len(pairs), dtype=torch.float64)
    try:
        want = _one_by_one(plain, pairs, ref_logp_S)
    except Exception:
        plain = plain.float()
        try:
            want = _one_by_one(plain, pairs, ref_logp_S)
        except Exception as error:
            return {"": _try_unable(plain, _line(error))}
    return {x: _try_layout(plain, x, pairs, ref_logp_S, want) for x in layouts}


Numbers = tuple[Tensor, dict[str, Tensor]]


def _one_by_one(plain: Any, pairs: Sequence[TokenizedPair], ref_logp_S: Tensor) -> Numbers:
    """Log-probs of sequences and gradients of the loss, one at a time by its own forward."""
    sums = []
    for pair in pairs:
        for response in (pair.chosen_ids, pair.rejected_ids):
            ids = torch.tensor([pair.prompt_ids + response])
            # A copy with the same parameters each: dynamic NTK keeps frequencies for later calls.
            fresh = copy.deepcopy(plain, {id(p): p for p in plain.parameters()})
            logp_TV = fresh(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
            rows = torch.arange(len(response)) + len(pair.prompt_ids) - 1
            sums.append(logp_TV[rows, torch.tensor(response)].sum())
    logp_S = torch.stack(sums)
    lengths = [len(ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    loss_P = reference.dpo_loss(logp_S, ref_logp_S, torch.tensor(lengths), BETA, ALPHA)
    loss_P.mean().backward()
    return logp_S.detach(), _gradients(plain)


def _gradients(model: Any) -> dict[str, Tensor]:
    """Taken out of the model."""
    found = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def _bound(plain: Any, pairs: Sequence[TokenizedPair], ref_logp_S: Tensor, want: Numbers) -> float:
    """What rounding may change: rotary embeddings, norms and softmaxes are fp32 in many models.

    So no more than the model's own error in fp32.  For a model that has no fp64 that is the error
    which one unit in the last place of its weights makes.
    """
    other = copy.deepcopy(plain).float()
    if next(plain.parameters()).dtype == torch.float32:
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(1 + torch.finfo(p.dtype).eps * torch.randint_like(p, -1, 2))
    return min(1e-4, max(1e-6, 2 * _error(_one_by_one(other, pairs, ref_logp_S), want)))


def _error(found: Numbers, want: Numbers) -> float:
    """Largest relative error of a log-prob and of a parameter's gradient.

    A gradient far below the others' size is compared with a thousandth of theirs.
    """
    logp = float(((found[0].double() - want[0]) / want[0]).abs().max())
    floor = 1e-3 * max((float(x.norm()) for x in want[1].values()), default=1.0)
    worst = 0.0
    for name in want[1].keys() | found[1].keys():
        zero = torch.zeros(())
        x, y = (grads.get(name, zero) for grads in (found[1], want[1]))
        error = float((x - y).norm()) / max(float(y.norm()), floor)
        worst = max(worst, error if error == error else float("inf"))
    return max(logp if logp == logp else float("inf"), worst)


def _try_layout(
    plain: Any, layout: str, pairs: Sequence[TokenizedPair], ref_logp_S: Tensor, want: Numbers,
) -> Outcome:  # fmt: skip
    try:
        model = prepare_model(copy.deepcopy(plain), layout=layout)
    except ModelError as error:
        return Outcome(REFUSED, _line(error))
    except Exception as error:
        return Outcome(CRASH, _line(error))
    try:
        batch = pack_pairs(pairs, layout=layout_of(model))
        result = packed_loss(model, batch, ref_logp_S, beta=BETA, alpha=ALPHA)
        result.loss.backward()
    except Exception as error:
        return Outcome(CRASH, _line(error))
    error = _error((result.logp_S, _gradients(model)), want)
    if error > 1e-6 and error > (bound := _bound(plain, pairs, ref_logp_S, want)):
        return Outcome(WRONG, f"relative error {error:.2g}, bound {bound:.2g}", error)
    return Outcome(EQUAL, "", error)


def _try_unable(plain: Any, reason: str) -> Outcome:
    """Of a model whose own forward or backward fails on tokens, preparing it has to fail too."""
    try:
        prepare_model(plain)
    except ModelError as error:
        return Outcome(REFUSED, _line(error))
    except Exception as error:
        return Outcome(CRASH, _line(error))
    return Outcome(NOT_BUILT, f"its own forward or backward fails on tokens: {reason}")


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, ModelError) else f"{type(error).__name__}: {text}"


# ------------------------------------------------------------------------------- a process a model
def _child(case: Case, pipe: Connection) -> None:
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    with open(os.devnull, "w") as sys.stderr:
        pipe.send(try_case(case))


def run(
    chosen: Sequence[Case], jobs: int = 2, seconds: float = SECONDS, log: Path | None = None
) -> dict[str, dict[str, Outcome]]:
    """Outcomes of each case, `jobs` at a time; one that dies or takes too long is a crash.

    `log` keeps them, a JSON line a case; a case that it has already from the same versions and
    commit, without changes, is not run again.
    """
    try_case(Case("llama", "llama", {}))  # imports once, before the forks, what takes seconds
    context = multiprocessing.get_context("fork")
    found: dict[str, dict[str, Outcome]] = {}
    here = where(torch.device("cpu"))
    if log and not here["dirty"]:
        for row in matching(resume(log), here):
            found[row["name"]] = {k: Outcome(*x) for k, x in row["outcomes"].items()}

    def done(case: Case, outcomes: dict[str, Outcome], started: float) -> None:
        found[case.name] = outcomes
        _print(len(found), len(chosen), case, outcomes, time.monotonic() - started)
        append(log, {"name": case.name, "outcomes": outcomes, **here})

    queue = [case for case in chosen if case.name not in found]
    live: dict[Any, tuple[Case, Any, float]] = {}
    while queue or live:
        while queue and len(live) < jobs:
            case = queue.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(case, theirs))
            process.start()
            theirs.close()
            live[ours] = case, process, time.monotonic()
        for pipe in wait(list(live), timeout=1.0):
            case, process, started = live.pop(pipe)
            try:
                outcomes = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                process.join()
                outcomes = {"": Outcome(CRASH, f"exit code {process.exitcode}")}
            process.join()
            done(case, outcomes, started)
        for pipe, (case, process, started) in list(live.items()):
            if time.monotonic() - started > seconds:
                process.kill()
                process.join()
                del live[pipe]
                done(case, {"": Outcome(CRASH, f"not done after {seconds:.0f} s")}, started)
    return {case.name: found[case.name] for case in chosen}


def _print(done: int, total: int, case: Case, outcomes: dict[str, Outcome], seconds: float) -> None:
    parts = [
        f"{layout or 'all'}: {x.kind}" + (f" ({x.reason})" if x.reason else f" {x.error:.1g}")
        for layout, x in outcomes.items()
    ]
    print(f"[{done}/{total}] {seconds:4.0f} s  {case.name}  {'; '.join(parts)}", flush=True)


# -------------------------------------------------------------------------------------- the table
def total(outcomes: dict[str, Outcome]) -> str:
    """One word for a model: wrong and crash before all, else what the first layout that runs is."""
    kinds = [x.kind for x in outcomes.values()]
    for bad in (CRASH, WRONG):
        if bad in kinds:
            return bad
    for layout, x in outcomes.items():
        if x.kind == EQUAL:
            return f"{EQUAL} {layout}"
    return kinds[0]


def table(found: dict[str, dict[str, Outcome]]) -> str:
    """Markdown: totals of the model types, then a line a case."""
    types = set(architectures.model_types())
    counts = Counter(total(x) for name, x in found.items() if name in types)
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "torch")
    )
    lines = [
        "# Architectures",
        "",
        f"Written by `python -m bench.sweep` with {versions}.",
        "Tiny models with random weights; log-probs and gradients of pairs in one batch against",
        "the model's own forward, a sequence at a time, to rounding.",
        "`fastdpo` takes the first of shared, packed and padded that is not refused.",
        "",
        f"{sum(counts.values())} model types: "
        + ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
        + ".",
        "",
        "| model type | shared | packed | padded | why not |",
        "|---|---|---|---|---|",
    ]
    for name, outcomes in found.items():
        cells = [outcomes[x].kind if x in outcomes else outcomes[""].kind for x in LAYOUTS]
        reasons = list(dict.fromkeys(x.reason for x in outcomes.values() if x.reason))
        reason = reasons[0].replace("|", "\\|")[:300] if reasons else ""
        lines.append(f"| {' | '.join([name, *cells, reason])} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(
        "python -m bench.sweep", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("names", nargs="*", help="model types or variants (all)")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, help=f"the table ({TABLE.name}, of all models)")
    parser.add_argument("--log", type=Path, help="JSON lines of outcomes; goes on where they end")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    chosen = [case for case in cases() if not args.names or case.name in args.names]
    if unknown := set(args.names) - {case.name for case in chosen}:
        raise SystemExit(f"no such model type: {', '.join(sorted(unknown))}")
    found = run(chosen, args.jobs, log=args.log)
    print(dict(Counter(total(x) for x in found.values())))
    out = args.out or (None if args.names else TABLE)
    if out:
        out.write_text(table(found))
    if any(total(x) in (WRONG, CRASH) for x in found.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
