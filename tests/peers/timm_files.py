"""Parts of timm without torchvision, which `import timm` needs and the tests do not."""

import ast
import importlib.util
import sys
import types
from functools import cache
from pathlib import Path

import pytest


@cache
def timm_files():
    package = importlib.util.find_spec("timm")
    if package is None:
        pytest.skip("no timm")
    folder = Path(package.origin).parent
    sys.modules["timm_alone"] = types.ModuleType("timm_alone")
    sys.modules["timm_alone"].__path__ = []

    def real(name, file):
        spec = importlib.util.spec_from_file_location(f"timm_alone.{name}", folder / file)
        sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[spec.name])
        return sys.modules[spec.name]

    model_ema, helpers = real("model_ema", "utils/model_ema.py"), real("_helpers", "models/_helpers.py")
    # utils/model.py imports torchvision, so only the two functions that the saver needs are compiled.
    tree = ast.parse((folder / "utils" / "model.py").read_text())
    wanted = ("unwrap_model", "get_state_dict")
    tree.body = [each for each in tree.body if isinstance(each, ast.FunctionDef) and each.name in wanted]
    model = sys.modules["timm_alone.model"] = types.ModuleType("timm_alone.model")
    model.ModelEma = model_ema.ModelEma
    exec(compile(tree, "timm/utils/model.py", "exec"), vars(model))
    return types.SimpleNamespace(
        ModelEmaV3=model_ema.ModelEmaV3,
        CheckpointSaver=real("checkpoint_saver", "utils/checkpoint_saver.py").CheckpointSaver,
        load_checkpoint=helpers.load_checkpoint,
    )
