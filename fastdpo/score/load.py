"""Scorers by their names: what is loaded, and which options it reads."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastdpo.errors import ConfigError
from fastdpo.model.load import dtype_name, load_tokenizer, policy_digest
from fastdpo.model.logps import load_packed
from fastdpo.remote import Endpoint, Remote, check_url
from fastdpo.score.answer import right_answer
from fastdpo.score.follow_up import follow_up_scores
from fastdpo.score.function import load_function
from fastdpo.score.implicit import implicit_reward, mean_likelihood
from fastdpo.score.judge import JUDGE_TEMPLATE, Judge, LocalJudge, check_template
from fastdpo.score.remote import PooledScores, RemoteJudge, RemoteScores
from fastdpo.score.reward_model import load_reward_model
from fastdpo.score.stage import Scorer

_USES = {  # by kind of scorer, what `load_scorer` reads beside the name
    "answer": set(),
    "function": set(),
    "implicit": {"policy", "previous", "loading", "batch_size"},
    "likelihood": {"policy", "loading", "batch_size"},
    "judge": {"template", "loading", "batch_size"},
    "remote judge": {"template", "remote"},
    "pooling": {"remote"},
    "follow-up": {"loading", "batch_size"},
    "endpoint": {"remote", "batch_size"},
    "reward model": {"loading", "batch_size"},
}


def uses(spec: str) -> set[str]:
    """What `load_scorer` reads for a scorer beside its name: some of policy, previous, template,
    loading (device, dtype and device_map), batch_size and remote."""
    return _USES[kind_of(spec)]


def kind_of(spec: str) -> str:
    """The kind of a scorer, by its name: a key of `_USES`."""
    if spec in ("answer", "implicit", "likelihood"):
        return spec
    url = spec.removeprefix("judge:").startswith(("http://", "https://"))
    if spec.startswith("judge:"):
        return "remote judge" if url else "judge"
    if spec.startswith("follow_up:"):
        return "follow-up"
    if url:
        pooled = spec.partition("#")[0].rstrip("/").endswith("/pooling")
        return "pooling" if pooled else "endpoint"
    named = ":" in spec and not Path(spec).exists()
    return "function" if named or spec.endswith(".py") else "reward model"


def load_scorer(
    spec: str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: str | dict[str, Any] | None = None,
    batch_size: int = 8,
    policy: str | None = None,
    previous: str | None = None,
    remote: Remote | None = None,
    judge_template: str | None = None,
) -> Scorer:
    """Load a scorer by name.

    - `module:function`, `file.py:function`: a Python function `f(prompts, responses) -> scores`.
    - `name` or `name#tokenizer`: a reward model, the folder or hub name of a sequence classifier
      with one logit or of a causal model with a `v_head`, and of its tokenizer if elsewhere.
    - `judge:name`: a causal language model that compares the responses of a prompt, see `Judge`.
    - `judge:URL#model`: the same by an OpenAI-compatible server; `URL` ends in `/v1` mostly.
    - `http://...`, `https://...`: an endpoint of one's own, see `RemoteScores`.
    - `http://.../pooling#model`: a reward model under vLLM, see `PooledScores`.
    - `follow_up:name`: how much likelier a causal language model finds praise after the response
      than a complaint, see `follow_up_scores`.
    - `answer`: 1 where the response gives the prompt's `answer`, see `right_answer`.
    - `implicit`: log-ratio of `policy` and `previous`, see `implicit_reward`.
    - `likelihood`: mean log-probability under `policy`, see `mean_likelihood`.

    What else has a colon and is no existing path is a function; modules in the working directory
    are found too. Servers are asked as `remote` says.

    `device` defaults to the GPU if there is one. `device_map` spreads a model over the devices of
    this machine instead, as of transformers' `from_pretrained`; scores are the same but for
    rounding. `dtype` defaults to that of the checkpoint ("auto"), and for the implicit reward and
    the likelihood to fp32: log-ratios are small next to the rounding of bf16. Reward models
    see prompt and response through their chat template, or with a line break between them where
    there is none, `batch_size` of them at a time, one at a time if there is no padding token.
    Weights are read from safetensors only and code from the hub is never run.

    Raises ConfigError or ModelError when it can't be loaded.
    """
    if device is not None and device_map is not None:
        raise ConfigError(f"device={device} must be left out beside device_map={device_map}")
    kind, where = kind_of(spec), {"device": device, "device_map": device_map}
    load = partial(load_packed, dtype=dtype or torch.float32, **where)
    if kind == "answer":
        return Scorer(spec, right_answer, on="rows", columns=("answer",))
    if kind == "function":
        return Scorer(spec, load_function(spec))
    if kind == "implicit":
        if policy is None or previous is None:
            raise ConfigError(
                "scorer 'implicit' needs policy and previous, folders or hub names of the policy "
                "and of the one before it"
            )
        return implicit_reward(str(policy), str(previous), load, batch_size)
    if kind == "likelihood":
        if policy is None:
            raise ConfigError("scorer 'likelihood' needs policy, a folder or hub name")
        return mean_likelihood(str(policy), load, batch_size)
    if kind == "reward model":
        reward_model = load_reward_model(spec, dtype, batch_size, **where)
        folder = spec if Path(spec).exists() else spec.partition("#")[0]
        return Scorer(spec, reward_model, settings=_weights(folder, reward_model.model))
    template = JUDGE_TEMPLATE if judge_template is None else judge_template
    if kind in ("judge", "remote judge"):
        check_template(template)
    if kind in ("judge", "follow-up"):
        name = spec.partition(":")[2]
        tokenizer = load_tokenizer(name, option="scorer")
        model = load_packed(name, dtype=dtype or "auto", option="scorer", **where)
        settings = _weights(name, model)
        if kind == "follow-up":
            function = partial(follow_up_scores, model, tokenizer, batch_size=batch_size)
            return Scorer(spec, function, settings=settings)
        judge = Judge(LocalJudge(model, tokenizer, batch_size), template)
        return Scorer(spec, judge, "rows", judge.compare, {"template": template} | settings)
    return _load_remote(spec, kind, remote or Remote(), batch_size, template)


def _load_remote(spec: str, kind: str, remote: Remote, batch_size: int, template: str) -> Scorer:
    """A scorer that asks a server; what follows the # of its URL names a model."""
    url = spec.removeprefix("judge:")
    check_url(url)
    remote.key()  # where there is none, it is better said now
    address, _, model = url.partition("#")
    if kind == "endpoint":
        endpoint = Endpoint(address, remote)
        return Scorer(spec, RemoteScores(endpoint, batch_size), endpoint=endpoint)
    if not model:
        raise ConfigError(f"scorer {spec!r}: name the model that the server has after a #")
    path = "/chat/completions" if kind == "remote judge" else ""
    endpoint = Endpoint(address.rstrip("/") + path, remote)
    if kind == "pooling":
        return Scorer(spec, PooledScores(endpoint, model), endpoint=endpoint)
    judge = Judge(RemoteJudge(endpoint, model), template)
    return Scorer(spec, judge, "rows", judge.compare, {"template": template}, endpoint)


def _weights(name: str, model: Any) -> dict[str, str]:
    """What decides the scores of a model beside its name."""
    return {"weights": policy_digest(name), "dtype": dtype_name(model.dtype)}
