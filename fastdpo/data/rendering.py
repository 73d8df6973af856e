"""Texts -> token ids through a chat template: is the text all there, and does the last turn end?

A template is a program of its own. Some cut the reasoning off an answer, some never read
`tool_calls`, some print a list of parts as Python writes it, and some end no turn. Nothing of that
is an error to them; here it is found by comparing what was rendered with what was given.

Legitimate, and let pass: role marks and other text around and between, outer whitespace stripped,
reasoning in a field of its own, whitespace about <think> and </think>, tool calls in any notation.
"""

import json
import re
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import TemplateSyntaxError

from fastdpo.data.records import STRING_PROMPTS, PreferenceRow, Prompt, Text, placed
from fastdpo.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]

_REASONING = ("reasoning_content", "reasoning", "thinking")  # the names that templates read it by
_THINK = re.compile(r"(</?think>)")
_MEDIA = ("image", "audio", "video")  # parts of a content that are no text, by type


class Lost(NamedTuple):
    """A text of message number `index` that isn't in its rendering."""

    index: int
    name: str  # the key that has it
    text: str


def texts(message: Message) -> Iterator[tuple[str, str]]:
    """The texts that a rendering of the message must hold, by key, in the order of rendering."""
    seen: list[str] = []
    for name in _REASONING:
        value = message.get(name)
        if isinstance(value, str) and value not in seen:  # some data has it under two names
            seen.append(value)
            yield name, value
    content = message.get("content")
    for part in content if isinstance(content, list) else [content]:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get(kind) if isinstance(part, dict) else part
        if isinstance(text, str) and kind not in _MEDIA:
            yield "content", text
    for call in message.get("tool_calls") or ():
        function = call.get("function", call) if isinstance(call, dict) else {}
        yield from (("tool_calls", text) for text in _leaves(function.get("name")))
        yield from (("tool_calls", text) for text in _leaves(_parsed(function.get("arguments"))))


def is_empty(text: str | list[Message], marks: Sequence[str | None] = ()) -> bool:
    """Whether there is nothing in a response but the `marks` of a beginning and an end.

    Blanks are nothing in messages, of which templates strip them.
    """
    given = [text] if isinstance(text, str) else [x for message in text for _, x in texts(message)]
    for mark in filter(None, marks):
        given = [x.replace(mark, "") for x in given]
    return not any(given if isinstance(text, str) else (x.strip() for x in given))


def trace(messages: list[Message], opening: str, rendered: str) -> tuple[Lost | None, str]:
    """The first text of `messages` that `rendered` lacks, and what follows the last one there.

    `opening` is what stands before `rendered`: the end of the prompt, in which a response may have
    its beginning where the template opens the turn with it, as with <think>.
    """
    whole, at = opening + rendered, 0
    for index, message in enumerate(messages):
        given = list(texts(message))
        calls_first = sorted(given, key=lambda x: x[0] != "tool_calls")
        ends = [_walk(order, whole, at, len(opening)) for order in (given, calls_first)]
        found = next((end for end in ends if isinstance(end, int)), ends[0])
        if not isinstance(found, int):
            return Lost(index, *found), ""
        at = found
    return None, whole[max(at, len(opening)) :]


def _walk(given: list[tuple[str, str]], whole: str, at: int, start: int) -> int | tuple[str, str]:
    """Where the texts, one after the other, end; or the first that isn't there."""
    calls = None  # where the calls begin: some templates sort their arguments
    for name, text in given:
        base = at
        if name == "tool_calls":
            base = calls = at if calls is None else calls
        found = _find(text, name, whole, base, start)
        if found is None:
            return name, text
        at = max(at, found)
    return at


def _find(text: str, name: str, whole: str, at: int, start: int) -> int | None:
    """Where in `whole`, from `at` on, the text ends, beyond `start`; None where it isn't."""
    forms = _notations(text) if name == "tool_calls" else [text.strip()]
    for form in forms:
        found = whole.find(form, max(at, start + 1 - len(form)))
        if form and found >= 0:
            return found + len(form)
    pieces = [piece for piece in map(str.strip, _THINK.split(text)) if piece]
    if len(pieces) < 2:
        return None if pieces else at
    for piece in pieces:
        found = whole.find(piece, at)
        if found < 0:
            return None
        at = found + len(piece)
    return at if at > start or pieces[-1] == "</think>" else None


