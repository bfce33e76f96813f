"""Which way imports may point, and that every public name says what it is; read from the source, nothing is run.

The rules name layers, not files, so that a new module is checked from its first commit. A new package, or a new module
at the top, must be given a layer here.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "adabatch"

FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef

ARGUMENTS = "adabatch.arguments"
VOCABULARY = (ARGUMENTS, "adabatch.batch.plan", "adabatch.batch.moments", "adabatch.batch.needs")
GUARDS = 3
SHELL = 4
CHECKPOINTING = 5
LAYERS = {
    "adabatch.batch": 1,
    "adabatch.lr": 1,
    "adabatch.forecast": 1,
    "adabatch.runtime": 2,
    "adabatch.optim": 2,
    "adabatch.guards": GUARDS,
    "adabatch.adaptive": SHELL,
    "adabatch.journal": SHELL,
    "adabatch.data": SHELL,
    "adabatch.probes": SHELL,
    "adabatch.local_sgd": SHELL,
    "adabatch.checkpointing": CHECKPOINTING,
    "adabatch": 6,
    "adabatch.verification": 7,
    "adabatch.integrations": 7,
    "adabatch.report": 7,
    "adabatch.recipes": 7,
    "adabatch.cli": 8,
    "adabatch.__main__": 9,
}


@dataclass(frozen=True)
class Import:
    """One import: of module ``target`` (for ``from a import b`` where b is a module, of ``a.b``), in ``source``."""

    source: str
    target: str
    line: int
    in_function: bool


def modules() -> list[str]:
    """Dotted names of all modules of the package."""
    return sorted(_name_of(path) for path in ROOT.rglob("*.py"))


def _name_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _path_of(module: str) -> Path:
    path = ROOT.parent.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(_path_of(module).read_text(encoding="utf-8"))


def exists(module: str) -> bool:
    return module.split(".")[0] == ROOT.name and _path_of(module).is_file()


@cache
def imports_of(module: str) -> tuple[Import, ...]:
    return tuple(_imports(module, tree_of(module), in_function=False))


def _imports(module: str, node: ast.AST, *, in_function: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(module, alias.name, child.lineno, in_function)
        elif isinstance(child, ast.ImportFrom):
            base = _base_of(module, child)
            for alias in child.names:
                deeper = f"{base}.{alias.name}"
                yield Import(module, deeper if exists(deeper) else base, child.lineno, in_function)
        yield from _imports(module, child, in_function=in_function or isinstance(child, FUNCTION))


def _base_of(module: str, node: ast.ImportFrom) -> str:
    if node.level == 0:
        assert node.module is not None
        return node.module
    package = module.split(".") if _path_of(module).name == "__init__.py" else module.split(".")[:-1]
    package = package[: len(package) - node.level + 1]
    return ".".join([*package, node.module] if node.module else package)


def own(module: str) -> bool:
    return module.split(".")[0] == ROOT.name


def inside(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def unit_of(module: str) -> str:
    """The part of the package that has a layer: the vocabulary, a package, the face, or a module of the shell."""
    return module if module in VOCABULARY else ".".join(module.split(".")[:2])


def layer_of(module: str) -> int:
    unit = unit_of(module)
    if unit in VOCABULARY:
        return 0
    assert unit in LAYERS, f"{unit} is new: give it a layer in {Path(__file__).name}"
    return LAYERS[unit]


def places(found: list[Import]) -> str:
    return "\n".join(f"  {each.source}, line {each.line}: imports {each.target}" for each in found)


def public_definitions(module: str) -> Iterator[tuple[str, ast.stmt]]:
    """Public functions and classes of a module, and the public methods that those classes bring in."""
    for node in tree_of(module).body:
        if isinstance(node, FUNCTION | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                for member in node.body:
                    private = not isinstance(member, FUNCTION) or member.name.startswith("_")
                    if not private and not described_by_a_base(node, member.name):
                        yield f"{node.name}.{member.name}", member


@cache
def described_methods() -> dict[str, set[str]]:
    """For each class of the package, by its name, the methods that have a docstring."""
    return {
        node.name: {each.name for each in node.body if isinstance(each, FUNCTION) and ast.get_docstring(each)}
        for module in modules()
        for node in tree_of(module).body
        if isinstance(node, ast.ClassDef)
    }


def described_by_a_base(node: ast.ClassDef, method: str) -> bool:
    """Whether a base class says what the method does: one of ours, or torch's ``Module.forward``."""
    bases = [ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases]
    return any(method in described_methods().get(base, ()) for base in bases) or method == "forward"


