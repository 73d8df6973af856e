"""What a run starts from and what it leaves: starts that cannot be trained, tokens without
embeddings, the date in a template, steps of fewer pairs than processes, files beside the weights.
"""

import datetime
import inspect
import json
import multiprocessing
import os
import shutil
import socket
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_rounds import arguments
from test_trainer import random_pairs
from tiny import CHAT_TEMPLATE, LLAMA, MAMBA, build_tokenizer, save_tiny
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    MllamaForConditionalGeneration,
)
from transformers.utils import chat_template_utils

from bench import architectures
from fastdpo.cli import main
from fastdpo.data.examples import TokenizedPair
from fastdpo.errors import ConfigError, ModelError
from fastdpo.model.load import check_folder, combine, load_causal_lm, load_tokenizer
from fastdpo.plan.longest import longest_pair
from fastdpo.sample.generate import GenerateSampler
from fastdpo.score.load import load_scorer
from fastdpo.storage import read_parts
from fastdpo.train import trainer
from fastdpo.train.config import TrainConfig
from fastdpo.train.metrics import read_metrics
from fastdpo.train.prepare import load_start
from fastdpo.train.trainer import train

DATED = "Today is {{ strftime_now('%d %b %Y, %H:%M') }}.\n" + CHAT_TEMPLATE
FAST = ["--bf16=false", "--batch_size=2", "--max_length=256", "--max_tokens=1024", "--save_steps=1",
        "--reference_cache=null"]  # fmt: skip


def vowels(prompts, responses):
    return [sum(c in "aeiou" for c in r) / (len(r) + 1) for r in responses]


def user(text):
    return {"role": "user", "content": text}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs_file(path, word="yes"):
    def answer(text):
        return [{"role": "assistant", "content": text}]

    rows = [{"prompt": [user(f"say {i}")], "chosen": answer(word), "rejected": answer("no")}
            for i in range(6)]  # fmt: skip
    return write(path, rows)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(LLAMA, tmp_path_factory.mktemp("starts") / "model")


