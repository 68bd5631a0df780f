"""Imports run one way through the package, without a circle. Those inside functions and for types alone count too."""

import ast
from itertools import pairwise
from pathlib import Path

import pytest

import fused_ema

PACKAGE = Path(fused_ema.__file__).parent
# A room is a module or a folder of the package; "__init__" is what `import fused_ema` gives. A room may import from
# itself and from the lines below its own.
ORDER = """
    __main__
    _cost
    integrations
    __init__
    merging
    posthoc checkpoints dropin
    manager
    functional
    ops
    plan
    runners
    pairs _build
    _version _warning
""".strip().splitlines()
LEVELS = {room: level for level, line in enumerate(ORDER) for room in line.split()}
ALSO = {  # room: further modules, or rooms, that it may import
    "__init__": {"schedules"},
    "integrations": {"schedules"},
    "merging": {"schedules"},
    "posthoc": {"checkpoints.files", "schedules"},
    "checkpoints": {"schedules"},
    "manager": {"schedules"},
    "schedules": {"pairs.arguments"},
    "runners": {"_C"},  # the compiled extension
}
NEVER = {("manager", "functional")}
ROOMS = {*LEVELS, "schedules", "_C"}


def modules_of(package):
    """The files by their names inside the package: "manager.ema", or "manager" for the room's __init__.py."""
    paths = sorted(path for path in package.rglob("*.py*") if path.suffix in (".py", ".pyi"))
    names = [".".join(path.relative_to(package).with_suffix("").parts) for path in paths]
    return dict(zip([name.removesuffix(".__init__") for name in names], paths, strict=True))


def room_of(module):
    return module.partition(".")[0]


