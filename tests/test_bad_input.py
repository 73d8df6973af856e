"""A thousand bad calls of each public op: each ends in a TypeError or ValueError that says where.

A valid call is corrupted in one argument, or in up to three where their faults cannot cancel.  A
wrong result, another exception (an IndexError from inside, an AttributeError) or a message that
names none of the corrupted arguments fails.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdpo import LinearDPOLoss, linear_dpo_loss, linear_logp, linear_preference_loss
from fastdpo.kernels import support
from fastdpo.loss.lists import lipo_lambda
from fastdpo.loss.objectives import lr_dpo, nca_pair
from fastdpo.loss.reference import IGNORE

D, V, PAIRS, L = 6, 17, 2, 5
SIZES = (3, 2, 4, 1)
N = sum(SIZES)
EXAMPLES = 1000


@pytest.fixture(autouse=True, scope="module")
def no_interpreter():
    """Without it the kernels cannot run on a CPU, and asking for them is an error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(support, "is_interpreted", lambda: False)
        yield


Args = dict[str, Any]
Draw = Callable[[st.SearchStrategy], Any]


class Corruption(NamedTuple):
    """``apply`` breaks the call; the error then has one of ``words`` in its message.

    ``alone`` marks faults of one argument relative to another, which a second fault might undo.
    """

    argument: str
    apply: Callable[[Args, Draw], None]
    words: tuple[str, ...]
    alone: bool


# ------------------------------------------------------------------------------------- valid calls
def valid_logp() -> Args:
    return {
        "h_TD": torch.randn(N, D),
        "w_VD": torch.randn(V, D),
        "target_N": torch.arange(N) % V,
        "rows_N": torch.arange(N),
        "bias_V": torch.randn(V),
        "scale": 1.0,
        "softcap": 20.0,
        "workspace_mib": 1.0,
        "impl": "torch",
    }


def valid_preference() -> Args:
    return {
        **valid_logp(),
        "bounds_S1": torch.tensor([0, *np.cumsum(SIZES)]),
        "ref_logp_S": -torch.rand(2 * PAIRS) * 9,
        "objective": lr_dpo(0.1),
        "margin_P": torch.randn(PAIRS),
        "smoothing_P": torch.rand(PAIRS) / 2,
        "weight_P": torch.rand(PAIRS),
        "num_pairs": 2.0,
        "stats": ("entropy",),
    }


def valid_lists() -> Args:
    args = {**valid_preference(), "objective": lipo_lambda(0.1)}
    return args | {
        "margin_P": None, "smoothing_P": None,  # which lists don't have
        "firsts_P1": (0, 2, 4), "scores_S": torch.rand(2 * PAIRS), "desirable_P": None,
        "mean_chosen_length": 2.0, "shift": 0.1,
    }  # fmt: skip


def valid_dpo() -> Args:
    args = {**valid_preference(), "beta": 0.1, "alpha": 0.01}
    del args["objective"]
    return args


def valid_module() -> Args:
    """The padded layout, with the settings of the constructor among the arguments."""
    args = valid_dpo()
    for name in ("rows_N", "bounds_S1"):
        del args[name]
    args["h_TD"] = torch.randn(2 * PAIRS, L, D)
    args["target_N"] = torch.arange(2 * PAIRS * L).reshape(2 * PAIRS, L) % V
    return args


def call_module(**args: Any) -> Any:
    made = {k: args.pop(k) for k in ("beta", "alpha", "scale", "softcap") if k in args}
    return LinearDPOLoss(**made)(**args)


# ----------------------------------------------------------------------------------------- faults
def replaced(argument: str, value: Callable[[Any, Draw], Any], *words: str, alone: bool = False):
    """Put ``value(old, draw)`` in the argument's place."""

    def apply(args: Args, draw: Draw) -> None:
        args[argument] = value(args[argument], draw)

    return Corruption(argument, apply, (argument, *words), alone)


