"""The targets of the fused loss: what is asked, as ratios within one run, and what was measured.

A CPU has ratios of times at SmolLM2's head. A GPU has `gpu_jobs`, the rows that its targets need in
the order of their importance, and `gpu_target_lines`. A target is judged at 2,560 MiB unless it
names another workspace, since the default is a share of the device's memory; what other workspaces
give is reported beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .tables import label
from .turns import OUT_OF_MEMORY
from .variants import (
    FASTDPO,
    FASTDPO_LARGE,
    FASTDPO_MIDDLE,
    FASTDPO_SMALL,
    FLOOR,
    FORWARD,
    FROZEN,
    LIGER,
    LIGER_EAGER,
    NAIVE,
    SHAPES,
    TRAIN,
    TRL,
    VARIANTS,
    WITH_REFERENCE,
    Shape,
    Variant,
)

FASTER_THAN_TRL = {"bf16": 4.0, "fp32": 2.3}
TIMES_THE_FLOOR = {"bf16": 2.5, "fp32": 1.4}
TIMES_THE_FASTEST_PEER = 1.1

LLAMA = SHAPES["llama-3-8b"]
LONG_PAIR = SHAPES["qwen2.5-7b"]._replace(N=131072, pairs=1)
SMALL_HEADS = {
    "smollm2": SHAPES["smollm2"]._replace(N=8192),
    "llama-3.2-1b": SHAPES["llama-3.2-1b"],
}
# On a GPU: the time over that of the pass's bare products, ...
PRODUCTS = {TRAIN: "three", WITH_REFERENCE: "four", FROZEN: "two", FORWARD: "one"}
TIMES_THE_PRODUCTS = {TRAIN: 1.05, WITH_REFERENCE: 1.07, FROZEN: 1.06, FORWARD: 1.08}
AT_1024_MIB = 1.1  # of the pass TRAIN
TIMES_THE_LONG_PAIRS = 1.15
# ... how much faster than peers, ...
TIMES_THE_PEERS = {TRL.name: 1.5, LIGER.name: 1.4, NAIVE.name: 1.35}
TIMES_LIGER_WITH_REFERENCE = 1.3
# ... and both for a small head, whose peer is the fastest.
SMALL_LIMITS = {"smollm2": (1.5, 1.4), "llama-3.2-1b": (1.12, 1.3)}
GPU_DTYPE = "bf16"
BUDGET_S = 360.0  # no job of the targets starts later; all of it is to end within 8 minutes
GIB = 2**10  # in MiB
ROUNDING_SLACK = 1.1  # a result rounded once has the error of rounding, and a little of its own


@dataclass(frozen=True)
class Job:
    """What one call of `measure.run` measures."""

    shape: Shape
    dtype: str
    passes: tuple[str, ...]
    variants: tuple[Variant, ...]
    leave_out: frozenset[tuple[str, str]] = field(default_factory=frozenset)


def gpu_jobs() -> list[Job]:
    """The rows of the GPU's targets, and no others."""
    named = FASTDPO_LARGE, FASTDPO_MIDDLE
    liger = LIGER, LIGER_EAGER
    others = tuple(v for v in VARIANTS.values() if "cuda" in v.devices and not v.ours)

    def job(shape: Shape, pass_: str, *variants: Variant) -> Job:
        return Job(shape, GPU_DTYPE, (pass_,), variants)

    return [
        job(LLAMA, TRAIN, *named, FASTDPO, TRL, *liger, NAIVE, FLOOR),
        job(LLAMA, WITH_REFERENCE, *named, *liger, FLOOR),
        job(LLAMA, FROZEN, *named, FLOOR),
        job(LLAMA, FORWARD, *named, FLOOR),
        job(LONG_PAIR, FROZEN, FASTDPO_SMALL, NAIVE, LIGER, FLOOR),
        *(job(shape, TRAIN, *named, FASTDPO, *others) for shape in SMALL_HEADS.values()),
    ]


@dataclass
class Found:
    """A number and what it leaves out, or why there is none."""

    value: float | None
    why: str = ""

    def line(self, asked: str, side: str, limit: float, unit: str = "x", judge: bool = True) -> str:
        asked = f"{asked} ({side} {limit}{unit})"
        if self.value is None:
            return f"not measured  {asked}: {self.why}"
        met = self.value >= limit if side == "at least" else self.value <= limit
        verdict = "report" if not judge else "pass" if met else "miss"
        return f"{verdict}  {self.value:.2f}{unit}  {asked}{self.why}"


