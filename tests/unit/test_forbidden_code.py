"""Nothing in our packages unpickles, evaluates text or runs a shell: the whole source is read."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path for top in ("server", "kernels", "operator") for path in (ROOT / top).rglob("*.py"))
MODULES = frozenset({"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "jsonpickle"})
CALLS = frozenset({
    "eval", "exec", "compile", "__import__", "torch.load", "torch.jit.load", "torch.export.load", "torch.hub.load",
    "np.load", "numpy.load", "yaml.load", "yaml.unsafe_load", "os.system", "os.popen", "send_pyobj", "recv_pyobj",
})  # fmt: skip


def violations(source: str) -> Iterator[str]:
    """Imports and calls that must not be, as `line: name`."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""] if (node.module or "").split(".")[0] in MODULES else []
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in CALLS or called.rpartition(".")[2] in ("send_pyobj", "recv_pyobj"):
                names = [called]
            names += [f"{called}(shell=True)" for word in node.keywords if word.arg == "shell" and _is_true(word.value)]
            trusted = [word for word in node.keywords if word.arg == "trust_remote_code" and _is_true(word.value)]
            names += [f"{called}(trust_remote_code=True)"] * len(trusted)
        for name in names:
            yield f"{getattr(node, 'lineno', 0)}: {name}"


def _is_true(value: ast.expr) -> bool:
    return not (isinstance(value, ast.Constant) and value.value in (False, None))


def test_the_source_is_found() -> None:
    assert len(FILES) > 300


@pytest.mark.parametrize("package", ["octavo_engine", "octavo_server", "octavo_gateway", "octavo_operator",
                                     "octavo_cli", "octavo_kernels"])  # fmt: skip
def test_no_package_unpickles_or_evaluates(package: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{violation}"
        for path in FILES
        if package in path.parts
        for violation in violations(path.read_text(encoding="utf-8"))
    ]

    assert found == []


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from marshal import loads", "eval(x)", "torch.load(p)", "socket.recv_pyobj()", "exec('x')",
     "subprocess.run(c, shell=True)", "yaml.load(f)", "AutoModel.from_pretrained(p, trust_remote_code=True)"],
)  # fmt: skip
def test_the_check_sees_what_it_looks_for(source: str) -> None:
    assert list(violations(source))


def test_the_check_lets_the_harmless_pass() -> None:
    assert list(violations("re.compile('x')\nmodel.eval()\nyaml.safe_load(f)\nrun(shell=False)\nimport json")) == []
