"""The house holds to its plan: what lies where, who imports whom, and how long a file may get."""

import ast
import re

from .conftest import ROOT

SCRIPTS = {"data_report", "eval", "generate_instruction", "inference", "train", "utils", "weight_diff"}
FOUNDATION = {"alpaca.common", "alpaca.prompts"}


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in [*ROOT.glob("*.py"), *ROOT.glob("alpaca/**/*.py")]}


def imports_of(module):
    """The modules of this project that a module imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return found & MODULES.keys()


IMPORTS = {module: imports_of(module) for module in MODULES}


def room(module):
    return module.rpartition(".")[0] if module.count(".") > 1 else module


def test_the_root_holds_the_scripts_and_nothing_else():
    assert {path.stem for path in ROOT.glob("*.py")} <= SCRIPTS
    assert {path.name for path in ROOT.glob("*.md")} == {"README.md"}


def test_no_script_imports_a_script_and_no_room_imports_a_script():
    for module, imported in IMPORTS.items():
        assert not imported & SCRIPTS, f"{module} imports {imported & SCRIPTS}"


def test_the_foundation_imports_nothing_of_the_project():
    assert not any(IMPORTS[module] for module in FOUNDATION)


def test_no_circle_of_files_and_none_of_rooms():
    def visit(node, edges, path):
        assert node not in path, " → ".join([*path, node])
        for other in edges.get(node, ()):
            visit(other, edges, [*path, node])

    rooms = {}
    for module, imported in IMPORTS.items():
        rooms.setdefault(room(module), set()).update({room(name) for name in imported} - {room(module)})
    for edges in (IMPORTS, rooms):
        for node in edges:
            visit(node, edges, [])


def test_files_read_from_top_to_bottom():
    for module, path in MODULES.items():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines < (300 if module in SCRIPTS else 450), f"{path.name} has {lines} lines"
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path.name} does not say what it is"
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 250


def test_the_readme_tree_names_what_is_there():
    tree = re.search(r"## Where things are\n\n```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    named = {word for line in tree.splitlines() for word in re.findall(r"[\w./]+", line.split("  ")[0])}
    assert all((ROOT / name).exists() for name in named), named
    rooms = {f"{path.parent.relative_to(ROOT)}/" for path in ROOT.glob("alpaca/*/*.py")}
    assert {path.name for path in ROOT.glob("*.py")} | rooms <= named


def test_tests_are_named_after_rooms():
    rooms = {path.name for path in (ROOT / "alpaca").iterdir() if path.is_dir() and path.name != "__pycache__"}
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert rooms <= folders <= rooms | {"benchmarks"}, folders ^ rooms
