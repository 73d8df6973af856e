"""A run: what it was given, its folder, and the samples and scores that its parts ask for.

OUT/state.json                 the config, the stages done and when, and the one under way
OUT/report.html, rounds.png    what the run shows; config.yaml has its options, once it is done
OUT/sampler.log                of a server that was started for sampling
OUT/offline/                   offline pairs to replay, their scores and summary.json
OUT/round-00/eval/             the start, on held-out prompts: candidates, scores, kl.json
OUT/round-01/candidates/       responses in parts, with plan.json and throughput.json
OUT/round-01/scores/           a score for each; scores-1, scores-2, ... of several scorers
OUT/round-01/scores-before/    the same by the round before, for `consistency`
OUT/round-01/offline/          a response to each offline prompt, for fresh_threshold
OUT/round-01/pairs.jsonl       what training takes, and pairs.summary.json
OUT/round-01/run.json          what decided the training; fitted.json, train.json, control.json
OUT/round-01/{ref_logps,metrics,policy}/   and adapter/ of LoRA; checkpoint/ until it is trained
OUT/round-01/policy/README.md  its model card, with results.svg; of adapter/ and extrapolated/ too
OUT/round-01/stage-1/          the same for each stage of a curriculum
OUT/round-01/reference/        a moving average of the policies, where that is the reference
OUT/round-01/extrapolated/     the next start, where the policy is not
OUT/round-01/eval/             the next start, on held-out prompts
OUT/round-01/summary.json      the row of the report

Beside a file of rows lies its SHA-256, hidden (.NAME.sha256); OUT/.lock keeps a second process out.
"""

import shutil
from pathlib import Path

from fastdpo.data.clock import Clock
from fastdpo.data.records import Prompt
from fastdpo.model.load import load_tokenizer
from fastdpo.rounds.config import IterateConfig
from fastdpo.rounds.inputs import decides, split_prompts
from fastdpo.rounds.processes import Processes
from fastdpo.rounds.resume import Stages, release
from fastdpo.sample.config import SampleConfig
from fastdpo.sample.stage import open_sampler, sample
from fastdpo.score.stage import score


def take_start(folder: Path, other: Path) -> None:
    """Begin a run with what the start answered and scored in another, unless it has begun.

    For runs that differ in what comes later. A run only takes samples and scores whose plan and
    content are what it would have made.
    """
    if folder.exists():
        return
    # Killed before the rename, the folder isn't there, and the next process copies again.
    scratch = folder.with_name(f".{folder.name}.copy")
    shutil.rmtree(scratch, ignore_errors=True)
    for name in ("round-00/eval", "round-01/candidates", "round-01/scores"):
        shutil.copytree(other / name, scratch / name)
    scratch.rename(folder)


class Run:
    """The options, prompts, stages and folders of a run.

    Attributes:
        prompts, heldout: those to train on, and those to evaluate on.
        stages: what is done, and what is made again.
        processes: those that train together.
    """

    def __init__(
        self, config: IterateConfig, progress: bool, clock: Clock, processes: Processes
    ) -> None:
        self.processes = processes
        self.config, self.progress, self.out = config, progress, Path(config.output_dir)
        self.tokenizer = load_tokenizer(config.model, config.chat_template)
        self.prompts, self.heldout = split_prompts(config, self.tokenizer)
        decided = decides(config, self.tokenizer, self.prompts, self.heldout)
        self.stages = Stages(self.out, decided, clock)

    def folder(self, index: int) -> Path:
        return self.out / f"round-{index:02d}"

    def scores(self, folder: Path) -> list[Path]:
        """A folder for each scorer."""
        count = len(self.config.score.scorers)
        return [folder / (f"scores-{i + 1}" if count > 1 else "scores") for i in range(count)]

    def trained(self, index: int) -> str:
        """What round ``index`` trained, before any extrapolation; the model for round 0."""
        return str(self.folder(index) / "policy") if index else self.config.model

    def start_of(self, index: int) -> str:
        """The policy that round ``index`` starts from; round 0 from what was before the model."""
        if index < 1:
            return str(self.config.score.previous_model)
        if index == 1 or not self.config.extrapolation:
            return self.trained(index - 1)
        return str(self.folder(index - 1) / "extrapolated")

    def before(self, index: int) -> str:
        """What the implicit reward of round ``index`` compares its policy with: as in DICE the
        policy of the round before, or with consistency, as in CREAM, M0 in all rounds."""
        return self.start_of(0 if self.config.pair.consistency != "none" else index - 1)

    def reference(self, index: int) -> str | None:
        """The reference of a round, None where it is the start of what is trained."""
        name = self.config.reference
        if name == "round" or (name == "average" and index == 1):
            return None
        return str(self.folder(index) / "reference") if name == "average" else name

    def sample(
        self,
        name: str,
        policy: str,
        prompts: list[Prompt],
        config: SampleConfig,
        candidates: Path,
        index: int,
    ) -> None:
        """The stage of this name, in which a policy responds to prompts."""

        def work() -> None:
            longest, log = self.config.train.max_length, self.out / "sampler.log"
            with open_sampler(
                policy, self.tokenizer, config, max_length=longest, log_path=log
            ) as sampler:
                sample(
                    sampler, self.tokenizer, prompts, config, candidates, round_index=index,
                    string_prompts=self.config.string_prompts, progress=self.progress,
                )  # fmt: skip

        self.stages.run(name, work, makes=candidates, needs=[policy])

    def score(self, candidates: Path, folders: list[Path], policy: str, previous: str) -> None:
        """Score with each scorer in turn, loaded for it alone."""
        for spec, folder in zip(self.config.score.scorers, folders):
            scorer = self.config.score.load(spec, policy, previous)
            score(scorer, candidates, folder, progress=self.progress)
            del scorer
            release()
