"""alpha=auto: the control law, its bounds and stability, and resuming with the same bits."""

import json
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdpo.errors import DataError
from fastdpo.loss.objectives import lr_dpo
from fastdpo.train import control
from fastdpo.train.control import LengthController, neutral_alpha

BETA = 0.1
PAIRS = [30, -10, 25, 60, -40, 15, -5, 80]
SAMPLES = [[100, 140, 90], [60, 80, 70], [200, 150, 160]]


def begun(target=None, samples=SAMPLES, differences=PAIRS):
    return LengthController(target).begin_round(differences, beta=BETA, lengths=samples)


def covariance(margins, differences):
    """What a step measures: nats x tokens."""
    return math.fsum(d * x for d, x in zip(margins, differences, strict=True)) / len(margins)


# --- the law ------------------------------------------------------------------------------------


def test_neutral_alpha_balances_the_first_gradient_of_the_loss():
    """With the policy at its reference, the gradient on the log-ratios pushes to no length."""
    alpha = neutral_alpha(PAIRS, 1.0)
    assert 0 < alpha < 0.1
    margins = torch.zeros(len(PAIRS), dtype=torch.float64, requires_grad=True)
    zeros, lengths = torch.zeros_like(margins), torch.tensor(PAIRS, dtype=torch.float64)

    def push(alpha):
        """How a step of gradient descent changes the slope of log-ratio on length."""
        loss = lr_dpo(BETA, alpha)(margins, zeros, lengths, zeros, zeros, zeros).sum()
        (gradient,) = torch.autograd.grad(loss, margins)
        return -(gradient * lengths).sum().item()

    assert push(alpha) == pytest.approx(0, abs=1e-12)
    assert push(0.0) > 1 and push(alpha - 1e-4) > 0 > push(alpha + 1e-4)


def test_neutral_alpha_is_antisymmetric_and_bounded():
    assert neutral_alpha([-x for x in PAIRS], 1.0) == pytest.approx(-neutral_alpha(PAIRS, 1.0))
    assert neutral_alpha([5, 9, 30], 0.2) == pytest.approx(0.2)
    assert neutral_alpha([-5, -9], 0.2) == pytest.approx(-0.2)
    assert abs(neutral_alpha([7, -7], 0.2)) < 1e-12
    assert neutral_alpha([10**6, -(10**6)], 1.0) == pytest.approx(0, abs=1e-12)


def test_the_first_round_sets_the_target_and_asks_for_nothing():
    controller = begun()
    flat = [x for group in SAMPLES for x in group]
    assert controller.target == controller.length == pytest.approx(sum(flat) / len(flat))
    assert controller.wanted == 0 and controller.error_sum == 0 and controller.round == 1
    assert controller.alpha == controller.neutral == neutral_alpha(PAIRS, controller.bound)


def test_wanted_tilt_in_its_units():
    """Variance within prompts 700, 100, 700: mean 500. 10 tokens too long, once: -10 / 500."""
    controller = begun(target=sum(map(sum, SAMPLES)) / 9 - 10)
    variance = np.mean([np.var(group, ddof=1) for group in SAMPLES])
    assert variance == pytest.approx(500)
    assert controller.wanted == pytest.approx(-10 / variance)
    assert controller.alpha == pytest.approx(controller.neutral + BETA * 10 / variance)
    again = controller.begin_round(PAIRS, beta=BETA, lengths=SAMPLES)
    assert again.error_sum == pytest.approx(20)
    assert again.wanted == pytest.approx(-(0.75 * 10 + 0.25 * 20) / variance)


def test_a_round_asks_for_one_standard_deviation_at_most_and_does_not_wind_up():
    controller = begun(target=1.0)
    assert controller.wanted == pytest.approx(-1 / math.sqrt(500)) and controller.error_sum == 0
    for _ in range(20):
        controller = controller.begin_round(PAIRS, beta=BETA, lengths=SAMPLES)
    assert controller.error_sum == 0
    short = [[1, 2, 1]] * 3  # far below a target of 50: at once the other way
    other = LengthController(50.0, error_sum=0.0).begin_round(PAIRS, beta=BETA, lengths=short)
    assert other.wanted > 0 and other.alpha < other.neutral


def test_a_tilt_towards_length_raises_alpha_by_its_logits():
    controller = begun()
    tilt = 0.002
    margins = [tilt * x for x in PAIRS]
    after = controller.after_step(covariance(margins, PAIRS), 0.1)
    assert after.tilt == pytest.approx(control.SMOOTHING * tilt)
    raised = control.TILT_GAIN * BETA * after.tilt
    assert after.alpha == pytest.approx(controller.neutral + raised)
    for _ in range(60):
        after = after.after_step(covariance(margins, PAIRS), 0.1)
    assert after.tilt == pytest.approx(tilt, rel=1e-4)
    assert after.alpha < after.bound