# --------------------------------------------------------------------------- the date in a template
@pytest.fixture
def dated(model, tmp_path, monkeypatch):
    """A model whose template prints the time, and a function that sets it."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = DATED
    load_causal = AutoModelForCausalLM.from_pretrained(model)
    load_causal.save_pretrained(tmp_path / "dated")
    tokenizer.save_pretrained(tmp_path / "dated")

    def set_to(*moment):
        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return datetime.datetime(*moment)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)

    return tmp_path / "dated", set_to


BEFORE, AFTER = (2026, 3, 4, 23, 59), (2026, 10, 25, 0, 1)  # other dates, of other lengths


def interrupted(monkeypatch, owner, name, call, work):
    plain, calls = getattr(owner, name), []

    def stop(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return plain(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stop)
        assert work() == 130


def test_training_goes_on_after_midnight(dated, tmp_path, monkeypatch, capsys):
    model, set_to = dated
    data = pairs_file(tmp_path / "pairs.jsonl")

    def run(name):
        return main(["train", f"--model={model}", f"--dataset={data}",
                     f"--output_dir={tmp_path / name}", *FAST])  # fmt: skip

    set_to(*BEFORE)
    assert run("whole") == 0
    interrupted(monkeypatch, trainer, "take_step", 2, lambda: run("broken"))
    set_to(*AFTER)
    assert run("broken") == 0
    whole, broken = (
        load_file(tmp_path / x / "policy/model.safetensors") for x in ("whole", "broken")
    )
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    pairs_file(data, word="maybe")
    assert run("broken") == 2
    assert "a run with other pairs" in capsys.readouterr().err


def test_a_template_without_a_date_leaves_no_time(model, tmp_path):
    data = pairs_file(tmp_path / "pairs.jsonl")
    arguments = [f"--model={model}", f"--dataset={data}", f"--output_dir={tmp_path / 'a'}", *FAST]
    assert main(["train", *arguments]) == 0
    assert not (tmp_path / "a" / "rendered.json").exists()


def test_sampling_goes_on_after_midnight(dated, tmp_path, monkeypatch):
    model, set_to = dated
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": f"say {i}"} for i in range(4)])

    def run():
        return main(
            ["sample", f"--model={model}", f"--prompts={prompts}", f"--output_dir={tmp_path / 'c'}",
             "--batch_prompts=2", "--max_new_tokens=4", "--dtype=float32",
             "--backend=generate"]
        )  # fmt: skip

    set_to(*BEFORE)
    interrupted(monkeypatch, GenerateSampler, "generate", 2, run)
    set_to(*AFTER)
    assert run() == 0
    texts = {
        load_tokenizer(str(model)).decode(x["prompt_ids"])[:26] for x in read_parts(tmp_path / "c")
    }
    assert texts == {"Today is 04 Mar 2026, 23:59"[:26]}


def test_all_rounds_are_rendered_by_one_clock(dated, tmp_path, monkeypatch):
    """Offline pairs and held-out prompts too, which are rendered anew in every stage."""
    model, set_to = dated
    inputs = tmp_path
    write(inputs / "prompts.jsonl", [{"prompt": f"say {i}"} for i in range(6)])
    offline = pairs_file(inputs / "offline.jsonl")
    options = dict(
        model=model, score__scorer="test_starts:vowels", evaluate__heldout=2,
        train__max_length=128, train__max_tokens=400, pair__replay=offline, pair__replay_share=0.5,
        pair__fresh_threshold=-9, sample__batch_prompts=2, sample__num_samples=2,
        sample__max_new_tokens=8, rounds=1,
    )  # fmt: skip

    def run():
        return main(arguments(inputs, tmp_path / "run", **options))

    set_to(*BEFORE)
    # In the middle of the first round's samples.
    interrupted(monkeypatch, GenerateSampler, "generate", 3, run)
    set_to(*AFTER)
    assert run() == 0
    tokenizer, found = load_tokenizer(str(model)), set()
    for folder in (tmp_path / "run").glob("**/candidates"):
        found |= {tokenizer.decode(x["prompt_ids"])[:27] for x in read_parts(folder)}
    assert found == {"Today is 04 Mar 2026, 23:59"}


# -------------------------------------------------------------------------------- quantized starts
SCHEMES = {
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "old bitsandbytes": {"load_in_8bit": True},
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq", "bits": 4},
    "fp8": {"quant_method": "fp8"},
    "mxfp4": {"quant_method": "mxfp4"},
    "compressed-tensors": {"quant_method": "compressed-tensors"},
}


def dequantizes(scheme):
    if scheme == "compressed-tensors":  # by which transformers, its configuration knows
        from transformers import CompressedTensorsConfig

        return "dequantize" in inspect.signature(CompressedTensorsConfig).parameters
    return scheme in ("fp8", "mxfp4")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_quantized_start_is_refused_by_its_configuration(model, tmp_path, scheme, capsys):
    """There are no weights, so nothing can have been loaded."""
    config = json.loads((model / "config.json").read_text())
    folder = tmp_path / "quantized"
    build_tokenizer().save_pretrained(folder)
    write(folder / "config.json", [{**config, "quantization_config": SCHEMES[scheme]}])
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": f"say {i}"} for i in range(8)])
    data, out = pairs_file(tmp_path / "pairs.jsonl"), tmp_path / "out"
    commands = [
        ["train", f"--model={folder}", f"--dataset={data}", "--use_peft=true"],
        ["train", f"--model={model}", f"--reference={folder}", f"--dataset={data}"],
        ["iterate", f"--model={folder}", f"--prompts={prompts}"],
        ["iterate", f"--model={model}", f"--reference={folder}", f"--prompts={prompts}"],
        ["plan", f"--model={folder}"],
    ]
    for command in commands:
        command += [] if command[0] == "plan" else [f"--output_dir={out}"]
        assert main(command) == 2
        said = capsys.readouterr().err
        assert "has quantized weights" in said and "load_in_4bit=true" in said
        assert dequantizes(scheme) == ("dequantize=True" in said)
        assert not out.exists()


def test_quantized_text_weights_of_a_larger_model_are_found(tmp_path, capsys):
    from transformers import Gemma3Config

    text = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    Gemma3Config(text_config=text).save_pretrained(tmp_path)
    assert main(["plan", f"--model={tmp_path}"]) == 2
    assert "quantized weights (gptq)" in capsys.readouterr().err


def test_a_quantized_model_in_memory_is_refused(model):
    pytest.importorskip("bitsandbytes")
    scheme = BitsAndBytesConfig(load_in_8bit=True)
    try:
        quantized = AutoModelForCausalLM.from_pretrained(model, quantization_config=scheme)
    except Exception as error:  # where bitsandbytes does not run
        pytest.skip(str(error))
    with pytest.raises(ModelError, match=r"LlamaForCausalLM.* quantized weights \(bitsandbytes\)"):
        load_start(quantized, TrainConfig(), torch.device("cpu"))


# ---------------------------------------------------------------------- tokens without an embedding
@pytest.fixture
def surplus(model, tmp_path):
    """As gemma-3-1b-it: a token more than there are embeddings; here it also pads."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.pad_token = "<image>"
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(tmp_path / "surplus")
    tokenizer.save_pretrained(tmp_path / "surplus")
    return tmp_path / "surplus"


