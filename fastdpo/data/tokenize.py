"""Checked rows -> tokenized examples, by a tokenizer and its chat template.

Token ids are those of TRL's DPOTrainer. Messages go through the chat template; string responses get
the end token unless they end in it. The responses begin where the tokens of the prompt alone and
those of prompt + response first differ, on whichever side that comes first, so a prompt can lose
its last tokens.

Other than in TRL, a text begins with one beginning token and a response ends in one end token,
whatever the tokenizer adds and the text brings: where several stand there, the first one at which
the model stops. Responses that a chat template doesn't end get the tokenizer's end token, with a
warning. A special token that the template writes after the response, other than those that begin a
turn, is an end; whitespace after it is kept, as in TRL. With `append_eos` false in the row,
responses end as they are written or rendered.

A prompt that is a string is text, which no template sees, as in TRL. With `string_prompts` "chat"
it is a message of the user and its responses are the assistant's, with the tokens that sampling
gives such a prompt.

Lists and single responses are tokenized as pairs are.  The responses of a next step (Step-DPO) go
on after the steps before it, which are tokens of the prompt: no turn ends in between, and none
after them.

An example is dropped when a response is empty, when no token is left of a prompt or of a response,
when all its sequences are the same tokens, or when it is a list of less than two responses.
"""

import warnings
from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fastdpo.data.budget import check_overlong, counted
from fastdpo.data.examples import (
    NAMES,
    TokenizedExample,
    TokenizedList,
    TokenizedPair,
    TokenizedSingle,
)
from fastdpo.data.lost import is_empty
from fastdpo.data.records import (
    LabeledRow,
    Prompt,
    Prompted,
    RankedRow,
    TextRow,
    messages_of,
    placed,
)
from fastdpo.data.rendering import (
    Renderer,
    check_string_prompts,
    common_prefix_length,
    options_of,
    starts_with,
    takes_as_chat,
)
from fastdpo.errors import DataError
from fastdpo.progress import bar, parts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Why an example is dropped that a larger max_length would save.
_TOO_LONG = {
    "responses truncated to nothing", "identical responses after truncation",
    "longer than max_length",
}  # fmt: skip
_WANTED = {
    "pair": "Give pairs whose chosen and rejected differ and are not empty.",
    "list": "Give lists of two or more responses that differ and are not empty.",
    "response": "Give completions that are not empty.",
}


@dataclass(frozen=True)
class Tokenized:
    """What `tokenize_dataset` made of a dataset."""

    examples: list[Any]  # TokenizedPair, TokenizedList or TokenizedSingle
    dropped_at: dict[str, list[str]]  # reason -> the rows left out
    truncated_at: list[str]  # rows kept with a response cut at max_length
    max_length: int | None = None
    # Rows kept whose prompt is a string that the tokenizer's chat template did not render.
    as_text_at: list[str] = field(default_factory=list)

    @property
    def pairs(self) -> list[TokenizedPair]:
        """The examples, of a dataset of pairs."""
        return self.examples

    @property
    def dropped(self) -> dict[str, int]:
        return {reason: len(rows) for reason, rows in self.dropped_at.items()}

    @property
    def truncated(self) -> int:
        return len(self.truncated_at)

    def __str__(self) -> str:
        """One line for what was kept, and one a reason for what was not."""
        cut = f"{counted(self.truncated_at)} truncated to max_length={self.max_length}"
        lines = [f"{len(self.examples)} {self.examples[0].name}s, {cut}"]
        lines += [f"dropped {counted(at)}: {reason}" for reason, at in self.dropped_at.items()]
        return "\n".join(lines)