def is_overload(node: ast.stmt) -> bool:
    """An overload's docstring stands at its implementation; a property's setter's, at its getter."""
    decorators = [ast.unparse(each) for each in getattr(node, "decorator_list", [])]
    return any(each.split(".")[-1] in ("overload", "setter", "deleter") for each in decorators)


def described(module: str, name: str) -> bool | None:
    """Whether ``name`` in ``module`` has a docstring; None where it does not exist."""
    if exists(f"{module}.{name}"):
        return ast.get_docstring(tree_of(f"{module}.{name}")) is not None
    body = tree_of(module).body
    for index, node in enumerate(body):
        if isinstance(node, FUNCTION | ast.ClassDef) and node.name == name:
            if is_overload(node):
                continue
            return ast.get_docstring(node) is not None
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                after = body[index + 1] if index + 1 < len(body) else None
                value = after.value if isinstance(after, ast.Expr) else None
                return isinstance(value, ast.Constant) and isinstance(value.value, str)
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    base = _base_of(module, node) if isinstance(node, ast.ImportFrom) else alias.name
                    return described(base, alias.name) if own(base) and base != module else True
    return None


def exported(module: str) -> list[str]:
    for node in tree_of(module).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            assert isinstance(node, ast.Assign)
            return list(ast.literal_eval(node.value))
    return []


def test_the_package_is_found() -> None:
    assert {"adabatch", *VOCABULARY, "adabatch.adaptive"} <= set(modules())


@pytest.mark.parametrize("module", modules())
def test_every_package_module_has_a_layer(module: str) -> None:
    assert 0 <= layer_of(module) <= max(LAYERS.values())


def test_pure_packages_import_the_standard_library_and_numpy_only() -> None:
    wrong = [
        each
        for module in modules()
        if inside(module, "adabatch.batch", "adabatch.lr", "adabatch.forecast")
        for each in imports_of(module)
        if each.target.split(".")[0] not in {*sys.stdlib_module_names, "numpy"}
        and not inside(each.target, "adabatch.batch", "adabatch.lr", "adabatch.forecast", ARGUMENTS)
    ]
    assert not wrong, f"batch/, lr/ and forecast/ are pure: standard library and numpy\n{places(wrong)}"


def test_runtime_knows_the_vocabulary_and_itself() -> None:
    # ProgressLR is a torch object around pure schedule maths, so that module alone reads shapes and clock.
    shapes = ("adabatch.lr.shapes", "adabatch.lr.function_shape")
    maths = {"adabatch.runtime.optimizers.scheduler": (*shapes, "adabatch.lr.clock")}
    wrong = [
        each
        for module in modules()
        if inside(module, "adabatch.runtime")
        for each in imports_of(module)
        if own(each.target)
        and not inside(each.target, "adabatch.runtime")
        and each.target not in (*VOCABULARY, *maths.get(module, ()))
    ]
    assert not wrong, (
        f"runtime/ imports only arguments, batch.plan, batch.moments, batch.needs and itself\n{places(wrong)}"
    )


def test_optimizers_know_nothing_of_the_package() -> None:
    wrong = [
        each
        for module in modules()
        if inside(module, "adabatch.optim")
        for each in imports_of(module)
        if own(each.target) and not inside(each.target, "adabatch.optim", ARGUMENTS)
    ]
    assert not wrong, f"optim/ imports nothing of the package but arguments\n{places(wrong)}"


def test_nothing_imports_upwards() -> None:
    wrong = [
        each
        for module in modules()
        for each in imports_of(module)
        if own(each.target) and layer_of(each.target) > layer_of(module)
    ]
    assert not wrong, f"imports point down\n{places(wrong)}"


@pytest.mark.parametrize("unit", [False, True], ids=["modules", "packages"])
def test_no_circles(unit: bool) -> None:
    def node(module: str) -> str:
        return unit_of(module) if unit else module

    edges: dict[str, set[str]] = {node(module): set() for module in modules()}
    for module in modules():
        edges[node(module)] |= {node(each.target) for each in imports_of(module) if own(each.target)}
    for source in edges:
        edges[source].discard(source)
    if not unit:
        assert not any(each.target == each.source for module in modules() for each in imports_of(module))
    while leaves := {source for source, targets in edges.items() if not targets & edges.keys()}:
        for leaf in leaves:
            del edges[leaf]
    assert not edges, f"these import each other in a circle: {sorted(edges)}"