def test_a_token_that_never_occurs_needs_no_embedding(surplus, tmp_path):
    # Of several lengths, so that samples are padded.
    write(tmp_path / "prompts.jsonl", [{"prompt": "tell me " * (i + 1)} for i in range(6)])
    options = dict(model=surplus, score__scorer="test_starts:vowels", rounds=1, evaluate__heldout=2)
    assert main(arguments(tmp_path, tmp_path / "run", **options)) == 0


@pytest.mark.parametrize("where", ["prompts", "replay"])
def test_a_token_that_occurs_needs_one(surplus, tmp_path, where, capsys):
    text = {"prompts": "say 3", "replay": "say 3"} | {where: "see <image>"}
    write(tmp_path / "prompts.jsonl",
          [{"prompt": text["prompts"] if i == 3 else f"say {i}"} for i in range(6)])  # fmt: skip
    options = dict(model=surplus, score__scorer="test_starts:vowels", rounds=1, evaluate__heldout=2)
    if where == "replay":
        row = {"prompt": text["replay"], "chosen": "yes", "rejected": "no"}
        offline = write(tmp_path / "replay.jsonl", [row])
        options |= dict(pair__replay=offline, pair__replay_share=0.5)
    assert main(arguments(tmp_path, tmp_path / "run", **options)) == 2
    said = capsys.readouterr().err
    line = "prompts.jsonl:4" if where == "prompts" else "replay.jsonl:1"
    assert line in said and "use the tokenizer that belongs to the model" in said
    assert not (tmp_path / "run").exists()
    if where == "prompts":
        assert main(["sample", f"--model={surplus}", f"--prompts={tmp_path / 'prompts.jsonl'}",
                     f"--output_dir={tmp_path / 'c'}", "--backend=generate"]) == 2  # fmt: skip
        said = capsys.readouterr().err
        assert line in said and "'<image>'" in said and "Remove the row" in said