def tokenize_dataset(
    rows: Sequence[TextRow],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None,
    overlong: str = "truncate",
    stop_ids: Collection[int] | None = None,
    string_prompts: str = "text",
    progress: bool = True,
) -> Tokenized:
    """Tokenize all examples, in order, by the rules of this module.

    `stop_ids` are the tokens that end the model's generation (`fastdpo.model.load.stop_ids`); None:
    not known, and not compared with what ends the responses.

    `string_prompts` says what a prompt that is a string is: "text", or, where `takes_as_chat` says
    so, "chat".

    `overlong` says what happens to an example with a sequence, prompt + response, over `max_length`
    tokens:

    - "truncate": the first `max_length` tokens of each sequence are kept. A prompt that leaves no
      room for a token of a response can't be truncated so; its example is dropped.
    - "drop": the example is dropped.
    - "stop": the first such example raises DataError.

    The last two leave examples aside that are dropped whatever their length (no prompt token, empty
    or identical responses): those count by that reason and don't stop anything.

    Dropped and truncated examples are named by their rows. One warning each tells of prompts that
    lost tokens, of messages that the chat template gave no beginning token or left out, and of
    responses that it didn't end or ended in none of `stop_ids`.

    Raises DataError when a row can't be rendered, when the chat template leaves out text of a
    response and when no example is left, and ValueError when `max_length` < 2, `overlong` is none
    of the three or `string_prompts` none of the two.
    """
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length must be at least 2 (prompt and response), got {max_length}")
    check_overlong(overlong)
    check_string_prompts(string_prompts)
    if not rows:
        raise DataError("there are no rows to tokenize. Give at least one preference pair.")
    result, kept, notes = Tokenized([], {}, [], max_length), [], _Notes()
    longest = 0  # of the examples that are dropped for their length
    renderer = Renderer(tokenizer, stop_ids)
    as_chat, name = string_prompts == "chat", NAMES[rows[0].shape]
    with bar("tokenizing", len(rows), name, shown=progress) as shown, shown.part(len(rows)):
        for row in parts(rows):
            split = _split(row, renderer, as_chat=as_chat)
            example = split if isinstance(split, str) else _within(split, max_length, overlong)
            if isinstance(split, str) or isinstance(example, str):
                result.dropped_at.setdefault(str(example), []).append(row.where)
                if example in _TOO_LONG and isinstance(split, _Split):
                    longest = max(longest, split.num_tokens)
                continue
            result.examples.append(example)
            kept += split.prompted
            notes.add(split, renderer)
            if isinstance(split.prompted[0].prompt, str) and tokenizer.chat_template is not None:
                result.as_text_at.append(row.where)
            if max_length is not None and split.num_tokens > max_length:
                result.truncated_at.append(row.where)
    if not kept:
        raise _nothing_left(rows, result, longest, name)
    warn_of_unread(kept, tokenizer)
    notes = notes.messages(len(result.examples), renderer, name)
    for message in (*notes, *_ends_that_do_not_stop(renderer)):
        warnings.warn(message, stacklevel=2)
    return result


def _nothing_left(rows: Sequence[TextRow], result: Tokenized, longest: int, name: str) -> DataError:
    reasons = ", ".join(f"{reason}: {count}" for reason, count in result.dropped.items())
    ways = []
    if longest:
        ways.append(f"Raise max_length={result.max_length}, to keep all of them to {longest}.")
    if result.dropped.keys() - _TOO_LONG:
        ways.append(_WANTED[name])
    return DataError(
        f"{rows[0].where} to {rows[-1].where}: no {name} is left ({reasons}). " + " ".join(ways)
    )


def warn_of_unread(rows: Sequence[Prompted | Prompt], tokenizer: Any) -> None:
    """Warn once of messages and tools of prompts that the chat template leaves out."""
    renderer = Renderer(tokenizer)
    found = ((row.where, renderer.unread(row)) for row in rows)
    places = [f"{where}: {unread}" for where, unread in found if unread]
    if places:
        warnings.warn(
            f"{len(places)} of {len(rows)} prompts: the chat template leaves out what they say; "
            f"the first is {places[0]}. The model never sees it. Give a template that renders it "
            "(chat_template), or write the rows without it.",
            stacklevel=3,
        )


