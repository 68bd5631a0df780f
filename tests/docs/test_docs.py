"""The pages in docs/: each block of Python runs, in a process of its own; links lead somewhere. (migrating.md has its
own test, README too.)"""

import copy
import itertools
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import fused_ema

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Imports alone take seconds, and the frameworks and exports have tests of their own.
SLOW = re.compile("import lightning|transformers|accelerate|diffusers|import peft|fully_shard|torch.onnx")
BLOCKS = [
    pytest.param(
        block,
        id=f"{page.stem}-{section.partition(chr(10))[0].strip()}",
        marks=[pytest.mark.slow] if SLOW.search(block) else [],
    )
    for page in PAGES
    if page.stem not in ("README", "migrating")
    for section in page.read_text(encoding="utf-8").split("\n## ")
    for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL)
]


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_runs(block, tmp_path):
    if "fully_shard" in block and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("FSDP2 runs on the CPU from PyTorch 2.7 on")
    command = [sys.executable, "-W", "error::UserWarning:__main__", "-c", block]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_what_help_calls_equivalent_and_its_example_are():
    def code(title):
        lines = fused_ema.update.__doc__.partition(f"{title}::\n")[2].splitlines()
        return textwrap.dedent("\n".join(itertools.takewhile(lambda line: not line or line.startswith(" " * 8), lines)))

    def train(body):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        batches = torch.randn(4, 8, 3)
        names = {"batches": batches, "loss": lambda model, x: model(x).square().mean(), "decay": 0.999}
        names |= {"copy": copy, "torch": torch, "fused_ema": fused_ema, "model": model, "optimizer": optimizer}
        exec(body, names)
        return names["ema"].state_dict()

    example = code("Example")
    plain = example.replace("fused_ema.update(ema, model, 0.999)", "plain(ema, model, decay)")
    plain = "def plain(ema, model, decay):\n" + textwrap.indent(code("Equivalent to"), "    ") + plain
    assert plain.count("plain(ema") == 2
    found, expected = train(example), train(plain)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-9)


def anchors(page):
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"(?:\]\(|\b(?:src|srcset|href)=\")([^)\"\s]+)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_tests_that_pages_name_exist():
    named = {
        name for page in PAGES for name in re.findall(r"`([\w/]+/test_\w+\.py(?:::\w+)?)`", page.read_text("utf-8"))
    }
    assert len(named) > 40
    for name in named:
        path, _, test = name.partition("::")
        file = ROOT / "tests" / path.removeprefix("tests/")
        assert file.is_file(), name
        assert not test or f"def {test}(" in file.read_text(encoding="utf-8"), name
