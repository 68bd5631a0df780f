"""Passes hostile sources to update, copy_, swap_ and bind.

    python tests/long/fuzz/fuzz_pairing.py -runs=10000 -seed=1

A call gives what a float64 reference gives by name, or raises ValueError, TypeError or RuntimeError; then no byte
changes.
"""

import collections
import contextlib
import itertools
import random
import types

import atheris

with atheris.instrument_imports(include=["fused_ema"]):
    import fused_ema
import harness
import torch
from torch import nn

WRAPPERS = ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
SEGMENTS = ("weight", "bias", "a", "0", *WRAPPERS, "modules", "", "é", "a b", "\ud800", "'")
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DTYPES = (*FLOATS, torch.complex64, torch.complex128, torch.int64, torch.uint8, torch.bool, torch.int32, torch.uint16)
ODD_DTYPES = (torch.float8_e4m3fn, torch.complex32)
SHAPES = ((3,), (2, 3), (), (0,), (1,), (2, 1, 3), (4, 0), (5, 5), (1,) * 9)
DECAYS = (0.5, 0.999, 0, 1, 1.0, True, 1.5, -0.1, float("nan"), "0.5", None, 10**400, 0.5j, [0.5], 1e-9)
BUFFERS = ("copy", "average", "ignore", "Copy", None, [], 0, torch.zeros(2), b"copy")
ODD_ENTRIES = (None, "x", 3, object(), [], {}, nn.Linear(1, 1), torch.float32)
ODD_SOURCES = (None, "abc", 7, set(), b"ab", iter(()), range(2), {"a": torch.zeros(1)}.items(), torch.zeros(2))
OPS = {"update": fused_ema.update, "copy": fused_ema.copy_, "swap": fused_ema.swap_}
PRECISION = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 2e-6, torch.complex64: 2e-6}


class Strange(torch.Tensor):
    pass


class Sources(harness.Choices):
    def __init__(self, data):
        super().__init__(data)
        self.made, self.pool = [], torch.arange(40, dtype=torch.float32)

    def name(self):
        if self.once_in(12):
            return self.of((3, None, ("a", 1), b"a", 1.5, True, float("nan"), frozenset()))
        return ".".join(self.of(SEGMENTS) for _ in range(1 + self.below(3)))

    def tensor(self, shape, dtype):
        found = self._tensor(shape, dtype)
        self.made.append(found)
        return found

    def _tensor(self, shape, dtype):
        value = torch.zeros(shape, dtype=torch.float64)
        value.view(-1)[:] = torch.arange(value.numel()) % 5 + self.below(4)
        value = value.to(dtype)
        form = self.below(8)
        if form == 1 and value.dim() > 1:
            return value.transpose(0, -1).contiguous().transpose(0, -1)
        if form == 2:
            return torch.stack([value, value], -1)[..., 0]  # with gaps
        if form == 3 and dtype in FLOATS:
            return nn.Parameter(value)
        if form == 4 and self.once_in(4):
            with contextlib.suppress(RuntimeError, TypeError):  # torch makes none such
                return self._odd(value)
        return value

    def _odd(self, value):
        kind = self.below(18)
        plain = value.to(torch.float32) if not value.is_complex() else value.real.float()
        if kind == 0:
            return value.as_strided(value.shape, (0,) * value.dim())
        if kind == 1:
            return self.pool[(start := self.below(30)) : start + self.below(10)]
        if kind == 2:
            value.untyped_storage().resize_(self.below(2) * 2)
        elif kind == 3:
            return value.to(torch.complex64).conj()
        elif kind == 4:
            return torch._neg_view(value) if value.dtype != torch.bool else value
        elif kind == 5:
            return plain.to_sparse() if value.dim() else value
        elif kind == 6:
            return value.to("meta")
        elif kind == 7:
            return torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8)
        elif kind == 8:
            return value.as_subclass(Strange)
        elif kind == 9:
            return nn.UninitializedParameter()
        elif kind == 10:
            return torch.nested.nested_tensor([plain.reshape(-1)])
        elif kind == 11:
            with torch.inference_mode():
                return value.clone()
        elif kind == 12:
            return value.to(self.of(ODD_DTYPES))
        elif kind == 13 and value.numel() > 1:
            return value.as_strided((2, value.numel() - 1), (1, 1))  # overlaps itself
        elif kind == 14:
            raw = torch.zeros(value.nbytes + 1, dtype=torch.uint8)
            return torch.tensor([], dtype=value.dtype).set_(raw.untyped_storage(), 0, value.shape)
        elif kind == 15:
            return self.of(ODD_ENTRIES)
        elif kind == 16:
            return plain.requires_grad_() * 2
        elif kind == 17 and self.made:
            return self.of(self.made)
        return value

    def entries(self):
        """Averages and model tensors by name. They fit each other, except where the fuzzer chose something odd."""
        ours, theirs = {}, {}
        for _ in range(self.below(5)):
            name, shape = self.name(), self.of(SHAPES)
            dtype, wider = self.of(DTYPES), self.once_in(4)
            parameter = not self.once_in(4)
            other = name
            if isinstance(name, str) and self.once_in(4):
                other = f"{self.of(WRAPPERS)}.{name}"
            if self.once_in(32):
                other = self.name()
            if ours and self.once_in(6):
                entry, model = next(iter(ours.values())), list(theirs.values())[-1]  # tied, or half so
            else:
                entry = (self.tensor(shape, self.of(FLOATS) if wider and dtype in FLOATS else dtype), parameter)
                other_shape = self.of(SHAPES) if self.once_in(24) else shape
                model = (self.tensor(other_shape, self.of(DTYPES) if self.once_in(24) else dtype), parameter)
            if self.once_in(24):
                model = (model[0], not parameter)
            ours[name], theirs[other] = entry, model
        return ours, theirs

    def decay(self):
        if self.once_in(6):
            value = torch.tensor(self.of((0.5, 0.9, 1.5, float("nan")))).to(self.of((*FLOATS, torch.int64)))
            return value.view(1) if self.once_in(4) else value
        return self.of(DECAYS[:6] if not self.once_in(8) else DECAYS)