def test_the_tokenizer_of_another_model_is_refused(model, tmp_path, capsys):
    """Its end token has no embedding, whatever the prompts are."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<end>"], special_tokens=True)
    tokenizer.eos_token = "<end>"
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    write(tmp_path / "prompts.jsonl", [{"prompt": f"say {i}"} for i in range(6)])
    options = dict(
        model=tmp_path / "m", score__scorer="test_starts:vowels", rounds=1, evaluate__heldout=2
    )
    assert main(arguments(tmp_path, tmp_path / "run", **options)) == 2
    assert "the tokenizer's end token" in capsys.readouterr().err


# ------------------------------------------------------------ steps of fewer pairs than processes
COUNTS = {
    "one in the last step": (9, {}),
    "one in all": (1, {}),
    "reference in each step": (5, dict(precompute_ref_log_probs=False)),
    "adapters, another reference": (
        5,
        dict(use_peft=True, lora_r=4, learning_rate=1e-2, reference=True),
    ),
}


def train_all(model, folder):
    for name, (count, changes) in COUNTS.items():
        options: dict[str, Any] = dict(
            batch_size=4, learning_rate=1e-3, bf16=False, max_length=64, max_tokens=128,
            reference_cache=None, gradient_checkpointing=False, warmup_ratio=0,
        ) | changes  # fmt: skip
        reference = model if options.pop("reference", False) else None
        tokenizer, config = load_tokenizer(str(model)), TrainConfig(**options)
        pairs, out = random_pairs(count), folder / name
        train(str(model), tokenizer, pairs, config, out, reference=reference, progress=False)


def worker(rank, port, model, folder):
    from accelerate.state import AcceleratorState, GradientState

    os.environ |= dict(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", ACCELERATE_USE_CPU="true",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    train_all(model, folder)
    torch.distributed.destroy_process_group()


def test_processes_without_a_pair_change_nothing(model, tmp_path):
    train_all(model, tmp_path / "one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    found = [
        context.Process(target=worker, args=(rank, port, model, tmp_path / "two"))
        for rank in range(2)
    ]
    for process in found:
        process.start()
    for process in found:
        process.join(120)
        assert process.exitcode == 0
    for name in COUNTS:
        one, two = (
            read_metrics(tmp_path / x / name / "metrics/metrics.jsonl") for x in ("one", "two")
        )
        assert len(one) == len(two) and 1 in {row["pairs"] for row in one}
        for a, b in zip(one, two):
            assert a.keys() == b.keys()
            for key in set(a) - {"pairs_per_second", "fill_rate"}:
                assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-5), (name, key)
        first, second = (
            load_file(tmp_path / x / name / "policy/model.safetensors") for x in ("one", "two")
        )
        start = load_file(model / "model.safetensors")
        moved = sum(float((first[key] - start[key]).norm()) for key in first)
        apart = sum(float((first[key] - second[key]).norm()) for key in first)
        assert moved > 0 and apart < 0.02 * moved, name


# --------------------------------------------------------------------------------- what is saved
@pytest.mark.parametrize(
    "families, change, problem",
    [
        ((LLAMA, MAMBA), {"precompute_ref_log_probs": False}, "set precompute_ref_log_probs=true"),
        ((MAMBA, LLAMA), {"max_tokens": 24}, "fit max_tokens=24 otherwise; raise max_tokens"),
    ],
)
def test_a_reference_that_takes_pairs_otherwise_is_refused(families, change, problem, tmp_path):
    """Its log-probs would be of other pairs, or of sequences that see each other."""
    start, other = (save_tiny(x, tmp_path / x.name) for x in families)
    pairs = [TokenizedPair([5] * 4, [6] * 4, [7] * 9), TokenizedPair([5] * 4, [6] * 2, [7] * 8)]
    options = {"bf16": False, "max_length": 64, "max_tokens": 64, "reference_cache": None}
    tokenizer = load_tokenizer(str(start))
    config = TrainConfig(**(options | change))
    with pytest.raises(ConfigError, match=problem):
        train(
            str(start), tokenizer, pairs, config, tmp_path / "o", reference=str(other),
            progress=False,
        )  # fmt: skip


def test_what_is_saved_is_what_was_loaded(model, tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.pad_token = None
    start = tmp_path / "start"
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(start)
    tokenizer.save_pretrained(start)
    beside = {"preprocessor_config.json": '{"size": 28}', "tokenizer.model": "vocabulary",
              "chat_template.json": "{}"}  # fmt: skip
    for name, text in beside.items():
        (start / name).write_text(text)
    (start / "generation_config.json").write_text(
        '{"do_sample": true, "temperature": 0.6, "top_k": 7}'
    )
    write(tmp_path / "prompts.jsonl", [{"prompt": f"tell me {i}"} for i in range(6)])
    options = dict(
        model=start, score__scorer="test_starts:vowels", evaluate__heldout=0, reference="average",
        train__use_peft="true", extrapolation=0.5, train__lora_r=4,
    )  # fmt: skip
    assert main(arguments(tmp_path, tmp_path / "run", **options)) == 0
    memory = AutoModelForCausalLM.from_pretrained(start)
    config = TrainConfig(reference_cache=None, bf16=False, max_length=64, max_tokens=128)
    train(
        memory, load_tokenizer(str(start)), random_pairs(2), config, tmp_path / "m", progress=False
    )
    left = [tmp_path / "m/policy", tmp_path / "run/round-02/reference"]
    left += [
        tmp_path / f"run/round-{i:02d}" / x for i in (1, 2) for x in ("policy", "extrapolated")
    ]
    for folder in left:
        assert {name: (folder / name).read_text() for name in beside} == beside, folder
        assert AutoTokenizer.from_pretrained(folder).pad_token is None
        generation = json.loads((folder / "generation_config.json").read_text())
        assert (generation["temperature"], generation["top_k"]) == (0.6, 7)


@pytest.mark.parametrize("by_name", [False, True])
def test_what_could_not_be_saved_is_refused_before_the_work(model, tmp_path, by_name):
    start = shutil.copytree(model, tmp_path / "start")
    (start / "generation_config.json").write_text('{"temperature": 0.5}')
    memory = AutoModelForCausalLM.from_pretrained(start)
    memory.generation_config.temperature = 0.5 if by_name else 0.6
    try:
        memory.save_pretrained(tmp_path / "saved")
    except ValueError as error:
        assert "temperature" in str(error)
    else:
        assert by_name
        pytest.skip("this transformers saves what it has loaded")
    config = TrainConfig(reference_cache=None, bf16=False)
    given: Any = start if by_name else memory
    with pytest.raises(ModelError, match=r"generation_config.json; correct .*temperature"):
        train(given, build_tokenizer(), random_pairs(2), config, tmp_path / "m", progress=False)


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_a_start_without_all_its_weights_is_refused(model, tmp_path, load_in_4bit):
    """transformers draws those that are missing."""
    start = shutil.copytree(model, tmp_path / "start")
    weights = load_file(start / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, start / "model.safetensors", {"format": "pt"})
    config = TrainConfig(use_peft=load_in_4bit, load_in_4bit=load_in_4bit)
    with pytest.raises(ModelError, match=r"lacks 1 .* model.layers.1.mlp.up_proj.weight; name"):
        load_start(str(start), config, torch.device("cpu"))


def test_the_text_model_of_a_larger_start_is_said_to_be_all_that_is_kept(tmp_path, caplog):
    settings = architectures.config("mllama")
    MllamaForConditionalGeneration(settings).save_pretrained(tmp_path)
    load_start(str(tmp_path), TrainConfig(), torch.device("cpu"))
    load_causal_lm(str(tmp_path))
    [record] = [x for x in caplog.records if x.name == "fastdpo.model.load"]
    assert "weights of model=" in record.getMessage() and "multi_modal" in record.getMessage()
    assert "no part of a MllamaForCausalLM" in record.getMessage()


def test_weights_that_a_configuration_leaves_out_are_refused(model, tmp_path, caplog):
    start = shutil.copytree(model, tmp_path / "start")
    weights = load_file(start / "model.safetensors")
    more = {"model.layers.9.mlp.up_proj.weight": torch.ones(48, 32)}  # of a deeper model
    save_file(weights | more, start / "model.safetensors", {"format": "pt"})
    load_causal_lm(str(start))
    assert "1 weights of model=" in caplog.text and "layers.9.mlp" in caplog.text
    more = {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}
    save_file(weights | more, start / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"has 1 weights .*self_attn\.q_proj\.bias; correct its"):
        load_causal_lm(str(start))


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("generation_config.json", {"do_sample": False, "num_return_sequences": 4}),
        ("generation_config.json", {"max_new_tokens": -1}),
        ("generation_config.json", {"eos_token_id": "</s>"}),
        ("generation_config.json", {"eos_token_id": [[2]]}),
        ("config.json", {"vocab_size": "x"}),
        ("config.json", {"num_attention_heads": 0}),
    ],
)
def test_a_file_of_a_start_that_is_wrong_is_one_error(model, tmp_path, file, changes, capsys):
    start, data = shutil.copytree(model, tmp_path / "start"), pairs_file(tmp_path / "pairs.jsonl")
    written = json.loads((start / file).read_text()) | changes
    (start / file).write_text(json.dumps(written))
    command = ["train", "--model", str(start), "--dataset", str(data)]
    assert main([*command, "--output_dir", str(tmp_path / "out")]) == 2
    assert f"model='{start}'" in capsys.readouterr().err


def test_a_model_in_memory_need_not_generate(model):
    memory = AutoModelForCausalLM.from_pretrained(model)
    del memory.generation_config
    assert load_start(memory, TrainConfig(), torch.device("cpu")) is memory


def test_files_given_with_the_policy_win(model, tmp_path):
    """A start's file never takes the place of what model and tokenizer write themselves."""
    written = load_tokenizer(str(model))
    written.chat_template = "{{ messages[0]['content'] }}"
    combine([str(model)], [1.0], written, tmp_path / "out")
    assert load_tokenizer(str(tmp_path / "out")).chat_template == written.chat_template


