"""The page of a training by itself, and the model cards of trainings and rounds."""

import json
import re
import shutil
import subprocess
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from report_runs import (
    BROKEN,
    Reader,
    page_of,
    section,
    section_text,
    write_json,
    write_rows,
    write_run,
)
from safetensors.torch import load_file
from tiny import LLAMA, save_tiny

from fastdpo import storage
from fastdpo.cli import main
from fastdpo.report import card, runfiles
from fastdpo.report.page import TRAINING

WORDS = ["the", "weather", "long walks", "no idea", "be nice", "beach", "tell", "me"]


def write_pairs(path, count, first):
    def side(i, words):
        content = " ".join(WORDS[(i + j) % len(WORDS)] for j in range(words))
        return [{"role": "assistant", "content": content}]

    rows = [
        {
            "prompt": [{"role": "user", "content": f"number {first + i}"}],
            "chosen": side(i, 2 + i % 5),
            "rejected": side(3 * i + 1, 1 + i % 3),
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def arguments(folder, out, *more):
    return [
        "train", f"--model={folder / 'model'}", f"--dataset={folder / 'pairs.jsonl'}",
        f"--output_dir={out}", "--max_length=96", "--max_tokens=400", "--batch_size=4",
        "--learning_rate=3e-3", "--bf16=false", "--gradient_checkpointing=false",
        "--reference_cache=null", "--save_steps=2", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    save_tiny(LLAMA, folder / "model")
    write_pairs(folder / "pairs.jsonl", 20, 0)
    write_pairs(folder / "held.jsonl", 6, 100)
    return folder


@pytest.fixture(scope="module")
def evaluated(folder):
    out = folder / "runs" / "first <run>"
    held = f"--eval_dataset={folder / 'held.jsonl'}"
    argv = arguments(folder, out, held, "--eval_steps=2", "--load_best_model_at_end")
    assert main(argv) == 0
    return out


@pytest.fixture(scope="module")
def adapters(folder):
    out = folder / "runs" / "adapters"
    assert main(arguments(folder, out, "--use_peft=true", "--alpha=0", "--lora_r=9")) == 0
    return out


def code_of(text, language):
    return re.findall(rf"^`{{3,4}}{language}\n(.*?)^`{{3,4}}$", text, re.MULTILINE | re.DOTALL)


def test_the_page_of_a_training_has_the_numbers_of_its_files(evaluated):
    page = (evaluated / "report.html").read_text(encoding="utf-8")
    rows = [json.loads(x) for x in (evaluated / "metrics/metrics.jsonl").read_text().splitlines()]
    held, steps = ([x for x in rows if ("eval_loss" in x) == held] for held in (True, False))
    best = min(held[1:], key=lambda row: row["eval_loss"])
    whole = Reader(page).all_text()
    assert re.search(
        rf"Finished: {len(steps)} optimizer steps, 20\d\d-\d\d-\d\d \d\d:\d\d UTC; "
        rf"the policy is of step {best['step']}, the best\.",
        whole,
    )
    assert f"{held[0]['eval_loss']:.4f} → {best['eval_loss']:.4f} step 0 → {best['step']}" in whole
    table = section_text(page, "evaluations")
    for row in held:
        name = f"{row['step']} (kept)" if row is best else row["step"]
        assert f"{name} {row['eval_loss']:.4f} " in table
    assert [*TRAINING] == re.findall(r'<section id="(\w+)"', page)
    # Each chart that was evaluated has the curve of it over that of training.
    charts = section(page, "training").split("<figure>")[1:]
    titles = [re.findall("<b>(.*?)</b>", chart)[0] for chart in charts]
    assert {"Loss", "Margin", "Accuracy, %", "Gradient norm", "Learning rate"} <= set(titles)
    for title, chart in zip(titles, charts):
        assert ('class="line s1"' in chart) == (title in titles[:5]), title
    changed, rest = section(page, "config").split("<details")
    assert "learning_rate" in changed and "pairs.jsonl" in changed and "beta" not in changed
    assert "<dt>beta</dt>" in rest and "first &lt;run&gt;" in page


def test_the_data_is_that_of_the_pairs(folder, evaluated):
    from fastdpo.data.rows import preference_rows, read_rows
    from fastdpo.data.tokenize import tokenize_dataset
    from fastdpo.model.load import load_tokenizer

    rows = preference_rows(read_rows(str(folder / "pairs.jsonl")))
    found = tokenize_dataset(
        rows, load_tokenizer(str(folder / "model")), max_length=96, progress=False
    )
    chosen = [len(pair.chosen_ids) for pair in found.pairs]
    sides = [
        len(x.prompt_ids) + len(y) for x in found.pairs for y in (x.chosen_ids, x.rejected_ids)
    ]
    told = section_text((evaluated / "report.html").read_text(encoding="utf-8"), "pairs")
    assert "Pairs kept 20" in told and f"Longest side, tokens {max(sides)}" in told
    assert f"Length of chosen, tokens {sum(chosen) / 20:.4g}" in told and "Held out 6" in told


def test_a_training_of_before_and_one_that_stopped(evaluated, tmp_path, capsys):
    out = tmp_path / "old"
    shutil.copytree(evaluated, out)
    for name in ("config.yaml", "data.json", "train.json", "best.json"):
        (out / name).unlink()
    noted = json.loads((out / "run.json").read_text())
    old = {name: x for name, x in noted.items() if not name.startswith("policy_")}
    write_json(out / "run.json", old)
    assert main(["report", f"--output_dir={out}"]) == 0
    assert f"report: {out / 'report.html'}" in capsys.readouterr().out
    page = (out / "report.html").read_text(encoding="utf-8")
    whole = Reader(page).all_text()
    assert "Finished: 5 optimizer steps." in whole and "Left out" not in whole
    assert "Pairs kept 20" in section_text(page, "pairs")
    assert "learning_rate 0.003" in section_text(page, "config")
    shutil.rmtree(out / "policy")
    assert "Unfinished: it is at step 5, or stopped there." in page_of(out)
    (out / "metrics/metrics.jsonl").unlink()
    assert "metrics/metrics.jsonl is not there" in section(page_of(out), "training")


@pytest.mark.parametrize("name", [
    "run.json", "config.yaml", "data.json", "train.json", "best.json", "fitted.json",
    "metrics/metrics.jsonl",
])  # fmt: skip
def test_damaged_files_of_a_training_give_a_page(name, evaluated, tmp_path):
    out = tmp_path / "run"
    ignored = shutil.ignore_patterns("policy", "checkpoint", "ref_logps", "best", "tensorboard")
    shutil.copytree(evaluated, out, ignore=ignored)
    (out / "policy").mkdir()
    strange = [
        b'{"num_train_epochs": 0, "policy_epochs": [], "ended": 3, "best_global_step": 1e300}',
        b'{"pairs": "x", "dropped": {"a <b>": 2}, "num_train_epochs": 1e400, "ended": "<b>"}',
        b'{"policy_steps": "a", "policy_ended": [3], "num_train_epochs": 1, "policy_epochs": 1}',
        b'{"step": 1e29, "eval_loss": 1, "pairs": 0}\n{"step": 2, "loss": 2}\n',
        b"a: [b\n", b"- 1\n",
    ]  # fmt: skip
    for content in [*BROKEN, *strange]:
        (out / name).write_bytes(content)
        page = page_of(out)
        assert "nan" not in Reader(page).all_text().lower().split()
        if content == BROKEN[4]:  # no UTF-8
            assert "Left out" in page, name


def test_the_page_is_there_while_training_runs(folder, tmp_path, monkeypatch):
    from fastdpo.cli import training

    out, steps = tmp_path / "run", []
    step = training.TrainingPage.step

    def watched(self, row):
        step(self, row)
        steps.append((out / "report.html").read_text(encoding="utf-8"))
        if len(steps) == 4:
            raise OSError("stopped")

    monkeypatch.setattr(training.TrainingPage, "step", watched)
    monkeypatch.setattr(training, "_LEAST_SHARE", 0)
    assert main(arguments(folder, out)) == 2
    at = [int(re.findall(r"it is at step (\d+)", page)[0]) for page in steps]
    assert at == [1, 2, 2, 4]  # at the first step, and at checkpoints
    assert main(arguments(folder, out, "--beta=0.2")) == 2  # another run leaves it as it is
    assert yaml.safe_load((out / "config.yaml").read_text())["beta"] == 0.1
    monkeypatch.undo()
    assert main(arguments(folder, out)) == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Finished: 5 optimizer steps, 20" in page
    assert main(arguments(folder, out)) == 0
    assert (out / "report.html").read_text(encoding="utf-8") == page


def test_added_epochs_keep_an_edited_card_and_their_numbers_are_those_of_the_policy(
    folder, tmp_path, monkeypatch, capsys
):
    """Killed while the policy is saved, and before the page is written."""
    from fastdpo.cli import training
    from fastdpo.train import trainer

    def kill(*_):
        raise KeyboardInterrupt

    def numbers():
        return json.loads((out / "train.json").read_text())

    out, held = tmp_path / "run", f"--eval_dataset={folder / 'held.jsonl'}"
    argv = arguments(folder, out, held)
    assert main(argv) == 0
    page, before = (out / "report.html").read_text(encoding="utf-8"), numbers()
    path = out / "policy" / card.NAME
    path.write_text(path.read_text(encoding="utf-8").replace(card.OURS, "mine"), encoding="utf-8")
    edited, files = path.read_text(encoding="utf-8"), sorted(x.name for x in path.parent.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_save", kill)
        patch.setattr(trainer, "note_saving", lambda setup: None)  # killed right before it
        assert main([*argv, "--num_train_epochs=2"]) == 130
    assert "Unfinished: it is at step 10" in page_of(out)
    capsys.readouterr()
    assert main(argv) == 0  # the finished run is had back
    told = capsys.readouterr().out
    assert "is finished, with num_train_epochs=1; of the 2 that it was to go on to" in told
    assert f"eval_loss {before['eval_loss']:.4g}" in told and numbers() == before
    assert (out / "report.html").read_text(encoding="utf-8") == page
    with monkeypatch.context() as patch:
        patch.setattr(training.TrainingPage, "finish", kill)
        assert main([*argv, "--num_train_epochs=2"]) == 130  # no step is left to take
    assert "Finished: 10 optimizer steps, 20" in page_of(out)
    assert main([*argv, "--num_train_epochs=2"]) == 0
    rows = [json.loads(line) for line in (out / "metrics/metrics.jsonl").open()]
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 5, 10]
    assert numbers()["eval_loss"] == rows[-1]["eval_loss"] != before["eval_loss"]
    assert numbers()["ended"] >= before["ended"]
    assert path.read_text(encoding="utf-8") == edited
    assert sorted(x.name for x in path.parent.iterdir()) == files
    storage.check_directory(path.parent)


@pytest.mark.parametrize("name", ["policy", "adapter"])
def test_the_lines_of_a_card_load_the_policy(adapters, name, capsys, monkeypatch):
    """Those for transformers are run; those for vLLM can only be read as Python here."""
    import torch
    from transformers import AutoModelForCausalLM

    text = (adapters / name / "README.md").read_text(encoding="utf-8")
    for_transformers, for_vllm = code_of(text, "python")
    scope: dict = {}
    monkeypatch.chdir(adapters / name)
    capsys.readouterr()
    exec(for_transformers.replace("max_new_tokens=256", "max_new_tokens=3"), scope)
    assert capsys.readouterr().out.endswith("\n") and scope["outputs"].shape[0] == 1
    merged = AutoModelForCausalLM.from_pretrained(adapters / "policy", dtype="float32")
    ids = scope["inputs"]["input_ids"]
    with torch.no_grad():
        found, wanted = scope["model"](ids).logits.float(), merged(ids).logits
        start = AutoModelForCausalLM.from_pretrained(adapters.parents[1] / "model")(ids).logits
    # In bf16, and still nearer to the policy than to the start.
    assert (found - wanted).abs().max() < 0.3 * (start - wanted).abs().max()
    compile(for_vllm, "vllm", "exec")
    # Both take the most probable tokens.
    assert "    do_sample=False,\n" in for_transformers
    assert "SamplingParams(max_tokens=256, temperature=0.0)\n" in for_vllm
    (serve,) = code_of(text, "bash")
    if name == "adapter":
        assert "max_lora_rank=16" in for_vllm  # the least that vLLM takes for 9
        assert "--lora-modules adapter=.\n" in serve
    else:
        assert serve == "vllm serve . --dtype bfloat16\n"


def test_an_adapters_base_is_named_from_its_folder(tmp_path, monkeypatch):
    """One that was given by a path of the directory that the command ran in."""
    out = write_run(tmp_path / "runs/one", chat_template="template.jinja")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/base").mkdir(parents=True)
    adapter = out / "round-01/adapter"
    write_json(adapter / "adapter_config.json", {"base_model_name_or_path": "models/base", "r": 8})
    (card_,) = card.write_cards(out.relative_to(tmp_path), {}, index=1)
    text = card_.read_text(encoding="utf-8")
    assert text.count('"../../../../models/base"') == 2
    assert text.count('"../policy"') == 2  # the tokenizer with the run's own template
    assert (adapter / "../../../../models/base").is_dir() and str(tmp_path) not in text
    write_json(adapter / "tokenizer_config.json", {"chat_template": "x"})
    card.write_cards(out, {}, index=1)
    assert "../policy" not in card_.read_text(encoding="utf-8")


@pytest.mark.parametrize(("temperature", "drawn"), [(0.7, True), (0, False)])
def test_transformers_and_vllm_draw_as_the_run_did(temperature, drawn, tmp_path):
    """Also where the model brings along other settings, which the run left out."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, TopPLogitsWarper

    top_p = 0.9 if drawn else 1.0
    out = write_run(tmp_path / "run", sample={"temperature": temperature, "top_p": top_p})
    policy = out / "round-01/policy"
    save_tiny(LLAMA, policy)
    own = GenerationConfig(
        do_sample=True, top_k=2, temperature=0.1, top_p=0.5, repetition_penalty=5.0, min_p=0.3
    )
    own.save_pretrained(policy)
    (path,) = card.write_cards(out, {}, index=1)
    for_transformers, for_vllm = code_of(path.read_text(encoding="utf-8"), "python")
    lines = for_transformers.split("model.generate(\n    **inputs,\n")[1].split("\n)")[0]
    (params,) = re.findall(r"SamplingParams\((.*)\)", for_vllm)
    settings, given = (eval(f"dict({x})") for x in (lines, params))
    assert settings["max_new_tokens"] == given.pop("max_tokens") == 40
    assert given == ({"temperature": 0.7, "top_p": 0.9} if drawn else {"temperature": 0.0})
    model: Any = AutoModelForCausalLM.from_pretrained(policy)
    found = model.generate(
        torch.tensor([[5, 6, 7]]), **settings | {"max_new_tokens": 1},
        return_dict_in_generate=True, output_scores=True, output_logits=True,
    )  # fmt: skip
    wanted = found.logits[0]
    if drawn:
        wanted = TopPLogitsWarper(0.9)(None, wanted / 0.7)  # type: ignore[arg-type]
    assert torch.equal(found.scores[0], wanted)


def test_a_card_tells_of_text_only_where_there_was_some(folder, tmp_path):
    """The pairs of the other cards are messages, though string_prompts is "text" there too."""
    from fastdpo.cli.training import data_facts
    from fastdpo.data.rows import preference_rows, read_rows
    from fastdpo.data.tokenize import tokenize_dataset
    from fastdpo.model.load import load_tokenizer

    tokenizer = load_tokenizer(str(folder / "model"))
    rows = [{"prompt": f"tell {i}", "chosen": "the weather", "rejected": "me"} for i in range(3)]
    path, facts = tmp_path / "text.jsonl", {}
    write_rows(path, rows)
    for how in ("text", "chat"):
        found = tokenize_dataset(
            preference_rows(read_rows(str(path))),
            tokenizer,
            max_length=96,
            string_prompts=how,
            progress=False,
        )
        facts[how] = data_facts(found, [])
    assert facts["text"]["prompts_as_text"] == 3 and "prompts_as_text" not in facts["chat"]
    out = tmp_path / "run"
    write_json(out / "run.json", {"string_prompts": "text"})
    write_json(out / "policy/config.json", {})
    write_json(out / "policy/tokenizer_config.json", {"chat_template": "x"})
    for how, told in (("text", True), ("chat", False)):
        write_json(out / "data.json", facts[how])
        (path,) = card.write_cards(out, {})
        assert ("trained on as they are" in path.read_text(encoding="utf-8")) == told
        assert (
            "Prompts without the chat template 3" in section_text(page_of(out), "pairs")
        ) == told


def test_a_card_is_one_of_the_hub(evaluated, adapters):
    found: Any = ModelCard.load(evaluated / "policy" / "README.md")
    assert found.data.library_name == "transformers" and found.data.base_model is None
    assert found.data.pipeline_tag == "text-generation"
    assert found.data.tags == ["fastdpo", "dpo", "length-regularized-dpo"]
    assert "first &lt;run&gt;: the policy" in found.text
    (chart,) = re.findall(r"!\[.*?\]\((.*?)\)", found.text)
    assert (evaluated / "policy" / chart).read_text().startswith("<svg xmlns=")
    adapter: Any = ModelCard.load(adapters / "adapter" / "README.md")
    assert adapter.data.library_name == "peft" and adapter.data.tags == ["fastdpo", "dpo", "lora"]
    for path in (evaluated / "policy", adapters / "policy", adapters / "adapter"):
        storage.check_directory(path)
        assert "README" not in (path / "SHA256SUMS").read_text()


def test_the_recipe_of_a_card_makes_the_same_policy_again(folder, evaluated, tmp_path, monkeypatch):
    text = (evaluated / "policy/README.md").read_text(encoding="utf-8")
    (recipe,) = code_of(text, "yaml")
    (tmp_path / "recipe.yaml").write_text(recipe)
    assert str(folder) not in text and "once its paths are whole" in text
    monkeypatch.chdir(folder)  # where what it names is
    argv = ["train", f"--config={tmp_path / 'recipe.yaml'}", f"--output_dir={tmp_path / 'again'}"]
    assert main(argv) == 0
    a, b = (load_file(x / "policy/model.safetensors") for x in (evaluated, tmp_path / "again"))
    assert all(x.equal(b[name]) for name, x in a.items())


def test_an_edited_card_is_left_alone_and_hub_names_are_named(tmp_path):
    out = write_run(
        tmp_path / "run", model="org/Model-3.1-8B",
        score={"scorer": ["judge:org/judge", "judge:/home/me/judge-2", "a`b | <c>"]},
        train={"beta": 0.1, "alpha": 0},
    )  # fmt: skip
    state = json.loads((out / "state.json").read_text())
    state["config"]["prompts"] = "org/prompts"
    write_json(out / "state.json", state)
    for name in ("policy", "extrapolated"):
        write_json(out / "round-01" / name / "config.json", {})
    defaults = {"model": "", "prompts": "", "rounds": 3, "score.scorer": "", "train.alpha": 0.01}
    written = card.write_cards(out, defaults, index=1)
    assert [path.parent.name for path in written] == ["policy", "extrapolated"]
    text = written[0].read_text(encoding="utf-8")
    data: Any = ModelCard(text).data
    assert data.base_model == "org/Model-3.1-8B" and data.datasets == ["org/prompts"]
    assert data.tags == ["fastdpo", "dpo", "iterative-dpo"]
    assert data.to_dict()["base_model_relation"] == "finetune"
    assert "`judge:org/judge`, `judge:judge-2`, `` a`b | <c> ``" in text and "/home" not in text
    assert "first: the policy of round 1" in text
    assert yaml.safe_load(code_of(text, "yaml")[0]) == {
        "model": "org/Model-3.1-8B", "prompts": "org/prompts", "rounds": 1,
        "score": {"scorer": ["judge:org/judge", "judge:judge-2", "a`b | <c>"]},
        "train": {"alpha": 0},
    }  # fmt: skip
    # The table ends with the card's own round, and has the page's numbers.
    assert "| Round 1 | 0.47 ± 0.20 (+0.240 ± 0.039) |" in text and "Round 2 |" not in text
    assert "95% interval" in text and "tokenizer(" in text  # without a template prompts are text
    assert "once its paths are whole" in text and "KL from the start: the mean" in text
    written[0].write_text(text.replace(card.OURS, ""), encoding="utf-8")
    assert card.write_cards(out, defaults, index=1) == written[1:]


def test_a_card_whose_checksum_was_taken_stays(tmp_path):
    out = write_run(tmp_path / "run")
    folder = out / "round-01/adapter"
    with storage.atomic_directory(folder) as scratch:
        (scratch / "adapter_config.json").write_text('{"base_model_name_or_path": "m", "r": 8}')
        (scratch / "README.md").write_text("peft's")
    assert card.write_cards(out, {}, index=1) == []
    storage.check_directory(folder)


def test_the_state_of_a_run_tells_where_it_is(tmp_path):
    out = write_run(tmp_path)
    state = json.loads((out / "state.json").read_text())
    state["config"]["rounds"] = 3
    write_json(out / "state.json", state | {"begun": ["round-03/score", "2026-01-02T03:04:05Z"]})
    (out / "round-03/candidates").mkdir(parents=True)
    page = page_of(out)
    assert (
        "Unfinished: 2 of 3 rounds. It is at score of round 3, begun 2026-01-02 03:04 UTC" in page
    )
    assert "is not there" not in page  # what is still to come is not missing
    state["config"]["rounds"] = 2
    ended = {"round-02/report": "2026-01-02T03:04:05Z"}
    write_json(out / "state.json", state | {"ended": ended, "begun": None})
    assert "Finished: 2 of 2 rounds, 2026-01-02 03:04 UTC." in page_of(out)
    for ended in ({"round-02/report": "soon"}, {"round-02/report": 3}, [1]):
        write_json(out / "state.json", state | {"ended": ended, "begun": [1]})
        assert "Finished: 2 of 2 rounds." in page_of(out)
    assert not runfiles.read_run(out).alone


WIDTHS = """<iframe src="report.html" width="400" height="900" style="border: 0"></iframe>
<pre></pre>
<script>onload = () => {
  const page = document.querySelector("iframe").contentDocument, root = page.documentElement;
  const tables = [...page.querySelectorAll(".scroll")];
  document.querySelector("pre").textContent = JSON.stringify({
    width: root.clientWidth, page: root.scrollWidth,
    wide: tables.filter((x) => x.scrollWidth > x.clientWidth).length,
    out: tables.filter((x) => x.getBoundingClientRect().right > root.clientWidth).length,
  });
}</script>"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser")
def test_on_a_phone_tables_scroll_and_the_page_does_not(tmp_path):
    texts = {(9, 0, 0): "long" * 300}
    out = write_run(tmp_path, rounds=9, texts=texts, output_dir="/runs/" + "name" * 30)
    drops = {"a reason that is rather long " * 4: 3, "unbroken" * 12: 2}
    write_json(out / "round-09/pairs.summary.json", {"pairs": 1234, "dropped": drops})
    page_of(out)
    (out / "frame.html").write_text(WIDTHS)
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
        "--virtual-time-budget=5000", "--dump-dom", f"--user-data-dir={tmp_path / 'profile'}",
        (out / "frame.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = json.loads(re.findall("<pre>(.*?)</pre>", done.stdout)[0])
    assert found["width"] == found["page"] <= 400 and found["out"] == 0
    assert found["wide"] >= 3  # of rounds, of responses, of pairs
