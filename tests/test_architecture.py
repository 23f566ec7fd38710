"""The rooms of the house: who may import whom, read from the source."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from conftest import ROOT

# From the top floor down. A room imports from floors below its own only, whether at the top of a file or inside a function; rooms of
# one floor do not know each other. A room is a folder of utils/ or data/, a file that lies beside these folders, or models/ as a whole.
FLOORS = (
    ("main",),
    ("utils.commands",),
    ("utils.profiling",),
    ("utils.training",),
    ("utils.tasks", "utils.reporting"),
    ("utils.evaluation", "utils.visualization"),
    ("utils.inference",),
    ("utils.checkpoints", "utils.cli"),
    ("utils.loggers",),
    ("utils.runtime", "utils.optim"),
    ("data",),
    ("data.build",),
    ("data.dense",),
    ("data.doctor", "data.streaming"),
    ("data.loading",),
    ("data.layouts", "data.transforms"),
    ("data.sources",),
    ("data.decoding",),
    ("data.errors", "data.messages", "data.seeds"),
    ("models",),
    ("config",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(reversed(FLOORS)) for room in rooms}
APART = {("data", "models"), ("models", "data")}  # neither knows the other
PROGRAM = [ROOT / "main.py", ROOT / "config.py", *(path for name in ("models", "data", "utils") for path in (ROOT / name).rglob("*.py"))]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path) for path in PROGRAM}


def room_of(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] in ("utils", "data") else parts[0]


def imports(path: Path) -> set[str]:
    """Modules of this program that a file imports anywhere in it, and that its strings name; not what only type checkers read."""
    tree = ast.parse(path.read_text())
    typed = {id(node) for block in ast.walk(tree) if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
             for node in ast.walk(block)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typed:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & MODULES or {node.module}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in MODULES and "." in node.value:
            found.add(node.value)
    return found & MODULES


def test_every_room_has_a_floor_and_says_what_it_is_for() -> None:
    assert {room_of(module) for module in MODULES} - {"utils"} == set(FLOOR_OF)
    for folder in (path.parent for path in PROGRAM if path.name == "__init__.py" and path.parent != ROOT / "utils"):
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), folder


def test_imports_point_down_only() -> None:
    for path in PROGRAM:
        own = room_of(module_of(path))
        for other in map(room_of, imports(path)):
            if own == "data" and path.name == "__init__.py" and other.startswith("data."):
                continue  # the door of the package: what it holds stands inside
            assert other == own or FLOOR_OF[other] < FLOOR_OF[own], f"{path} imports {other}, which is not below {own}"
            assert (own.split(".")[0], other.split(".")[0]) not in APART, f"{path} imports {other}"


def test_scripts_are_nobodys_ground() -> None:
    for path in PROGRAM:
        assert not re.search(r"^\s*(from|import) (scripts|tests)\b", path.read_text(), re.M), path


def test_only_one_module_knows_torch_distributed() -> None:
    pattern = re.compile(r"torch\.distributed|DistributedDataParallel|torch import distributed")
    for path in PROGRAM:
        code = ast.unparse(ast.parse(path.read_text()))  # comments do not count
        code = re.sub(r'""".*?"""|\'[^\']*\'|"[^"]*"', "", code, flags=re.S)
        assert path.name == "distributed.py" or not pattern.search(code), path


def test_only_one_module_reads_the_launchers_variables() -> None:
    variable = re.compile(r"RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|MASTER_\w+|SLURM_\w+|TORCHELASTIC_\w+")
    for path in PROGRAM:
        constants = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
        found = {value for value in constants if isinstance(value, str) and variable.fullmatch(value)}
        allowed = {"LOCAL_RANK"} if path.name in ("config.py", "flags.py") else set()  # an old key and its flag
        assert path.name == "launcher.py" or found <= allowed, f"{path}: {found}"


def test_command_line_is_understood_before_torch_is_imported() -> None:
    """Neither main.py nor config.py nor utils/cli, nor what these import at their top, brings in torch."""
    heavy, seen, waiting = {"torch", "timm", "torchvision", "numpy"}, set(), ["main", "config", *(m for m in MODULES if "utils.cli" in m)]
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        path = next(path for path in PROGRAM if module_of(path) == module)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {a.name for a in node.names} | {getattr(node, "module", "") or ""}
                assert not {n.split(".")[0] for n in names} & heavy, path
                waiting += [m for m in names | {f"{getattr(node, 'module', '')}.{n}" for n in names} if m in MODULES]


def test_the_step_reads_nothing_from_the_device() -> None:
    """No synchronisation inside the hot functions: they hold no .item(), .cpu(), .tolist() and no float()."""
    tree = ast.parse((ROOT / "utils/training/engine.py").read_text())
    hot = [n for n in tree.body if getattr(n, "name", "") in ("train_one_epoch", "backward", "forward_backward", "Step")]
    assert len(hot) == 4
    for function in hot:
        for call in (n for n in ast.walk(function) if isinstance(n, ast.Call)):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            assert name not in ("item", "cpu", "tolist", "synchronize", "float", "int", "bool"), ast.unparse(call)
