"""Checked rows -> tokenized pairs, by a tokenizer and its chat template.

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

A pair is dropped when a response is empty, when no token is left of the prompt or of a response, or
when both responses are the same tokens.
"""

import warnings
from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fastdpo.data.batch import TokenizedPair
from fastdpo.data.budget import check_overlong, counted
from fastdpo.data.records import PreferenceRow, Prompt, messages_of, placed
from fastdpo.data.rendering import (
    Renderer,
    check_string_prompts,
    common_prefix_length,
    is_empty,
    options_of,
    starts_with,
    takes_as_chat,
)
from fastdpo.errors import DataError
from fastdpo.progress import bar, parts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Why a pair is dropped that a larger max_length would save.
_TOO_LONG = {
    "responses truncated to nothing", "identical responses after truncation",
    "longer than max_length",
}  # fmt: skip


@dataclass(frozen=True)
class TokenizedPairs:
    """What `tokenize_dataset` made of a dataset."""

    pairs: list[TokenizedPair]
    dropped_at: dict[str, list[str]]  # reason -> the rows left out
    truncated_at: list[str]  # rows kept with a response cut at max_length
    max_length: int | None = None
    # Rows kept whose prompt is a string that the tokenizer's chat template did not render.
    as_text_at: list[str] = field(default_factory=list)

    @property
    def dropped(self) -> dict[str, int]:
        return {reason: len(rows) for reason, rows in self.dropped_at.items()}

    @property
    def truncated(self) -> int:
        return len(self.truncated_at)

    def __str__(self) -> str:
        """One line for what was kept, and one a reason for what was not."""
        cut = f"{counted(self.truncated_at)} truncated to max_length={self.max_length}"
        lines = [f"{len(self.pairs)} pairs, {cut}"]
        lines += [f"dropped {counted(at)}: {reason}" for reason, at in self.dropped_at.items()]
        return "\n".join(lines)


def tokenize_dataset(
    rows: Sequence[PreferenceRow],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None,
    overlong: str = "truncate",
    stop_ids: Collection[int] | None = None,
    string_prompts: str = "text",
    progress: bool = True,
) -> TokenizedPairs:
    """Tokenize all pairs, in order, by the rules of this module.

    `stop_ids` are the tokens that end the model's generation (`fastdpo.model.load.stop_ids`); None:
    not known, and not compared with what ends the responses.

    `string_prompts` says what a prompt that is a string is: "text", or, where `takes_as_chat` says
    so, "chat".

    `overlong` says what happens to a pair with a side, prompt + response, over `max_length` tokens:

    - "truncate": the first `max_length` tokens of each side are kept. A prompt that leaves no room
      for a token of a response can't be truncated so; its pair is dropped.
    - "drop": the pair is dropped.
    - "stop": the first such pair raises DataError.

    The last two leave pairs aside that are dropped whatever their length (no prompt token, empty or
    identical responses): those count by that reason and don't stop anything.

    Dropped and truncated pairs are named by their rows. One warning each tells of prompts that lost
    tokens, of messages that the chat template gave no beginning token or left out, and of responses
    that it didn't end or ended in none of `stop_ids`.

    Raises DataError when a row can't be rendered, when the chat template leaves out text of a
    response and when no pair is left, and ValueError when `max_length` < 2, `overlong` is none of
    the three or `string_prompts` none of the two.
    """
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length must be at least 2 (prompt and response), got {max_length}")
    check_overlong(overlong)
    check_string_prompts(string_prompts)
    if not rows:
        raise DataError("there are no rows to tokenize. Give at least one preference pair.")
    result, kept, notes = TokenizedPairs([], {}, [], max_length), [], _Notes()
    longest = 0  # of the pairs that are dropped for their length
    renderer = Renderer(tokenizer, stop_ids)
    with bar("tokenizing", len(rows), "pair", shown=progress) as shown, shown.part(len(rows)):
        for given in parts(rows):
            row = _as_chat(given, tokenizer) if string_prompts == "chat" else given
            split = _split_pair(row, renderer)
            if row is not given and isinstance(split, _SplitPair):
                split = _as_written(split, given, tokenizer)
            pair = split if isinstance(split, str) else _within(split, max_length, overlong)
            if isinstance(split, str) or isinstance(pair, str):
                result.dropped_at.setdefault(str(pair), []).append(row.where)
                if pair in _TOO_LONG and isinstance(split, _SplitPair):
                    longest = max(longest, split.num_tokens)
                continue
            result.pairs.append(pair)
            kept.append(row)
            notes.add(row, split, renderer)
            if isinstance(row.prompt, str) and tokenizer.chat_template is not None:
                result.as_text_at.append(row.where)
            if max_length is not None and split.num_tokens > max_length:
                result.truncated_at.append(row.where)
    if not kept:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in result.dropped.items())
        ways = []
        if longest:
            ways.append(f"Raise max_length={max_length}, to keep all of them to {longest}.")
        if result.dropped.keys() - _TOO_LONG:
            ways.append("Give pairs whose chosen and rejected differ and are not empty.")
        raise DataError(
            f"{rows[0].where} to {rows[-1].where}: no pair is left ({reasons}). " + " ".join(ways)
        )
    warn_of_unread(kept, tokenizer)
    for message in (*notes.messages(len(kept), renderer), *_ends_that_do_not_stop(renderer)):
        warnings.warn(message, stacklevel=2)
    return result


