"""Texts -> token ids through a chat template: is the text all there, and does the last turn end?

A template is a program of its own. Some cut the reasoning off an answer, some never read
`tool_calls`, some print a list of parts as Python writes it, and some end no turn. Nothing of that
is an error to them; `lost.py` finds it by comparing what was rendered with what was given.
"""

import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateSyntaxError

from fastdpo.data.lost import Lost, cause, notations, raw_part, short, texts, trace
from fastdpo.data.records import (
    STRING_PROMPTS,
    PreferenceRow,
    Prompt,
    Prompted,
    Text,
    placed,
)
from fastdpo.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def last_token(ids: Sequence[int], tokenizer: Any) -> int:
    """The place of the last token that is not whitespace; -1 where there is none.

    Templates write a line break after the end of a turn. It is trained on, as in TRL.
    """
    places = reversed(range(len(ids)))
    return next((place for place in places if tokenizer.decode([ids[place]]).strip()), -1)


def special_ids(tokenizer: Any) -> set[int]:
    """The ids of a tokenizer's special tokens, named or only added as such."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}


def text_of(prompt: Text, role: str | None = None) -> str:
    """A prompt as plain text; of messages the contents, `role` selects some of them."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(content_of(m) for m in prompt if role in (None, m["role"]))


def content_of(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "\n".join(x.get("text", "") for x in content)


def render_prompt(
    prompt: Text,
    tokenizer: "PreTrainedTokenizerBase",
    tools: list[Any] | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    *,
    as_chat: bool = False,
) -> list[int]:
    """Token ids of a prompt, to sample a response after it.

    Messages go through the chat template with its generation prompt; a string stays as it is, or
    with `as_chat` becomes one user message where `takes_as_chat` says so. Training tokenizes
    prompts by this function too. A string gets the beginning token of tokenizers that put one,
    unless it has it already, and never an end token.

    Raises DataError when the tokenizer or its chat template can't render the prompt.
    """
    if as_chat and isinstance(prompt, str) and takes_as_chat(prompt, tokenizer):
        prompt = [{"role": "user", "content": prompt}]
    options = {"tools": tools, **(chat_template_kwargs or {})}
    return Renderer(tokenizer).ids(prompt, options, add_generation_prompt=True)


def render_row(
    row: Prompt | PreferenceRow,
    tokenizer: "PreTrainedTokenizerBase",
    string_prompts: str = "chat",
) -> list[int]:
    """Token ids that a sample after the row's prompt follows, by `render_prompt`; as chat, unless
    `string_prompts` is "text".

    Raises DataError as that does, naming the row.
    """
    check_string_prompts(string_prompts)
    as_chat, options = string_prompts == "chat", row.chat_template_kwargs
    with placed(row.where):
        return render_prompt(row.prompt, tokenizer, row.tools, options, as_chat=as_chat)


def check_string_prompts(value: str) -> None:
    """Raise ValueError where it is none of `STRING_PROMPTS`."""
    if value not in STRING_PROMPTS:
        raise ValueError(f"string_prompts must be chat or text, got {value!r}")


def takes_as_chat(prompt: str, tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether a string can be a message of the user: not where there is no chat template, nor where
    the string was rendered before, and begins with a special token that the template writes too."""
    if tokenizer.chat_template is None:
        return False
    try:
        first = tokenizer(text=prompt[:64], add_special_tokens=False)["input_ids"][:1]
        if not first or first[0] not in special_ids(tokenizer):
            return True
        own = tokenizer(text=prompt, add_special_tokens=False)["input_ids"]
    except Exception:  # told of by the rendering
        return True
    chat = Renderer(tokenizer).ids([{"role": "user", "content": prompt}], {})
    return chat.count(first[0]) == own.count(first[0])  # type: ignore[index,union-attr]


def options_of(row: PreferenceRow | Prompt | Prompted) -> dict[str, Any]:
    """What a row gives to the chat template beside its messages."""
    return {"tools": row.tools, **row.chat_template_kwargs}


@dataclass(eq=False)
class Renderer:
    """Texts to token ids by one tokenizer, and what was found out about it on the way."""

    tokenizer: Any
    stop_ids: Collection[int] | None = None  # None: not known

    @cached_property
    def prefix(self) -> list[int]:
        """What the tokenizer puts before every text of its own accord: the beginning token."""
        ids, plain = (
            self.tokenizer(text="a", add_special_tokens=x)["input_ids"] for x in (True, False)
        )
        places = range(len(ids) - len(plain) + 1)
        return ids[: next((i for i in places if ids[i : i + len(plain)] == plain), 0)]

    @cached_property
    def special(self) -> set[int]:
        return special_ids(self.tokenizer)

    @cached_property
    def ends(self) -> dict[int, str]:
        """Tokens known to end a response, and the first row that ends in each."""
        return {x: "" for x in [self.tokenizer.eos_token_id] if x is not None}

    def ids(
        self, text: Text, options: dict[str, Any], *, rendered: bool = False, **extra: bool
    ) -> list[int]:
        """Ids of a string, or of messages through the chat template with `options`.

        One beginning token at most, and of a `rendered` string its own; of a string no end token
        but its own.
        """
        if isinstance(text, str):
            encoded = self._call(lambda: self.tokenizer(text=text, add_special_tokens=False))
            ids = encoded["input_ids"]
            if rendered:
                return self._begun_once(ids)
            return ids if starts_with(ids, self.prefix) else self.prefix + ids
        encoded = self._template(text, options, tokenize=True, return_dict=True, **extra)
        ids = self._begun_once(encoded["input_ids"])
        if any(isinstance(message.get("content"), list) for message in text):
            raw = raw_part(text, self._decode(ids))
            if raw is not None:
                raise DataError(
                    "the chat template doesn't take a list of parts as content: it writes "
                    f"{short(raw)}. Write the content as one string, or give a template that "
                    "reads parts (chat_template)."
                )
        return ids

    def opened(self, row: Prompted) -> Prompted:
        """A row whose responses go on after a `prefix`, with all before them as one text.

        A template renders the prompt alone, as it does before a model goes on with its own answer:
        no turn ends in between, and the template changes nothing of the answer.
        """
        opening = row.prompt
        if isinstance(opening, list):
            opening = self._text(row, opening, add_generation_prompt=True)
        return replace(row, prompt=f"{opening}{row.prefix}")

    def _begun_once(self, ids: list[int]) -> list[int]:
        """Rendered ids with one beginning token, where template and message bring one each."""
        twice = len(ids) > 1 and ids[0] == ids[1] == self.tokenizer.bos_token_id
        return ids[1:] if twice else ids

    def join(self, row: Prompted, response: Text) -> Text:
        """Prompt and response as one text; a string response ends in the end token."""
        prompt = row.prompt
        if isinstance(prompt, list) and isinstance(response, list):
            return prompt + response
        if not isinstance(prompt, str) or not isinstance(response, str):
            raise DataError("prompt and responses have different formats. Use strings or messages.")
        begin, end = self.tokenizer.bos_token, self.tokenizer.eos_token
        if begin and begin != end:  # a response that was rendered alone
            response = response.removeprefix(begin)
        if not row.append_eos:
            return prompt + response
        if not isinstance(end, str):
            raise DataError("the tokenizer has no end token. Set tokenizer.eos_token.")
        return prompt + (response if response.rstrip().endswith(end) else response + end)

    def checked(
        self, row: Prompted, name: str, prompt: list[int], ids: list[int]
    ) -> tuple[list[int], bool]:
        """A response's ids, all text in them and ended once; and whether its end was added here.

        `prompt` are the ids of the prompt alone, `name` is that of the response's column.
        """
        after = ""
        if isinstance(row.prompt, list):
            after = self._after_text(row, name, ids)
        if not row.append_eos:
            return ids, False
        last = last_token(ids, self.tokenizer)
        if last >= 0 and self._is_end(ids[last], row, prompt, after):
            ids = self._ended_once(ids)
            end = ids[last_token(ids, self.tokenizer)]
            self.ends[end] = self.ends.get(end) or row.where
            return ids, False
        if after.strip() and self._decode(prompt).rstrip().endswith(after.strip()):
            raise DataError(
                f"the chat template writes {short(after)} after {name} as it does before it, "
                "which begins another turn. Give a template that does so with "
                "add_generation_prompt only (chat_template)."
            )
        if self.tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no end token. Set tokenizer.eos_token.")
        end = self.tokenizer.eos_token_id
        self.ends[end] = self.ends[end] or row.where
        return [*ids, end], True

    def _ended_once(self, ids: list[int]) -> list[int]:
        """`ids` with one end token, where several stand at the end with but whitespace between.

        A response that brings its end token gets another from a template, and Phi-3's writes one
        after a turn and one after the conversation.  Different ones are one end where the model
        stops at the first of them, which is one of `stop_ids`.
        """
        while True:
            last = last_token(ids, self.tokenizer)
            before = last_token(ids[:last], self.tokenizer) if last > 0 else -1
            same = before >= 0 and ids[before] in (ids[last], *(self.stop_ids or ()))
            if not same or ids[last] not in self.ends:
                return ids
            ids = ids[: before + 1] + ids[last + 1 :]

    def unread(self, row: Prompted | Prompt) -> str | None:
        """What a template leaves out of a prompt: a message, or a tool; None: nothing.

        Turns of the assistant are not looked at: templates cut the reasoning off earlier ones.
        """
        if isinstance(row.prompt, str):
            return None
        asked = [x for x in row.prompt if x.get("role") != "assistant"]
        given = [x for message in asked for x in texts(message) if x[0] == "content"]
        for tool in row.tools or ():
            function = tool.get("function", tool) if isinstance(tool, dict) else None
            if isinstance(function, dict) and isinstance(function.get("name"), str):
                given.append(("tools", function["name"]))
        rendered = self._text(row, row.prompt, add_generation_prompt=True)
        for name, text in given:
            if not any(form in rendered for form in notations(text.strip())):
                return f"{name} {short(text)} ({cause(Lost(0, name, text), self.tokenizer)})"
        return None

    def _after_text(self, row: Prompted, name: str, ids: list[int]) -> str:
        """What a template wrote after the text of a response; DataError where text is lost."""
        response: Any = row.responses[name]
        lost, after = trace(response, "", self._decode(ids))
        if lost is None:
            return after
        # A beginning in the prompt, or a tokenizer that doesn't give the text back: ask the text.
        prompt = self._text(row, row.prompt, add_generation_prompt=True)
        side = self._text(row, [*row.prompt, *response])
        split = common_prefix_length(prompt, side)
        given = [text.strip() for message in row.prompt for _, text in texts(message)]  # type: ignore[arg-type]
        opening = prompt[:split]
        if given and given[-1] in opening:
            opening = opening[opening.rindex(given[-1]) + len(given[-1]) :]
        lost, after = trace(response, opening, side[split:])
        if lost is not None:
            reason = cause(lost, self.tokenizer)
            raise DataError(
                f"{lost.name} {short(lost.text)} of message {lost.index} of {name} is not in what "
                f"the chat template renders, {short(side[split:])}: {reason}. Give a template "
                "that keeps it (chat_template), or write the row without it."
            )
        return after

    def _is_end(self, token: int, row: Prompted, prompt: list[int], after: str) -> bool:
        """Whether a token ends a turn: a special one that the template wrote `after` the text of
        the response, unless it begins turns with it."""
        if token in self.ends or token not in self.special or isinstance(row.prompt, str):
            return token in self.ends
        tokenizer = self.tokenizer
        others = (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
        if token in others or self._decode([token]).strip() not in after:
            return False
        alone = self.ids(row.prompt, options_of(row), add_generation_prompt=False)
        opening = prompt[common_prefix_length(alone, prompt) :]
        if token in (opening or prompt[last_token(prompt, self.tokenizer) :]):
            return False
        self.ends[token] = row.where
        return True

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def _text(self, row: Prompted | Prompt, messages: Any, **settings: Any) -> str:
        return self._template(messages, options_of(row), tokenize=False, **settings)

    def _template(self, messages: Any, options: dict[str, Any], **settings: Any) -> Any:
        if not (self.tokenizer.chat_template or options.get("chat_template")):
            raise DataError(
                "the tokenizer has no chat template for message lists. Use the tokenizer of a chat "
                "model, give one (chat_template), or write strings."
            )
        # An option may be one of the settings too, which is an error of the call.
        template = options.get("chat_template") or self.tokenizer.chat_template
        return self._call(
            lambda: self.tokenizer.apply_chat_template(messages, **settings, **options), template
        )

    def _call(self, render: Callable[[], Any], template: Any = None) -> Any:
        try:
            return render()
        except Exception as error:  # a template is a program of its own and can raise anything
            raise DataError(
                f"the tokenizer can't render this ({named(error)}{line_of(error, template)}). "
                "Fix the row, or use a chat template that accepts it."
            ) from error


def starts_with(ids: Sequence[int], prefix: Sequence[int]) -> bool:
    return ids[: len(prefix)] == prefix


def common_prefix_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def line_of(error: Exception, template: Any) -> str:
    """Where in a chat template an exception arose, to stand behind it; "" where it isn't known."""
    number = error.lineno if isinstance(error, TemplateSyntaxError) else None
    frames = traceback.extract_tb(error.__traceback__)
    number = next((x.lineno for x in reversed(frames) if x.filename == "<template>"), number)
    if number is None:
        return ""
    # A tokenizer can have several templates, by name.
    lines = template.splitlines() if isinstance(template, str) else []
    text = f": {short(lines[number - 1].strip())}" if number <= len(lines) else ""
    return f", line {number} of the chat template{text}"


def named(error: Exception) -> str:
    """The kind of an exception of a library, and the first line of what it says."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
