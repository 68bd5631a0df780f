"""Builds the extension for the torch that is installed; without one, a pure-Python install that says so.

All else is in pyproject.toml and fused_ema/_build/compile.py.
"""

import importlib
import sys
import types
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

# A bare package takes the place of the real one, whose __init__.py imports torch: an isolated build does not have it.
package = types.ModuleType("fused_ema")
package.__path__ = [str(ROOT / "fused_ema")]
sys.modules["fused_ema"] = package
_build = importlib.import_module("fused_ema._build.compile")


def give_up(reason):
    """Ends as a pure-Python install, unless the environment asks for more."""
    for name in ("FUSED_EMA_EXT", "FUSED_EMA_CUDA"):
        if _build.switch(name):
            sys.exit(f"fused_ema: {reason}; {name}=1 makes that an error")
    _build.say(f"WARNING: NO COMPILED EXTENSION, only the slower pure-PyTorch path: {reason}.")
    _build.say("WARNING: for the fast one run `python -m fused_ema build` after this install,")
    _build.say("WARNING: or `pip install --no-build-isolation .` in an environment that has torch.")


class BuildExt(build_ext):
    """Compiles through _build.py, which falls back from CUDA to the CPU part alone; here, to no extension."""

    def run(self):
        folder = Path(self.get_ext_fullpath(_build.NAME)).parent
        # Kept between builds, so that ninja compiles what changed; one per torch, since headers of another
        # may be older than the objects.
        temp = ROOT / "build" / f"{_build.PYTHON_TAG}-torch-{_build.import_torch().__version__}"
        try:
            _build.place(_build.compile_extension(temp), folder)
        except _build.BuildError as error:
            _build.remove(folder)  # an older one must not pass for this one
            give_up(error)

    def get_outputs(self):
        return [path for path in super().get_outputs() if Path(path).is_file()]


reason = None
if _build.switch("FUSED_EMA_EXT") is False:
    reason = "FUSED_EMA_EXT=0"
else:
    try:
        _build.import_torch()
    except _build.BuildError as error:
        reason = error
BUILDING = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}
if reason and BUILDING & set(sys.argv):
    give_up(reason)

setup(
    packages=[*find_packages(include=["fused_ema", "fused_ema.*"]), "fused_ema._csrc"],
    package_dir={"fused_ema._csrc": "csrc"},
    package_data={"fused_ema": ["py.typed", "*.pyi"], "fused_ema._csrc": ["*.h", "*.cpp", "*.cu"]},
    ext_modules=[] if reason else [Extension(_build.NAME, sources=[])],
    cmdclass={"build_ext": BuildExt},
)
