"""What is missing is named, with the extra that brings it."""

import re
import sys
from importlib import import_module
from pathlib import Path

import pytest

from fused_ema import checkpoints

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = {
    "lightning": ["lightning", "lightning.pytorch", "pytorch_lightning"],
    "transformers": ["transformers"],
    "diffusers": ["diffusers"],
    "files": ["safetensors"],
}
MODULES = {
    "lightning": "fused_ema.integrations.lightning",
    "transformers": "fused_ema.integrations.transformers",
    "diffusers": "fused_ema.dropin.ema_model",
}


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_error_names_the_extra(monkeypatch, extra):
    for name in EXTRAS[extra]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, MODULES.get(extra, ""), raising=False)
    expected = f'run pip install "fused-ema[{extra}]", or pip install {EXTRAS[extra][0]}'
    with pytest.raises(ImportError, match=re.escape(expected)):
        checkpoints.load("a.safetensors") if extra == "files" else import_module(MODULES[extra])


def test_the_page_lists_the_extras():
    section = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    declared = set(re.findall(r"^(\w+) = \[", section.partition("\n[")[0], re.MULTILINE))
    declared -= {"test", "demo", "bench", "dev", "docs"}  # of the checkout
    rows = (ROOT / "docs" / "install.md").read_text().partition("\n## Extras\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", rows, re.MULTILINE)) == declared >= set(EXTRAS)
