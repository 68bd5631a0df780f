"""What the package must never do: run code from a file, use a network, or start a shell."""

import ast
from pathlib import Path

import pytest

import fused_ema

PACKAGE = Path(fused_ema.__file__).parent
FILES = [*sorted(PACKAGE.rglob("*.py")), PACKAGE.parent / "setup.py"]
ALLOWED = {  # exactly what is imported: think about what another module can do before you add it
    "__future__",
    "accelerate",
    "argparse",
    "array",
    "bisect",
    "collections",
    "contextlib",
    "copy",
    "ctypes",
    "dataclasses",
    "diffusers",
    "enum",
    "errno",
    "fcntl",
    "fractions",
    "functools",
    "fused_ema",
    "gc",
    "hashlib",
    "importlib",
    "inspect",
    "io",
    "itertools",
    "json",
    "lightning",
    "math",
    "mmap",
    "numbers",
    "operator",
    "os",
    "pathlib",
    "pickle",
    "platform",
    "pytorch_lightning",
    "re",
    "reprlib",
    "safetensors",
    "setuptools",
    "shutil",
    "struct",
    "subprocess",
    "sys",
    "sysconfig",
    "tempfile",
    "threading",
    "time",
    "torch",
    "transformers",
    "types",
    "typing",
    "typing_extensions",
    "uuid",
    "warnings",
    "weakref",
}
NATIVE = {"_build/nvrtc.py", "runners/driver.py"}  # the only files that may import ctypes, which can call anything
# An unpickler of its own class makes nothing but what its find_class allows; tests/merging/test_dcp.py tries others.
RESTRICTED = {"merging/dcp_folders.py"}
CODE = {"__import__", "builtins.__import__", "builtins.compile", "compile", "runpy.run_module", "runpy.run_path"}
UNPICKLE = {"pickle.load", "pickle.loads", "pickle.Unpickler", "torch.jit.load", "torch.hub.load"}
SHELL = {"os.startfile", *(f"subprocess.{name}" for name in ("call", "check_call", "check_output", "Popen"))}
FORBIDDEN = CODE | UNPICKLE | SHELL
# Calls of any object's member of that name, if they have arguments: nn.Module.eval() has none.
LAST = {
    "download_url_to_file",
    "eval",
    "exec",
    "getoutput",
    "getstatusoutput",
    "load_state_dict_from_url",
    "popen",
    "system",
}
PROCESSES = ("os.exec", "os.posix_spawn", "os.spawn")
LOADS = {"torch.load", "torch.serialization.load"}
# Modules that may only be imported under their own names.
HIDING = {"builtins", "importlib", "os", "pickle", "runpy", "subprocess", "torch"}
PARTS = {"importlib.import_module", "torch.hub", "torch.jit", "torch.serialization"}
SHELLS = {"bash", "cmd", "cmd.exe", "powershell", "sh"}


def imported(node):
    """The modules that an import or a call of import_module names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [] if node.level else [node.module]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        return [getattr(node.args[0], "value", None) or "a module that is not named here"]
    return []


def top(module):
    return module.partition(".")[0]


def forbidden(name):
    return name in FORBIDDEN or name.startswith(PROCESSES)


def hides(node):
    """What an import makes callable under a name that the checks below do not know."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names if alias.asname and top(alias.name) in HIDING]
    if isinstance(node, ast.ImportFrom) and not node.level:
        names = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        return [
            full
            for name, full in names.items()
            if forbidden(full) or name in LAST or full in LOADS | PARTS or (name == "*" and top(full) in HIDING)
        ]
    return []


def options(call):
    return {each.arg: ast.unparse(each.value) for each in call.keywords}


def faults(source):
    """Everything in the source that is forbidden, with its line."""
    nodes = list(ast.walk(ast.parse(source)))
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    safe = {call.func for call in calls if options(call).get("weights_only") == "True"}
    for node in nodes:
        for module in imported(node):
            if top(module) not in ALLOWED:
                yield node.lineno, f"imports {module}"
        for name in hides(node):
            yield node.lineno, f"imports {name} under a name that hides its use"
        if isinstance(node, ast.Name | ast.Attribute):
            name = ast.unparse(node)
            if forbidden(name):
                yield node.lineno, f"uses {name}"
            if name in LOADS and node not in safe:
                yield node.lineno, f"uses {name} without weights_only=True"
    for node in calls:
        called, given = ast.unparse(node.func), options(node)
        if called.rpartition(".")[2] in LAST and (node.args or given):
            yield node.lineno, f"calls {called}"
        for option in ("allow_pickle", "shell"):
            if given.get(option, "False") != "False":
                yield node.lineno, f"{called} with {option}"
        if called.startswith("subprocess.") and SHELLS & {
            Path(each.value).name
            for argument in node.args
            for each in ast.walk(argument)
            if isinstance(each, ast.Constant) and isinstance(each.value, str)
        }:
            yield node.lineno, f"{called} with a shell"


def test_what_is_imported():
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in FILES]
    assert {top(module) for tree in trees for node in ast.walk(tree) for module in imported(node)} == ALLOWED


def test_who_calls_libraries():
    texts = {path: path.read_text(encoding="utf-8") for path in FILES}
    assert {path.relative_to(PACKAGE).as_posix() for path, text in texts.items() if "ctypes" in text} == NATIVE


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE.parent).as_posix())
def test_no_file_does_what_is_forbidden(path):
    source = path.read_text(encoding="utf-8")
    if path.is_relative_to(PACKAGE) and path.relative_to(PACKAGE).as_posix() in RESTRICTED:
        assert source.count("pickle.Unpickler") == source.count("(pickle.Unpickler):\n") == 1
        assert "def find_class" in source
        source = source.replace("(pickle.Unpickler):", ":")
    assert not list(faults(source))


@pytest.mark.parametrize(
    "line",
    [
        "import pickle; pickle.load(file)",
        "from pickle import load; load(f)",
        "from pickle import loads",
        "from pickle import *",
        "import pickle as p",
        "import pickle as p; p.loads(x)",
        "f = pickle.loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "read = torch.load",
        "import torch as t",
        "import torch.serialization as s",
        "from torch import load",
        "from torch import serialization",
        "from torch.serialization import load as read",
        "torch.serialization.load(f)",
        "torch.jit.load(f)",
        "torch.hub.load(repository, name)",
        "torch.hub.load_state_dict_from_url(u)",
        "from torch.hub import load_state_dict_from_url",
        "numpy.load(f, allow_pickle=True)",
        "eval('1')",
        "builtins.eval(x)",
        "from builtins import exec as run",
        "import urllib.request",
        "from socket import socket",
        "import aiohttp",
        "importlib.import_module('socket')",
        "importlib.import_module(name)",
        "from importlib import import_module as load; load('socket')",
        "subprocess.run(line, shell=True)",
        "subprocess.run(['/bin/sh', '-c', line])",
        "subprocess.call(['sh', '-c', x])",
        "from subprocess import check_output",
        "os.system(line)",
        "os.execvp(name, arguments)",
        "from os import system",
        "from os import system as run; run(line)",
    ],
)
def test_each_fault_is_seen(line):
    assert list(faults(line))


def test_what_is_allowed():
    for line in (
        "torch.load(path, weights_only=True)",
        "subprocess.run([nvcc, '--version'])",
        "re.compile('')",
        "model.eval()",
        "from torch import Tensor, nn",
        "from . import files",
    ):
        assert not list(faults(line))
