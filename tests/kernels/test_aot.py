"""The kernels at their shipped configurations, compiled for GPUs that need not be present.

A compilation takes nothing from this file but shapes: the host functions run on meta tensors with
every kernel replaced by a recorder, so block sizes, warps, stages, options and the absence of
arguments are those of the launch.  What is recorded is specialized as Triton's JIT would.

N rows, C columns of a tile, V vocabulary, D hidden, K tiles.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import aot
import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", minversion="3.6")

import triton.language as tl  # noqa: E402

from fastdpo.kernels import fold, kl, pair, pointwise, project, scatter  # noqa: E402
from fastdpo.loss import fused  # noqa: E402
from fastdpo.loss.objectives import KERNEL_FORMULAS, Objective  # noqa: E402

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = (BF16, FP16, FP32)
# Of the projection: the usual one, and that for more registers.  The other devices fold tiles.
MARGIN_KINDS = [formula.name for formula in KERNEL_FORMULAS if formula.form != "sides"]
TILES = {
    "sm_90": (project.HOPPER, project.HOPPER_NARROW),
    "sm_100": (project.BLACKWELL, project.BLACKWELL),
    "sm_120": (project.SMALL, project.SMALL),
}
# Bytes of registers that a projection may spill.  Triton 3.6 is what the tile was measured with;
# 3.9 allots registers worse, and a smaller tile would cost more.
OLD_TRITON = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
MOST_SPILLED = 16 if OLD_TRITON else 256
MODULES = (fold, kl, pair, project, scatter)
WIDTHS = [C for C in (256, 1024, 4096, 8192) if C <= fold.MAX_TILE_COLUMNS]
N, V, D = 4096, 128_256, 4096
# No kernel of the package is as small; an empty one has only its exit and what surrounds it.
FEWEST_INSTRUCTIONS = 20


def has_assembler() -> bool:
    """Whether Triton's package brings NVIDIA's assembler and disassembler, as on Linux it does."""
    try:
        from triton.backends import nvidia
    except ImportError:
        return False
    return all(Path(nvidia.__path__[0], "bin", tool).is_file() for tool in ("ptxas", "cuobjdump"))


pytestmark = pytest.mark.skipif(
    not has_assembler(), reason="this platform's Triton brings no ptxas and cuobjdump"
)


# --------------------------------------------------------------------------------------- recording
class Recorder:
    """Stands for a kernel: takes launches and keeps the job each would compile."""

    def __init__(self, module: str, name: str, kernel: Any, jobs: list[dict[str, Any]]) -> None:
        self.kernel = f"{module}:{name}"
        self.parameters = inspect.signature(kernel.fn).parameters
        self.jobs = jobs

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self.launch

    def launch(self, *values: Any, **named: Any) -> None:
        options = {name: named.pop(name) for name in [*named] if name not in self.parameters}
        bound = inspect.Signature([*self.parameters.values()]).bind(*values, **named).arguments
        arguments, constants, divisible = {}, {}, []
        for name, value in bound.items():
            annotation = self.parameters[name].annotation
            kind = None if annotation is tl.constexpr else type_of(value)
            if kind is None:
                constants[name] = value
                continue
            arguments[name] = kind
            if is_divisible(value):
                divisible.append(name)
        self.jobs.append(
            {
                "kernel": self.kernel,
                "arguments": arguments,
                "constants": constants,
                "divisible_by_16": divisible,
                "options": options,
            }
        )


def type_of(value: Any) -> str | None:
    """Triton's name of an argument's type; None if the JIT makes it a constant."""
    integers = {torch.int32: "i32", torch.int64: "i64"}
    names = {BF16: "bf16", FP16: "fp16", FP32: "fp32", torch.float64: "fp64", **integers}
    if value is None or (isinstance(value, int) and value == 1):
        return None
    if isinstance(value, Tensor):
        return f"*{names[value.dtype]}"
    if isinstance(value, int):
        return "i32" if abs(value) < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    block = ", ".join(map(str, value.block_shape))
    return f"tensordesc<{names[value.base.dtype]}[{block}]>"


def is_divisible(value: Any) -> bool:
    """Whether the JIT would know that the integer or the address is a multiple of 16."""
    if isinstance(value, Tensor):
        return value.storage_offset() * value.element_size() % 16 == 0
    return isinstance(value, int) and value % 16 == 0


@contextmanager
def recorded(modules: tuple[ModuleType, ...] = MODULES) -> Iterator[list[dict[str, Any]]]:
    """Replace the kernels of the modules and give the jobs of their launches, without repeats."""
    jobs: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            origin = module.__name__.replace("fastdpo.kernels", "kernels")
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                patch.setattr(module, name, Recorder(origin, name, getattr(module, name), jobs))
        yield jobs
    jobs[:] = [job for i, job in enumerate(jobs) if job not in jobs[:i]]


def meta(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def head(softcap: bool = False) -> fold.HeadShape:
    return fold.HeadShape(1.0, 30.0 if softcap else None)


def optional(wanted: bool, *shape: int, dtype: torch.dtype) -> Tensor | None:
    return meta(*shape, dtype=dtype) if wanted else None


def targets() -> Tensor:
    return meta(N, dtype=torch.int64)


# ---------------------------------------------------------------------------------------- launches
def launch_project(
    target: str,
    dtype: torch.dtype,
    *,
    bias: bool = False,
    softcap: bool = False,
    stash: bool = True,
    lse: bool = False,
    stats: bool = False,
) -> None:
    """The projection, and what gives its rows their shift; nothing on a device that folds."""
    if target not in TILES:
        return
    tile, target_N = TILES[target][stats or (bias and softcap)], targets()
    names = frozenset(fold.STATS if stats else ())
    operands = (
        meta(N, D, dtype=dtype), meta(V, D, dtype=dtype), optional(bias, V, dtype=dtype),
        head(softcap),
    )  # fmt: skip
    project.project(
        *operands, target_N, meta(N) if lse else project.row_shifts(*operands), tile=tile,
        limit=fold.LIMITS[dtype], stash_NC=optional(stash or lse, N, V, dtype=dtype),
        partials=None if lse else fold.Partials.empty(target_N, V, tile.v, names),
    )  # fmt: skip


def launch_fold(
    C: int,
    dtype: torch.dtype,
    *,
    bias: bool = False,
    softcap: bool = False,
    stash: bool = False,
    stats: bool = False,
    first: bool = False,
) -> None:
    partials = fold.Partials.empty(targets(), V, C, frozenset(fold.STATS if stats else ()))
    stash_RC = optional(stash, N, V, dtype=dtype)
    fold.fold(
        meta(N, C), optional(bias, C, dtype=dtype), head(softcap), targets(), 0 if first else 2 * C,
        partials, slice(0, N), None if stash_RC is None else stash_RC[:, :C], fold.LIMITS[dtype],
    )  # fmt: skip


def launch_keep(
    C: int,
    dtype: torch.dtype,
    *,
    bias: bool = False,
    softcap: bool = False,
    ref: bool = False,
    target: bool = True,
) -> None:
    reference = None
    if ref:
        bias_C, rows = optional(bias, C, dtype=dtype), (meta(N) for _ in range(3))
        reference = fold.RefTile(meta(N, C), bias_C, *rows)
    fold.keep(
        meta(N, C), optional(bias, C, dtype=dtype), head(softcap), targets() if target else None,
        meta(N), 2 * C, meta(N, V, dtype=dtype)[:, :C], reference,
    )  # fmt: skip


def launch_cross(
    C: int,
    dtype: torch.dtype,
    *,
    bias: bool = False,
    softcap: bool = False,
    stash: bool = False,
) -> None:
    kept = (targets(), 2 * C, meta(N, V, dtype=dtype)[:, :C]) if stash else None
    kl.cross(
        meta(N, C), optional(bias, C, dtype=dtype), meta(N, C), optional(bias, C, dtype=dtype),
        head(softcap), meta(N), meta(N), kept,
    )  # fmt: skip


def launch_mix(dtype: torch.dtype) -> None:
    kl.mix(meta(N, V, dtype=dtype), meta(N, V, dtype=dtype), meta(N), meta(N))


def launch_merge(
    stats: frozenset[str] = frozenset(), dtype: torch.dtype | None = None, softcap: bool = False
) -> None:
    """``dtype`` of a stash, if there is one."""
    partials = fold.Partials.empty(targets(), V, 4096, stats)
    stash_NV = None if dtype is None else meta(N, V, dtype=dtype)
    fold.merge(partials, targets(), V, head(softcap), stash_NV)


def segments(count: int) -> scatter.TokenGroups:
    return scatter.TokenGroups.of(targets(), count)


def launch_head_grads(dtype: torch.dtype, width: int = D) -> None:
    """Rows of the weight's gradient, written or added to; those of the bias's."""
    rows, h_ND, scale_N = 1024, meta(N, width, dtype=dtype), meta(N)
    for out_ID, accumulate in ((meta(rows, width, dtype=dtype), False), (meta(rows, width), True)):
        scatter.row_sums(
            out_ID, segments=segments(V), offset=1024, accumulate=accumulate, b_ND=h_ND,
            base_ID=meta(rows, width), base_factor=meta(1)[0], b_scale_N=scale_N,
        )  # fmt: skip
    scatter.row_sums(
        meta(V)[:, None], segments=segments(V), accumulate=True, b_ND=meta(N)[:, None],
        b_scale_N=scale_N,
    )  # fmt: skip


def launch_row_grads(dtype: torch.dtype, width: int = D) -> None:
    """Gradients of the hidden rows, with the targets' own rows of the head or without."""
    product_ND, scale_N = meta(N, width), meta(N)
    scatter.row_sums(
        product_ND, a_ND=product_ND, a_scale_N=scale_N, b_ND=meta(V, width, dtype=dtype),
        b_scale_N=scale_N, b_index_N=targets(),
    )  # fmt: skip
    scatter.row_sums(meta(N, width), a_ND=product_ND, a_scale_N=scale_N, accumulate=True)


