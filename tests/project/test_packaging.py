"""Contents of a wheel, an sdist and an editable install; the package takes one import name only, `runner`.

Everything is built offline by the setuptools of this environment, from a copy of the tree without the kernels' sources
(compiling them takes a minute, and scripts/setup_venv has done so); the sdist is made from the whole tree.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from places import ROOT

SHIPPED = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md")
MINE = "WHOSE = 'the user'\n"
# What else is imported is Any, which strict mode would complain of: here only the names of modules count.
NAMES_ONLY = ("--follow-imports=skip", "--allow-subclassing-any", "--no-warn-return-any", "-m", "runner.models.llama")


def command(*words: str, cwd: Path, python: Path | str = sys.executable, **environment: str) -> str:
    """Run `python words`, with the repository not on its path; return stdout and stderr together."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    done = subprocess.run(
        [str(python), *words],
        cwd=cwd,
        env={**env, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def copy_tree(target: Path, *, kernels: bool) -> Path:
    """Copy the files that a build reads; links stay links, so `runner/models` is a link as in a clone."""
    ignored = ["__pycache__", "*.so", *([] if kernels else ["*.cpp"])]
    for name in ("runner", "models", "configs"):
        shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=shutil.ignore_patterns(*ignored))
    for name in SHIPPED:
        shutil.copy(ROOT / name, target / name)
    return target


def bare_environment(place: Path) -> Path:
    """Python of a new environment with this one's packages but without the project: only `site` reads its link."""
    venv.create(place)
    (site,) = place.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(f"{Path(pytest.__file__).parent.parent}\n")
    return place / "bin" / "python"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Build a wheel; return it and the output of the build."""
    tree = copy_tree(tmp_path_factory.mktemp("tree"), kernels=False)
    said = command("-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", "out", ".", cwd=tree)
    (path,) = (tree / "out").glob("*.whl")
    return path, said


@pytest.fixture(scope="module")
def installed(wheel: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's directory with the installed package and with a models.py and a configs.py of the user's own."""
    place = tmp_path_factory.mktemp("user")
    arguments = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", "site", str(wheel[0]))
    command(*arguments, cwd=place)
    for name in ("models", "configs"):
        (place / f"{name}.py").write_text(MINE)
    return place


def names(path: Path) -> set[str]:
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def test_a_wheel_holds_the_package_and_nothing_beside_it(wheel: tuple[Path, str]) -> None:
    found = names(wheel[0])
    python = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("runner/**/*.py")}
    python |= {f"runner/models/{path.name}" for path in ROOT.glob("models/*.py")}
    data = {f"runner/configs/{path.parent.name}/{path.name}" for path in ROOT.glob("configs/*/*.json")}
    data |= {
        path.relative_to(ROOT).as_posix()
        for part in ("server/page/*", "ops/cuda/*.cu")
        for path in ROOT.glob(f"runner/{part}")
    }
    assert len(python) > 50 and len(data) > 10
    wanted = python | data | {"runner/py.typed", "runner/ops/cpu/_C.pyi"}
    assert {name for name in found if not name.startswith("mlx_runner-")} == wanted
    (top_level,) = (name for name in found if name.endswith("/top_level.txt"))
    with zipfile.ZipFile(wheel[0]) as archive:
        assert archive.read(top_level).split() == [b"runner"]


ON_A_MAC = """
import sys, sysconfig, urllib.request
from setuptools import build_meta
sysconfig.get_config_vars()  # Python finds them by the real platform
sys.platform = "darwin"
sysconfig.get_platform = lambda: "macosx-10.13-universal2"
print(build_meta.build_wheel("out"))
"""


def test_a_wheel_without_kernels_is_for_the_platform_it_was_made_on(wheel: tuple[Path, str], tmp_path: Path) -> None:
    """Not for `any`: pip on Linux would take it, and with it a machine that has a compiler lost its kernels."""
    here = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel[0].name == f"mlx_runner-0.1.0-py3-none-{here}.whl"
    said = command("-c", ON_A_MAC, cwd=copy_tree(tmp_path / "tree", kernels=True))
    made = said.splitlines()[-1]
    assert made == "mlx_runner-0.1.0-py3-none-macosx_14_0_arm64.whl"
    place = tmp_path / "tree" / "out" / made
    with pytest.raises(AssertionError, match="not a supported wheel on this platform"):
        command("-m", "pip", "install", "--no-deps", "--no-index", "--target", "site", str(place), cwd=tmp_path)


def test_the_build_has_nothing_to_warn_of(wheel: tuple[Path, str]) -> None:
    assert "Building wheel for mlx-runner" in wheel[1]
    assert "absent from" not in wheel[1] and "Deprecat" not in wheel[1]


@pytest.mark.skipif(sys.platform != "linux", reason="kernels are built on Linux")
def test_a_machine_without_a_compiler_builds_without_kernels(tmp_path: Path) -> None:
    """The compiler that Python was built with is not there at all, as on a bare Debian; strictly, that is an error."""
    tree = copy_tree(tmp_path / "tree", kernels=True)
    (tmp_path / "nanobind").mkdir()
    (tmp_path / "nanobind" / "__init__.py").touch()  # looked for; its headers only once there is a compiler
    build = 'import os, sys; sys.path.append(".."); sys.argv[1:] = ["build_ext"]; exec(open("setup.py").read())'
    none = {"CC": "/none/cc", "CXX": "/none/c++", "RUNNER_STRICT_BUILD": "0"}
    said = command("-c", build, cwd=tree, **none)
    assert "/none/c++: No such file or directory" in said and not list(tree.glob("**/*.so"))
    with pytest.raises(AssertionError, match="/none/c"):
        command("-c", build, cwd=tree, **{**none, "RUNNER_STRICT_BUILD": "1"})


