"""Judges that compare two responses to a prompt, and a causal language model as one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import Any

import torch

from fastdpo.data.examples import TokenizedPair
from fastdpo.data.records import Candidate, Text
from fastdpo.data.rendering import content_of, text_of
from fastdpo.errors import ConfigError, ModelError
from fastdpo.model.logps import pair_logps

JUDGE_TEMPLATE = """\
Two answers to the same message follow. Decide which one is better: more correct, more helpful and \
more to the point. Neither its length nor its place makes an answer better.

[Message]
{prompt}

[Answer A]
{first}

[Answer B]
{second}

Which answer is better? Reply with one letter, A or B."""


@dataclass(frozen=True)
class Judge:
    """A pairwise judge; every comparison is made in both orders and averaged.

    Judges favour a place: swapping and averaging takes that out (arXiv 2305.17926, "balanced
    position calibration"). `ask` gives the probability that the answer is the letter A, of each
    text. The same two responses are a tie, without asking.
    """

    ask: Callable[[list[str]], list[float]]
    template: str = JUDGE_TEMPLATE

    def compare(
        self, prompts: Sequence[Text], first: Sequence[str], second: Sequence[str]
    ) -> list[float]:
        """Probability that `first[i]` is the better response to `prompts[i]`."""
        asked = [i for i in range(len(prompts)) if first[i] != second[i]]
        both = [(prompts[i], *x) for i in asked for x in permutations((first[i], second[i]))]
        texts = [self._text(*x) for x in both]
        wins = [0.5] * len(prompts)
        answers = self.ask(texts) if texts else []
        for i, forward, backward in zip(asked, answers[0::2], answers[1::2]):
            wins[i] = (forward + 1 - backward) / 2
        return wins

    def __call__(self, rows: Sequence[Candidate]) -> list[float]:
        """Mean probability of each response to win against the others of its prompt.

        0.5 where there are none. `rows` hold whole prompts: n responses take n (n - 1) questions.
        """
        members: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            members.setdefault(row.prompt_index, []).append(i)
        contests = [pair for group in members.values() for pair in combinations(group, 2)]
        wins = self.compare(
            [rows[i].prompt for i, _ in contests],
            [rows[i].response for i, _ in contests],
            [rows[j].response for _, j in contests],
        )
        sums = [0.0] * len(rows)
        for (i, j), win in zip(contests, wins):
            sums[i] += win
            sums[j] += 1 - win
        others = [len(members[row.prompt_index]) - 1 for row in rows]
        return [total / count if count else 0.5 for total, count in zip(sums, others)]

    def _text(self, prompt: Text, first: str, second: str) -> str:
        return self.template.format(prompt=_conversation(prompt), first=first, second=second)


def check_template(template: str) -> None:
    """Raise ConfigError unless a judge's template has the fields prompt, first and second only."""
    names = "{prompt}, {first} and {second}"
    try:
        filled = template.format(prompt="\0p", first="\0f", second="\0s")
    except (LookupError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"judge_template must have the fields {names} only ({type(error).__name__}: {error}); "
            "write a brace that is meant as {{ or }}"
        ) from error
    if not all(mark in filled for mark in ("\0p", "\0f", "\0s")):
        raise ConfigError(f"judge_template must have the fields {names}, got {template!r}")


def _conversation(prompt: Text) -> str:
    """What the answers reply to; roles are named where there is more than one message."""
    if isinstance(prompt, str) or len(prompt) == 1:
        return text_of(prompt)
    return "\n\n".join(f"{message['role']}: {content_of(message)}" for message in prompt)


@dataclass(frozen=True)
class LocalJudge:
    """Probability of A against B as the next token of a causal language model.

    `model` is of `fastdpo.model.logps.load_packed`. Raises ModelError as `letters` does.
    """

    model: Any
    tokenizer: Any
    batch_size: int

    def __post_init__(self) -> None:
        self.letters("x")

    def __call__(self, texts: list[str]) -> list[float]:
        pairs = [self.letters(text) for text in texts]
        logp_P2 = pair_logps(self.model, pairs, batch_size=self.batch_size)
        return torch.sigmoid(logp_P2[:, 0] - logp_P2[:, 1]).tolist()

    def letters(self, text: str) -> TokenizedPair:
        """The letters A and B after a question.

        Raises ModelError where the letters aren't one token each.
        """
        if self.tokenizer.chat_template is None:
            rendered, special = text + "\nAnswer:", True
        else:
            special = False
            # Models that can think first are told not to; other templates pass the option over.
            rendered = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,
            )

        def ids_of(ending: str) -> list[int]:
            return self.tokenizer(text=rendered + ending, add_special_tokens=special)["input_ids"]

        ids = ids_of("")
        # A word begins with a space, unless there is one already.
        for space in ("",) if rendered[-1:].isspace() else (" ", ""):
            a, b = ids_of(space + "A"), ids_of(space + "B")
            if a[:-1] == ids == b[:-1] and a[-1] != b[-1]:
                return TokenizedPair(ids, a[-1:], b[-1:])
        raise ModelError(
            "the judge's tokenizer doesn't make one token each of the letters A and B after a "
            "question. Use another model, or serve it and name its URL."
        )
