"""What the site shows of the package: public names at their public places, and docstrings as Markdown."""

import re
import textwrap
from typing import Any

import griffe

EXAMPLE = re.compile(r"^(\S.*?)(::)?\n\n((?: {4}.*\n|\n)+)", re.MULTILINE)


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """An indented example, which `help()` shows well, becomes a block of Python."""
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub(_block, obj.docstring.value + "\n").rstrip()

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """`checkpoints.load` is the function, as for Python, not the file of that name."""
        for module in (pkg["checkpoints"], pkg["posthoc"]):
            for name in module.exports:
                if module[name].is_module:
                    module.set_member(name, griffe.Alias(name, module[name][name], parent=module))


def _block(match: re.Match[str]) -> str:
    before, colons, code = match.groups()
    return f"{before}{':' if colons else ''}\n\n```python\n{textwrap.dedent(code).strip()}\n```\n\n"
