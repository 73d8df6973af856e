"""What a chat template made of messages: is their text all there, and does the last turn end?

A template is a program of its own. Some cut the reasoning off an answer, some never read
`tool_calls`, some print a list of parts as Python writes it, and some end no turn. Nothing of that
is an error to them; here it is found by comparing what was rendered with what was given.

Legitimate, and let pass: role marks and other text around and between, outer whitespace stripped,
reasoning in a field of its own, whitespace about <think> and </think>, tool calls in any notation.
"""

import json
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

from fastdpo.data.records import Text

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
        found = _walk(given, whole, at, len(opening))
        if not isinstance(found, int) and calls_first != given:
            again = _walk(calls_first, whole, at, len(opening))
            found = again if isinstance(again, int) else found
        if not isinstance(found, int):
            return Lost(index, *found), ""
        at = found
    return None, whole[max(at, len(opening)) :]


def _walk(given: list[tuple[str, str]], whole: str, at: int, start: int) -> int | tuple[str, str]:
    """Where the texts, one after the other, end; or the first that isn't there."""
    calls = None  # where the calls begin: some templates sort their arguments
    for name, text in given:
        if name == "tool_calls" and calls is None:
            calls = at
        base = calls if name == "tool_calls" and calls is not None else at
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
    pieces = [piece.strip() for piece in _THINK.split(text)]
    pieces = [piece for piece in pieces if piece]
    if not pieces:
        return at
    if len(pieces) == 1:
        return None
    for piece in pieces:
        found = whole.find(piece, at)
        if found < 0:
            return None
        at = found + len(piece)
    return at if at > start or pieces[-1] == "</think>" else None


def is_in(text: str, rendered: str) -> bool:
    """Whether a text stands in a rendering, in any notation."""
    return any(form in rendered for form in _notations(text.strip()))


def _notations(text: str) -> list[str]:
    """A string of a tool call as it is, in JSON, in JSON within JSON, and in Python."""
    coded = json.dumps(text, ensure_ascii=False)[1:-1]
    again = json.dumps(coded, ensure_ascii=False)[1:-1]
    return [text, text.strip(), coded, json.dumps(text)[1:-1], again, repr(text)[1:-1]]


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if _is_list(value) else ():
        yield from _leaves(inner)


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _parsed(arguments: Any) -> Any:
    """Arguments of a call, which some data has as JSON text."""
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments


def cause(lost: Lost, template: str) -> str:
    """Why a template may have lost a text, as far as that can be read off it."""
    if lost.name not in template:
        return f"the template never reads {lost.name!r}"
    if lost.name == "content" and "</think>" in lost.text and "</think>" in template:
        return "the template cuts what stands before </think> off a turn of the assistant"
    return "the template leaves it out or changes it in such a message"


def raw_part(messages: list[Message], rendered: str) -> str | None:
    """A part of a content that `rendered` has as Python or JSON writes it, braces and all."""
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            for part in (content, *(x for x in content if isinstance(x, dict))):
                for form in (str(part), json.dumps(part), json.dumps(part, ensure_ascii=False)):
                    if form in rendered:
                        return form
    return None


def last_token(ids: Sequence[int], tokenizer: Any) -> int:
    """The place of the last token that is not whitespace; -1 where there is none.

    Templates write a line break after the end of a turn. It is trained on, as in TRL.
    """
    for place in range(len(ids) - 1, -1, -1):
        if tokenizer.decode([ids[place]]).strip():
            return place
    return -1


def special_ids(tokenizer: Any) -> set[int]:
    """The ids of a tokenizer's special tokens, named or only added as such."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}


def once(
    ids: list[int], tokenizer: Any, ends: Collection[int], stop_ids: Collection[int] = ()
) -> list[int]:
    """`ids` with one end token, where several stand at the end with but whitespace between them.

    A response that brings its end token gets another from a template, and Phi-3's writes one after
    a turn and one after the conversation.  Different ones are one end where the model stops at the
    first of them, which is one of `stop_ids`.
    """
    while True:
        last = last_token(ids, tokenizer)
        before = last_token(ids[:last], tokenizer) if last > 0 else -1
        same = before >= 0 and (ids[before] == ids[last] or ids[before] in stop_ids)
        if not same or ids[last] not in ends:
            return ids
        ids = ids[: before + 1] + ids[last + 1 :]


def own_prefix(tokenizer: Any) -> list[int]:
    """The tokens that a tokenizer puts before every text of its own accord: the beginning token."""
    ids, plain = (
        tokenizer(text="a", add_special_tokens=special)["input_ids"] for special in (True, False)
    )
    places = range(len(ids) - len(plain) + 1)
    return ids[: next((i for i in places if ids[i : i + len(plain)] == plain), 0)]


def text_of(prompt: Text, role: str | None = None) -> str:
    """A prompt as plain text; of messages the contents, `role` selects some of them."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(content_of(m) for m in prompt if role in (None, m["role"]))


def content_of(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "\n".join(x.get("text", "") for x in content)