@dataclass
class _Notes:
    """What is told of after the last row: the rows by which each was found."""

    lost_at: list[str] = field(default_factory=list)
    ended_at: list[str] = field(default_factory=list)
    unbegun_at: list[str] = field(default_factory=list)

    def add(self, split: "_Split", renderer: Renderer) -> None:
        where, chat = split.row.where, isinstance(split.prompted[0].prompt, list)
        if split.ended:
            self.ended_at.append(where)
        if chat and not all(starts_with(ids, renderer.prefix) for ids in split.prompts):
            self.unbegun_at.append(where)
        for lost_ids in filter(None, split.lost):
            self.lost_at.append(f"{where}: {renderer.tokenizer.decode(lost_ids)!r}")

    def messages(self, total: int, renderer: Renderer, name: str) -> Iterator[str]:
        """One a kind, of `total` examples of a name."""
        if self.lost_at:
            yield (
                f"{len(self.lost_at)} of {total} prompts lose their last tokens, which render or "
                f"merge differently before a response; the first is {self.lost_at[0]}. Training "
                "then sees another context than sampling. End prompts on a token boundary, or use "
                "a chat template that renders a prompt alike with and without a response."
            )
        if self.ended_at:
            end = renderer.tokenizer.eos_token
            yield (
                f"{len(self.ended_at)} of {total} {name}s: the chat template ends a turn of the "
                f"assistant with no token that stops generation, so {end!r} was "
                f"put after the responses; the first is {self.ended_at[0]}. Give a template that "
                "ends its turns (chat_template), or set append_eos to false in rows that are not "
                "to end."
            )
        if self.unbegun_at:
            begin = renderer.tokenizer.decode(renderer.prefix)
            yield (
                f"{len(self.unbegun_at)} of {total} {name}s: the chat template doesn't begin with "
                f"{begin!r}, which the tokenizer puts before every text; the first is "
                f"{self.unbegun_at[0]}. They are trained on as rendered, as chats are generated. "
                f"Where the model was made with {begin!r}, give a template that writes it "
                "(chat_template)."
            )


def _ends_that_do_not_stop(renderer: Renderer) -> Iterator[str]:
    if renderer.stop_ids is None:
        return
    decode = renderer.tokenizer.decode
    stops = ", ".join(repr(decode([x])) for x in renderer.stop_ids)
    for token, where in renderer.ends.items():
        if where and token not in renderer.stop_ids:
            yield (
                f"responses end with {decode([token])!r} (token {token}), at which the model "
                f"doesn't stop to generate, by its generation config ({stops}); the first such row "
                f"is {where}. Add {token} to eos_token_id in the generation_config.json of the "
                "model, or give a template that ends turns with what stops it (chat_template)."
            )


@dataclass(frozen=True)
class _Split:
    """Token ids of a row's sequences before truncation, in turn.

    Attributes:
        prompted: what was rendered.
        names, prompts, responses: of each sequence its response's column and its ids.
        lost: ids that ended a prompt alone, but not within a sequence; of each of `prompted`.
        ended: whether a response got its end token although a template rendered it.
    """

    row: TextRow
    prompted: list[Prompted]
    names: list[str]
    prompts: list[list[int]]
    responses: list[list[int]]
    lost: list[list[int]]
    ended: bool

    @property
    def num_tokens(self) -> int:
        """Tokens of the longest sequence."""
        return max(len(prompt) + len(ids) for prompt, ids in zip(self.prompts, self.responses))


def _split(row: TextRow, renderer: Renderer, *, as_chat: bool) -> _Split | str:
    """The tokens of a row, checked, or the reason to drop it."""
    if isinstance(row, RankedRow) and len(row.responses) < 2:
        return "fewer than 2 responses"
    marks = (renderer.tokenizer.bos_token, renderer.tokenizer.eos_token)
    if any(is_empty(x, marks) for given in row.prompted for x in given.responses.values()):
        return "empty response"
    split = _Split(row, [], [], [], [], [], False)
    for given in row.prompted:
        asked = _as_chat(given, renderer.tokenizer) if as_chat else given
        with placed(row.where):
            whole, prompt, sides = _rendered(asked, renderer)
            start = min(common_prefix_length(prompt, side) for side in sides)
            found = [
                renderer.checked(whole, name, prompt, side[start:])
                for name, side in zip(asked.responses, sides)
            ]
        responses = [ids for ids, _ in found]
        if asked is not given and asked.prefix is None:
            responses = _as_written(responses, given, renderer.tokenizer)
        split.prompted.append(asked)
        split.names.extend(asked.responses)
        split.prompts.extend([prompt[:start]] * len(sides))
        split.responses.extend(responses)
        split.lost.append(prompt[start:])
        if any(ended for _, ended in found):
            split = replace(split, ended=True)
    return split


