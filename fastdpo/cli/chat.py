"""``fastdpo chat``: a policy in the terminal, beside the model that it was trained from.

Both answer the same question, each in its own conversation, drawn as `fastdpo sample` draws. Below
an answer is how many tokens it has, and whether it was cut off.
"""

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastdpo.cli.columns import Flow, cells, column_width, end_of, side_by_side, wrap
from fastdpo.cli.commands import quiet_loading
from fastdpo.data.rendering import render_prompt
from fastdpo.errors import ConfigError, DataError, ModelError, require
from fastdpo.loss.gemm import has_native_bf16
from fastdpo.model.adapters import merged
from fastdpo.model.load import DTYPES, load_causal_lm, load_tokenizer
from fastdpo.sample.config import SampleConfig
from fastdpo.sample.generate import GenerateSampler
from fastdpo.sample.sampler import prompt_seed
from fastdpo.storage import read_json

_NEW, _QUIT = ("/new", "!clear"), ("/quit", "/exit", "!exit")  # those with a ! are transformers'
_HELP = "/new begins another conversation, /quit or Ctrl-D ends, Ctrl-C stops an answer"
_CLEAR = "\r\x1b[K"
_BASE = "base_model_name_or_path"  # in adapter_config.json


@dataclass(kw_only=True)
class ChatCommand:
    """Talk to a policy in the terminal, beside the model that it was trained from.

    Each model has its own answers in its conversation, and both draw with the same random numbers.
    A model without a chat template continues the text, and knows nothing of what was before it.

    Attributes:
        model: the policy, a folder or hub name in Hugging Face format, or a folder of adapters.
        beside: another model that answers too, like the start of the training.
        prompt: ask this alone, without a conversation. What comes through a pipe is such a question
            too.
        system_prompt: what the models are told before the conversation.
        chat_template: file with a Jinja chat template instead of the models' own.
        max_new_tokens: tokens of an answer, the end token included.
        temperature: 0 takes the most probable token.
        top_p: share of the probability that is kept, from the most probable token on.
        seed: of all random numbers; of both models the same.
        dtype: of the models, float32, bfloat16 or float16; by default bfloat16, or float32 on a CPU
            that is slow in it.
    """

    model: str
    beside: str | None = None
    prompt: str | None = None
    system_prompt: str | None = None
    chat_template: str | None = None
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    dtype: str | None = None

    def __post_init__(self) -> None:
        known = self.dtype is None or self.dtype in DTYPES
        require(self, "dtype", known, f"one of {', '.join(DTYPES)}")
        asks = self.prompt is None or bool(self.prompt.strip())
        require(self, "prompt", asks, "a question, or left out")
        self.sampling()

    def sampling(self) -> SampleConfig:
        """How answers are drawn. Raises ConfigError, naming the option."""
        return SampleConfig(
            num_samples=1,
            batch_prompts=1,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
        )


class Answer(NamedTuple):
    text: str
    tokens: int
    cut: bool

    def footer(self, most: int) -> str:
        """What stands below it; `most` is what it was cut off at."""
        count = f"{self.tokens} token{'s' * (self.tokens != 1)}"
        return f"[{count}, cut off at max_new_tokens={most}]" if self.cut else f"[{count}]"


@dataclass
class Speaker:
    """A model and its side of the conversation; without a chat template it has none."""

    name: str
    tokenizer: Any
    sampler: GenerateSampler
    system_prompt: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    @property
    def has_template(self) -> bool:
        return self.tokenizer.chat_template is not None

    def forget(self) -> None:
        """Begin another conversation."""
        told = self.system_prompt
        self.messages = [] if told is None else [{"role": "system", "content": told}]

    def ids(self, question: str) -> list[int]:
        """Tokens that an answer follows.

        Raises DataError when they can't be rendered, or leave no room in the model's context.
        """
        asked = [*self.messages, {"role": "user", "content": question}]
        ids = render_prompt(asked if self.has_template else question, self.tokenizer)
        most, context = self.sampler.config.max_new_tokens, self.sampler.context
        if context is not None and len(ids) + most > context:
            raise DataError(
                f"the conversation has {len(ids)} tokens, which with max_new_tokens={most} is more "
                f"than the context of {self.name}, {context}; begin another (/new), or lower "
                "max_new_tokens"
            )
        return ids

    def answer(self, ids: list[int], seed: int, show: Callable[[str], None]) -> Answer:
        """The answer, which `show` gets in pieces as they come."""
        streamer = _streamer(self.tokenizer, show)
        [[output]] = self.sampler.generate([ids], 1, seed, streamer)
        text = self.sampler.ending.text(output.ids)
        return Answer(text, len(output.ids), output.finish_reason == "length")

    def keep(self, question: str, answer: Answer) -> None:
        """Add both to the conversation."""
        if self.has_template:
            self.messages += [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer.text},
            ]


