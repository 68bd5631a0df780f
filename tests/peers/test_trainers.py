"""Trainers that have no callback here, run for real where they are installed: torchtitan 0.3.0 and lerobot 0.4.4.

Neither installs next to the tests' PyTorch as it is. lerobot wants torch < 2.11 and transformers < 5; torchtitan asks
for what PyTorch 2.13 lacks. With ``pip install --no-deps`` into an environment of their own both run:

torchtitan==0.3.0 spmd_types==0.2.3 torch_checkpointing triton tyro typeguard docstring_parser tensorboard absl-py
    grpcio markdown protobuf werkzeug tensorboard-data-server einops datasets==4.1.1 multiprocess dill pyarrow pandas
    xxhash torchdata
lerobot==0.4.4 transformers==4.57.3 huggingface-hub==0.35.3 tokenizers==0.22.1 diffusers==0.35.2 accelerate==1.11.0
    hf-xet draccus==0.10.0 mergedeep pyyaml-include==1.4.1 typing_inspect mypy_extensions jsonlines datasets==4.1.1
    gymnasium cloudpickle farama-notifications deepdiff orderly-set cachebox imageio av==15.1.0 pyserial
    torchvision==0.28.0 (the one for torch 2.13)
"""

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
pytestmark = pytest.mark.slow


def run(command, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=600, env=environment
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def data_of_torchtitan(folder):
    """What its debug configuration reads: a tokenizer of bytes, and texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    vocabulary = {letter: i for i, letter in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), *special])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(special)
    for name in ("tokenizer", "c4_test"):
        (folder / "tests/assets" / name).mkdir(parents=True)
    tokenizer.save(str(folder / "tests/assets/tokenizer/tokenizer.json"))
    special = json.dumps(dict(zip(("bos_token", "eos_token"), special, strict=True)))
    (folder / "tests/assets/tokenizer/tokenizer_config.json").write_text(special)
    rng, words = random.Random(0), ["the", "a", "cat", "mat", "sat", "on", "red", "and", "big"]
    texts = [" ".join(rng.choices(words, k=80)) for _ in range(500)]
    (folder / "tests/assets/c4_test/data.json").write_text("\n".join(json.dumps({"text": each}) for each in texts))


def test_torchtitan(tmp_path):
    if importlib.util.find_spec("torchtitan") is None:
        pytest.skip("no torchtitan")
    data_of_torchtitan(tmp_path)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", HERE / "train_torchtitan.py"]
    assert run(command, tmp_path).count("passed") == 2


def test_lerobot(tmp_path):
    if importlib.util.find_spec("lerobot") is None:
        pytest.skip("no lerobot")
    assert "passed" in run([HERE / "train_lerobot.py", tmp_path / "policy"], tmp_path)
