"""Tables of `bench.parallel`: how far several processes are from one."""

from __future__ import annotations

from collections.abc import Mapping

from .tables import commit, grouped, markdown_table, setting

OP = "parallel"
_CASE = ("engine", "ranks", "head", "route", "extra", "family")
MEASURES = ("losses", "norm", "gradients", "clipped", "weights", "policy")
# Of a cell: what is told together is the larger of the two.
_TOLD = (("losses",), ("norm", "gradients"), ("clipped",), ("weights", "policy"))
_ROUTES = ("stash", "grouped", "recompute", "frozen")
_ALONE = "one process, packed otherwise"
_LEGEND = """\
Each cell has the largest relative difference from one process, over three clipped steps: of losses
and log-probs; of gradients, each weight's and their norm; of gradients after clipping; and of
weights after the last step, each tensor's, and those of the saved policy. `{alone}` is how far runs
of one process are from each other whose sums have another order: three packings, by each way
through the head where it is trained. Columns are those ways; in the last adapters are trained
(LoRA) and the head is frozen. In the last step one process has a pair and the others have none."""
_LEGEND_OF_OTHERS = """\
Other runs, each as the largest of those four differences over that of one process packed otherwise;
of bf16 over the difference of one process in bf16 from fp32. *{names}* have an evaluation after
each step."""


def markdown(rows: list[dict], links: list[str]) -> str:
    """Tables of each version of torch, the newest first."""
    by_torch = grouped([{**row, "torch": row["versions"]["torch"]} for row in rows], ("torch",))
    parts = []
    for _, of_torch in sorted(by_torch.items(), key=lambda item: _version(item[0][0]))[::-1]:
        parts += _of_build(_newest(of_torch))
    return "\n\n".join(parts)


def _newest(rows: list[dict]) -> list[dict]:
    """The last row of each case, with the versions of the last one of all: each has in it with what
    it is compared, so a fix of some cases asks for no new run of the others."""
    rows = sorted(rows, key=lambda row: row["utc"])
    rows = [row for row in rows if row["versions"] == rows[-1]["versions"]]
    return [group[-1] for group in grouped(rows, _CASE).values()]


def _version(name: str) -> list[int]:
    return [int(x) for x in name.split("+")[0].split(".") if x.isdigit()]


def _of_build(rows: list[dict]) -> list[str]:
    main = [row for row in rows if not row["extra"] and row["family"] == "llama"]
    others = [row for row in rows if row not in main]
    what = "**Three steps of a Llama of 4 layers with grouped heads in fp32, against one process**"
    last = max(rows, key=lambda row: row["utc"])
    older = dict.fromkeys(commit(row) for row in rows if commit(row) != commit(last))
    also = f"; some cases as of {', '.join(older)}, each with its own run of one process"
    parts = [f"{what} {setting(last)}{also if older else ''}"]
    if main:
        parts += [_of_heads(main), _LEGEND.format(alone=_ALONE)]
    if others:
        evaluated = dict.fromkeys(row["extra"] for row in others if row["evaluated"])
        parts += [_of_others(others), _LEGEND_OF_OTHERS.format(names=", ".join(evaluated))]
    return parts


def _cell(found: Mapping[str, float]) -> str:
    told = [[found[name] for name in names if name in found] for names in _TOLD]
    return " ".join(f"{max(values):.0e}" if values else "-" for values in told)


def _told(row: dict | None) -> str:
    if row is None:
        return ""
    return _cell(row["differences"]) if "differences" in row else "failed"


def _of_heads(rows: list[dict]) -> str:
    """A line for each engine, number of processes and place of the head."""
    body = []
    for (tied,), alike in grouped([{**x, "tied": x["tied"]} for x in rows], ("tied",)).items():
        alone = {x["route"]: x["rounding"] for x in alike if "rounding" in x}
        cells = [_cell(alone[route]) if route in alone else "" for route in _ROUTES]
        body.append([f"*{_ALONE}*", "", "tied" if tied else "untied", *cells])
    for (engine, ranks, head), alike in grouped(rows, ("engine", "ranks", "head")).items():
        by_route = {row["route"]: row for row in alike}
        cells = [_told(by_route.get(route)) for route in _ROUTES]
        body.append([engine, str(ranks), head, *cells])
    titles = ["engine", "processes", "head", *_ROUTES[:-1], "frozen, LoRA"]
    return markdown_table(titles, ["---", "---:", "---", *["---:"] * len(_ROUTES)], body)


def _of_others(rows: list[dict]) -> str:
    """A line for each other run, a column for each engine and number of processes."""
    columns = [*grouped(sorted(rows, key=lambda x: x["ranks"]), ("engine", "ranks"))]
    body = []
    for (extra, family, trains), alike in grouped(rows, ("extra", "family", "trains")).items():
        by_engine = {(row["engine"], row["ranks"]): row for row in alike}
        what = ", ".join(filter(None, (extra or family, "LoRA" if trains == "LoRA" else "")))
        rounding = next((x["rounding"] for x in alike if "rounding" in x), None)
        cells = [_times(by_engine.get(column)) for column in columns]
        body.append([what, _cell(rounding) if rounding else "", *cells])
    titles = ["", _ALONE, *(f"{engine}, {ranks} processes" for engine, ranks in columns)]
    return markdown_table(titles, ["---", *["---:"] * (len(columns) + 1)], body)


def _times(row: dict | None) -> str:
    if row is None:
        return ""
    return f"{worst(row):.2g}" if "differences" in row else "failed"


def worst(row: Mapping) -> float:
    """The largest difference of a row over what rounding makes."""
    off, rounding = row["differences"], row["rounding"]
    return max(x / rounding[name] if x else 0.0 for name, x in off.items())
