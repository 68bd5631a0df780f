"""Runs a few updates on a GPU for `ncu` to profile (`make gpu-counters`); the arguments are parts of cases' titles."""

import sys

import torch
from methods import BOUND, FOREACH_CACHED, make_step
from models import CASES, filled_pair


@torch.no_grad()
def main() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    for part in sys.argv[1:]:
        case = next(case for case in CASES if part in case.title)
        model, average = filled_pair(case, device)
        print(case.title, flush=True)
        for name in (BOUND, FOREACH_CACHED):
            if name == BOUND or case.model_dtype == case.average_dtype:
                make_step(name, model, average)()
                torch.cuda.synchronize()
        del model, average
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
