"""The options of pairing: of ``fastdpo pair``, and the section ``pair`` of a run."""

from dataclasses import dataclass, replace

from fastdpo.errors import ConfigError, is_default, is_number, require, require_used

RULES = ("best_worst", "best_random", "all_ranked", "curriculum", "nearest_margin", "tree_siblings",
         "listwise")  # fmt: skip
TRANSFORMS = ("none", "par", "win_rate", "log_sigmoid", "mean_std")
# What says something of a pair, and nothing of a list: why it is refused there.
_OF_PAIRS = {
    "consistency": "it is the label smoothing of a pair",
    "flip_share": "it turns a pair round",
    "soft_label": "it is the label smoothing of a pair",
    "ches_keep": "CHES is of a chosen and a rejected response",
    "max_difficulty": "difficulty is of a chosen and a rejected response",
    "replay": "offline rows are pairs, which an objective of lists doesn't take",
    "replay_share": "offline rows are pairs, which an objective of lists doesn't take",
    "fresh_threshold": "offline rows are pairs, which an objective of lists doesn't take",
}


@dataclass(frozen=True, kw_only=True)
class PairConfig:
    """How scored responses become pairs or lists; every option but `rule` is off by default.

    Raises ConfigError, naming the option, when one is out of its range or has nothing to act on,
    and when two of the options that set label smoothing are on: tree_siblings, consistency, and
    flip_share or soft_label. What depends on the number of scorers is in `check_scorers`.

    Attributes:
        rule: best_worst, best_random, all_ranked, curriculum, nearest_margin, tree_siblings or
            listwise, the functions of `fastdpo.pair.rules`; by default best_worst, and in a run
            whose ``train.loss_type`` takes lists listwise.
        weights: of each of several scorers, negative to avoid something; all 1 by default.
        combine: "weighted", or "log_sigmoid", high where all of several scorers are.
        transform: of scores within a prompt: none, par, win_rate (SPPO's), log_sigmoid or mean_std.
            It keeps their order, so a run needs what looks at more: a loss that reads scores,
            min_gap, length_penalty, nearest_margin, or all_ranked with max_pairs.
        transform_reference: what par and log_sigmoid compare a score with: "own", the prompt's
            samples, or "start", those of the model before training, as in the papers.
        length_penalty: subtracted for each token, in units of the transformed score; "auto" finds
            DICE's.
        min_gap: the scores of a pair, or the best and the worst of a list, must differ by more.
        target_margin: the gap that nearest_margin looks for.
        max_pairs: pairs of a prompt at most, of all_ranked and curriculum, where it is the number
            of stages; by default all.
        equal_prompts: weigh a pair by 1 / (pairs of its prompt).
        drop_truncated: leave out responses that were cut off at max_new_tokens.
        drop_duplicates: leave out a response that repeats another of its prompt.
        drop_ties: of the responses of a list with the same score leave out all but the first.
        consistency: none, or label smoothing by the ranking's agreement with the round before, of
            each prompt ("prompt") or on average ("mean") (CREAM); see `fastdpo.pair.votes`.
        flip_share: turn round this share of pairs, the weakest by the scorers' weighted mean, of
            the sampled ones and of the offline ones. As soft_label it needs labels that are not
            their own sum: combine=log_sigmoid, a length_penalty, or offline pairs.
        soft_label: label smoothing of pairs on which several scorers disagree on average.
        ches_keep: keep this share of the sampled pairs, those of lowest length-normalized CHES.
        max_difficulty: drop sampled pairs above this difficulty under the reference, in nats.
        replay: file or hub name of offline pairs.
        replay_share: share of offline pairs among all.
        fresh_threshold: drop offline pairs that a fresh sample beats by this score (fDPO).
        seed: of what is drawn.
    """

    rule: str | None = None
    weights: list[float] | None = None
    combine: str = "weighted"
    transform: str = "none"
    transform_reference: str = "own"
    length_penalty: float | str = 0.0
    min_gap: float = 0.0
    target_margin: float = 1.0
    max_pairs: int | None = None
    equal_prompts: bool = False
    drop_truncated: bool = False
    drop_duplicates: bool = False
    drop_ties: bool = False
    consistency: str = "none"
    flip_share: float = 0.0
    soft_label: float = 0.0
    ches_keep: float = 1.0
    max_difficulty: float | None = None
    replay: str | None = None
    replay_share: float = 0.0
    fresh_threshold: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in (
            ("rule", (*RULES, None)),
            ("combine", ("weighted", "log_sigmoid")),
            ("transform", TRANSFORMS),
            ("transform_reference", ("own", "start")),
            ("consistency", ("none", "mean", "prompt")),
        ):
            known = ", ".join(filter(None, choices))
            require(self, name, getattr(self, name) in choices, f"one of {known}")
        numbers = self.weights is None or (any(self.weights) and all(map(is_number, self.weights)))
        penalty = self.length_penalty
        positive = penalty == "auto" or (is_number(penalty) and penalty >= 0)
        for name, holds, wanted in (
            ("weights", numbers, "a list of finite numbers, not all of them 0"),
            ("length_penalty", positive, 'a finite number of at least 0 or "auto"'),
            ("min_gap", self.min_gap >= 0, "finite and >= 0"),
            ("target_margin", self.target_margin > 0, "finite and > 0"),
            ("max_pairs", self.max_pairs is None or self.max_pairs >= 1, ">= 1"),
            ("flip_share", 0 <= self.flip_share <= 1, "in [0, 1]"),
            ("soft_label", 0 <= self.soft_label <= 1, "in [0, 1]"),
            ("ches_keep", 0 < self.ches_keep <= 1, "in (0, 1]"),
            ("max_difficulty", True, "finite"),
            ("replay_share", 0 <= self.replay_share < 1, "in [0, 1)"),
            ("fresh_threshold", True, "finite"),
        ):
            require(self, name, holds, wanted)
        for name, used, otherwise in (
            ("target_margin", self.rule == "nearest_margin", "rule be nearest_margin"),
            ("max_pairs", self.rule in ("all_ranked", "curriculum"),
             "rule be all_ranked or curriculum: the others have a pair or none"),
            ("equal_prompts", self.makes_several,
             "rule be all_ranked, curriculum (with max_pairs other than 1) or tree_siblings: "
             "otherwise a prompt has one pair and all weigh the same"),
            ("drop_ties", self.rule in (None, "listwise"),
             "rule be listwise: the others pair no tie"),
            *((name, not self.makes_lists, f"rule not be listwise: {why}")
              for name, why in _OF_PAIRS.items()),
        ):  # fmt: skip
            require_used(self, name, used, otherwise)
        smoothing = {
            "rule=tree_siblings": self.rule == "tree_siblings",
            "consistency": self.consistency != "none",
            "flip_share or soft_label": self.needs_several_scorers,
        }
        chosen = [name for name, on in smoothing.items() if on]
        if len(chosen) > 1:
            raise ConfigError(f"{' and '.join(chosen)} each say how far a label holds; choose one")

    def named(self, rule: str = "best_worst") -> "PairConfig":
        """With this rule where none was given. Raises ConfigError as these options together do."""
        return self if self.rule is not None else replace(self, rule=rule)

    @property
    def makes_lists(self) -> bool:
        """Whether the responses to a prompt become one list, and not pairs."""
        return self.rule == "listwise"

    @property
    def makes_several(self) -> bool:
        """Whether a prompt may have more than one pair."""
        if self.rule in ("all_ranked", "curriculum"):
            return self.max_pairs != 1
        return self.rule == "tree_siblings"

    @property
    def looks_at_gaps(self) -> bool:
        """Whether anything depends on more than the order of a prompt's scores."""
        widest = self.rule == "all_ranked" and self.max_pairs is not None
        penalized = self.length_penalty != 0
        return self.min_gap > 0 or self.rule == "nearest_margin" or widest or penalized

    @property
    def needs_model(self) -> bool:
        """Whether pairs are measured under a model."""
        return self.ches_keep < 1 or self.max_difficulty is not None

    @property
    def needs_several_scorers(self) -> bool:
        """Whether the scorers vote on the labels."""
        return self.flip_share > 0 or self.soft_label > 0

    def shapes(self, scorers: int) -> bool:
        """Whether scores become others; those of a single scorer can be taken as they are."""
        options = ("weights", "combine", "transform", "length_penalty")
        return scorers > 1 or not all(is_default(self, name) for name in options)

    def weights_of(self, scorers: int) -> list[float]:
        """The weight of each of so many scorers. Raises ConfigError when there are others."""
        if self.weights is None:
            return [1.0] * scorers
        fits = len(self.weights) == scorers
        require(self, "weights", fits, f"one for each of the {scorers} scorers")
        return list(self.weights)

    def check_scorers(self, scorers: int, *, offline: bool = False, read: bool = True) -> None:
        """What can be said before there are scores, of so many scorers.

        Args:
            offline: whether there will be offline pairs with the scores of all of them.
            read: whether the scores in the file are read, by a loss or by whoever has the file.

        Raises ConfigError, naming the option.
        """
        self.weights_of(scorers)
        self.check_shaping(scorers, read=read)
        self.check_votes(scorers, offline)
        self.check_replay()
        if self.transform_reference == "start":
            self.check_references()

    def check_votes(self, scorers: int, offline: bool) -> None:
        """Raise ConfigError where `flip_share` and `soft_label` can change no label: with a single
        scorer, or where all labels are the sum of the scores that vote.

        Every rule takes the higher score as chosen, so with combine "weighted" and no length
        penalty no sampled pair is against the sum it was labelled by, whatever the rule and the
        transform. With another `combine` or a length penalty one can be, and so can an offline
        pair, whose label comes with the data.
        """
        given = [name for name in ("flip_share", "soft_label") if getattr(self, name)]
        names = " and ".join(f"{name}={getattr(self, name):g}" for name in given)
        if given and scorers < 2:
            raise ConfigError(
                f"{names} can change no label with {scorers} scorer; give a list of at least two "
                "as scorer, or their folders as scores"
            )
        reorders = self.combine != "weighted" or self.length_penalty != 0
        if given and not reorders and not offline:
            raise ConfigError(
                f"{names} can change no label: combine=weighted without length_penalty labels "
                "sampled pairs by the same sum of scores; give combine=log_sigmoid, a "
                "length_penalty or offline pairs (replay) scored by all scorers, or leave out what "
                "does nothing"
            )

    def check_shaping(self, scorers: int, *, read: bool) -> None:
        """Raise ConfigError where an option that shapes scores can change nothing.

        A transform keeps the order of a prompt's scores, and so do, of a single scorer, combine
        "log_sigmoid" and a positive weight. That matters only where gaps do, or where the loss
        reads the scores (`read`). `fresh_threshold` compares weighted scores with a number.
        """
        weight = self.weights[0] if self.weights and scorers == 1 else 1.0
        scales = weight > 0 and weight != 1 and not self.fresh_threshold
        for what, idle in (
            (f"transform={self.transform}", self.transform != "none"),
            (f"combine={self.combine} of one scorer", self.combine != "weighted" and scorers < 2),
            (f"weights={self.weights} of one scorer", scales),
        ):
            if idle and not read and not self.looks_at_gaps:
                raise ConfigError(
                    f"{what} changes nothing: it keeps the order of a prompt's scores, and nothing "
                    "looks at more than that. Leave it out, or give min_gap, a length_penalty, the "
                    "rule nearest_margin, all_ranked with max_pairs, or a loss that reads scores"
                )

    def check_references(self) -> None:
        """Raise ConfigError where scores of reference responses have no use, or no meaning."""
        compares = self.transform in ("par", "log_sigmoid")
        if self.combine != "log_sigmoid" and not compares:
            raise ConfigError(
                "reference_scores need transform=par or log_sigmoid, or combine=log_sigmoid, which "
                "compare with them; leave them out"
            )
        if self.consistency != "none":  # the reference's scores are of one of the two
            raise ConfigError(
                f"consistency={self.consistency} ranks by the scorers of two rounds, which can't "
                "share reference_scores; leave out one of the two"
            )

    def check_replay(self) -> None:
        """Raise ConfigError unless offline pairs and their share come together."""
        if (self.replay is not None) != (self.replay_share > 0):
            raise ConfigError(
                f"replay={self.replay} and replay_share={self.replay_share} need each other: a "
                "file of pairs, and its share above 0"
            )
