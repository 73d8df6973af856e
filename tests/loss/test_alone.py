"""The loss and its kernels, copied into another package, run where there is no `fastdpo`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import interpreter
import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import importlib.util, sys
import interpreter
if {impl!r} == "triton":
    interpreter.enable()
import torch
from other.loss import linear_dpo_loss, linear_logp, reference

assert importlib.util.find_spec("fastdpo") is None
h, w = torch.randn(9, 16, requires_grad=True), torch.randn(70, 16, requires_grad=True)
target, bounds = torch.randint(70, (9,)), torch.tensor([0, 2, 5, 6, 9])
ref_logp = -torch.rand(4) * 20
whole = h.detach().double().requires_grad_(), w.detach().double().requires_grad_()

result = linear_dpo_loss(h, w, target, bounds, ref_logp, alpha=0.02, impl={impl!r})
wanted = reference.linear_dpo_loss(*whole, target, bounds, ref_logp.double(), alpha=0.02)
logp_N = linear_logp(h, w, target, impl={impl!r})
wanted_N = reference.linear_logp(*whole, target)
torch.testing.assert_close(result.loss.double(), wanted, rtol=1e-5, atol=1e-6)
torch.testing.assert_close(logp_N.double(), wanted_N, rtol=1e-5, atol=1e-5)
for found, gold in ((result.loss, wanted), (logp_N.sum(), wanted_N.sum())):
    for x, y in zip(torch.autograd.grad(found, (h, w)), torch.autograd.grad(gold, whole)):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-5)
assert not [name for name in sys.modules if name.partition(".")[0] == "fastdpo"]
assert {impl!r} == "triton" or "triton" not in sys.modules
"""


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=interpreter.needs_kernels)])
def test_a_copy_in_another_package(tmp_path, impl):
    package = tmp_path / "other"
    for source in (ROOT / "fastdpo" / "loss", ROOT / "kernels"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, package / source.name, ignore=ignored)
    (package / "__init__.py").touch()
    shutil.copy(ROOT / "tests" / "interpreter.py", tmp_path)
    # -S: the .pth of an editable install would lead back to `fastdpo`.
    paths = [str(tmp_path), *(path for path in sys.path if path.endswith("site-packages"))]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-S", "-c", SCRIPT.format(impl=impl)],
        capture_output=True, text=True, timeout=300, cwd=tmp_path, env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
