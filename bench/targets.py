"""The targets of the fused loss, forward and backward, as ratios of times in one run."""

from __future__ import annotations

from .variants import FASTDPO, TRAIN, TRL

FASTER_THAN_TRL = {"bf16": 4.0, "fp32": 2.3}
TIMES_THE_FLOOR = {"bf16": 2.5, "fp32": 1.4}
TIMES_THE_FASTEST_PEER = 1.1


def target_lines(rows: list[dict]) -> list[str]:
    """One line a target: what was asked, what was measured, pass or miss."""
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
