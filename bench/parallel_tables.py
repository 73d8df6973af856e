"""Tables of `bench.parallel`: how far several processes are from one."""

from __future__ import annotations

OP = "parallel"
MEASURES = ("losses", "norm", "gradients", "clipped", "weights", "policy")


def markdown(rows: list[dict], links: list[str]) -> str:
    return ""