def _rendered(row: Prompted, renderer: Renderer) -> tuple[Prompted, list[int], list[list[int]]]:
    """What is rendered, the ids of its prompt alone, and those of it with each of its responses."""
    rendered, options = False, options_of(row)
    if row.prefix is not None:
        rendered = isinstance(row.prompt, list)
        row = renderer.opened(row)
    texts = [renderer.join(row, text) for text in row.responses.values()]
    prompt = renderer.ids(row.prompt, options, rendered=rendered, add_generation_prompt=True)
    return row, prompt, [renderer.ids(text, options, rendered=rendered) for text in texts]


def _as_chat(row: Prompted, tokenizer: "PreTrainedTokenizerBase") -> Prompted:
    """The row with its strings as messages; the same object where it stays as it is."""
    if not isinstance(row.prompt, str) or not takes_as_chat(row.prompt, tokenizer):
        return row
    responses: dict[str, Any] = row.responses
    if row.prefix is None:
        responses = {x: [{"role": "assistant", "content": y}] for x, y in responses.items()}
    return replace(row, prompt=messages_of(row.prompt), responses=responses)


def _as_written(responses: list[list[int]], row: Prompted, tokenizer: Any) -> list[list[int]]:
    """Strings taken as messages that are not to end, without the end that a template gave them."""
    if row.append_eos:
        return responses
    texts = map(str, row.responses.values())
    return [_less_after(ids, text, tokenizer) for ids, text in zip(responses, texts)]


def _less_after(ids: list[int], text: str, tokenizer: Any) -> list[int]:
    """The tokens up to where they hold the text of a response, without what a template added."""

    def holds(count: int) -> bool:
        return text.strip() in tokenizer.decode(ids[:count], clean_up_tokenization_spaces=False)

    return ids[: bisect_left(range(len(ids)), True, key=holds)]


def _within(split: _Split, max_length: int | None, overlong: str) -> TokenizedExample | str:
    """The example within `max_length` tokens a sequence by the choice `overlong`, or why to drop
    it."""
    example = _truncate(split, max_length if overlong == "truncate" else None)
    fits = max_length is None or split.num_tokens <= max_length
    # What no length would save is no matter of length.
    if overlong == "truncate" or fits or isinstance(example, str):
        return example
    if overlong == "drop":
        return "longer than max_length"
    sizes = [(len(x), len(y)) for x, y in zip(split.prompts, split.responses)]
    prompt, response = size = max(sizes, key=sum)
    name = split.names[sizes.index(size)]
    what = f"{name} response" if name in ("chosen", "rejected") else name
    raise DataError(
        f"{split.row.where}: prompt and {what} have {prompt + response} tokens "
        f"({prompt} + {response}), max_length is {max_length}. Raise max_length "
        f"to at least {prompt + response}, or set overlong=truncate or overlong=drop."
    )


def _truncate(split: _Split, max_length: int | None) -> TokenizedExample | str:
    """The example with its sequences cut to `max_length` tokens, or the reason to drop it."""
    prompts, responses = split.prompts, split.responses
    if not all(prompts):
        return "no prompt token"
    cut = responses
    if max_length is not None:
        if any(len(prompt) >= max_length for prompt in prompts):
            return "responses truncated to nothing"
        cut = [ids[: max_length - len(prompt)] for prompt, ids in zip(prompts, responses)]
    if not all(cut):
        return "empty response"
    if _alike(prompts, responses):
        return "identical responses"
    if _alike(prompts, cut):
        return "identical responses after truncation"
    return _example(split.row, prompts, cut)


def _alike(prompts: list[list[int]], responses: list[list[int]]) -> bool:
    """Whether several sequences are all the same."""
    sequences = list(zip(prompts, responses))
    return len(sequences) > 1 and all(x == sequences[0] for x in sequences)


def _example(
    row: TextRow, prompts: list[list[int]], responses: list[list[int]]
) -> TokenizedExample:
    more: dict[str, Any] = {"extra": row.extra, "where": row.where, **row.numbers}
    if isinstance(row, RankedRow):
        return TokenizedList(prompts[0], responses, row.scores, **more)
    if isinstance(row, LabeledRow):
        return TokenizedSingle(prompts[0], responses[0], row.label, **more)
    if prompts[1] != prompts[0]:
        more["rejected_prompt_ids"] = prompts[1]
    return TokenizedPair(prompts[0], *responses, **more)
