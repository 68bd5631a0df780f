"""fused_ema.dropin.EMAModel in the training loop of diffusers' train_unconditional.py, with accelerate's hooks."""

import sys

import pytest
import torch
from accelerate import Accelerator
from checkpoint_checks import same
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel as Theirs
from small_unet import clones, contents, unet
from torch import nn

from fused_ema.dropin import EMAModel

STEPS, STOP = 8, 4


@pytest.fixture(autouse=True)
def reset():
    yield
    sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)


def run(cls, folder, *, until=STEPS, resume=False):
    """Trains a UNet to predict noise, with the hooks and the order of calls of the script; returns the model and its
    average."""
    accelerator = Accelerator(cpu=True)
    model = unet(seed=7 if resume else 0)
    ema_model = cls(
        model.parameters(),
        decay=0.95,
        use_ema_warmup=True,
        inv_gamma=1.0,
        power=3 / 4,
        model_cls=UNet2DModel,
        model_config=model.config,
    )

    def save_model_hook(models, weights, output_dir):
        ema_model.save_pretrained(f"{output_dir}/unet_ema")
        for each in models:
            each.save_pretrained(f"{output_dir}/unet")
            weights.pop()

    def load_model_hook(models, input_dir):
        loaded = cls.from_pretrained(f"{input_dir}/unet_ema", UNet2DModel)
        ema_model.load_state_dict(loaded.state_dict())
        ema_model.to(accelerator.device)
        while models:
            models.pop().load_state_dict(UNet2DModel.from_pretrained(input_dir, subfolder="unet").state_dict())

    accelerator.register_save_state_pre_hook(save_model_hook)
    accelerator.register_load_state_pre_hook(load_model_hook)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    ema_model.to(accelerator.device)
    scheduler = DDPMScheduler(num_train_timesteps=100)
    if resume:
        accelerator.load_state(folder)
    for step in range(ema_model.optimization_step, until):
        random = torch.Generator().manual_seed(step)
        images, noise = torch.randn(2, 4, 3, 8, 8, generator=random)
        timesteps = torch.randint(100, (4,), generator=random)
        predicted = model(scheduler.add_noise(images, noise, timesteps), timesteps).sample
        accelerator.backward(nn.functional.mse_loss(predicted, noise))
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema_model.step(model.parameters())
        if step % 2:  # samples are drawn with the average
            raw = clones(model.parameters())
            bare = accelerator.unwrap_model(model)
            ema_model.store(bare.parameters())
            ema_model.copy_to(bare.parameters())
            assert same(bare.parameters(), ema_model.shadow_params)
            assert bare(images, timesteps).sample.isfinite().all()
            ema_model.restore(bare.parameters())
            assert same(model.parameters(), raw)
    accelerator.save_state(folder)
    return accelerator.unwrap_model(model), ema_model


def test_training_is_as_with_theirs(tmp_path):
    (their_model, theirs), (our_model, ours) = (run(cls, str(tmp_path / cls.__module__)) for cls in (Theirs, EMAModel))
    assert same(our_model.parameters(), their_model.parameters()), "the model itself does not notice"
    assert {**ours.state_dict(), "shadow_params": 0} == {**theirs.state_dict(), "shadow_params": 0}
    apart = [(a - b).abs().max() / b.abs().max() for a, b in zip(ours.shadow_params, theirs.shadow_params, strict=True)]
    assert max(apart) <= STEPS * 2.0**-23, "a unit in the last place in each step"
    away = [(a - b).abs().max() for a, b in zip(ours.shadow_params, our_model.parameters(), strict=True)]
    assert max(away) > 1e-4, "the average is not the model"


@pytest.mark.parametrize("first", [EMAModel, Theirs], ids=["ours", "theirs"])
def test_a_run_that_is_stopped_and_resumed(tmp_path, first):
    whole_model, whole = run(EMAModel, str(tmp_path / "whole"))
    _, stopped = run(first, str(tmp_path / "stopped"), until=STOP)
    model, resumed = run(EMAModel, str(tmp_path / "stopped"), resume=True)
    assert stopped.optimization_step == STOP
    assert same(model.parameters(), whole_model.parameters())
    assert resumed.optimization_step == STEPS
    if first is EMAModel:
        assert same(resumed.shadow_params, whole.shadow_params)
        assert contents(tmp_path / "stopped" / "unet_ema") == contents(tmp_path / "whole" / "unet_ema")
