"""Compile Triton kernels for GPUs that are absent, and report what their machine code holds.

As a program it reads a JSON list of jobs from stdin and writes a JSON list of reports to stdout.
It must be a process of its own: kernels that were decorated for the interpreter do not compile.
"""

import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

KIB = 1024
# The shared memory that one block may use, as the JIT checks it before a launch.
SHARED_LIMIT = {
    "sm_80": 163 * KIB, "sm_90": 227 * KIB, "sm_100": 227 * KIB, "sm_120": 99 * KIB,
    "gfx942": 64 * KIB,
}  # fmt: skip
_MATRIX = {
    "sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": r"UTC\w*MMA", "sm_120": "HMMA",
    "gfx942": "v_mfma",
}  # fmt: skip
_SASS = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", re.MULTILINE)
_GCN = re.compile(r"^\s+((?:s|v|ds|buffer|global|flat|scratch)_\w+)", re.MULTILINE)
_FILLER = {"NOP", "s_nop", "s_code_end"}


def run(jobs: list[dict[str, Any]], cache: Path) -> list[dict[str, Any]]:
    """Compile the jobs in a new process, into a cache of its own, and return their reports."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(Path(__file__).resolve())]
    done = subprocess.run(
        command, input=json.dumps(jobs), env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def compile_kernel(
    fn: Any,
    arguments: dict[str, str],
    constants: dict[str, Any],
    target: str,
    *,
    divisible_by_16: Iterable[str] = (),
    **options: Any,
) -> Any:
    """Compile ``fn`` for ``target`` as the JIT would, and return Triton's compiled kernel.

    ``arguments`` has the Triton type of every argument that is given at the launch. ``constants``
    has the values of the rest: constexprs, and None for absent pointers. ``divisible_by_16`` names
    the pointers and integers of which the JIT would know it; without it loads are not vectorized.
    """
    from triton import JITFunction, compile
    from triton.compiler import ASTSource

    while not isinstance(fn, JITFunction):  # autotune and heuristics wrap the kernel
        if not hasattr(fn, "fn") or "Interpreted" in type(fn).__name__:
            raise TypeError(f"{fn!r} is no @triton.jit function that can be compiled")
        fn = fn.fn
    divisible = set(divisible_by_16)
    if arguments.keys() & constants.keys() or {*arguments, *constants} != {*fn.arg_names}:
        raise ValueError(
            f"{fn.__name__} takes {fn.arg_names}, each one as argument or constant; got arguments "
            f"{sorted(arguments)} and constants {sorted(constants)}"
        )
    if unknown := divisible - arguments.keys():
        raise ValueError(f"divisible_by_16 names no argument: {sorted(unknown)}")
    signature = {name: arguments.get(name, "constexpr") for name in fn.arg_names}
    index = {name: (i,) for i, name in enumerate(fn.arg_names)}
    source = ASTSource(
        fn,
        signature,
        {index[name]: value for name, value in constants.items()},
        {index[name]: [["tt.divisibility", 16]] for name in divisible},
    )
    # Triton prints the log of ptxas, which has spills and warnings, only if told to.
    switches = {"TRITON_DUMP_PTXAS_LOG": "1", "TRITON_ALWAYS_COMPILE": "1"}
    with _environment(switches), contextlib.redirect_stdout(io.StringIO()) as log:
        kernel = compile(source, target=_gpu(target), options=options)
    kernel.asm["log"] = log.getvalue()
    return kernel


def report(kernel: Any, target: str) -> dict[str, Any]:
    """Resources and instruction counts; registers, spills and stack are per thread."""
    read = _report_amd if target.startswith("gfx") else _report_nvidia
    opcodes, facts = read(kernel)

    def count(pattern: str) -> int:
        return sum(n for opcode, n in opcodes.items() if re.match(pattern, opcode))

    return {
        "target": target,
        **facts,
        "shared_bytes": kernel.metadata.shared,
        "shared_limit": SHARED_LIMIT[target],
        "global_scratch_bytes": getattr(kernel.metadata, "global_scratch_size", 0),
        "instructions": sum(opcodes.values()),
        "matrix_instructions": count(_MATRIX[target]),
        "tma_loads": count("UTMALDG"),
        "tma_stores": count("UTMASTG"),
        "local_memory_instructions": count("STL$|LDL$|scratch_"),
        "wgmma_serialized": "serialized" in kernel.asm["log"],
        "reduce_layouts": _reduce_layouts(kernel.asm["ttgir"]),
    }


def _reduce_layouts(text: str) -> list[str]:
    """How each reduction's operand is spread over registers and threads: the order of its sum."""
    layouts = dict(re.findall(r"(#\w+) = (#ttg\.\w+<\{[^}]*\}>)", text))
    operands = re.findall(r"\}\) : \(tensor<[^>]*?, (#\w+)>\)", text)
    return [layouts.get(name, name) for name in operands]


