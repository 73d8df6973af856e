"""Runs for the tests of the report, and readers of its page."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from fastdpo.report import summary as report

HOSTILE = [
    "<script>alert(1)</script>",
    "</p></div></article></section><h1>other</h1>",
    "\"><img src=x onerror=alert(1)> ' onload='x",
    "&lt;b&gt; &amp; &#60;i&#62;",
    "]]> --> <!-- <style>*{display:none}</style>",
    "abc \u202e fdp.exe \u2066 isolate \u200b zero \ufeff",
    "nul \0 and \x1b[31mred\x07",
    "lone \ud800 surrogate \udfff",
    "<svg><a xlink:href='javascript:alert(1)'>x</a></svg>",
    "line\u2028separators\u2029here",
]

BROKEN = [
    b"", b"[]", b"{", b"null", b"\xff\xfe", b"[" * 100_000, b'{"step": 1}\nnope\n{"step": 2}\nno\n',
    b'{"config": [], "done": {}, "dropped": [1], "pairs": "x"}',
    b'{"config": {"beta": 1e999, "rounds": null}, "done": [1, null], "dropped": {"tie": NaN}}',
]  # fmt: skip


def write_json(path, value):
    """With escapes for all but ASCII, so that lone surrogates can be written too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_run(
    out: Path,
    *,
    rounds: int = 2,
    prompts: int = 5,
    texts: dict | None = None,
    text: str = "a fine answer",
    prompt: Any = "question",
    sample: dict[str, Any] | None = None,
    evaluate: dict[str, Any] | None = None,
    **config: Any,
):
    """A finished run with the files that the stages write; `texts` overrides response texts."""
    config = {
        "model": "/models/tiny", "prompts": "prompts.jsonl", "rounds": rounds,
        "output_dir": "/runs/first", "sample": {"max_new_tokens": 40, **(sample or {})},
        "score": {"scorer": "words:plain"}, "train": {"beta": 0.1, "alpha": 0.01},
        "evaluate": evaluate or {},
    } | config  # fmt: skip
    done = [f"round-{i:02d}/report" for i in range(rounds + 1)]
    write_json(out / "state.json", {"config": config, "done": done})
    for index in range(rounds + 1):
        folder = out / f"round-{index:02d}"
        candidates, scores = [], []
        for p in range(prompts):
            for s in range(2):
                key = {"prompt_index": p, "sample_index": s}
                length = 10 + 3 * p + s + (2 + p % 2) * index
                response = (texts or {}).get((index, p, s), f"{text} {index}.{p}.{s}")
                asked = prompt if isinstance(prompt, list) else f"{prompt} {p}"
                finish = "length" if (p + s) % 2 else "stop"
                candidates.append({
                    **key, "prompt": asked, "prompt_ids": [1], "response": response,
                    "response_ids": [5] * length, "finish_reason": finish, "extra": {},
                })  # fmt: skip
                scores.append({**key, "score": 0.1 * p + 0.05 * s + (0.2 + 0.02 * p) * index})
        for name, rows in (("candidates", candidates), ("scores", scores)):
            write_rows(folder / "eval" / name / "part-00000.jsonl", rows)
            write_json(folder / "eval" / name / "plan.json", {"parts": 1})
        speed = {"backend": "generate", "tokens_per_second": 812.5, "samples_per_second": 12.5}
        write_json(folder / "eval/candidates/throughput.json", speed)
        summary = {"round": index, "score": 0.226 + 0.24 * index, "score_se": 0.0707}
        summary |= {"length": 16.5 + 2.4 * index, "length_se": 2.121, "truncated": 0.5}
        if index:
            trained = {
                "loss": 0.66, "rewards/chosen": -0.1, "rewards/rejected": -0.3,
                "rewards/margins": 0.2, "rewards/accuracies": 0.625, "pairs_per_second": 1.5,
            }  # fmt: skip
            dropped = {"tie": 3, "identical responses": index}
            write_json(folder / "train.json", trained)
            pairing = {"pairs": 60 + index, "dropped": dropped, "mean_score_chosen": 0.75}
            write_json(folder / "pairs.summary.json", pairing)
            steps = [
                {"step": i + 1, **trained, "loss": 0.7 - 0.01 * i, "grad_norm": 9.5, "pairs": 8,
                 "lengths/chosen": 20.0, "lengths/rejected": 18.0}
                for i in range(4)
            ]  # fmt: skip
            write_rows(folder / "metrics" / "metrics.jsonl", steps)
            write_json(folder / "candidates/throughput.json", speed)
            summary |= trained | {"pairs": 60 + index, "dropped": dropped}
            summary |= {"kl": 2.5 * index, "kl_se": 0.5}
        write_json(folder / "summary.json", summary)
    return out


class Reader(HTMLParser):
    """Elements with their attributes, and the text of the page, as a browser takes them."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})
    INLINE = frozenset({"b", "i"})

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.text, self.declarations = [], [], [], []
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.text.append("" if tag in self.INLINE else " ")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)

    def handle_comment(self, data):
        self.declarations.append(data)

    def find(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def all_text(self):
        return " ".join("".join(self.text).split())


def page_of(out):
    path = report.html(out)
    assert path == Path(out) / "report.html"
    return path.read_text(encoding="utf-8")


def section(page, name):
    return page.split(f'<section id="{name}"')[1].split("</section>")[0]


def section_text(page, name):
    return text_of(f'<section id="{name}"{section(page, name)}</section>')


def text_of(markup_text):
    return Reader(markup_text).all_text()


def drawing(svg):
    return ElementTree.fromstring(svg)