def test_an_sdist_has_all_that_compiles_the_kernels(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path, kernels=True)
    command("-c", "from setuptools import build_meta; build_meta.build_sdist('out')", cwd=tree)
    (path,) = (tree / "out").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("runner/ops/cpu/src/*")}
    assert len(wanted) > 20 and wanted <= found
    assert {"runner/models/llama.py", "runner/configs/sampling/greedy.json", "setup.py", "LICENSE"} <= found
    assert not any(name.startswith("tests") for name in found)


WHOSE = """
import sys; sys.path[:0] = ['.', 'site']
import models, configs, runner, runner.models.llama, runner.resources
assert models.WHOSE == configs.WHOSE == 'the user'
assert runner.__file__.startswith(sys.argv[1]), runner.__file__
assert runner.models.llama.__name__ == 'runner.models.llama'
assert 'greedy' in runner.resources.names('sampling') and 'Llama-3.2-1B' in runner.resources.names('shapes')
print('fine')
"""


def test_users_keep_their_own_models_py(installed: Path) -> None:
    assert command("-c", WHOSE, str(installed), cwd=installed).endswith("fine\n")


def test_an_installed_package_runs_and_is_typed(installed: Path) -> None:
    model = ROOT / "tests" / "fixtures" / "llama" / "llama-gqa"
    words = ("generate", str(model), "abc", "--raw", "--temperature", "0", "--max-tokens", "2", "--preset", "greedy")
    command("-m", "runner", *words, cwd=installed, PYTHONPATH="site")
    assert (installed / "site" / "bin" / "runner").is_file()
    code = "import models, runner\nfrom runner.models.llama import LlamaConfig\n"
    types = "reveal_type(runner.load('x').generate)\nreveal_type(models.WHOSE)\n"
    (installed / "use.py").write_text(code + types)
    said = command("-m", "mypy", "--strict", "--follow-imports=silent", "use.py", cwd=installed, MYPYPATH="site")
    assert "-> runner.answer.Generation" in said and '"str"' in said


def test_an_editable_install_gives_runner_alone(tmp_path: Path) -> None:
    """For Python and pytest, `runner.models` exists, and `models` is the user's module or does not exist."""
    tree = copy_tree(tmp_path / "tree", kernels=False)
    python = bare_environment(tmp_path / "venv")
    # Without --ignore-installed pip might take this environment's own package, and its command, for the old version.
    options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed")
    command("-m", "pip", "install", *options, "-e", str(tree), cwd=tmp_path, python=python)
    user = tmp_path / "user"
    user.mkdir()
    found = "[name for name in ('models', 'configs', 'tests') if importlib.util.find_spec(name)]"
    assert command("-c", f"import importlib.util; print({found})", cwd=user, python=python) == "[]\n"
    (user / "models.py").write_text(MINE)
    checks = f"    import models, runner, runner.models.llama as llama\n    assert models.WHOSE and {str(tree)!r} in "
    (user / "test_mine.py").write_text(f"def test_mine() -> None:\n{checks}str(llama.__file__)\n")
    assert "1 passed" in command("-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=user, python=python)


def test_mypy_and_pytest_know_one_name_for_a_model_file(tmp_path: Path) -> None:
    """In the source tree, mypy's settings find each model file once, as `runner.models...`."""
    said = command("-m", "mypy", "--verbose", "--cache-dir", str(tmp_path), *NAMES_ONLY, cwd=ROOT)
    found = [line for line in said.splitlines() if "llama" in line and "Found source" in line]
    assert found and all("module='runner.models.llama'" in line for line in found)
    (tmp_path / "test_name.py").write_text(
        "import sys, runner.models.llama\ndef test_name() -> None:\n    assert 'models' not in sys.modules\n"
    )
    assert "1 passed" in command("-m", "pytest", "-q", str(tmp_path), cwd=ROOT)


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="the kernels are built on Linux")
def test_a_wheel_with_kernels_needs_no_compiler(tmp_path: Path) -> None:
    """scripts/wheel, installed into an environment that sees no compiler: its kernels compute."""
    tree = tmp_path / "tree"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    for name in (name.decode() for name in tracked if name and not name.startswith(b"tests/")):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name, follow_symlinks=False)
    if (ROOT / "build" / "kernels").is_dir():  # what was compiled for this checkout
        shutil.copytree(ROOT / "build" / "kernels", tree / "build" / "kernels")
    environment = {**os.environ, "RUNNER_VENV": sys.prefix}
    shutil.copy(tree / "scripts" / "setup_venv", tmp_path / "kept")
    (tree / "scripts" / "setup_venv").write_text("#!/bin/sh\n")  # this environment stays as it is
    done = subprocess.run(
        [str(tree / "scripts" / "wheel")], env=environment, capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, done.stderr
    built = Path(done.stdout.strip())
    assert built.suffix == ".whl" and any(name.startswith("runner/ops/cpu/_C.") for name in names(built))
    python = bare_environment(tmp_path / "venv")
    options = ("--quiet", "--no-deps", "--no-index", "--ignore-installed")
    command("-m", "pip", "install", *options, str(built), cwd=tmp_path, python=python, PATH="/nowhere")
    code = (
        "import runner; from runner.ops import cpu; assert cpu.unavailable() is None; print(runner.__file__, cpu.isa())"
    )
    said = command("-c", code, cwd=tmp_path, python=python, PATH="/nowhere")
    assert said.startswith(str(tmp_path / "venv"))