NOT_TENSORS = st.one_of(
    st.text(max_size=9),
    st.binary(max_size=9),
    st.integers(),
    st.floats(),
    st.booleans(),
    st.complex_numbers(),
    st.lists(st.floats(-9, 9), max_size=4),
    st.lists(st.integers(-9, 9), max_size=4).map(np.array),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
    st.sampled_from([object(), torch.float32, torch.nn.Linear(2, 2), len]),
)
NOT_NUMBERS = st.one_of(
    st.text(max_size=9),
    st.booleans(),
    st.complex_numbers(),
    st.lists(st.floats(-9, 9), max_size=3),
    st.builds(lambda x: torch.tensor(x), st.floats(0.1, 9)),
    st.builds(lambda x: np.array([x]), st.floats(0.1, 9)),
    st.just(object()),
)
NOT_FINITE = st.sampled_from([float("nan"), float("inf"), float("-inf"), 10**400, -(10**400)])
POSITIVE = st.floats(1e-6, 1e6)
INTEGER_DTYPES = st.sampled_from([torch.int64, torch.int32, torch.uint8, torch.bool])
SOME = st.integers(1, 5)


def not_a_tensor(name: str, *words: str, optional: bool = False) -> Corruption:
    junk = NOT_TENSORS if optional else st.one_of(st.none(), NOT_TENSORS)
    return replaced(name, lambda _, draw: draw(junk), *words)


def wrong_ndim(name: str, *words: str) -> Corruption:
    def value(x: torch.Tensor, draw: Draw) -> torch.Tensor:
        more = x[(None,) * draw(SOME)]
        return draw(st.sampled_from([x.flatten()[0], more, x.flatten() if x.ndim > 1 else more]))

    return replaced(name, value, *words)


def sparse(name: str, *words: str) -> Corruption:
    return replaced(name, lambda x, _: x.to_sparse(), *words)


def meta(name: str, *words: str) -> Corruption:
    return replaced(name, lambda x, _: x.to("meta"), *words, alone=True)


def other_dtype(name: str, dtypes: st.SearchStrategy, *words: str) -> Corruption:
    return replaced(name, lambda x, draw: x.to(draw(dtypes)), *words)


def other_float(name: str, *words: str) -> Corruption:
    floats = st.sampled_from([torch.float64, torch.float16, torch.bfloat16])
    return replaced(name, lambda x, draw: x.to(draw(floats)), *words, alone=True)


def other_length(name: str, *words: str, dim: int = 0) -> Corruption:
    def value(x: torch.Tensor, draw: Draw) -> torch.Tensor:
        size = draw(st.integers(0, 40).filter(lambda n: n != x.shape[dim]))
        index = torch.arange(size) % x.shape[dim]
        return x.index_select(dim, index)

    return replaced(name, value, *words, alone=True)


def one_entry(name: str, entries: st.SearchStrategy, *words: str) -> Corruption:
    def value(x: torch.Tensor, draw: Draw) -> torch.Tensor:
        x = x.clone()
        x.view(-1)[draw(st.integers(0, x.numel() - 1))] = draw(entries)
        return x

    return replaced(name, value, *words)


def wants_grad(name: str) -> Corruption:
    return replaced(name, lambda x, _: x.clone().requires_grad_())


def number(name: str, bad: st.SearchStrategy) -> list[Corruption]:
    """A fault of a scalar: no number, not finite, or out of its range."""
    return [
        replaced(name, lambda _, draw: draw(NOT_NUMBERS)),
        replaced(name, lambda _, draw: draw(NOT_FINITE)),
        replaced(name, lambda _, draw: draw(bad)),
    ]


NEGATIVE_OR_ZERO = st.one_of(
    st.just(0), st.just(0.0), POSITIVE.map(lambda x: -x), st.integers(-9, 0)
)
NO_ROW = st.one_of(st.integers(N, 2**62), st.integers(-(2**62), -1))
NO_TOKEN = st.one_of(st.integers(V, 2**62), st.integers(-(2**62), -1).filter(lambda x: x != IGNORE))
NOT_A_CHOICE = st.one_of(
    st.text(max_size=9), st.integers(), st.none(), st.lists(st.just("torch"), max_size=2)
).filter(lambda x: x not in ("auto", "torch", "triton"))


