"""Builds the extension for the installed torch; without torch, makes an install of Python alone, which says so.

The rest is in pyproject.toml and fused_ema/_build.
"""

import importlib
import sys
import types
from pathlib import Path

from setuptools import Extension, __version__, find_packages, setup
from setuptools.command.build_ext import build_ext

if int(__version__.partition(".")[0]) < 77:  # its own error about pyproject.toml is 91 lines long
    sys.exit(f'fused_ema: expected setuptools 77 or newer, found {__version__}; run pip install "setuptools>=77"')

ROOT = Path(__file__).resolve().parent

# An empty package stands in for fused_ema, whose __init__.py imports torch, which an isolated build does not have.
package = types.ModuleType("fused_ema")
package.__path__ = [str(ROOT / "fused_ema")]
sys.modules["fused_ema"] = package
_build = importlib.import_module("fused_ema._build.compile")
_cache = importlib.import_module("fused_ema._build.cache")


def give_up(reason):
    """Continues without the extension, unless the environment demands it."""
    for name in ("FUSED_EMA_EXT", "FUSED_EMA_CUDA"):
        if _build.switch(name):
            sys.exit(f"fused_ema: {reason}; {name}=1 makes this an error")
    _build.say(f"installing without the compiled extension: {reason}.")
    _build.say(
        "On CUDA, updates compile the same kernels by NVRTC; elsewhere they are as fast as torch._foreach_lerp_."
    )
    _build.say("With a C++ compiler, `python -m fused_ema build` adds the extension, which is faster on the CPU.")


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