# ------------------------------------------------------------------------ what is missing, at once
@pytest.mark.parametrize(
    "name", ["/no/where", "./runs", "~/policy", "runs/round-01/policy", "a\\b"]
)
def test_a_missing_folder_is_no_hub_name(tmp_path, name, monkeypatch, capsys):
    def ask(*_: object, **__: object):
        raise AssertionError("a hub may be asked")

    for kind in (AutoConfig, AutoTokenizer, AutoModelForCausalLM):
        monkeypatch.setattr(kind, "from_pretrained", ask)
    monkeypatch.chdir(tmp_path)
    data = pairs_file(tmp_path / "pairs.jsonl")
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "a"}])
    for command in (["train", f"--dataset={data}"], ["plan"], ["sample", f"--prompts={prompts}"]):
        assert main([*command, f"--model={name}"]) == 2
        assert f"the folder model={name!r} does not exist" in capsys.readouterr().err
    # Another option with a model is named as itself.
    start = tmp_path / "start"
    save_tiny(LLAMA, start)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    for option, *command in (
        ("beside", "chat", "--prompt=hi", "--dtype=float32"),
        ("reference", "train", f"--dataset={data}"),
        ("reference", "iterate", f"--prompts={prompts}", "--score.scorer=answer"),
    ):
        assert main([*command, f"--model={start}", f"--{option}={name}"]) == 2
        assert f"the folder {option}={name!r} does not exist" in capsys.readouterr().err
    for scorer in (name, f"judge:{name}"):
        with pytest.raises(ModelError, match="the folder scorer="):
            load_scorer(scorer)