def head_faults(h: str, h_words: tuple[str, ...] = ()) -> list[Corruption]:
    """Faults of what `linear_logp` and the losses have in common; ``h`` names the hidden rows."""
    return [
        not_a_tensor(h, *h_words),
        sparse(h, *h_words),
        meta(h, *h_words),
        other_dtype(h, INTEGER_DTYPES, *h_words),
        other_dtype(h, st.just(torch.complex64), *h_words),
        other_float(h, *h_words),
        other_length(h, *h_words, dim=-1),
        not_a_tensor("w_VD"),
        wrong_ndim("w_VD"),
        sparse("w_VD"),
        meta("w_VD"),
        other_dtype("w_VD", INTEGER_DTYPES),
        other_float("w_VD"),
        other_length("w_VD", "bias_V", "target_N"),
        other_length("w_VD", dim=1),
        replaced("w_VD", lambda w, draw: w[:0] if draw(st.booleans()) else w[:, :0]),
        not_a_tensor("bias_V", optional=True),
        wrong_ndim("bias_V"),
        meta("bias_V"),
        other_dtype("bias_V", INTEGER_DTYPES),
        other_float("bias_V"),
        other_length("bias_V"),
        *number("scale", st.sampled_from([0, 0.0, -0.0])),
        *number("softcap", NEGATIVE_OR_ZERO),
        *number("workspace_mib", NEGATIVE_OR_ZERO),
        replaced("workspace_mib", lambda _, draw: draw(st.floats(1e-12, 1e-4))),  # not one row
        replaced("impl", lambda _, draw: draw(NOT_A_CHOICE)),
        replaced("impl", lambda *_: "triton"),
    ]


TOKEN_FAULTS = [
    wrong_ndim("h_TD"),
    other_length("h_TD", "rows_N", dim=0)._replace(
        apply=lambda args, draw: args.update(h_TD=args["h_TD"][: draw(st.integers(0, N - 1))])
    ),
    not_a_tensor("target_N"),
    wrong_ndim("target_N"),
    meta("target_N"),
    other_dtype("target_N", st.sampled_from([torch.int32, torch.float32, torch.bool])),
    other_length("target_N"),
    one_entry("target_N", NO_TOKEN),
    not_a_tensor("rows_N", optional=True),
    wrong_ndim("rows_N"),
    meta("rows_N"),
    other_dtype("rows_N", st.sampled_from([torch.int32, torch.float32, torch.bool])),
    other_length("rows_N"),
    one_entry("rows_N", NO_ROW),
]


def decreasing(x: torch.Tensor, draw: Draw) -> torch.Tensor:
    s = draw(st.integers(1, len(x) - 2))
    x = x.clone()
    x[s] = draw(st.one_of(st.integers(-(2**40), int(x[s - 1])), st.integers(int(x[s + 1]), 2**40)))
    return x


def wrong_ends(x: torch.Tensor, draw: Draw) -> torch.Tensor:
    x = x.clone()
    x[draw(st.sampled_from([0, -1]))] += draw(st.integers(-(2**40), 2**40).filter(bool))
    return x


def mask_response(args: Args, draw: Draw) -> None:
    s = draw(st.integers(0, 2 * PAIRS - 1))
    if args["target_N"].ndim == 2:
        args["target_N"][s] = IGNORE
    else:
        edges = args["bounds_S1"].tolist()
        args["target_N"][edges[s] : edges[s + 1]] = IGNORE


def no_reference(args: Args, _: Draw) -> None:
    args["ref_logp_S"] = None


def with_reference_rows(apply: Callable[[Args, Draw], None], *words: str) -> Corruption:
    """A fault of the reference's hidden rows or head."""

    def both(args: Args, draw: Draw) -> None:
        rows = args["h_TD"]
        args |= {"ref_logp_S": None, "ref_h_TD": rows.clone(), "ref_w_VD": args["w_VD"].clone()}
        args["ref_bias_V"] = args["bias_V"].clone()
        apply(args, draw)

    return Corruption("ref_logp_S", both, words, alone=True)


def on_reference(corruption: Corruption) -> Corruption:
    return with_reference_rows(corruption.apply, corruption.argument)


