"""What the tests of snapshots share: as much of a manager as a snapshot needs, with numbers that the tests choose."""

from fused_ema.schedules import gamma_of, power_function, to_state

BASE = (0.05, 0.10)  # the paper's choice
TARGETS = (0.03, 0.04, 0.07, 0.15, 0.20, 0.25)


class Stub:
    def __init__(self, updates, *averages, schedules=BASE, step=None):
        self.state = {
            "step": updates if step is None else step,
            "updates": updates,
            "update_after_step": 0,
            "schedules": [
                each if isinstance(each, (dict, str)) else to_state(power_function(each)) for each in schedules
            ],
            "averages": list(averages),
        }

    def state_dict(self):
        return self.state


def both(tensor):
    return {"w": tensor}, {"w": tensor + 1}


def even(count, total=1.0):
    """times, gammas: `count` snapshots of BASE, evenly spread."""
    times = [total * (i + 1) / count for i in range(count) for _ in BASE]
    return times, [gamma_of(sigma_rel) for sigma_rel in BASE] * count