def launch_place(dtype: torch.dtype, width: int = D) -> None:
    """Rows summed into the hidden row each belongs to, or rounded."""
    scatter.row_sums(meta(N, width, dtype=dtype), base_ID=meta(N, width), base_factor=meta(1)[0])
    for segmented, scale_N in product((False, True), (None, meta(N))):
        scatter.row_sums(
            meta(N, width, dtype=dtype), segments=segments(N) if segmented else None,
            a_ND=meta(N, width), a_scale_N=scale_N,
        )  # fmt: skip


def launch_scales(dtype: torch.dtype, width: int = D) -> None:
    scatter.scaled_rows(meta(N, width, dtype=dtype), meta(N), meta(1)[0])
    scatter.add_column_sums(meta(V), meta(N, V, dtype=dtype), meta(N))
    scatter.gather(meta(N, width, dtype=dtype), targets())


def launch_factors(dtype: torch.dtype, width: int = D) -> None:
    """Of a stash's rows, with scaled hidden rows or without; of finished ones."""
    for x_ND in (meta(N, width, dtype=dtype), None):
        stash = (meta(N), meta(N), meta(N))
        scatter.factors(targets(), meta(N), meta(1)[0], *stash, -0.7, x_ND)
        scatter.factors(targets(), meta(N), None, None, None, None, 1.0, x_ND)