MASKED = Corruption("target_N", mask_response, ("response of pair",), alone=True)
REFERENCE_FAULTS = [
    not_a_tensor("ref_logp_S"),
    wrong_ndim("ref_logp_S"),
    meta("ref_logp_S"),
    other_dtype("ref_logp_S", INTEGER_DTYPES),
    other_dtype("ref_logp_S", st.sampled_from([torch.float16, torch.bfloat16])),
    other_length("ref_logp_S"),
    one_entry("ref_logp_S", NOT_FINITE.filter(lambda x: isinstance(x, float))),
    wants_grad("ref_logp_S"),
    Corruption("ref_logp_S", no_reference, ("ref_logp_S",), alone=False),
    *(
        on_reference(fault)
        for name in ("ref_h_TD", "ref_w_VD")
        for fault in (
            not_a_tensor(name),
            wrong_ndim(name),
            sparse(name),
            meta(name),
            other_dtype(name, INTEGER_DTYPES),
            other_float(name),
            other_length(name, dim=-1),
        )
    ),
    on_reference(not_a_tensor("ref_bias_V", optional=True)),
    on_reference(other_length("ref_bias_V")),
    with_reference_rows(lambda args, _: args.update(ref_logp_S=torch.zeros(4)), "ref_logp_S"),
    with_reference_rows(lambda args, _: args.update(ref_w_VD=args["w_VD"][:-1]), "ref_"),
    with_reference_rows(lambda args, _: args.update(ref_h_TD=args["ref_h_TD"][:-1]), "ref_h_TD"),
    with_reference_rows(lambda args, _: args.update(ref_h_TD=None), "ref_w_VD"),
]


def vector_faults(name: str, bad: st.SearchStrategy) -> list[Corruption]:
    return [
        not_a_tensor(name, optional=True),
        wrong_ndim(name),
        meta(name),
        other_dtype(name, INTEGER_DTYPES),
        other_length(name),
        one_entry(name, bad),
        wants_grad(name),
    ]


FINITE_FLOATS = NOT_FINITE.filter(lambda x: isinstance(x, float))
PAIR_FAULTS = [
    *vector_faults("margin_P", FINITE_FLOATS),
    *vector_faults(
        "smoothing_P", st.one_of(FINITE_FLOATS, st.floats(1.001, 9), st.floats(-9, -1e-3))
    ),
    *vector_faults("weight_P", st.one_of(FINITE_FLOATS, st.floats(-9, -1e-3))),
    *number("num_pairs", NEGATIVE_OR_ZERO),
    replaced(
        "stats",
        lambda _, draw: draw(st.one_of(st.text(), st.none(), st.floats(), st.just(object()))),
    ),
    replaced(
        "stats", lambda _, draw: ("entropy", draw(st.one_of(st.text(), st.integers(), st.just([]))))
    ),
    replaced("stats", lambda *_: ("kl_ref",), alone=True),  # there is no ref_h_TD
]
BOUNDS_FAULTS = [
    not_a_tensor("bounds_S1"),
    wrong_ndim("bounds_S1"),
    meta("bounds_S1"),
    other_dtype("bounds_S1", st.sampled_from([torch.float32, torch.int16, torch.bool])),
    other_length("bounds_S1"),
    replaced("bounds_S1", decreasing, "response of pair", alone=True),
    replaced("bounds_S1", wrong_ends, alone=True),
    MASKED,
]
NO_LISTS = st.lists(st.integers(-1, 5), max_size=5).filter(lambda x: x not in ([0, 2, 4], [0, 4]))
LIST_FAULTS = [
    not_a_tensor("firsts_P1", optional=True),
    replaced("firsts_P1", lambda _, draw: tuple(draw(NO_LISTS)), alone=True),
    replaced("firsts_P1", lambda x, _: torch.tensor(x)),
    replaced("firsts_P1", lambda x, draw: (*x[:-1], draw(NOT_NUMBERS))),
    *vector_faults("scores_S", FINITE_FLOATS),
    replaced("scores_S", lambda *_: None),
    replaced("desirable_P", lambda *_: torch.ones(PAIRS)),
    *number("mean_chosen_length", NEGATIVE_OR_ZERO),
    *number("shift", st.sampled_from(["", (), None])),
    *vector_faults("weight_P", st.one_of(FINITE_FLOATS, st.floats(-9, -1e-3))),
    replaced("margin_P", lambda *_: torch.ones(PAIRS)),
]
SCALARS = [*number("beta", NEGATIVE_OR_ZERO), *number("alpha", st.sampled_from(["", (), None]))]


def unknown_option(args: Args, draw: Draw) -> None:
    args["wanted_" + draw(st.sampled_from("abcdef"))] = draw(st.integers())


