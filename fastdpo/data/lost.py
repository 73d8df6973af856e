"""What of a message's text isn't in its rendering by a chat template.

Legitimate, and let pass: role marks and other text around and between, outer whitespace stripped,
reasoning in a field of its own, whitespace about <think> and </think>, tool calls in any notation.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

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
    forms = notations(text) if name == "tool_calls" else [text.strip()]
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


def notations(text: str) -> list[str]:
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


def short(text: str) -> str:
    """A text for a message, its middle left out where it is long."""
    return repr(text if len(text) <= 60 else f"{text[:45]} ... {text[-10:]}")