def module_of(entries):
    root = nn.Module()
    for name, (tensor, parameter) in entries.items():
        *path, last = str(name).split(".")
        child = root
        for segment in path:
            child = child._modules.setdefault(segment, nn.Module())
        (child._parameters if parameter else child._buffers)[last] = tensor
    return root


def source(kind, entries):
    tensors = {name: tensor for name, (tensor, _) in entries.items()}
    if kind == "module":
        return module_of(entries)
    if kind in ("list", "tuple", "deque"):
        return {"list": list, "tuple": tuple, "deque": collections.deque}[kind](tensors.values())
    if kind == "proxy":
        return types.MappingProxyType(tensors)
    return {"dict": dict, "ordered": collections.OrderedDict, "user": collections.UserDict}[kind](tensors)


def plain(name):
    if not isinstance(name, str):
        return name
    return ".".join(segment for segment in name.split(".") if segment not in WRAPPERS)


def by_plain_name(side):
    """Where plain names collide, the segments "module" stay, except those that all names begin with."""
    times = collections.Counter(map(plain, side))
    paths = {name: [each for each in str(name).split(".") if each == "module" or each not in WRAPPERS] for name in side}
    shared = min(len(list(itertools.takewhile("module".__eq__, path))) for path in paths.values()) if side else 0
    own = {name: plain(name) if times[plain(name)] == 1 else ".".join(paths[name][shared:]) for name in side}
    return {own[name]: entry for name, entry in side.items()}


def paired(a, m):
    """(average, model tensor, is a parameter) by the documented rules; None where these refuse the sources."""
    if a.keys() != m.keys():
        sizes = len(a), len(m)
        a, m = map(by_plain_name, (a, m))
        if a.keys() != m.keys() or sizes != (len(a), len(m)):
            return None
    pairs = [(a[name][0], *m[name]) for name in a]
    return pairs if all(_sound(x) and _sound(y) and x.shape == y.shape for x, y, _ in pairs) else None


def by_name(kind, entries, buffers):
    """{name or position: (tensor, parameter)} of what takes part."""
    if kind in ("list", "tuple", "deque"):
        return {i: (tensor, True) for i, (tensor, _) in enumerate(entries.values())}
    if kind == "module":
        entries = {str(name): entry for name, entry in entries.items() if entry[0] is not None}
        return {name: entry for name, entry in entries.items() if entry[1] or buffers != "ignore"}
    return {name: (tensor, True) for name, (tensor, _) in entries.items()}


def wide(tensor):
    return tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64, copy=True)