UNKNOWN = Corruption("wanted", unknown_option, ("wanted_",), alone=False)
NOT_OBJECTIVES = st.one_of(
    st.none(),
    st.text(max_size=9),
    st.floats(),
    # The builder instead of its result, and functions of another signature.
    st.sampled_from([lr_dpo, nca_pair, lambda: 0, lambda c, r: c - r, torch.nn.Identity]),
)
NOT_LOSSES = st.sampled_from(
    [
        lambda c, *_: c.mean(),
        lambda c, *_: c.detach(),
        lambda c, *_: None,
        lambda c, *_: 0.5,
        lambda c, *_: c[:1],
        lambda c, *_: (c, c),
    ]
)
OBJECTIVE_FAULTS = [
    replaced("objective", lambda _, draw: draw(NOT_OBJECTIVES)),
    replaced("objective", lambda _, draw: draw(NOT_LOSSES)),
    replaced("objective", lambda *_: nca_pair(), "margin_P", "smoothing_P"),
]
PADDED_FAULTS = [
    not_a_tensor("target_N"),
    wrong_ndim("target_N"),
    meta("target_N"),
    other_dtype("target_N", st.sampled_from([torch.int32, torch.float32, torch.bool])),
    other_length("target_N"),
    other_length("target_N", dim=1),
    one_entry("target_N", NO_TOKEN),
    other_length("h_TD"),
    other_length("h_TD", "target_N", dim=1),
    wrong_ndim("h_TD", "bounds_S1"),
    MASKED._replace(argument="target_N"),
    Corruption(
        "rows_N", lambda args, _: args.update(rows_N=torch.arange(20)), ("rows_N",), alone=True
    ),
]

OPS: dict[str, tuple[Callable[..., Any], Callable[[], Args], list[Corruption]]] = {
    "linear_logp": (linear_logp, valid_logp, [*head_faults("h_TD"), *TOKEN_FAULTS, UNKNOWN]),
    "linear_preference_loss": (
        linear_preference_loss,
        valid_preference,
        [
            *head_faults("h_TD"),
            *TOKEN_FAULTS,
            *BOUNDS_FAULTS,
            *REFERENCE_FAULTS,
            *PAIR_FAULTS,
            *OBJECTIVE_FAULTS,
            UNKNOWN,
        ],
    ),
    "linear_preference_loss of lists": (linear_preference_loss, valid_lists, LIST_FAULTS),
    "linear_dpo_loss": (
        linear_dpo_loss,
        valid_dpo,
        [
            *head_faults("h_TD"),
            *TOKEN_FAULTS,
            *BOUNDS_FAULTS,
            *REFERENCE_FAULTS,
            *PAIR_FAULTS,
            *SCALARS,
            UNKNOWN,
        ],
    ),
    "LinearDPOLoss": (
        call_module,
        valid_module,
        [
            *head_faults("h_TD"),
            *PADDED_FAULTS,
            *REFERENCE_FAULTS,
            *PAIR_FAULTS,
            *SCALARS,
            UNKNOWN,
        ],
    ),
}


@st.composite
def some_faults(draw: Draw, faults: list[Corruption]) -> list[Corruption]:
    first = draw(st.sampled_from(faults))
    if first.alone:
        return [first]
    independent = [f for f in faults if not f.alone]
    chosen = [first, *draw(st.lists(st.sampled_from(independent), max_size=2))]
    return list({fault.argument: fault for fault in chosen}.values())


@pytest.mark.parametrize("name", OPS)
def test_the_call_that_is_corrupted_is_valid(name):
    op, valid, _ = OPS[name]
    op(**valid())


@pytest.mark.parametrize("name", OPS)
def test_a_thousand_bad_calls(name):
    op, valid, faults = OPS[name]
    seen = []

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example],
    )
    @given(some_faults(faults), st.data())
    def check(chosen, data):
        args = valid()
        for fault in chosen:
            fault.apply(args, data.draw)
        with pytest.raises((TypeError, ValueError)) as caught:
            op(**args)
        words = [word for fault in chosen for word in fault.words]
        assert any(word in str(caught.value) for word in words), f"{words}: {caught.value}"
        seen.append(chosen)

    check()
    assert len(seen) >= EXAMPLES
    # Every fault was tried, not only those that Hypothesis likes.
    assert len({id(fault) for chosen in seen for fault in chosen}) >= 0.95 * len(faults)