def test_imports_stand_at_the_head_of_a_module() -> None:
    wrong = [
        each
        for module in modules()
        if not inside(module, "adabatch.integrations", "adabatch.cli")
        for each in imports_of(module)
        if each.in_function and not (inside(module, "adabatch.runtime") and inside(each.target, "mpi4py"))
    ]
    assert not wrong, f"imports hidden in functions\n{places(wrong)}"


@pytest.mark.parametrize("module", modules())
def test_exported_names_exist_and_are_described(module: str) -> None:
    names = exported(module)
    assert len(names) == len(set(names))
    missing = [name for name in names if described(module, name) is None]
    assert not missing, f"{module}.__all__ names what is not there: {missing}"
    silent = [name for name in names if described(module, name) is False]
    assert not silent, f"{module}.__all__ names what has no docstring: {silent}"


@pytest.mark.parametrize("module", modules())
def test_public_names_have_docstrings(module: str) -> None:
    assert ast.get_docstring(tree_of(module)), f"{module} does not say what it is for"
    silent = [
        name
        for name, node in public_definitions(module)
        if not is_overload(node) and ast.get_docstring(node) is None  # type: ignore[arg-type]
    ]
    assert not silent, f"no docstring in {module}: {silent}"


def test_only_the_command_line_prints() -> None:
    prints = [
        f"{module}, line {node.lineno}"
        for module in modules()
        if not inside(module, "adabatch.cli")
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not prints, f"print in the library: {prints}"


# --- docs/architecture.md ------------------------------------------------------------------------------------------

PAGE = ROOT.parent / "docs" / "architecture.md"


def table(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading of the page, without its head."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = section[section.index("| --- |") :].split("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def names_in(path: Path) -> set[str]:
    """Classes, functions and variables that a module defines, and the members of its classes."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    inner = [node for outer in body if isinstance(outer, ast.ClassDef) for node in outer.body]
    found = {node.name for node in (*body, *inner) if isinstance(node, FUNCTION | ast.ClassDef)}
    assigned = [node for node in (*body, *inner) if isinstance(node, ast.Assign | ast.AnnAssign)]
    targets = [target for node in assigned for target in getattr(node, "targets", [getattr(node, "target", None)])]
    return found | {target.id for target in targets if isinstance(target, ast.Name)}


def test_the_page_has_the_layers_of_the_code() -> None:
    told = {name: int(layer) for layer, what, _ in table("Layers") for name in quoted(what)}
    assert told == {unit_of(module): layer_of(module) for module in modules()}


def test_the_page_names_the_rooms_of_runtime() -> None:
    section = PAGE.read_text(encoding="utf-8").split("Rooms inside `runtime/`:")[1].split("\n## ")[0]
    folders = {path.name for path in (ROOT / "runtime").iterdir() if (path / "__init__.py").is_file()}
    assert set(re.findall(r"^\| `runtime/(\w+)/` \|", section, flags=re.MULTILINE)) == folders


@pytest.mark.parametrize("row", table("Protocols"), ids=lambda row: row[0])
def test_the_page_names_protocols_that_exist(row: list[str]) -> None:
    names, module, members, _ = row
    (module,) = quoted(module)
    defined = names_in(_path_of(module))
    assert set(quoted(names)) | set(quoted(members)) <= defined


@pytest.mark.parametrize("row", table("To add something"), ids=lambda row: row[0])
def test_the_page_names_files_that_hold_what_it_says(row: list[str]) -> None:
    _, change, tests = row
    for path, name in re.findall(r"`([\w/]+\.(?:py|cfg))`(?: \(`(\w+)`\))?", change.replace(".py`: `", " ")):
        where = ROOT.parent / path if path == "setup.cfg" else ROOT / path
        assert where.is_file(), path
        assert not name or name in names_in(where), f"{path} does not hold {name}"
    for folder, file, name in re.findall(r"a module in `([\w/]+)/`(?: \(`(\w+\.py)`: `(\w+)`\))?", change):
        assert (ROOT / folder).is_dir()
        assert not file or name in names_in(ROOT / folder / file)
    for path, name in re.findall(r"`(tests/[\w/]+(?:\.py)?)`(?: \(`(\w+)`\))?", tests):
        assert (ROOT.parent / path).exists(), path
        assert not name or name in names_in(ROOT.parent / path)