def objective_of(kind: str, normalized: bool, numbers: bool) -> Objective:
    """One of the pair kernel; with all ``numbers`` that its formula has a use for."""
    formula = KERNEL_FORMULAS[pair.KINDS.index(kind)]
    of_margin = {"alpha": 0.02, "length_normalized": normalized} if kind in MARGIN_KINDS else {}
    if numbers and kind in MARGIN_KINDS:
        of_margin.update(label_smoothing=0.1, target_margin=0.5)
    own = {} if formula.parameter is None else {"parameter": 0.05}
    least = {"label_smoothing": 1e-3} if kind == "exo_pair" else {}
    scale = {"reference_scale": 1.1} if numbers else {}
    return Objective(formula, 0.1, **{**own, **least, **of_margin, **scale})


def launch_pair(
    kind: str,
    *,
    normalized: bool = False,
    numbers: bool = False,
    options: bool = True,
    ref_dtype: torch.dtype | None = FP32,
    coef: bool = True,
) -> None:
    """``ref_dtype`` of the reference's sums, None for log-probs of its tokens."""
    P = 8
    per_pair = meta(P, dtype=torch.float64) if options else None
    pair.pair_losses(
        meta(N), targets(), meta(2 * P + 1, dtype=torch.int64),
        objective_of(kind, normalized, numbers),
        ref_logp_S=None if ref_dtype is None else meta(2 * P, dtype=ref_dtype),
        ref_logp_N=meta(N) if ref_dtype is None else None, margin_P=per_pair,
        smoothing_P=per_pair, weight_P=per_pair, num_pairs=float(P), want_coef=coef,
    )  # fmt: skip