def warn_of_unread(rows: Sequence[PreferenceRow | Prompt], tokenizer: Any) -> None:
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

    def add(self, row: PreferenceRow, split: "_SplitPair", renderer: Renderer) -> None:
        if split.ended:
            self.ended_at.append(row.where)
        if isinstance(row.prompt, list) and not starts_with(split.prompt_ids, renderer.prefix):
            self.unbegun_at.append(row.where)
        if split.lost_ids:
            self.lost_at.append(f"{row.where}: {renderer.tokenizer.decode(split.lost_ids)!r}")

    def messages(self, total: int, renderer: Renderer) -> Iterator[str]:
        """One a kind, of `total` pairs."""
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
                f"{len(self.ended_at)} of {total} pairs: the chat template ends a turn of the "
                f"assistant with no token that stops generation, so {end!r} was "
                f"put after the responses; the first is {self.ended_at[0]}. Give a template that "
                "ends its turns (chat_template), or set append_eos to false in rows that are not "
                "to end."
            )
        if self.unbegun_at:
            begin = renderer.tokenizer.decode(renderer.prefix)
            yield (
                f"{len(self.unbegun_at)} of {total} pairs: the chat template doesn't begin with "
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
class _SplitPair:
    """Token ids before truncation. `lost_ids` ended the prompt alone, but not within a side;
    `ended` says that a response got its end token although a template rendered it."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    lost_ids: list[int]
    extra: dict[str, Any]
    where: str
    ended: bool

    @property
    def num_tokens(self) -> int:
        """Tokens of the longer side."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


def _split_pair(row: PreferenceRow, renderer: "Renderer") -> _SplitPair | str:
    """The tokens of a pair, checked, or the reason to drop it."""
    marks = (renderer.tokenizer.bos_token, renderer.tokenizer.eos_token)
    if is_empty(row.chosen, marks) or is_empty(row.rejected, marks):
        return "empty response"
    options = options_of(row)
    responses = {"chosen": row.chosen, "rejected": row.rejected}
    with placed(row.where):
        prompt = renderer.ids(row.prompt, options, add_generation_prompt=True)
        sides = [renderer.ids(renderer.join(row, x), options) for x in responses.values()]
        split = min(common_prefix_length(prompt, side) for side in sides)
        found = [
            renderer.checked(row, name, prompt, x[split:]) for name, x in zip(responses, sides)
        ]
    (chosen, chosen_ended), (rejected, rejected_ended) = found
    ended = chosen_ended or rejected_ended
    return _SplitPair(prompt[:split], chosen, rejected, prompt[split:], row.extra, row.where, ended)


def _as_chat(row: PreferenceRow, tokenizer: "PreTrainedTokenizerBase") -> PreferenceRow:
    """The row with its strings as messages; the same object where it stays as it is."""
    if not isinstance(row.prompt, str) or not takes_as_chat(row.prompt, tokenizer):
        return row
    chosen, rejected = ([{"role": "assistant", "content": x}] for x in (row.chosen, row.rejected))
    return replace(row, prompt=messages_of(row.prompt), chosen=chosen, rejected=rejected)


def _as_written(split: _SplitPair, row: PreferenceRow, tokenizer: Any) -> _SplitPair:
    """Strings taken as messages that are not to end, without the end that a template gave them."""
    if row.append_eos:
        return split
    chosen, rejected = (
        _less_after(ids, str(text), tokenizer)
        for ids, text in ((split.chosen_ids, row.chosen), (split.rejected_ids, row.rejected))
    )
    return replace(split, chosen_ids=chosen, rejected_ids=rejected)


def _less_after(ids: list[int], text: str, tokenizer: Any) -> list[int]:
    """The tokens up to where they hold the text of a response, without what a template added."""

    def holds(count: int) -> bool:
        return text.strip() in tokenizer.decode(ids[:count], clean_up_tokenization_spaces=False)

    return ids[: bisect_left(range(len(ids)), True, key=holds)]


def _within(split: _SplitPair, max_length: int | None, overlong: str) -> TokenizedPair | str:
    """The pair within `max_length` tokens a side by the choice `overlong`, or why to drop it."""
    pair = _truncate(split, max_length if overlong == "truncate" else None)
    fits = max_length is None or split.num_tokens <= max_length
    # What no length would save is no matter of length.
    if overlong == "truncate" or fits or isinstance(pair, str):
        return pair
    if overlong == "drop":
        return "longer than max_length"
    sides = {"chosen": len(split.chosen_ids), "rejected": len(split.rejected_ids)}
    side = max(sides, key=lambda name: sides[name])
    raise DataError(
        f"{split.where}: prompt and {side} response have {split.num_tokens} tokens "
        f"({len(split.prompt_ids)} + {sides[side]}), max_length is {max_length}. Raise max_length "
        f"to at least {split.num_tokens}, or set overlong=truncate or overlong=drop."
    )


def _truncate(split: _SplitPair, max_length: int | None) -> TokenizedPair | str:
    """The pair with both sides cut to `max_length` tokens, or the reason to drop it."""
    if not split.prompt_ids:
        return "no prompt token"
    if max_length is not None and len(split.prompt_ids) >= max_length:
        return "responses truncated to nothing"
    room = None if max_length is None else max_length - len(split.prompt_ids)
    chosen, rejected = split.chosen_ids[:room], split.rejected_ids[:room]
    if not chosen or not rejected:
        return "empty response"
    if split.chosen_ids == split.rejected_ids:
        return "identical responses"
    if chosen == rejected:
        return "identical responses after truncation"
    return TokenizedPair(split.prompt_ids, chosen, rejected, extra=split.extra, where=split.where)
