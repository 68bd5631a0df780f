"""Lightning's WeightAveraging with the drop-in for torch's AveragedModel, and its real trainer."""

import copy
import re
import warnings
from pathlib import Path

import pytest
import torch
from conftest import bits, same_bits
from torch import nn
from torch.optim import swa_utils

import fused_ema

lightning = pytest.importorskip("lightning.pytorch")
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, WeightAveraging  # noqa: E402

PAGE = Path(__file__).resolve().parents[2] / "docs" / "dropin-averaged-model.md"
STEPS = 6


def of_the_page(base):
    """The callback that the page shows, on another base class."""
    (lines,) = re.findall(r"^class Averaging\(EMAWeightAveraging\):\n(?:    .*\n)+", PAGE.read_text("utf-8"), re.M)
    names = {"EMAWeightAveraging": base, "fused_ema": fused_ema}
    exec(lines, names)
    return names["Averaging"]


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        self.trained, self.validated = [], []  # values of the network

    def training_step(self, batch, _):
        return self.network(batch).square().mean()

    def on_train_batch_end(self, *_):
        self.trained.append(copy.deepcopy(self.network))

    def validation_step(self, batch, _):
        self.validated = bits(self.network)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


def fit(folder, callback, module=None, epochs=2, path=None, keep=False):
    module = module or Module()
    batches = torch.randn(STEPS, 16, 4, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            accelerator="cpu",
            logger=False,
            callbacks=[callback, *([ModelCheckpoint(folder, "{epoch}", save_top_k=-1)] if keep else ())],
            max_epochs=epochs,
            enable_checkpointing=keep,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        loader = torch.utils.data.DataLoader(batches, batch_size=None)
        trainer.fit(module, loader, torch.utils.data.DataLoader(batches[:1], batch_size=None), ckpt_path=path)
    return module


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("base", [EMAWeightAveraging, WeightAveraging], ids=["moving average", "mean"])
def test_weight_averaging_takes_it(tmp_path, monkeypatch, base, use_buffers):
    """Each step is one call of ours, and validation and the end of the fit see its bits."""
    options = {"decay": 0.9} if base is EMAWeightAveraging else {}
    callback = of_the_page(base)(use_buffers=use_buffers, **options)
    monkeypatch.setattr(swa_utils.AveragedModel, "update_parameters", lambda *_: pytest.fail("PyTorch's own code ran"))
    module = fit(tmp_path, callback)
    assert type(callback._average_model) is fused_ema.AveragedModel
    assert callback._average_model.n_averaged == len(module.trained) == 2 * STEPS
    expected = copy.deepcopy(module.trained[0])
    for count, model in enumerate(module.trained[1:], 1):
        decay = 0.9 if options else count / (count + 1)
        fused_ema.update(expected, model, decay, buffers="average" if use_buffers else "copy")
    assert same_bits(bits(expected), module.network)
    assert same_bits(module.validated, module.network)


@pytest.mark.parametrize("first", ["Lightning's own", "ours"])
def test_a_run_resumes_with_either(tmp_path, first):
    """From a checkpoint of the other kind, as from one of its own."""
    own, ours = EMAWeightAveraging, of_the_page(EMAWeightAveraging)
    one, other = (own, ours) if first == "Lightning's own" else (ours, own)
    before = fit(tmp_path, one(decay=0.9), epochs=1, keep=True)
    (path,) = tmp_path.glob("*.ckpt")
    callback, straight = other(decay=0.9), one(decay=0.9)
    resumed = fit(tmp_path, callback, path=path, epochs=2)
    expected = fit(tmp_path, straight, path=path, epochs=2)
    assert callback._average_model.n_averaged == straight._average_model.n_averaged == 2 * STEPS
    for found, wanted in zip(resumed.trained, expected.trained, strict=True):
        assert same_bits(bits(wanted), found)
    trained = [list(network.parameters()) for network in (*before.trained, *expected.trained)]
    for i, wanted in enumerate(expected.network.parameters()):
        found = list(resumed.network.parameters())[i]
        each = torch.stack([parameters[i].detach() for parameters in trained])
        reach = each.amax(0) - each.amin(0)  # no average is farther from any weights than this
        # Of each step, one rounds once and the other three times, and the product twice more.
        one_step = 2 * 2.0**-23 * each.abs().amax(0) + 2.0**-22 * 0.1 * reach
        assert ((found - wanted).abs() <= STEPS * one_step).all()