def launch_sums(
    ref_dtype: torch.dtype | None = None, *, ref: bool = True, gap: bool = True
) -> None:
    """``ref_dtype`` of the reference's sums, None for log-probs of its tokens."""
    S = 7
    pair.sequence_sums(
        meta(N), targets(), meta(S + 1, dtype=torch.int64), ref_dtype or FP32,
        ref_logp_S=None if ref_dtype is None else meta(S, dtype=ref_dtype),
        ref_logp_N=meta(N) if ref and ref_dtype is None else None,
        gap_N=meta(N, dtype=torch.float64) if gap else None,
    )  # fmt: skip


def main_launches(target: str) -> None:
    """What a default call launches, with the arguments that cost registers."""
    for options in ({}, {"lse": True}, {"stats": True}):
        launch_project(target, BF16, bias=True, softcap=True, **options)
    launch_project(target, BF16)
    for C in WIDTHS:
        everything = {"bias": True, "softcap": True, "stash": True}
        launch_fold(C, BF16, stats=True, **everything)
        launch_fold(C, BF16, stash=True, first=True)
        launch_keep(C, BF16, bias=True, softcap=True)
    for C in (WIDTHS[0], WIDTHS[-1]):
        launch_keep(C, BF16, bias=True, softcap=True, ref=True)
        launch_keep(C, BF16, ref=True)
    launch_cross(WIDTHS[-1], BF16, bias=True, softcap=True)
    launch_cross(WIDTHS[-1], BF16, bias=True, softcap=True, stash=True)
    launch_mix(BF16)
    launch_merge()
    launch_merge(frozenset(fold.STATS), BF16, softcap=True)
    launch_head_grads(BF16)
    launch_row_grads(BF16)
    launch_place(BF16)
    launch_scales(BF16)
    launch_factors(BF16)
    for kind in ("sigmoid", "nca_pair", "robust", "discopop"):
        launch_pair(kind, options=kind in MARGIN_KINDS)
    launch_sums(FP32)


def further_launches(target: str) -> None:
    """Every dtype, width and option."""
    flags = [dict(zip(("bias", "softcap"), x)) for x in product((False, True), repeat=2)]
    for dtype, flag, mode in product((BF16, FP16), flags, ("stash", "plain", "lse")):
        launch_project(target, dtype, stash=mode == "stash", lse=mode == "lse", **flag)
    for dtype, flag, stash in product((BF16, FP16), flags, (True, False)):
        launch_project(target, dtype, stats=True, stash=stash, **flag)
    # 1,105 columns are the last tile of a vocabulary of 50,257: neither full nor aligned.
    for dtype, C in product(DTYPES, (*WIDTHS, 1105)):
        for stats, stash in product((False, True), repeat=2):
            launch_fold(C, dtype, stats=stats, stash=stash, first=stats)
        launch_fold(C, dtype, bias=True, softcap=True, stash=True, stats=True)
        launch_keep(C, dtype)
        for both in (True, False):
            launch_keep(C, dtype, bias=True, softcap=True, ref=True, target=both)
            launch_cross(C, dtype, bias=True, softcap=True, stash=both)
    for name in fold.STATS:
        launch_merge(frozenset([name]))
    for dtype, width in product(DTYPES, (576, 1000, D)):
        for launch in (
            launch_head_grads, launch_row_grads, launch_place, launch_scales, launch_factors,
        ):  # fmt: skip
            launch(dtype, width)
    for dtype in DTYPES:
        launch_merge(frozenset(), dtype)
        launch_mix(dtype)
    further_pairs()


