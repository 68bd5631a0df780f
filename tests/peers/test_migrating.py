"""docs/migrating.md: the counts of lines are right, and the scripts before and after keep the same averages."""

import importlib
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from timm_files import timm_files
from torch import nn

import fused_ema

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "migrating.md").read_text(encoding="utf-8")
SECTIONS = {text.partition("\n")[0]: text for text in re.split(r"^## ", PAGE, flags=re.MULTILINE) if "```diff" in text}
ROWS = re.findall(r"^\| \[(.+)\]\(#(.+)\) \| (\d+) \| (\d+) \| (.+) \|$", PAGE, re.MULTILINE)
EPOCHS, BATCHES = 4, 5
TRAIN_PY, UNCONDITIONAL = "timm's ModelEmaV3, train.py", "diffusers' EMAModel, train_unconditional.py"
LIGHTNING = "Lightning's EMAWeightAveraging"
NEEDS = {
    "torch's AveragedModel": [],
    "timm's ModelEmaV3, a loop of your own": ["timm"],
    TRAIN_PY: ["timm"],
    "diffusers' EMAModel, a loop of your own": ["diffusers.training_utils"],
    UNCONDITIONAL: ["diffusers.training_utils", "accelerate", "safetensors"],
    "ema-pytorch": ["ema_pytorch"],
    "torch_ema": ["torch_ema"],
    LIGHTNING: ["lightning.pytorch"],
}
each_that_runs = pytest.mark.parametrize("section", NEEDS)


def diff_of(section):
    return re.search(r"```diff\n(.*?)```", SECTIONS[section], re.DOTALL)[1].splitlines()


def program(section, kept):
    """The lines of the diff in " -", the script before, or " +", the one after."""
    return "\n".join(line[1:] for line in diff_of(section) if not line or line[0] in kept)


def count(section, mark):
    return sum(line.startswith(mark) and line[1:].strip() != "" for line in diff_of(section))


# ---- The page


@pytest.mark.parametrize("section", SECTIONS)
def test_counts(section):
    before, after = count(section, "-"), count(section, "+")
    words = f"{abs(after - before)} {'fewer' if after < before else 'more'}" if after != before else "as many"
    lines = "line" if before == 1 else "lines"
    assert f"\n\n**{before} {lines} before, {after} after**: {words}." in SECTIONS[section]
    anchor = re.sub(r"[^\w -]", "", section).lower().replace(" ", "-")
    assert (section, anchor, str(before), str(after), words) in ROWS
    assert [row[0] for row in ROWS] == list(SECTIONS)
    assert max(len(line[1:]) for line in diff_of(section)) <= 120
    assert ("Not run by the tests" in SECTIONS[section]) == (section not in NEEDS)


# ---- What the scripts are given


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def small_unet():
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (4,)}
    blocks |= {"layers_per_block": 1, "norm_num_groups": 2, "attention_head_dim": 2}
    return importlib.import_module("diffusers").UNet2DModel(4, **blocks)


def given(section, folder, resume=False, epochs=EPOCHS):
    """The names that the page lists, and in `seen` what each `validate` measured."""

    def loss_of(model, batch):
        if section == UNCONDITIONAL:
            return nn.functional.mse_loss(model(batch[0], 500).sample, batch[1])
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def validate(model, *_, **__):
        state = model.eval().state_dict().items()
        seen.append({name.removeprefix("module."): t.clone() for name, t in state if t.is_floating_point()})
        model.train()

    def loader_of(batches):
        return torch.utils.data.DataLoader(batches, batch_size=None)

    seen, output_dir, path = [], str(folder), folder if section == LIGHTNING else folder / "checkpoint.pt"
    model = small_unet() if section == UNCONDITIONAL else small_model()
    batches = [(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(BATCHES)]
    if section == UNCONDITIONAL:
        batches = [(torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)) for _ in range(BATCHES)]
    loader = loader_train = train_dataloader = loader_of(batches)
    loader_eval, train_loss_fn, validate_loss_fn = loader_of(batches[:1]), nn.functional.cross_entropy, None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    args = types.SimpleNamespace(epochs=epochs, resume=f"{folder}/last.pth.tar" if resume else "")  # timm's
    args.model_ema_decay, args.model_ema_warmup, args.torchcompile, args.distributed = 0.9998, True, None, False
    args.ema_max_decay, args.ema_inv_gamma, args.ema_power = 0.9999, 1.0, 0.75  # diffusers'
    args.num_epochs, args.output_dir, args.resume_from_checkpoint = epochs, output_dir, output_dir if resume else None
    names = {**locals(), "torch": torch, "__name__": "script"}
    if section == UNCONDITIONAL:
        names["accelerator"] = importlib.import_module("accelerate").Accelerator(cpu=True)
        names["save_unet"] = names["load_unet"] = lambda *_: None  # accelerate does it
        names["first_epoch"] = EPOCHS // 2 if resume else 0
    if section == LIGHTNING:
        steps = {
            "training_step": lambda self, batch: loss_of(self.model, batch),
            "validation_step": lambda self, batch: validate(self.model),
            "configure_optimizers": lambda self: optimizer,
        }
        names["module"] = type("Module", (importlib.import_module("lightning.pytorch").LightningModule,), steps)()
        names["module"].model = model
        names["options"] = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
        names["options"] |= {"accelerator": "cpu", "devices": 1, "num_sanity_val_steps": 0}
    return names