def test_a_round_begins_without_tilt_and_progress():
    """Its reference is its start; errors and target stay."""
    before = begun(target=100.0).after_step(50.0, 1.0)
    assert before.tilt > 0 and before.progress == 1
    after = before.begin_round(PAIRS, beta=2 * BETA, lengths=SAMPLES)
    assert (after.tilt, after.progress, after.beta) == (0.0, 0.0, 2 * BETA)
    assert (after.target, after.round, after.error_sum) == (100.0, 2, 2 * before.error_sum)


def test_one_odd_step_is_forgotten():
    controller = begun()
    after = controller.after_step(1e308, 0.1)
    assert after.alpha == after.bound
    for _ in range(40):
        after = after.after_step(0.0, 0.1)
    assert after.alpha == pytest.approx(controller.alpha, rel=0.1)


def test_the_wanted_tilt_is_reached_by_a_ramp():
    """A policy whose tilt goes evenly to what is wanted sees no change of alpha."""
    controller = begun(target=100.0)
    first = controller.alpha
    assert controller.wanted < 0
    for progress in (0.25, 0.5, 1.0):
        on_track = LengthController.from_dict(
            {**controller.to_dict(), "tilt": progress * controller.wanted, "progress": progress}
        )
        assert on_track.alpha == pytest.approx(first)
    behind = controller.after_step(0.0, 0.5)
    assert behind.alpha > first


def test_without_samples_the_tilt_is_held_at_zero():
    controller = LengthController().begin_round(PAIRS, beta=BETA)
    assert controller.target is None and controller.length is None and controller.wanted == 0
    assert controller.alpha == controller.neutral > 0


def test_pairs_of_equal_lengths_leave_alpha_at_zero():
    controller = begun(differences=[0, 0]).after_step(0.0, 1.0)
    assert controller.alpha == 0.0 and controller.bound == 0.0
    assert LengthController().alpha == 0.0


def test_what_is_logged():
    controller = begun(target=100.0).after_step(30.0, 0.5)
    facts = controller.step_facts()
    assert set(facts) == {
        "alpha", "alpha/neutral", "alpha/bound", "length_tilt", "length_tilt/wanted",
        "length/sampled", "length/target", "length/error_sum",
    }  # fmt: skip
    assert facts["length/target"] == 100.0 and facts["alpha/bound"] == controller.bound
    assert facts["alpha"] == controller.alpha
    assert facts["length_tilt"] == controller.tilt > 0
    assert facts["length_tilt/wanted"] == 0.5 * controller.wanted < 0
    json.dumps(facts)
    assert "length/sampled" not in begun(samples=None).step_facts()


# --- bounds and resume, for anything that can be measured ---------------------------------------

FINITE = st.floats(allow_nan=False, allow_infinity=False)
ROUND = st.tuples(
    st.lists(st.integers(-(10**6), 10**6), min_size=1, max_size=8),
    st.lists(
        st.lists(st.integers(0, 10**6), min_size=2, max_size=4), min_size=1, max_size=4
    ),
    st.lists(FINITE, max_size=6),
)  # fmt: skip


def events(rounds):
    """Each change of state, as a function from a controller to the next."""
    for differences, lengths, measured in rounds:
        yield lambda c, d=differences, n=lengths: c.begin_round(d, beta=BETA, lengths=n)
        for i, x in enumerate(measured):
            progress = (i + 1) / len(measured)
            yield lambda c, x=x, s=progress: c.after_step(x, s)


@settings(max_examples=200, deadline=None)
@given(st.lists(ROUND, min_size=1, max_size=5), st.one_of(st.none(), st.floats(1e-3, 1e6)))
def test_alpha_is_bounded_and_every_state_resumes_bit_for_bit(rounds, target):
    controller = LengthController(target)
    longest = max(max(map(max, lengths)) for _, lengths, _ in rounds)
    for change in events(rounds):
        kept = json.loads(json.dumps(controller.to_dict(), allow_nan=False))
        resumed = LengthController.from_dict(kept)
        assert resumed == controller
        controller = change(controller)
        assert change(resumed) == controller
        assert abs(controller.alpha) <= controller.bound
        assert controller.bound * controller.spread <= control.MAX_MARGIN * (1 + 1e-12)
        assert abs(controller.wanted) <= 1
        # The sum is bounded by what can be wanted of it (one deviation) and a round's errors.
        most = max(longest, target or 0.0)
        assert abs(controller.error_sum) <= 8 * (most + 1)