def imported_names(node, path, package):
    """What a statement imports, as pairs: the full name, and the module that it is taken from."""
    if isinstance(node, ast.Import):
        return [(alias.name, alias.name) for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        folders = path.relative_to(package.parent).parent.parts
        base = ".".join([*folders[: len(folders) + 1 - node.level], *filter(None, [node.module])])
        base = base if node.level else node.module
        return [(f"{base}.{alias.name}", base) for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        name = getattr(node.args[0], "value", "")
        return [(name, name)]
    return []


def imports(package):
    """Each import of a part of the package by another: the importing module, the imported one, "path:line"."""
    modules = modules_of(package)

    def inside(name):
        root, _, rest = name.partition(".")
        return (rest or "__init__") if root == package.name else ""

    for importer, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for name, base in imported_names(node, path, package):
                found = inside(name) if inside(name) in modules else inside(base)
                if found and found != importer:
                    yield importer, found, f"{path.relative_to(package.parent)}:{node.lineno}"


def allowed(importer, imported):
    room, other = room_of(importer), room_of(imported)
    if room == other:
        return True
    if (room, other) in NEVER:
        return False
    if {imported, other} & ALSO.get(room, set()):
        return True
    return room in LEVELS and LEVELS.get(other, -1) > LEVELS[room]


def circles(edges):
    """The shortest circle through each edge, as a list of modules that ends where it begins; each circle once."""
    after = {}
    for importer, imported in edges:
        after.setdefault(importer, []).append(imported)
    seen = set()
    for importer, imported in edges:
        ways, reached = [[importer, imported]], {imported}
        for way in ways:  # the list grows while it is read: the shortest ways come first
            if way[-1] == importer:
                if frozenset(way) not in seen:
                    seen.add(frozenset(way))
                    yield way
                break
            new = [each for each in after.get(way[-1], []) if each not in reached]
            reached.update(new)
            ways += [[*way, each] for each in new]


def faults(package):
    """A line for each room that has no place in the order, each import that runs backwards, and each circle in a room.

    A circle through several rooms has an import that runs backwards.
    """
    found = list(imports(package))
    for room in sorted(set(map(room_of, modules_of(package))) - ROOMS):
        yield f"{room} has no place in ORDER: say there what it may import"
    for importer, imported, place in found:
        if not allowed(importer, imported):
            yield f"{place}: {importer} must not import {imported}"
    places = {(one, other): place for one, other, place in found if room_of(one) == room_of(other)}
    for circle in circles(sorted(places)):
        yield f"{', '.join(places[edge] for edge in pairwise(circle))}: circle {' -> '.join(circle)}"


def test_imports_run_one_way():
    found = list(imports(PACKAGE))
    assert {("__init__", "functional"), ("plan", "pairs.checks")} <= {(one, other) for one, other, _ in found}
    wrong = list(faults(PACKAGE))
    assert not wrong, f"{len(wrong)} faults in the package's imports:\n" + "\n".join(wrong)


# ---- That faults are seen ------------------------------------------------------------------------

GOOD = {
    "_C.pyi": "",
    "__init__.py": "from . import posthoc, schedules\nfrom .manager.ema import EMA",
    "__main__.py": "import fused_ema\nfrom . import _cost",
    "_cost.py": "from .functional import bind",
    "_version.py": "__version__ = '1'",
    "functional.py": "import torch\nfrom .plan import Plan",
    "plan.py": "from .pairs import pairing\nfrom .runners.base import Runner",
    "schedules.py": "from .pairs.arguments import shown",
    "manager/__init__.py": "",
    "manager/ema.py": "from .. import schedules\nfrom . import state\nfrom .state import f",
    "manager/state.py": "from ..pairs.pairing import pair",
    "checkpoints/__init__.py": "from ..manager.ema import EMA\nfrom .files import save",
    "checkpoints/files.py": "",
    "posthoc/__init__.py": "from ..checkpoints import files\nfrom ..checkpoints.files import save",
    "runners/__init__.py": "",
    "runners/base.py": "from .. import _C\nfrom .._build import cache",
    "pairs/__init__.py": "",
    "pairs/arguments.py": "",
    "pairs/pairing.py": "from . import arguments",
    "_build/__init__.py": "",
    "_build/cache.py": "from .._version import __version__",
}


@pytest.fixture
def package(tmp_path):
    for name, text in GOOD.items():
        path = tmp_path / "fused_ema" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "fused_ema"


def test_a_package_without_faults(package):
    assert list(faults(package)) == []


@pytest.mark.parametrize(
    ("file", "added", "expected"),
    [
        ("plan.py", "from .functional import bind", "plan must not import functional"),
        ("pairs/pairing.py", "from .. import plan", "pairs.pairing must not import plan"),
        ("pairs/arguments.py", "import fused_ema", "pairs.arguments must not import __init__"),
        ("pairs/arguments.py", "from fused_ema import EMA", "pairs.arguments must not import __init__"),
        ("pairs/arguments.py", "from .. import EMA", "pairs.arguments must not import __init__"),
        ("pairs/arguments.py", "import fused_ema.plan as p", "pairs.arguments must not import plan"),
        ("pairs/arguments.py", "from fused_ema._build.cache import build", "arguments must not import _build.cache"),
        ("manager/ema.py", "from ..functional import bind", "manager.ema must not import functional"),
        ("manager/ema.py", "def f():\n    from ..posthoc import g", "manager.ema must not import posthoc"),
        ("manager/ema.py", "if TYPE_CHECKING:\n    from .. import posthoc", "manager.ema must not import posthoc"),
        ("manager/state.py", "from .ema import EMA", "circle manager.ema -> manager.state -> manager.ema"),
        ("manager/state.py", "from . import ema", "circle manager.ema -> manager.state -> manager.ema"),
        ("manager/__init__.py", "from .a import b", "circle manager -> manager.a -> manager.b -> manager"),
        ("posthoc/__init__.py", "from ..checkpoints import load", "posthoc must not import checkpoints"),
        ("posthoc/__init__.py", "from .. import checkpoints", "posthoc must not import checkpoints"),
        ("checkpoints/files.py", "from ..posthoc import g", "checkpoints.files must not import posthoc"),
        ("schedules.py", "from .pairs.pairing import pair", "schedules must not import pairs.pairing"),
        ("functional.py", "from .schedules import f", "functional must not import schedules"),
        ("plan.py", "from . import _C", "plan must not import _C"),
        ("_version.py", "importlib.import_module('fused_ema.plan')", "_version must not import plan"),
        ("attic.py", "", "attic has no place in ORDER"),
    ],
)
def test_each_fault_is_seen(package, file, added, expected):
    (package / "manager" / "a.py").write_text("from .b import c")
    (package / "manager" / "b.py").write_text("from . import c")
    with open(package / file, "a") as text:
        text.write(f"\n{added}")
    (found,) = faults(package)
    assert expected in found


def test_the_message_names_every_place(package):
    (package / "manager" / "state.py").write_text("\ndef f():\n    from .ema import EMA")
    (package / "_version.py").write_text("from . import plan")
    assert list(faults(package)) == [
        "fused_ema/_version.py:1: _version must not import plan",
        "fused_ema/manager/ema.py:3, fused_ema/manager/state.py:3: circle manager.ema -> manager.state -> manager.ema",
    ]


def private_members_of_managers(package):
    """Reads and writes of `ema._x` and the like outside the file that defines EMA, as "path:line"."""
    for path in sorted(package.rglob("*.py")):
        if path.relative_to(package) == Path("manager/ema.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                owner = ast.unparse(node.value).rpartition(".")[2]
                if owner in ("ema", "_ema", "manager", "_manager"):
                    yield f"{path.relative_to(package)}:{node.lineno}"


def test_nobody_else_touches_the_private_members_of_a_manager():
    assert not list(private_members_of_managers(PACKAGE))


@pytest.mark.parametrize("line", ["ema._step = 3", "x = self.ema._swap", "self._manager._update(None)"])
def test_a_touch_of_private_members_is_seen(tmp_path, line):
    (tmp_path / "callback.py").write_text(f"{line}\n")
    assert list(private_members_of_managers(tmp_path)) == ["callback.py:1"]