def expected(op, pairs, decay, buffers):
    """The tensor, and what it must hold afterwards; None where it is parameter and buffer, which may be either."""
    kinds = collections.defaultdict(set)
    for ema, _, parameter in pairs:
        kinds[ema.data_ptr()].add(parameter)
    for ema, model, parameter in pairs:
        a, m = wide(ema), wide(model)
        averaged = op == "update" and (ema.is_floating_point() or ema.is_complex())
        averaged = averaged and (parameter or buffers == "average")
        value = a if op == "update" and decay == 1 else decay * a + (1 - decay) * m if averaged else m
        yield ema, value if len(kinds[ema.data_ptr()]) == 1 or not ema.numel() else None
        yield model, a if op == "swap" else m


def target(data):
    choose = Sources(data)
    ours, theirs = choose.entries()
    kinds = ["module", "dict", "list", "ordered", "tuple", "user", "proxy", "deque"]
    kind = choose.of(kinds)
    kind_of_model = choose.of(kinds) if choose.once_in(12) else kind
    if kind == "module":  # names that a module can have
        ours, theirs = ({n: e for n, e in side.items() if "" not in str(n).split(".")} for side in (ours, theirs))
    ema, model = source(kind, ours), source(kind_of_model, theirs)
    if choose.once_in(24):
        ema, kind = choose.of(ODD_SOURCES), "odd"
    if choose.once_in(24):
        model, kind = choose.of((ema, *ODD_SOURCES)), "odd"
    buffers = choose.of(BUFFERS if choose.once_in(12) else BUFFERS[:3])
    bound = None
    for _ in range(1 + choose.below(3)):
        op, decay = choose.of(("update", "copy", "swap")), choose.decay()
        pairs = None
        if kind != "odd":
            pairs = paired(by_name(kind, ours, buffers), by_name(kind_of_model, theirs, buffers))
        before = harness.stored(choose.made)
        number = float(decay) if isinstance(decay, (int, float)) and decay <= 1 else decay
        number = decay.item() if isinstance(decay, torch.Tensor) and decay.numel() == 1 else number
        sound = op != "update" or (isinstance(number, float) and 0 <= number <= 1)
        wanted = list(expected(op, pairs, number, buffers)) if sound and pairs else []

        def call(op=op, decay=decay):
            nonlocal bound
            if choose.once_in(2):
                bound = bound or fused_ema.bind(ema, model, buffers=buffers)
                return {"update": lambda: bound.update(decay), "copy": bound.copy_, "swap": bound.swap_}[op]()
            return OPS[op](ema, model, *([decay] if op == "update" else []), buffers=buffers)

        if not harness.attempt(call):
            assert harness.stored(choose.made) == before, f"{op}: a refused call changed bytes"
            continue
        assert sound, f"update took the decay {decay!r}"
        assert pairs is not None or kind == "odd", f"{op} took {ours} and {theirs}"
        for tensor, values in wanted:
            if values is None:
                continue
            tolerance = PRECISION.get(tensor.dtype, 1e-12)
            size = 20.0 * tolerance
            assert torch.allclose(wide(tensor), values, rtol=tolerance, atol=size), f"{op}: {tensor} is not {values}"
        written = harness.stored([tensor for tensor, _ in wanted])
        after = harness.stored(choose.made)
        assert all(after[at] == content for at, content in before.items() if at not in written), (
            f"{op}: other tensors changed"
        )
        if choose.once_in(2) and kind in ("dict", "list", "module") and kind == kind_of_model and ours:
            change(choose, kind, (ema, ours) if choose.once_in(2) else (model, theirs))


def _sound(tensor):
    if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.layout is not torch.strided or tensor.is_quantized:
        return False
    if tensor.is_meta or tensor.is_nested or tensor.is_conj() or tensor.is_neg() or tensor.dtype in ODD_DTYPES:
        return False
    last = tensor.storage_offset() + sum(
        (n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return tensor.untyped_storage().nbytes() >= (last + 1) * tensor.element_size() or not tensor.numel()


def change(choose, kind, side):
    """Puts another tensor in a place, mostly one that fits."""
    container, entries = side
    if not entries:
        return
    i = choose.below(len(entries))
    name = list(entries)[i]
    old, parameter = entries[name]
    fits = isinstance(old, torch.Tensor) and not nn.parameter.is_lazy(old) and not old.is_nested and old.dtype in DTYPES
    new = choose.tensor(tuple(old.shape) if fits else (2,), old.dtype if fits else torch.float32)
    entries[name] = (new, parameter)
    if kind == "module":
        *path, last = str(name).split(".")
        child = container
        for segment in path:
            child = child._modules[segment]
        (child._parameters if parameter else child._buffers)[last] = new
    else:
        container[i if kind == "list" else name] = new


if __name__ == "__main__":
    harness.run(target, [random.Random(i).randbytes(400) for i in range(40)])
