# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false
# pyright: reportArgumentType=false
"""Lists, pairs of two prompts and scored prompts in a batch: each sequence against itself alone."""

import copy

import pytest
import torch
from test_rope import GEMMA3, PHI3, SWITCH, build, ids
from tiny import LLAMA

from fastdpo.data.batch import pack_pairs, padded_tokens, plan_batches
from fastdpo.data.examples import LAYOUTS, TokenizedList, TokenizedPair, TokenizedSingle
from fastdpo.loss.ops import linear_logp
from fastdpo.loss.reference import sequence_sums
from fastdpo.model.balance import token_mask
from fastdpo.model.head import packed_forward
from fastdpo.model.prepare import layout_of, prepare_model


def some_list(prompt, *responses):
    texts = [ids(count, seed) for seed, count in enumerate(responses, 2)]
    return TokenizedList(ids(prompt, 1), texts, [float(i) for i in range(len(texts))])


# Long enough to fall on both sides of the switch of PHI3 and GEMMA3, in turn.
LISTS = [some_list(20, 5, 70, 9, 60, 30), some_list(7, 3, 12), some_list(40, 30, 30, 4)]
PAIRS = [
    TokenizedPair(ids(20, 1), ids(9, 2), ids(12, 3), rejected_prompt_ids=ids(33, 4)),
    TokenizedPair(ids(20, 1), ids(70, 2), ids(12, 3)),
    TokenizedPair(ids(5, 1), ids(8, 2), ids(8, 2), rejected_prompt_ids=ids(61, 4)),
]
SCORED = [
    TokenizedPair(ids(20, 1), ids(9, 2), ids(60, 3), prompt_nll=True),
    TokenizedPair(ids(30, 1), ids(50, 2), ids(12, 3), prompt_nll=True),
    TokenizedPair(ids(2, 1), ids(3, 2), ids(5, 3), prompt_nll=True),
]
SINGLES = [TokenizedSingle(ids(9, 1), ids(n, 2), n % 2 == 0) for n in (4, 9, 66)]
KINDS = {"lists": LISTS, "pairs": PAIRS, "scored prompts": SCORED, "singles": SINGLES}


def alone(plain, examples):
    """Log-prob sums of each sequence from full logits, of a model that has seen no other; the
    tokens of a scored prompt are those before the chosen response."""
    rotary, sums = copy.deepcopy(plain.model.rotary_emb), []
    for one in examples:
        for s, (prompt, response) in enumerate(zip(one.prompts, one.responses)):
            tokens = prompt + response
            whole = tokens + (one.chosen_ids if s >= one.num_computed else [])
            plain.model.rotary_emb = copy.deepcopy(rotary)
            logits = plain(torch.tensor([whole]), use_cache=False).logits[0]
            rows = logits.log_softmax(-1)[len(prompt) - 1 : len(tokens) - 1]
            sums.append(rows.gather(1, torch.tensor(response)[:, None]).sum())
    return torch.stack(sums)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("of", [LLAMA, GEMMA3, PHI3], ids=lambda of: of.name)
def test_every_sequence_is_what_it_is_alone(of, layout):
    plain = build(of)
    model = prepare_model(copy.deepcopy(plain), layout=layout)
    for kind, examples in KINDS.items():
        plain.zero_grad()
        model.zero_grad()
        batch = pack_pairs(examples, layout=layout_of(model))
        assert batch.num_tokens == sum(x.num_tokens(layout_of(model)) for x in examples) or (
            layout == "padded"
        )

        def of_targets(h_TD, w_VD, **head):
            return linear_logp(h_TD, w_VD, batch.target_N, rows_N=batch.rows_N, **head)  # noqa: B023

        logp_N = packed_forward(model, batch, of_targets)
        logp_S, wanted_S = sequence_sums(logp_N, batch.bounds_S1), alone(plain, examples)
        torch.testing.assert_close(logp_S, wanted_S, rtol=1e-6, atol=1e-6, msg=kind)
        weight_S = torch.randn(len(wanted_S), dtype=torch.float64)
        (weight_S * logp_S).sum().backward()
        (weight_S * wanted_S).sum().backward()
        for (name, p), q in zip(plain.named_parameters(), model.parameters()):
            scale = float(p.grad.abs().max())
            torch.testing.assert_close(
                q.grad, p.grad, rtol=1e-5, atol=1e-6 * scale, msg=f"{kind}: {name}"
            )


def test_a_prompt_of_a_list_is_there_once_for_each_length_class():
    layout = layout_of(prepare_model(build(PHI3)))
    one = LISTS[0]
    short = [x for x in one.responses if len(x) + 20 <= SWITCH]
    assert 0 < len(short) < len(one.responses)
    responses = sum(map(len, one.responses))
    assert one.num_tokens(layout) == 2 * 20 + responses
    assert one.num_tokens("shared") == 20 + responses
    assert one.num_tokens("packed") == 5 * 20 + responses
    assert one.num_tokens("padded") == 5 * 90


def test_gradients_of_half_precision_keys_are_summed_in_fp32():
    """Of a list the prompt's keys get many gradients, each of which would round."""
    from fastdpo.model.attention import _GatherKeys

    segments = pack_pairs([some_list(3, *[1] * 40)]).segments
    x = torch.randn(43, 1, 4, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.rand(len(segments.key_rows_K), 1, 4).bfloat16()
    _GatherKeys.apply(x, segments).backward(grad)
    wanted = torch.zeros(43, 1, 4).index_add_(0, segments.key_rows_K, grad.float())
    assert torch.equal(x.grad, wanted.bfloat16())


def test_padding_of_lists_is_counted_and_masked():
    examples = [*LISTS, some_list(3, 4, 4, 4, 4, 4, 4, 4)]
    lengths = [x.num_tokens("padded") for x in examples]
    counts = [x.num_computed for x in examples]
    most = max(lengths)
    plan = plan_batches(lengths, max_tokens=most, padded=True, sequences=counts)
    assert sorted(i for batch in plan for i in batch) == [0, 1, 2, 3]
    for index in plan:
        batch = pack_pairs([examples[i] for i in index], index, layout="padded")
        tokens = padded_tokens([lengths[i] for i in index], [counts[i] for i in index])
        assert batch.num_tokens == tokens <= most
    for kind in (LISTS, SCORED):
        batch = pack_pairs(kind, layout="padded")
        rows = [len(p) + len(r) for one in kind for p, r in computed(one)]
        assert token_mask(batch).sum(1).tolist() == rows


def computed(one):
    return list(zip(one.prompts, one.responses))[: one.num_computed]