def _notations(text: str) -> list[str]:
    """A string of a tool call as it is, in JSON, in JSON within JSON, and in Python."""
    coded = json.dumps(text, ensure_ascii=False)[1:-1]
    again = json.dumps(coded, ensure_ascii=False)[1:-1]
    return [text, text.strip(), coded, json.dumps(text)[1:-1], again, repr(text)[1:-1]]


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    inner = value.values() if isinstance(value, dict) else value
    for item in inner if isinstance(value, dict | list) else ():
        yield from _leaves(item)


def _parsed(arguments: Any) -> Any:
    """Arguments of a call, which some data has as JSON text."""
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments


def cause(lost: Lost, tokenizer: Any) -> str:
    """Why the chat template may have lost a text, as far as that can be read off it."""
    template = str(tokenizer.chat_template)
    if lost.name not in template:
        return f"the template never reads {lost.name!r}"
    if lost.name == "content" and "</think>" in lost.text and "</think>" in template:
        return "the template cuts what stands before </think> off a turn of the assistant"
    return "the template leaves it out or changes it in such a message"


def raw_part(messages: list[Message], rendered: str) -> str | None:
    """A part of a content that `rendered` has as Python or JSON writes it, braces and all."""
    lists = [x["content"] for x in messages if isinstance(x.get("content"), list)]
    parts = [part for x in lists for part in (x, *(y for y in x if isinstance(y, dict)))]
    coded = (
        form for x in parts for form in (str(x), json.dumps(x), json.dumps(x, ensure_ascii=False))
    )
    return next((form for form in coded if form in rendered), None)


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


def options_of(row: PreferenceRow | Prompt) -> dict[str, Any]:
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

    def ids(self, text: Text, options: dict[str, Any], **extra: bool) -> list[int]:
        """Ids of a string, or of messages through the chat template with `options`.

        One beginning token at most; of a string no end token but its own.
        """
        if isinstance(text, str):
            encoded = self._call(lambda: self.tokenizer(text=text, add_special_tokens=False))
            ids = encoded["input_ids"]
            return ids if starts_with(ids, self.prefix) else self.prefix + ids
        encoded = self._template(text, options, tokenize=True, return_dict=True, **extra)
        ids = encoded["input_ids"]
        if len(ids) > 1 and ids[0] == ids[1] == self.tokenizer.bos_token_id:
            ids = ids[1:]
        if any(isinstance(message.get("content"), list) for message in text):
            raw = raw_part(text, self._decode(ids))
            if raw is not None:
                raise DataError(
                    "the chat template doesn't take a list of parts as content: it writes "
                    f"{_short(raw)}. Write the content as one string, or give a template that "
                    "reads parts (chat_template)."
                )
        return ids

    def join(self, row: PreferenceRow, response: Text) -> Text:
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
        self, row: PreferenceRow, name: str, prompt: list[int], ids: list[int]
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
                f"the chat template writes {_short(after)} after {name} as it does before it, "
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

    def unread(self, row: PreferenceRow | Prompt) -> str | None:
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
            if not any(form in rendered for form in _notations(text.strip())):
                return f"{name} {_short(text)} ({cause(Lost(0, name, text), self.tokenizer)})"
        return None

    def _after_text(self, row: PreferenceRow, name: str, ids: list[int]) -> str:
        """What a template wrote after the text of a response; DataError where text is lost."""
        response: Any = getattr(row, name)
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
                f"{lost.name} {_short(lost.text)} of message {lost.index} of {name} is not in what "
                f"the chat template renders, {_short(side[split:])}: {reason}. Give a template "
                "that keeps it (chat_template), or write the row without it."
            )
        return after

    def _is_end(self, token: int, row: PreferenceRow, prompt: list[int], after: str) -> bool:
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

    def _text(self, row: PreferenceRow | Prompt, messages: Any, **settings: Any) -> str:
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


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:45]} ... {text[-10:]}")


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
    text = f": {_short(lines[number - 1].strip())}" if number <= len(lines) else ""
    return f", line {number} of the chat template{text}"


def named(error: Exception) -> str:
    """The kind of an exception of a library, and the first line of what it says."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
