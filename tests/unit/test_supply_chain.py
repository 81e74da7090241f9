"""What is shipped is what is in the repository, and what the images install is pinned to the byte."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
INFO = f"octavo-{PROJECT['project']['version']}.dist-info"
LOCKS = ROOT / "images" / "locks"
INSTALLED = {
    "operator": ("operator",),
    "gateway": ("gateway",),
    "engine-cuda": ("server", "gpu"),
    "engine-cpu": ("server",),
}
NOT_LOCKED = {"engine-cpu": {"torch"}}  # from PyTorch's own index, by version alone
_ENTRY = re.compile(
    r"^([a-z0-9][a-z0-9.-]*)==([^\s;]+)(?: ;.*)?((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", re.MULTILINE
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel as the images of operator and gateway get it, built from what git would commit."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheels")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("no git checkout: what belongs to the repository is not known")
    for name in listed.stdout.decode().split("\0"):
        if name and not name.startswith(("tests/", "benchmarks/", "docs/")) and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "-C", "wheel.cmake=false", "-w", str(out), str(source)], check=True)
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_our_packages_and_nothing_that_runs_by_itself(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    packages = {Path(package).name for package in PROJECT["tool"]["scikit-build"]["wheel"]["packages"]}
    assert {name.partition("/")[0] for name in names} == packages | {
        f"octavo-{PROJECT['project']['version']}.dist-info"
    }
    assert not [name for name in names if name.endswith((".pth", ".so", ".pyc", ".egg-link")) or ".data/" in name]
    assert not [name for name in names if Path(name).name in ("sitecustomize.py", "usercustomize.py", "setup.py")]


def test_every_module_of_the_wheel_is_the_repositorys_own(wheel: zipfile.ZipFile) -> None:
    """And every module of the repository is in it."""
    roots = {Path(package).name: ROOT / package for package in PROJECT["tool"]["scikit-build"]["wheel"]["packages"]}
    seen = 0
    for name in wheel.namelist():
        package, _, rest = name.partition("/")
        if package in roots:
            assert wheel.read(name) == (roots[package] / rest).read_bytes(), name
            seen += rest.endswith(".py")
    own = {path for root in roots.values() for path in root.rglob("*.py")}
    assert seen == len(own)


def test_the_record_of_the_wheel_is_true_and_its_only_command_is_octavo(wheel: zipfile.ZipFile) -> None:
    recorded = set()
    for name, digest, size in csv.reader(io.StringIO(wheel.read(f"{INFO}/RECORD").decode())):
        recorded.add(name)
        if digest:
            found = base64.urlsafe_b64encode(hashlib.sha256(wheel.read(name)).digest()).rstrip(b"=").decode()
            assert digest == f"sha256={found}", name
            assert int(size) == len(wheel.read(name))
    assert recorded == set(wheel.namelist())
    commands = wheel.read(f"{INFO}/entry_points.txt").decode().split("\n")
    assert [line.replace(" ", "") for line in commands if "=" in line] == ["octavo=octavo_cli.main:main"]


@pytest.mark.parametrize("image", INSTALLED)
def test_the_images_install_by_hash_what_the_project_asks_for(image: str) -> None:
    text = (LOCKS / f"{image}.txt").read_text()
    pinned = {name: version for name, version, _ in _ENTRY.findall(text)}
    entries = [line for line in text.splitlines() if not line.startswith(" ")]
    assert len(_ENTRY.findall(text)) == len(entries), "an entry without hashes, or of another form"
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *(line for extra in INSTALLED[image] for line in extras[extra])]
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        if name not in NOT_LOCKED.get(image, ()):
            assert name in pinned, f"{requirement} is not in {image}.txt: run `make locks`"
            assert requirement.specifier.contains(pinned[name]), f"{requirement} is {pinned[name]}: run `make locks`"


@pytest.mark.parametrize("image", INSTALLED)
def test_the_images_install_nothing_else(image: str) -> None:
    text = (ROOT / "images" / f"{image}.Dockerfile").read_text()
    for command in re.findall(r"pip (?:install|wheel) [^\\\n&]*", text):
        is_locked = "--require-hashes" in command and "-r images/locks/" in command
        assert is_locked or "--no-deps" in command, command
    assert f"-r images/locks/{image}.txt" in text
    assert "-r images/locks/build.txt" in text
    others = re.findall(r"--no-deps .*?(\S+==\S+)", text)
    torch = next(line for line in PROJECT["project"]["optional-dependencies"]["server"] if line.startswith("torch"))
    assert others == ([torch] if image == "engine-cpu" else [])


def test_what_builds_the_wheel_is_pinned_too() -> None:
    text = (LOCKS / "build.txt").read_text()
    pinned = {name: version for name, version, _ in _ENTRY.findall(text)}
    (backend,) = map(Requirement, PROJECT["build-system"]["requires"])
    assert backend.specifier.contains(pinned[backend.name])
