"""What the atheris targets share: the run, the count, and what bytes tensors hold."""

import os
import sys
import tempfile
import warnings
from collections import Counter

import atheris
import torch

counts = Counter()
REFUSALS = (ValueError, TypeError, RuntimeError)


class Choices:
    """Decisions taken from the fuzzer's bytes. When those run out: the first option, and nothing odd."""

    def __init__(self, data):
        self.data = data

    def below(self, n):
        return self.data.ConsumeIntInRange(0, n - 1)

    def of(self, options):
        return options[self.below(len(options))]

    def once_in(self, n):
        return self.below(n) == n - 1


def attempt(call, refusals=REFUSALS):
    """True if the call succeeded, False if it was refused. Any other exception is a finding."""
    try:
        call()
    except Exception as error:
        if type(error) not in refusals:
            raise
        counts["refused"] += 1
        return False
    counts["done"] += 1
    return True


def stored(tensors):
    """The bytes of every storage, by address."""
    found = {}
    for tensor in tensors:
        if type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided and not tensor.is_meta:
            storage = tensor.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = bytes(torch.tensor([], dtype=torch.uint8).set_(storage).numpy())
    return found


def run(target, seeds):
    """Runs libFuzzer with the command line's options; fails if no call succeeded or none was refused."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    corpus = tempfile.mkdtemp(prefix="fuzz-")
    for i, seed in enumerate(seeds):
        with open(os.path.join(corpus, str(i)), "wb") as file:
            file.write(seed)

    runs = next((int(option[6:]) for option in sys.argv if option.startswith("-runs=")), -1)

    def one(data):
        counts["runs"] += 1
        target(atheris.FuzzedDataProvider(data))
        if counts["runs"] == runs:  # libFuzzer ends the process by itself
            report()

    def report():
        about = f"{counts['runs']} runs, {counts['done']} calls done, {counts['refused']} refused"
        print(f"{os.path.basename(sys.argv[0])}: {about}", flush=True)
        if not counts["done"] or not counts["refused"]:
            os._exit(1)

    given = [argument for argument in sys.argv[1:] if not argument.startswith("-")]  # inputs to run again
    atheris.Setup([*sys.argv, *([] if given else [corpus])], one)
    atheris.Fuzz()
