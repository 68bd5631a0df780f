"""Builds the extension for the installed torch; without torch, makes a pure-Python install that says so.

The rest is in pyproject.toml and fused_ema/_build.
"""

import importlib
import sys
import types
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

# An empty package stands in for fused_ema, whose __init__.py imports torch, which an isolated build does not have.
package = types.ModuleType("fused_ema")
package.__path__ = [str(ROOT / "fused_ema")]
sys.modules["fused_ema"] = package
_build = importlib.import_module("fused_ema._build.compile")
_cache = importlib.import_module("fused_ema._build.cache")


def give_up(reason):
    """Continues as a pure-Python install, unless the environment demands the extension."""
    for name in ("FUSED_EMA_EXT", "FUSED_EMA_CUDA"):
        if _build.switch(name):
            sys.exit(f"fused_ema: {reason}; {name}=1 makes this an error")
    _build.say(f"WARNING: NO COMPILED EXTENSION, only the slower pure-PyTorch path: {reason}.")
    _build.say("WARNING: to get the fast path, run `python -m fused_ema build` after this install,")
    _build.say("WARNING: or `pip install --no-build-isolation .` in an environment that has torch.")


class BuildExt(build_ext):
    """Compiles with CUDA or, if that fails, without it; if that fails too, continues without an extension."""

    def run(self):
        folder = Path(self.get_ext_fullpath(_build.NAME)).parent
        if target is None:  # give_up() has said why
            _cache.remove(folder)  # an older library must not be taken for this one
            return
        torch, toolkit = target
        # The objects stay, so that ninja compiles only what changed. Each torch has its own: the headers of
        # another may be older than the objects.
        temp = ROOT / "build" / f"{_build.PYTHON_TAG}-torch-{torch.__version__}"
        try:
            _cache.place(_build.compile_extension(temp, torch, toolkit), folder)
        except _build.BuildError as error:
            _cache.remove(folder)
            give_up(error)

    def get_outputs(self):
        return [path for path in super().get_outputs() if Path(path).is_file()]


BUILDING = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}
target = None
if BUILDING & set(sys.argv):
    try:
        target = _build.find_target()
    except _build.BuildError as error:
        give_up(error)

setup(
    packages=[*find_packages(include=["fused_ema", "fused_ema.*"]), "fused_ema._csrc"],
    package_dir={"fused_ema._csrc": "csrc"},
    package_data={"fused_ema": ["py.typed", "*.pyi"], "fused_ema._csrc": ["*.h", "*.cpp", "*.cu"]},
    ext_modules=[Extension(_build.NAME, sources=[])] if target else [],
    cmdclass={"build_ext": BuildExt},
)
