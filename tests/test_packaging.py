"""The package imports from a checkout, a wheel and an sdist, beside Hugging Face's `kernels`."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def python(code, *paths, cwd=ROOT):
    """Run code in a process that sees only these paths besides the installed packages."""
    program = f"import sys; sys.path[:0] = {[str(path) for path in paths]!r}\n{code}"
    done = subprocess.run([sys.executable, "-c", program], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_bare_checkout_imports_the_kernels_folder():
    out = python("import fastdpo.kernels.support as s; print(s.__file__)", ROOT)
    assert Path(out.strip()).resolve() == ROOT / "kernels" / "support.py"


def test_the_kernels_folder_does_not_shadow_another_package(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("name = 'the other one'\n")
    out = python("import kernels; print(kernels.name)", ROOT, tmp_path)
    assert out.strip() == "the other one"
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_import_is_light():
    code = """
import sys, torch
before = set(sys.modules)
import fastdpo
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(new & {"triton", "transformers", "datasets", "accelerate", "jsonargparse"}))
"""
    assert python(code, ROOT).strip() == "[]"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def package_files():
    """What a checkout has in the package, the kernels through their link."""
    folders = (ROOT / "fastdpo", "fastdpo"), (ROOT / "kernels", "fastdpo/kernels")
    return {
        f"{name}/{path.relative_to(folder).as_posix()}"
        for folder, name in folders
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_wheel_and_sdist_hold_all_of_the_package_once(built):
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    packaged = [name for name in names if name.startswith("fastdpo/")]
    assert sorted(packaged) == sorted(package_files())
    assert not any(name.startswith(("kernels/", "tests/", "bench/")) for name in names)
    assert any(name.endswith("LICENSE") for name in names)
    with tarfile.open(sdist) as archive:
        members = [name for name in archive.getnames() if name.endswith("support.py")]
    assert members and all("fastdpo/kernels/" in name for name in members)


@pytest.mark.parametrize("pattern", ["*.whl", pytest.param("*.tar.gz", marks=pytest.mark.slow)])
def test_installed_package_imports(built, pattern, tmp_path):
    (archive,) = built.glob(pattern)
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target"]
    done = subprocess.run([*command, str(tmp_path), str(archive)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code = "import fastdpo.kernels.support as s, fastdpo.cli; print(s.__file__)"
    assert str(tmp_path) in python(code, tmp_path, cwd=tmp_path)


@pytest.mark.slow
def test_hugging_face_kernels_still_imports(tmp_path):
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target"]
    done = subprocess.run([*command, str(tmp_path), "kernels"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code = """
import kernels
assert hasattr(kernels, "get_kernel"), kernels
import transformers
transformers.LlamaForCausalLM(transformers.LlamaConfig(
    hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9))
import fastdpo.kernels.support
print(kernels.__file__)
"""
    assert str(tmp_path) in python(code, ROOT, tmp_path)