def _report_nvidia(kernel: Any) -> tuple[Counter[str], dict[str, Any]]:
    from triton.backends import nvidia

    log = kernel.asm["log"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        tool = Path(nvidia.__path__[0], "bin", "cuobjdump")
        sass = subprocess.check_output([tool, "--dump-sass", cubin.name], text=True)
    stores = _number(r"(\d+) bytes spill stores", log)
    loads = _number(r"(\d+) bytes spill loads", log)
    return _opcodes(_SASS, sass), {
        "registers": _number(r"Used (\d+) registers", log),
        "spill_bytes": stores + loads,
        "stack_bytes": _number(r"(\d+) bytes stack frame", log),
    }


def _report_amd(kernel: Any) -> tuple[Counter[str], dict[str, Any]]:
    text = kernel.asm["amdgcn"]
    spilled = _number(r"\.vgpr_spill_count:\s+(\d+)", text)
    return _opcodes(_GCN, text), {
        "registers": _number(r"\.vgpr_count:\s+(\d+)", text),
        "spill_bytes": 4 * spilled,
        "vgpr_spills": spilled,
        "sgpr_spills": _number(r"\.sgpr_spill_count:\s+(\d+)", text),
        "stack_bytes": _number(r"\.private_segment_fixed_size:\s+(\d+)", text),
    }


def _opcodes(pattern: re.Pattern[str], text: str) -> Counter[str]:
    return Counter(opcode for opcode in pattern.findall(text) if opcode not in _FILLER)


def _number(pattern: str, text: str) -> int:
    found = re.findall(pattern, text)
    if len(found) != 1:
        raise RuntimeError(f"{pattern!r} occurs {len(found)} times, not once, in:\n{text[:2000]}")
    return int(found[0])


def _gpu(target: str) -> Any:
    from triton.backends.compiler import GPUTarget

    if target.startswith("gfx"):
        return GPUTarget("hip", target, 64)
    return GPUTarget("cuda", int(target.removeprefix("sm_")), 32)


@contextlib.contextmanager
def _environment(values: dict[str, str]):
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _work(job: dict[str, Any]) -> dict[str, Any]:
    started = time.perf_counter()
    try:
        module, _, name = job["kernel"].partition(":")
        kernel = compile_kernel(
            getattr(importlib.import_module(module), name),
            job["arguments"],
            job["constants"],
            job["target"],
            divisible_by_16=job.get("divisible_by_16", ()),
            **job.get("options", {}),
        )
        result = report(kernel, job["target"])
    except Exception as error:
        result = {"target": job.get("target"), "error": f"{type(error).__name__}: {error}"}
    return {**result, "seconds": round(time.perf_counter() - started, 3)}


def main() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    tests = Path(__file__).resolve().parent
    sys.path[:0] = [str(tests.parent), str(tests / "kernels")]  # some kernels are a test's own
    json.dump([_work(job) for job in json.load(sys.stdin)], sys.stdout)


if __name__ == "__main__":
    main()
