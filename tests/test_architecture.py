"""The rooms of the house: who may import whom, read from the source."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from conftest import ROOT

LOCAL = ("config", "main", "models", "data", "utils")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def local(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names} & set(LOCAL)


def test_imports_point_down_only() -> None:
    assert local(imports(ROOT / "config.py")) == set()
    for path in rooms("models"):
        assert local(imports(path)) <= {"config", "models"}, path
    for path in rooms("data"):
        assert local(imports(path)) <= {"config", "data"}, path
    for path in rooms("utils"):
        assert "main" not in local(imports(path)), path


def test_only_one_module_knows_torch_distributed() -> None:
    pattern = re.compile(r"torch\.distributed|DistributedDataParallel|torch import distributed")
    for path in [ROOT / "config.py", ROOT / "main.py", *rooms("models", "data", "utils")]:
        code = ast.unparse(ast.parse(path.read_text()))  # comments do not count
        code = re.sub(r'""".*?"""|\'[^\']*\'|"[^"]*"', "", code, flags=re.S)
        assert path.name == "distributed.py" or not pattern.search(code), path


def test_command_line_is_understood_before_torch_is_imported() -> None:
    heavy = {"torch", "timm", "torchvision", "numpy"}
    tree = ast.parse((ROOT / "main.py").read_text()), ast.parse((ROOT / "config.py").read_text())
    for module in tree:
        for node in module.body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {a.name for a in node.names} | {getattr(node, "module", "") or ""}
                assert not {n.split(".")[0] for n in names} & heavy


def test_the_step_reads_nothing_from_the_device() -> None:
    """No synchronisation inside the hot functions: they hold no .item(), .cpu(), .tolist() and no float()."""
    tree = ast.parse((ROOT / "utils/engine.py").read_text())
    hot = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in ("train_one_epoch", "backward")]
    assert len(hot) == 2
    for function in hot:
        for call in (n for n in ast.walk(function) if isinstance(n, ast.Call)):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            assert name not in ("item", "cpu", "tolist", "synchronize", "float", "int", "bool"), ast.unparse(call)