def test_the_folder_of_several_runs_names_their_policies(tmp_path, capsys):
    for run in ("alpha/round-01", "alpha/round-02", "plain"):
        (tmp_path / run / "policy").mkdir(parents=True)
    assert main(["chat", f"--model={tmp_path}", "--prompt=hi"]) == 2
    policies = [str(tmp_path / x / "policy") for x in ("alpha/round-02", "plain")]
    assert f"is the folder of runs; name a policy of one: {', '.join(policies)}\n" in (
        capsys.readouterr().err
    )
    for i in range(4):
        (tmp_path / f"run-{i}" / "policy").mkdir(parents=True)
    with pytest.raises(ModelError, match=r"run-1/policy and 2 more$"):
        check_folder(str(tmp_path))


def test_what_may_be_a_hub_name_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct", "owner/a.b_c-1"):
        check_folder(name)
    (tmp_path / "weights.safetensors").touch()
    with pytest.raises(ModelError, match="is a file; name the folder"):
        check_folder("weights.safetensors")


def test_a_plan_without_peft_leaves_lora_out(model, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    config = TrainConfig(max_length=64, max_tokens=256)
    found = longest_pair(str(model), config, 24.0)
    assert found.options and not any("use_peft" in option.changes for option in found.options)
    assert "use_peft is left out: it needs peft" in str(found)