def gpu_target_lines(rows: list[dict]) -> list[str]:
    """One line a target: what was asked, what was measured, pass, miss or not measured."""
    large, middle, default = FASTDPO_LARGE.name, FASTDPO_MIDDLE.name, FASTDPO.name
    liger_names = [LIGER.name, LIGER_EAGER.name]
    train, reference = Rows(rows, LLAMA, TRAIN), Rows(rows, LLAMA, WITH_REFERENCE)
    lines = []
    for pass_, limit in TIMES_THE_PRODUCTS.items():
        found, less = Rows(rows, LLAMA, pass_), pass_ == TRAIN
        lines.append(found.products_line(large, "", limit))
        lines.append(found.products_line(middle, "", AT_1024_MIB if less else limit, judge=less))
    lines.append(train.products_line(default, "", TIMES_THE_PRODUCTS[TRAIN], judge=False))
    for name in (large, middle, default):
        for peer, limit in TIMES_THE_PEERS.items():
            speedup = train.speedup(name, liger_names if peer == LIGER.name else [peer])
            asked = f"{train.called(name)}: faster than {peer}"
            lines.append(speedup.line(asked, "at least", limit, judge=name == large))
    for name in (large, middle):
        speedup = reference.speedup(name, liger_names)
        asked = f"{name}: faster than liger, each with its reference"
        limit = TIMES_LIGER_WITH_REFERENCE
        lines.append(speedup.line(asked, "at least", limit, judge=name == large))
    long_pair, small = Rows(rows, LONG_PAIR, FROZEN), FASTDPO_SMALL.name
    what = "2 x 65,536 tokens, "
    lines.append(long_pair.products_line(small, what, TIMES_THE_LONG_PAIRS))
    asked = f"{small}: {what}frozen head, memory beyond inputs and gradients"
    lines.append(long_pair.extra_gib(small).line(asked, "at most", 1.0, " GiB"))
    for name in (NAIVE.name, LIGER.name):
        lines.append(cannot_line(long_pair, name))
    for name in (large, middle, default):
        called, judge = train.called(name), name == large
        asked = f"{called}: log-prob error of an fp32 matmul and an fp64 log-softmax"
        error = train.ratio(name, FLOOR.name, "logp_max_err")
        lines.append(error.line(asked, "at most", 1.5, judge=judge))
        for gradient in ("dh", "dw"):
            asked = (
                f"{called}: {gradient} error of half of naive's or {ROUNDING_SLACK} times the "
                "rounding of the exact gradient, whichever is larger"
            )
            error = gradient_error(train, name, f"{gradient}_rel_err")
            lines.append(error.line(asked, "at most", 1.0, judge=judge))
    for head, shape in SMALL_HEADS.items():
        found, (times, faster) = Rows(rows, shape, TRAIN), SMALL_LIMITS[head]
        for name in (large, middle, default):
            judge = name == large
            lines.append(found.products_line(name, f"{head}, ", times, judge=judge))
            asked = f"{found.called(name)}: {head}, faster than {found.fastest_name}"
            speedup = found.speedup(name, found.peers)
            lines.append(speedup.line(asked, "at least", faster, judge=judge))
    return lines


