"""Run by test_lightning_sharded.py, in a process for each of two ranks: training with FSDP2, stopped and resumed."""

import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from fused_ema.integrations.lightning import EMACallback

FOLDER = Path(sys.argv[1])


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Linear(4, 3)  # 3 rows on two ranks
        self.validated = []

    def configure_model(self):
        if not isinstance(self.network, FSDPModule):
            fully_shard(self.network, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, index):
        return self.network(batch).square().mean()

    def validation_step(self, batch, index):
        self.network(batch)

    def on_validation_epoch_start(self):  # before a forward pass gathers the parameters
        self.validated.append(whole(dict(self.network.named_parameters())))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


def whole(tensors):
    return {name: tensor.detach().full_tensor().clone() for name, tensor in tensors.items()}


def trained(callback, *others, epochs, distributed=False, **options):
    strategy = ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=distributed
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_epochs=epochs,
        callbacks=[callback, *others],
        enable_checkpointing=bool(others),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        logger=False,
    )
    batches = torch.randn(4, 8, 4, generator=torch.Generator().manual_seed(0))
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    module = Module()
    trainer.fit(module, loader, loader, **options)
    return trainer, module


def averages(callback):
    return whole(callback.ema.state_dict()["averages"][0])


def same(found, expected):
    return all(torch.equal(found[name], expected[name]) for name in expected)


uninterrupted = EMACallback(decay=0.9)
trainer, module = trained(uninterrupted, epochs=2)
expected = averages(uninterrupted)
assert same({f"network.{name}": value for name, value in module.validated[-1].items()}, expected)
for distributed in (False, True):
    name = f"distributed={distributed}"
    saving = ModelCheckpoint(FOLDER, filename=name, enable_version_counter=False)
    trained(EMACallback(decay=0.9), saving, epochs=1, distributed=distributed)
    resumed = EMACallback(decay=0.9)
    trained(resumed, epochs=2, distributed=distributed, ckpt_path=FOLDER / f"{name}.ckpt")
    assert resumed.ema.step == 8
    assert same(averages(resumed), expected), (averages(resumed), expected)

with pytest.raises(ValueError, match="expected save='model' for a sharded module"):
    trained(EMACallback(decay=0.9, save="average"), epochs=1)
trainer, _ = trained(uninterrupted, epochs=2)
with uninterrupted.ema.swapped():  # as the error says
    trainer.save_checkpoint(FOLDER / "average.ckpt", weights_only=True)
if trainer.is_global_zero:
    assert same(torch.load(FOLDER / "average.ckpt", weights_only=True)["state_dict"], expected)
    print("all is well")
