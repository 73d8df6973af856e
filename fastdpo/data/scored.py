"""Which tokens of an example are scored: other divisions into prompts and responses.

The tokens of each sequence stay what they are, so these change no hidden state.
"""

from dataclasses import replace

from fastdpo.data.examples import TokenizedExample, TokenizedList, TokenizedPair
from fastdpo.data.rendering import common_prefix_length
from fastdpo.errors import DataError


def with_scored_prompt(example: TokenizedExample) -> TokenizedExample:
    """The example with its prompts' tokens scored too, and counted in the lengths.

    That is the likelihood of prompt and response together (DOVE, arXiv 2404.00530): the prompt is
    left with its first token, which nothing predicts.
    """
    first, rest = example.prompt_ids[:1], example.prompt_ids[1:]
    if isinstance(example, TokenizedPair):
        other = example.rejected_prompt_ids
        more = {} if other is None else {"rejected_prompt_ids": other[:1]}
        chosen_ids = rest + example.chosen_ids
        rejected_ids = (rest if other is None else other[1:]) + example.rejected_ids
        return replace(
            example, prompt_ids=first, chosen_ids=chosen_ids, rejected_ids=rejected_ids, **more
        )
    if isinstance(example, TokenizedList):
        responses = [rest + ids for ids in example.responses_ids]
        return replace(example, prompt_ids=first, responses_ids=responses)
    return replace(example, prompt_ids=first, response_ids=rest + example.response_ids)


def from_first_difference(pair: TokenizedPair) -> TokenizedPair:
    """The pair with what both responses begin with as part of the prompt.

    As MCTS-DPO sums (arXiv 2405.00451, its released code); both keep a token where one is the
    beginning of the other.

    Raises DataError where the two have different prompts.
    """
    if pair.rejected_prompt_ids is not None:
        raise DataError(
            f"{pair.where}: from_first_difference needs one prompt, and the responses have two. "
            "Leave the option or the row out."
        )
    chosen, rejected = pair.chosen_ids, pair.rejected_ids
    start = min(common_prefix_length(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    prompt_ids = pair.prompt_ids + chosen[:start]
    return replace(
        pair, prompt_ids=prompt_ids, chosen_ids=chosen[start:], rejected_ids=rejected[start:]
    )