class Rows:
    """The rows of one shape and pass, by the variant's name."""

    def __init__(self, rows: list[dict], shape: Shape, pass_: str) -> None:
        self.pass_ = pass_
        wanted = {**shape._asdict(), "dtype": GPU_DTYPE, "pass": pass_}
        self.by_name = {
            row["variant"]: row
            for row in rows
            if all(row.get(name) == value for name, value in wanted.items())
        }
        self.peers = [name for name, row in self.by_name.items() if row["kind"] == "peer"]

    def number(self, name: str, column: str = "time_ms") -> Found:
        """A row's number; a median for the time."""
        row = self.by_name.get(name)
        if row is None:
            return Found(None, f"no row of {name}")
        value = row[column]
        if value is None:
            return Found(None, f"{name}: {row['note'] or 'unknown'}")
        return Found(value["median"] if column == "time_ms" else value)

    def called(self, name: str) -> str:
        """As in the tables; the default with the workspace that it had."""
        return label(self.by_name[name]) if name in self.by_name else name

    def products_line(self, name: str, what: str, limit: float, judge: bool = True) -> str:
        """Its time over that of the pass's bare products."""
        pass_ = "reference head" if self.pass_ == WITH_REFERENCE else self.pass_
        count = PRODUCTS[self.pass_]
        asked = f"{self.called(name)}: {what}{pass_}, time of {count} bare product"
        asked += "s" * (count != "one")
        return self.ratio(name, FLOOR.name).line(asked, "at most", limit, judge=judge)

    def ms(self, name: str) -> float | None:
        return self.number(name).value

    def ratio(self, top: str, bottom: str, column: str = "time_ms") -> Found:
        a, b = self.number(top, column), self.number(bottom, column)
        if a.value is None or b.value is None:
            return a if a.value is None else b
        return Found(a.value / b.value)

    def fastest(self, names: list[str]) -> str | None:
        return min((x for x in names if self.ms(x)), key=lambda x: self.ms(x) or 0, default=None)

    @property
    def fastest_name(self) -> str:
        return self.fastest(self.peers) or "the fastest peer"

    def speedup(self, ours: str, peers: list[str]) -> Found:
        """Over the fastest of the peers that could be measured."""
        fastest = self.fastest(peers)
        if fastest is None:
            return self.number(peers[0]) if peers else Found(None, "no rows of peers")
        notes = {name: self.by_name[name]["note"] for name in peers if name in self.by_name}
        missing = [f"{name} ({note})" for name, note in notes.items() if note]
        why = f"; without {', '.join(missing)}" if missing else ""
        found = self.ratio(fastest, ours)
        return found if found.value is None else Found(found.value, why)

    def extra_gib(self, name: str) -> Found:
        """Peak memory beyond inputs and gradients."""
        peak, grads = self.number(name, "peak_mib"), self.number(name, "grads_mib")
        if peak.value is None or grads.value is None:
            return peak if peak.value is None else grads
        return Found((peak.value - grads.value) / GIB)


def cannot_line(rows: Rows, name: str) -> str:
    """A peer that is asked to run out of memory, or to need too much."""
    asked = f"{name}: cannot run the same, or needs over 40 GiB"
    row = rows.by_name.get(name)
    if row is not None and row["note"] == OUT_OF_MEMORY:
        return f"pass  {OUT_OF_MEMORY}  {asked}"
    peak = rows.number(name, "peak_mib")
    if peak.value is None:
        return f"not measured  {asked}: {peak.why}"
    return f"{'pass' if peak.value > 40 * GIB else 'miss'}  {peak.value / GIB:.1f} GiB  {asked}"


def gradient_error(rows: Rows, name: str, column: str) -> Found:
    """As a fraction of what is allowed."""
    ours, naive, rounding = (rows.number(x, column) for x in (name, NAIVE.name, FLOOR.name))
    if ours.value is None or naive.value is None or rounding.value is None:
        return next(found for found in (ours, naive, rounding) if found.value is None)
    return Found(ours.value / max(naive.value / 2, ROUNDING_SLACK * rounding.value))


def target_lines(rows: list[dict]) -> list[str]:
    """The CPU's targets, one line each."""
    lines = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        times = {
            row["variant"]: row["time_ms"]["median"]
            for row in rows
            if (row["dtype"], row["pass"]) == (dtype, TRAIN) and row["time_ms"]
        }
        kinds = {row["variant"]: row["kind"] for row in rows}
        if FASTDPO.name not in times:
            lines.append(f"{dtype}: no time for {FASTDPO.name}")
            continue
        ours = times[FASTDPO.name]
        if dtype in FASTER_THAN_TRL and TRL.name in times:
            ratio, target = times[TRL.name] / ours, FASTER_THAN_TRL[dtype]
            lines.append(line(dtype, f"faster than {TRL.name}", "at least", target, ratio))
        peers = [name for name in times if kinds[name] == "peer"]
        if peers:
            fastest = min(peers, key=times.__getitem__)
            ratio, target = ours / times[fastest], TIMES_THE_FASTEST_PEER
            lines.append(
                line(dtype, f"time of the fastest peer, {fastest}", "at most", target, ratio)
            )
        floor = [name for name in times if kinds[name] == "floor"]
        if floor and dtype in TIMES_THE_FLOOR:
            ratio, target = ours / times[floor[0]], TIMES_THE_FLOOR[dtype]
            lines.append(line(dtype, "time of the bare matmuls", "at most", target, ratio))
    return lines


def line(dtype: str, what: str, side: str, target: float, ratio: float) -> str:
    met = ratio >= target if side == "at least" else ratio <= target
    verdict = "pass" if met else "miss"
    return f"{verdict}  {dtype}  {ratio:5.2f}x {what} ({side} {target}x)"