def _streamer(tokenizer: Any, show: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            show(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def load_speaker(option: str, config: ChatCommand) -> Speaker:
    """The model that an option names, "model" or "beside", ready to answer.

    Raises ModelError when it can't be loaded, and ConfigError for a system prompt that it can't be
    told.
    """
    cuda = torch.cuda.is_available()
    usual = "bfloat16" if cuda or has_native_bf16() else "float32"
    name: str = getattr(config, option)
    dtype, folder = getattr(torch, config.dtype or usual), Path(name)
    adapters = folder / "adapter_config.json"
    if adapters.is_file() and not (folder / "config.json").is_file():
        base = read_json(adapters).get(_BASE) or name
        # Earlier versions left the tokenizer in the policy that the adapters were merged into.
        places = (folder, folder.resolve().parent / "policy")
        own = next((x for x in places if (x / "tokenizer_config.json").is_file()), base)
        tokenizer = load_tokenizer(str(own), config.chat_template, option=_BASE)
        model = merged(base, folder, torch.float32, option=_BASE)
        model = model.to(dtype)  # merged in bf16, a small change would be rounded
    else:
        tokenizer = load_tokenizer(name, config.chat_template, option=option)
        model = load_causal_lm(name, dtype=dtype, option=option)
    if tokenizer.chat_template is None and config.system_prompt is not None:
        raise ConfigError(
            f"system_prompt={config.system_prompt} needs a chat template, which {option}={name} "
            "has not; give one (chat_template), or leave system_prompt out"
        )
    sampler = GenerateSampler(model.to("cuda" if cuda else "cpu"), tokenizer, config.sampling())
    speaker = Speaker(name, tokenizer, sampler, config.system_prompt)
    speaker.forget()
    return speaker


def run_chat(config: ChatCommand) -> None:
    for stream in (sys.stdin, sys.stdout):  # either may have what an encoding has not
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        question = _piped() if config.prompt is None and not sys.stdin.isatty() else config.prompt
        quiet_loading()
        options = ["model"] if config.beside is None else ["model", "beside"]
        speakers = [load_speaker(option, config) for option in options]
        if question is None:
            _converse(speakers, config.seed)
        else:
            _ask(speakers, question, prompt_seed(config.seed, 0))
    except KeyboardInterrupt:  # nothing is left behind that could go on
        raise SystemExit(130) from None


def _piped() -> str:
    """The question that comes through a pipe; ConfigError where there is none."""
    # One that stays open would keep it waiting without a word.
    print("the question is read from the pipe, to its end; or give --prompt", file=sys.stderr)
    question = sys.stdin.read().strip()
    if not question:
        raise ConfigError("there is no question in what came through the pipe; or give --prompt")
    return question


def _converse(speakers: Sequence[Speaker], seed: int) -> None:
    """Questions and answers until the user has enough."""
    with suppress(ImportError):
        import readline  # noqa: F401  # input() then takes arrow keys
    for speaker in speakers:
        if not speaker.has_template:
            print(f"{speaker.name} has no chat template: it continues each text by itself")
    print(_HELP)
    turn = 0
    while True:
        print()
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if question in _QUIT:
            return
        if question in _NEW:
            for speaker in speakers:
                speaker.forget()
            print("a new conversation")
        elif question.startswith(("/", "!")) and len(question.split()) == 1:
            print(_HELP)
        elif question:
            try:
                _ask(speakers, question, prompt_seed(seed, turn))
                turn += 1
            except KeyboardInterrupt:
                print("\nstopped; this question is forgotten")
            except (DataError, ModelError) as error:  # as where memory runs out
                print(f"error: {error}", file=sys.stderr)


def _ask(speakers: Sequence[Speaker], question: str, seed: int) -> None:
    """Let all answer and show it: side by side on a terminal that is wide enough.

    Raises DataError, and adds nothing to any conversation, when one can't be asked.
    """
    prompts = [speaker.ids(question) for speaker in speakers]
    on_terminal = sys.stdout.isatty()
    columns = column_width(shutil.get_terminal_size().columns) if on_terminal else None
    if len(speakers) == 1 or columns is None:
        answers = [_told(*x, seed, heading=len(speakers) > 1) for x in zip(speakers, prompts)]
    else:
        answers = _in_columns(speakers, prompts, seed, columns)
    for speaker, answer in zip(speakers, answers):
        speaker.keep(question, answer)


def _told(speaker: Speaker, ids: list[int], seed: int, heading: bool) -> Answer:
    """An answer, printed as it comes."""
    if heading:
        print(f"\n{speaker.name}\n{'-' * cells(speaker.name)}")
    flow = Flow(shutil.get_terminal_size().columns if sys.stdout.isatty() else None)
    answer = speaker.answer(ids, seed, lambda text: print(flow.add(text), end="", flush=True))
    print(f"{flow.add('', last=True)}\n{answer.footer(speaker.sampler.config.max_new_tokens)}")
    return answer


def _in_columns(
    speakers: Sequence[Speaker], prompts: Sequence[list[int]], seed: int, width: int
) -> list[Answer]:
    """The answers side by side. Until they are whole, a line shows the end of what there is."""
    answers, columns = [], []
    lively = os.environ.get("TERM") != "dumb"
    for speaker, ids in zip(speakers, prompts):
        name, said = end_of(speaker.name, width), [""]

        def show(text: str, name: str = name, said: list[str] = said) -> None:
            said[0] = (said[0] + text)[-4 * width :]
            if lively:
                print(f"{_CLEAR}{name} {end_of(said[0], width)}", end="", flush=True)

        try:
            answer = speaker.answer(ids, seed, show)
        finally:
            if lively:
                print(_CLEAR, end="", flush=True)
        footer = wrap(answer.footer(speaker.sampler.config.max_new_tokens), width)
        answers.append(answer)
        columns.append(([name, "-" * width, *wrap(answer.text.strip("\n"), width)], footer))
    (left, below_left), (right, below_right) = columns
    print(side_by_side(left, right, width))
    print(side_by_side(below_left, below_right, width))
    return answers