def further_pairs() -> None:
    """Every objective of the pair kernel."""
    for kind, normalized in product(MARGIN_KINDS, (False, True)):
        launch_pair(kind, normalized=normalized)
        launch_pair(kind, normalized=normalized, numbers=True, options=False)
        launch_pair(kind, normalized=normalized, ref_dtype=None, coef=False)
    for kind in set(pair.KINDS) - set(MARGIN_KINDS):
        launch_pair(kind, options=False, ref_dtype=torch.float64)
        launch_pair(kind, options=False, numbers=True)
    launch_sums(torch.float64, gap=False)
    launch_sums()
    launch_sums(ref=False, gap=False)


# ------------------------------------------------------------------------------------------ checks
def flaws(job: dict[str, Any], report: dict[str, Any]) -> list[str]:
    """What is wrong with the machine code of a job; an empty list if nothing is."""
    if "error" in report:
        return [report["error"]]
    found = []
    projects = job["kernel"].endswith(":project_kernel")
    if ".project:" in job["kernel"] and report["spill_bytes"] <= MOST_SPILLED:
        pass  # the measured tile is worth more than its few spills
    elif report["spill_bytes"] or report["stack_bytes"] or report["local_memory_instructions"]:
        found.append(
            f"{report['spill_bytes']} bytes of spills, {report['stack_bytes']} of stack, "
            f"{report['local_memory_instructions']} instructions of local memory"
        )
    if report["shared_bytes"] > report["shared_limit"]:
        found.append(f"{report['shared_bytes']} bytes of shared memory")
    if report["instructions"] < FEWEST_INSTRUCTIONS:
        found.append(f"only {report['instructions']} instructions")
    if report["global_scratch_bytes"]:
        found.append(f"{report['global_scratch_bytes']} bytes of scratch in global memory")
    if projects:
        if not report["matrix_instructions"]:
            found.append("no matrix instructions")
        if report["wgmma_serialized"]:
            found.append("wgmma is serialized")
        if not report["tma_loads"]:
            found.append("no bulk copies to shared memory")
        if job["constants"].get("stash_desc", 1) is not None and not report["tma_stores"]:
            found.append("no bulk copies of the stash")
    return found


def describe(job: dict[str, Any]) -> str:
    """A job by what tells it from the others."""
    constants = {name: value for name, value in job["constants"].items() if value is not None}
    absent = [name for name, value in job["constants"].items() if value is None]
    return f"{job['kernel']} {constants} {job['options']} without {absent}: {job['arguments']}"