@pytest.mark.parametrize(
    "call",
    [
        lambda: LengthController(-1.0),
        lambda: LengthController(math.inf),
        lambda: LengthController().begin_round([], beta=BETA),
        lambda: LengthController().begin_round([math.nan], beta=BETA),
        lambda: LengthController().begin_round(PAIRS, beta=0.0),
        lambda: begun(samples=[[3, -1]]),
        lambda: begun(samples=[]),
        lambda: begun(samples=[[3], [4]]),
        lambda: begun().after_step(math.nan, 0.5),
        lambda: begun().after_step(0.0, 1.5),
    ],
)
def test_what_cannot_be_is_refused(call):
    with pytest.raises(ValueError, match=r"must"):
        call()


@pytest.mark.parametrize("change", [{"tilt": math.nan}, {"tilt": "1"}, {"more": 1}, {"beta": None}])
def test_a_broken_state_is_refused(change):
    with pytest.raises(DataError, match="alpha=auto"):
        LengthController.from_dict({**begun().to_dict(), **change})
    with pytest.raises(DataError, match="alpha=auto"):
        LengthController.from_dict([])  # type: ignore[arg-type]


# --- stability, as the module claims it ---------------------------------------------------------


def step_roots(rate):
    """Of the loop in a round, from the law itself: how it carries a small deviation on."""
    start = LengthController(1.0, round=1, beta=1.0, spread=1e-6)  # far from every bound

    def one(b, m):
        controller = LengthController.from_dict({**start.to_dict(), "tilt": m})
        after = controller.after_step(b * start.spread**2, 0.5)
        return b + rate * (-controller.alpha - b), after.tilt

    matrix = np.array([one(1.0, 0.0), one(0.0, 1.0)]).T
    return abs(np.linalg.eigvals(matrix)).max()


@pytest.mark.parametrize(
    ("rate", "stable"), [(1e-3, True), (0.01, True), (0.1, True), (0.16, True), (0.18, False)]
)
def test_a_round_is_stable_up_to_the_stated_rate(rate, stable):
    assert (1 / rate + 1 / control.SMOOTHING > 1 + control.TILT_GAIN) == stable
    assert (step_roots(rate) < 1) == stable


def errors_by_round(g, rounds=60, drift=0.0, noise=0.0, seed=0, until=None, cap=2000):
    """Errors by round of a length that moves by g times what the tilt predicts, and drifts.

    It is measured with noise, at the start of the next round, and has a floor and a cap.
    """
    generator = random.Random(seed)
    length, target, errors = 400.0, 400.0, []
    controller = LengthController(target)
    for index in range(rounds):
        drift = 0.0 if index == until else drift
        shown = max(60.0, length + generator.gauss(0, noise))
        # Spread 50 around the mean, whatever it is.
        controller = controller.begin_round(
            PAIRS, beta=BETA, lengths=[[shown - 50, shown + 50, shown]]
        )
        errors.append(length - target)
        length += g * 2500 * controller.wanted + drift + generator.gauss(0, noise)
        length = max(1.0, min(cap, length))
    return errors


@pytest.mark.parametrize("g", [0.2, 0.5, 1.0, 1.6, 2.2])
def test_rounds_settle_on_the_target_against_a_drift(g):
    """Of 5 tokens a round: 300 in 60 rounds, without the controller."""
    errors = errors_by_round(g, drift=5.0, rounds=150)
    assert abs(errors[-1]) < 0.1
    assert max(map(abs, errors)) < 40


def test_a_drift_beyond_a_deviation_a_round_is_slowed_and_not_wound_up():
    """70 tokens a round, of which 50 can be undone; once it ends, the error goes at once."""
    errors = errors_by_round(1.0, drift=70.0, rounds=30, until=15, cap=10_000)
    assert errors[15] == pytest.approx(70 + 14 * 20, abs=60)
    assert min(errors) > -120 and abs(errors[-1]) < 5


def test_beyond_the_stated_limit_rounds_do_not_settle():
    """Twice the gain that is allowed: it swings, and the bounds keep it from diverging."""
    errors = errors_by_round(4.5, drift=5.0)
    assert max(map(abs, errors[-10:])) > 30
    assert max(map(abs, errors)) < 1000


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_not_amplified_much(seed):
    errors = np.array(errors_by_round(1.0, drift=20.0, noise=4.0, seed=seed, rounds=200)[20:])
    assert abs(errors.mean()) < 2 and errors.std() < 4 * 4.0


def test_roots_between_rounds_are_one_half():
    P, total = control.ERROR_SHARE, control.ERROR_SHARE + control.SUM_SHARE
    assert np.roots([1, total - 2, 1 - P]) == pytest.approx([0.5, 0.5], abs=1e-6)
    assert 2.2 * (P + total) < 4 < 2.3 * (P + total)


# --- a policy that is trained by the loss on samples of its own ---------------------------------

LENGTHS = torch.arange(4, 404, 4, dtype=torch.float64)  # of responses; the last is the cap


