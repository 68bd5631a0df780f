"""The site that `make docs` builds: it has every page and every public name. (Whether links hold, mkdocs checks.)"""

import inspect
import re
from pathlib import Path

import fused_ema
from fused_ema import EMA, Binding, checkpoints, posthoc, schedules

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
MODULES = {"checkpoints": checkpoints, "posthoc": posthoc, "schedules": schedules}
CALLBACKS = {"integrations.lightning.EMACallback", "integrations.transformers.EMACallback"}


def test_the_navigation_names_every_page():
    navigation = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(navigation) == len(set(navigation))
    assert set(navigation) >= {page.relative_to(ROOT).as_posix() for page in PAGES} | {"README.md", "CHANGELOG.md"}


def test_every_public_name_is_on_a_page():
    shown = [name for page in PAGES for name in re.findall(r"^::: fused_ema\.(\S+)$", page.read_text("utf-8"), re.M)]
    public = set(fused_ema.__all__) - {"__version__"} | CALLBACKS
    public |= {f"{name}.{each}" for name, module in MODULES.items() for each in module.__all__}
    assert sorted(shown) == sorted(public)


def test_what_is_public_has_a_docstring_without_which_the_site_leaves_it_out():
    kinds = [each for module in (fused_ema, *MODULES.values()) for each in map(vars(module).get, module.__all__)]
    assert all(each.__doc__ for each in kinds if inspect.isclass(each) or inspect.isroutine(each))
    for kind in (EMA, Binding):
        for name, member in vars(kind).items():
            assert name.startswith("_") or inspect.getdoc(member), name