def compiled(
    target: str, launches: Callable[[str], None], cache: Any
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Jobs of some launches and the reports on them."""
    with recorded() as jobs:
        launches(target)
    jobs = [{**job, "target": target} for job in jobs]
    return list(zip(jobs, aot.run(jobs, cache)))


def assert_flawless(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    lines = [
        f"{describe(job)}\n    {'; '.join(found)} (registers: {report.get('registers')})"
        for job, report in pairs
        if (found := flaws(job, report))
    ]
    assert not lines, f"{len(lines)} of {len(pairs)} are flawed:\n" + "\n".join(lines)


# ------------------------------------------------------------------------------------------- tests
# One of the two that take longest is slow, to keep the suite short.
@pytest.mark.parametrize(
    "target", [pytest.param(x, marks=pytest.mark.slow if x == "sm_100" else ()) for x in TARGETS]
)
def test_shipped_configurations(target, tmp_path):
    assert_flawless(compiled(target, main_launches, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_specialization(target, tmp_path):
    assert_flawless(compiled(target, further_launches, tmp_path))


def projections(target: str) -> None:
    """The projection and its shifts alone."""
    for options in ({}, {"lse": True}, {"stats": True}):
        launch_project(target, BF16, bias=True, softcap=True, **options)
        launch_project(target, BF16, **options)


def test_projection_with_little_shared_memory(tmp_path):
    """Of the consumer's Blackwell, which has 99 KiB."""
    assert_flawless(compiled("sm_120", projections, tmp_path))


def launch_with_and_without_a_stash(target: str) -> None:
    """Each fold or projection twice in a row; the ragged width is a vocabulary's last columns."""
    for dtype in (None, BF16):
        launch_merge(dtype=dtype)
    for C, dtype in product((256, 1105, 4096), DTYPES):
        partials = fold.Partials.empty(targets(), V, C, frozenset())
        rows = fused.matrix(N, C, FP32, torch.device("meta"))
        stash = fused.matrix(N, C, dtype, torch.device("meta"))
        for kept in (None, stash):
            fold.fold(
                rows, None, head(), targets(), C, partials, slice(0, N), kept, fold.LIMITS[dtype]
            )
    for dtype, softcap, stats in ((BF16, False, False), (FP16, True, False), (BF16, False, True)):
        for stash in (False, True):
            launch_project(target, dtype, softcap=softcap, stash=stash, stats=stats)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90"])
def test_a_stash_does_not_change_the_order_of_sums(target, tmp_path):
    """Reference and policy agree to the bit only if their rows are summed in one order."""
    found = compiled(target, launch_with_and_without_a_stash, tmp_path)
    reports = [report for _, report in found]
    assert len(reports) >= 2 * 10 and all("error" not in report for report in reports)
    by_shape: dict[str, list[list[str]]] = {}
    for job, report in found:
        fixed = {k: v for k, v in job["constants"].items() if k not in ("stash_ptr", "stash_desc")}
        # What is kept, and how wide, is all that may differ.
        rest = {k: v for k, v in job["arguments"].items() if not k.startswith("stash")}
        key = f"{job['kernel']} {fixed} {rest} {'product_stride' in job['divisible_by_16']}"
        assert report["reduce_layouts"], "no reduction was found in the compiled text"
        by_shape.setdefault(key, []).append(report["reduce_layouts"])
    assert len(by_shape) >= 5
    for key, layouts in by_shape.items():
        # A merge of a stash asks at its end whether there is anything to settle.
        first, *others = [found[: min(map(len, layouts))] for found in layouts]
        assert all(other == first for other in others), f"{key}: {layouts}"


def test_every_kernel_is_compiled():
    with recorded() as jobs:
        main_launches("sm_90")
    names = {
        f"{module.__name__.removeprefix('fastdpo.')}:{name}"
        for module in MODULES
        for name in vars(module)
        if name.endswith("_kernel")
    }
    assert {job["kernel"] for job in jobs} == names


def test_products_and_sums_are_fused_in_every_kernel():
    with recorded() as jobs:
        main_launches("sm_90")
    assert all(pointwise.OPTIONS.items() <= job["options"].items() for job in jobs)


@pytest.mark.parametrize("name", [*TARGETS, "sm_120"])
def test_a_device_gets_the_tile_that_is_checked_for_it(name, monkeypatch):
    is_amd = name.startswith("gfx")
    capability = (9, 0) if is_amd else divmod(int(name.removeprefix("sm_")), 10)
    monkeypatch.setattr(torch.version, "hip", "7.0" if is_amd else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cuda")
    assert project.feeds_from_descriptors(device) == (name in TILES)
    if name in TILES:
        assert TILES[name] == tuple(project.tile_for(device, narrow=x) for x in (False, True))


# ------------------------------------------------------------------------------- negative controls
@triton.jit
def empty_kernel(x, out, BLOCK: tl.constexpr):
    pass


@triton.jit
def spilling_kernel(x, out, BLOCK: tl.constexpr):
    """Holds a block of numbers across a reduction."""
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i)
    tl.store(out + i, value / tl.sum(value, 0))


@pytest.mark.parametrize("target", TARGETS)
def test_flawed_kernels_are_flagged(target, tmp_path):
    pointers = {"x": "*fp32", "out": "*fp32"}

    def job(name: str, BLOCK: int) -> dict[str, Any]:
        return {
            "kernel": f"{Path(__file__).stem}:{name}",
            "arguments": pointers,
            "constants": {"BLOCK": BLOCK},
            "divisible_by_16": [*pointers],
            "options": {"num_warps": 1},
            "target": target,
        }

    lanes = 64 if target.startswith("gfx") else 32
    jobs = [job("empty_kernel", 64), job("spilling_kernel", 512 * lanes), job("no_kernel", 1)]
    empty, spilling, absent = (flaws(*x) for x in zip(jobs, aot.run(jobs, tmp_path)))
    assert len(empty) == 1 and "only" in empty[0]
    assert len(spilling) == 1 and "spills" in spilling[0]
    assert len(absent) == 1 and "AttributeError" in absent[0]