class Toy:
    """A policy over lengths and three qualities, with a few features, as a network would have them:
    length, its square, quality. Prompts are alike. Its judge likes quality, and likes or dislikes
    length.

    The rest is the real thing: best and worst of four samples, the loss, its gradient, Adam.
    """

    def __init__(self, seed, bias, mean=120.0):
        self.generator = torch.Generator().manual_seed(seed)
        self.bias = bias
        self.lengths = LENGTHS.repeat_interleave(3)
        self.quality = torch.arange(3, dtype=torch.float64).repeat(len(LENGTHS))
        x = (self.lengths - mean) / 60
        self.features = torch.stack([x, x * x / 2, self.quality], 1)
        self.start = -((self.lengths / mean).log() ** 2) / (2 * 0.45**2)
        self.theta = torch.zeros(3, dtype=torch.float64)

    def logp(self, theta):
        return (self.start + self.features @ theta).log_softmax(0)

    def sample(self, prompts, count=4):
        drawn = torch.multinomial(
            self.logp(self.theta).exp(), prompts * count, True, generator=self.generator
        )
        noise = torch.randn(drawn.shape, generator=self.generator, dtype=torch.float64)
        score = self.bias * self.lengths[drawn] + 0.5 * self.quality[drawn] + noise
        return drawn.view(prompts, count), score.view(prompts, count)

    def round(self, alpha, prompts=96, batch=8):
        """One round; alpha is fixed, or a controller; returns what the next round gets."""
        drawn, score = self.sample(prompts)
        rows = torch.arange(prompts)
        chosen, rejected = drawn[rows, score.argmax(1)], drawn[rows, score.argmin(1)]
        nw, nl = self.lengths[chosen], self.lengths[rejected]
        differences = (nw - nl).int().tolist()
        if isinstance(alpha, LengthController):
            lengths = self.lengths[drawn].int().tolist()
            alpha = alpha.begin_round(differences, beta=BETA, lengths=lengths)
        reference = self.logp(self.theta)
        theta = self.theta.clone().requires_grad_()
        optimizer = torch.optim.Adam([theta], lr=0.01)
        steps = rows.split(batch)
        for index, part in enumerate(steps):
            ratio = self.logp(theta) - reference
            sides = ratio[chosen[part]], ratio[rejected[part]]
            zeros = torch.zeros(len(part), dtype=torch.float64)
            now = alpha.alpha if isinstance(alpha, LengthController) else alpha
            loss = lr_dpo(BETA, now)(*sides, nw[part], nl[part], zeros, zeros)
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
            if isinstance(alpha, LengthController):
                margins = (sides[0] - sides[1]).tolist()
                moment = covariance(margins, [differences[i] for i in part.tolist()])
                alpha = alpha.after_step(moment, (index + 1) / len(steps))
        self.theta = theta.detach()
        return alpha

    def mean(self, values):
        return float((self.logp(self.theta).exp() * values).sum())


def changes_by_round(seed, bias, alpha, rounds=5):
    """Of the mean length after each round, and of the mean quality after the last."""
    toy = Toy(seed, bias)
    start, quality, found = toy.mean(toy.lengths), toy.mean(toy.quality), []
    for _ in range(rounds):
        alpha = toy.round(alpha)
        found.append(toy.mean(toy.lengths) - start)
    return found, toy.mean(toy.quality) - quality


@pytest.mark.parametrize("bias", [0.003, 0.008, -0.01])
def test_it_holds_the_length_of_a_policy_whose_judge_likes_or_dislikes_length(bias):
    shares, gains = [], []
    for seed in range(6):
        plain, _ = changes_by_round(seed, bias, 0.0)
        auto, gain = changes_by_round(seed, bias, LengthController())
        assert plain[-1] * bias > 0 and abs(plain[-1]) > 20, "the plant does not drift"
        shares.append(max(map(abs, auto)) / abs(plain[-1]))
        gains.append(gain)
    assert max(shares) < 0.5 and sum(shares) / len(shares) < 0.3, shares
    assert min(gains) > 0.2, "nothing else is learned"


def test_a_fixed_alpha_that_fits_the_start_holds_it_worse():
    """What feedback is for: the policy, and so what balances its pairs, changes."""
    auto, fixed = [], []
    for seed in range(6):
        auto.append(abs(changes_by_round(seed, 0.008, LengthController())[0][-1]))
        first = Toy(seed, 0.008).round(LengthController()).neutral
        fixed.append(abs(changes_by_round(seed, 0.008, first)[0][-1]))
    assert sum(auto) < 0.7 * sum(fixed), (auto, fixed)


def test_a_target_away_from_the_start_is_reached():
    start = Toy(0, 0.003).mean(LENGTHS.repeat_interleave(3))
    for target in (start - 40, start + 40):
        found, _ = changes_by_round(0, 0.003, LengthController(target), rounds=12)
        assert sum(start + x - target for x in found[-4:]) / 4 == pytest.approx(0, abs=15)