def run(section, kept, folder, **how):
    for name in NEEDS[section]:
        pytest.importorskip(name, exc_type=ImportError)
    folder.mkdir(exist_ok=True)
    names = given(section, folder, **how)
    exec(compile(program(section, kept), f"migrating.md, {section},{kept}", "exec"), names)
    return names


@pytest.fixture(autouse=True)
def one_thread():
    """With tensors this small, two threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def timm(request, monkeypatch):
    """Stands in for `import timm`, which needs torchvision."""
    if "timm" in request.node.name and "counts" not in request.node.name:
        files, package = timm_files(), types.ModuleType("timm")
        resume_checkpoint = sys.modules["timm_alone._helpers"].resume_checkpoint
        package.utils, package.models = types.ModuleType("timm.utils"), types.ModuleType("timm.models")
        vars(package.utils).update(ModelEmaV3=files.ModelEmaV3, CheckpointSaver=files.CheckpointSaver)
        vars(package.models).update(load_checkpoint=files.load_checkpoint, resume_checkpoint=resume_checkpoint)
        for each in (package, package.utils, package.models):
            monkeypatch.setitem(sys.modules, each.__name__, each)


# ---- The scripts


@each_that_runs
def test_the_averages_agree(section, tmp_path):
    before, after = run(section, " -", tmp_path / "before"), run(section, " +", tmp_path / "after")
    assert len(after["seen"]) >= EPOCHS
    for theirs, ours in zip(before["seen"], after["seen"], strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            if section != TRAIN_PY or "running" not in name:  # there the page says that buffers differ
                assert (value - theirs[name]).abs().max() <= 1e-6 * value.abs().max(), name
    initial = given(section, tmp_path)["model"].state_dict()
    assert max((value - initial[name]).abs().max() for name, value in ours.items()) > 1e-3, "they moved"


@each_that_runs
def test_stopped_and_resumed_it_gives_the_same_bits(section, tmp_path):
    whole = run(section, " +", tmp_path / "whole")
    first = run(section, " +", tmp_path / "stopped", epochs=EPOCHS // 2)
    second = run(section, " +", tmp_path / "stopped", resume=True)
    assert len(first["seen"]) == len(second["seen"]) == len(whole["seen"]) / 2
    for ours, expected in zip(first["seen"] + second["seen"], whole["seen"], strict=True):
        assert [name for name, value in expected.items() if not torch.equal(ours[name], value)] == []
    for name, value in whole["model"].state_dict().items():
        assert torch.equal(second["model"].state_dict()[name], value), name


@each_that_runs
def test_the_averages_without_an_optimizer(section, tmp_path):
    after, new = run(section, " +", tmp_path), given(section, tmp_path)
    files = {TRAIN_PY: "last.pth.tar", UNCONDITIONAL: "optimizer.bin", LIGHTNING: "last.ckpt"}
    saved = torch.load(tmp_path / files.get(section, "checkpoint.pt"))
    if section == LIGHTNING:
        (state,) = (state for name, state in saved["callbacks"].items() if "EMACallback" in name)
    else:
        state = (saved if section == UNCONDITIONAL else saved["optimizer"])["fused_ema"]
    buffers = "average" if any("running" in name for name in state["averages"][0]) else "copy"
    ema = fused_ema.EMA(new.get("module", new["model"]), buffers=buffers)
    ema.load_state_dict(state)
    assert ema.step == EPOCHS * BATCHES
    ema.copy_to()
    for name, parameter in new["model"].named_parameters():
        assert torch.equal(parameter, after["seen"][-1][name]), name


def test_timm_reads_the_averages_that_train_py_saves_for_it(tmp_path):
    names = given(TRAIN_PY, tmp_path) | {"SimpleNamespace": types.SimpleNamespace}
    (argument,) = re.findall(r"`(model_ema=SimpleNamespace.+?)`", SECTIONS[TRAIN_PY])
    exec(program(TRAIN_PY, " +").replace("checkpoint_dir=", f"{argument}, checkpoint_dir="), names)
    model, path = small_model(), tmp_path / "last.pth.tar"
    sys.modules["timm.models"].load_checkpoint(model, str(path), use_ema=True)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, names["seen"][-1][name]), name
    saved = torch.load(path)
    ours, theirs = saved["optimizer"]["fused_ema"]["averages"][0], saved["state_dict_ema"]
    assert all(ours[name].data_ptr() == theirs[name].data_ptr() for name in ours), "the file holds them once"


@each_that_runs
def test_an_old_checkpoint_is_taken_over(section, tmp_path):
    before, new = run(section, " -", tmp_path), given(section, tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", SECTIONS[section], re.DOTALL)
    ema = fused_ema.EMA(new.get("module", new["model"]), 0.9)
    before["args"].resume = f"{tmp_path}/last.pth.tar"
    exec(block, {**before, "ema": ema, "fused_ema": fused_ema})
    ema.attach(new["optimizer"], save=True)
    with pytest.warns(UserWarning, match="has no averages under"):
        new["optimizer"].load_state_dict(before["optimizer"].state_dict())
    assert ema.step == EPOCHS * BATCHES
    averages = ema.averaged_state_dict()
    for name, _ in ema.model.named_parameters():
        assert torch.equal(averages[name], before["seen"][-1][name.removeprefix("model.")]), name
