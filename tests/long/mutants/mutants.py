"""Faults put into the package by hand, one at a time: the file, the text there once, and what takes its place."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    new: str


MUTANTS = [
    # ---- csrc: numbers
    Mutant("weight for decay", "csrc/lerp.h", "? T(1.0 - decay) : T(-decay)", "? T(decay) : T(decay - 1.0)"),
    Mutant("1 - decay in float32", "csrc/lerp.h", "? T(1.0 - decay)", "? T(1) - T(decay)"),
    Mutant("one branch for all decays", "csrc/lerp.h", "return 1.0 - decay < 0.5 ?", "return 1.0 - decay < 2.0 ?"),
    Mutant(
        "two roundings for one",
        "csrc/lerp.h",
        "  return std::fma(a, b, c);\n#endif\n}\nFUSED_EMA_HD double",
        "  return a * b + c;\n#endif\n}\nFUSED_EMA_HD double",
    ),
    Mutant("no select where equal", "csrc/lerp.h", "return e == p ? e : result;", "return result;"),
    Mutant("bfloat16 cut off", "csrc/lerp.h", "(bits + 0x7fffu + (bits >> 16 & 1u)) >> 16", "bits >> 16"),
    Mutant("ties to odd in float16", "csrc/lerp.h", "+ 0xfffu + (magnitude >> 13 & 1u)", "+ 0x1000u"),
    Mutant("one stream of random bits", "csrc/lerp.h", "uint32_t(counter >> 32) * 0x9e3779b9u", "0u"),
    Mutant(
        "half the share in float16",
        "csrc/lerp.h",
        "const uint32_t share = random >> 19;",
        "const uint32_t share = random >> 20;",
    ),
    Mutant("infinity is finite", "csrc/lerp.h", "x <= 3.4028234663852886e38f;", "x == x;"),
    Mutant(
        "nothing skipped",
        "csrc/ops.h",
        "is_finite(cast<C>(p.lane[i])) ? e.lane[i] : old.lane[i]",
        "is_finite(cast<C>(p.lane[i])) ? e.lane[i] : e.lane[i]",
    ),
    Mutant(
        "copies skip nothing",
        "csrc/tiles.h",
        "      if (step.decay == 0.0) return with_lerp<Finite<Copy>::Of>(row, step, run);\n",
        "      if (step.decay == 0.0) return with_lerp<Copy>(row, step, run);\n",
    ),
    Mutant("infinity is finite on the CPU", "csrc/ema_cpu.cpp", "return largest != exponent;", "return true;"),
    Mutant(
        "the first of several skips",
        "csrc/ema_cpu.cpp",
        "at<char>(row.ema, (step.shift + begin) * size), size_t(n * size));",
        "at<char>(row.ema, begin * size), size_t(n * size));",
    ),
    # ---- csrc: tables and tiles
    Mutant("int32 count", "csrc/table.h", "row.numel = numel;", "row.numel = static_cast<int32_t>(numel);"),
    Mutant(
        "int32 index",
        "csrc/tiles.h",
        "at.ema += index * layout.ema_stride[d];",
        "at.ema += static_cast<int32_t>(index * layout.ema_stride[d]);",
    ),
    Mutant(
        "dropped tail",
        "csrc/tiles.h",
        "begin + kTile < row.numel ? begin + kTile : row.numel;",
        "begin + kTile < row.numel ? begin + kTile : row.numel / 4 * 4;",
    ),
    Mutant(
        "dropped last tile",
        "csrc/table.h",
        "(numel + row.misaligned + tile - 1) / tile",
        "(numel + row.misaligned) / tile",
    ),
    Mutant("tile for the head forgotten", "csrc/table.h", "(numel + row.misaligned + tile - 1)", "(numel + tile - 1)"),
    Mutant(
        "missing guard of loads",
        "csrc/tiles.h",
        "      if (first + b * kThreads >= end) continue;\n      if (F::reads_ema)",
        "      if (F::reads_ema)",
    ),
    Mutant(
        "missing guard of stores",
        "csrc/tiles.h",
        "      if (first + b * kThreads >= end) continue;\n      f(e[b]",
        "      f(e[b]",
    ),
    Mutant(
        "swapped strides",
        "csrc/table.h",
        "layout.model_stride[layout.dims] = model;",
        "layout.model_stride[layout.dims] = ema;",
    ),
    Mutant(
        "merged by one side alone",
        "csrc/table.h",
        "layout.ema_stride[last] == ema * size && layout.model_stride[last] == model * size",
        "layout.ema_stride[last] == ema * size",
    ),
    Mutant(
        "flat by one side alone",
        "csrc/table.h",
        "layout.ema_stride[0] == 1 && layout.model_stride[0] == 1)",
        "layout.ema_stride[0] == 1)",
    ),
    Mutant("a dimension too many", "csrc/table.h", "if (layout.dims == kMaxDims) return false;", ""),
    Mutant(
        "vectors at any address",
        "csrc/tiles.h",
        "if (high - low == kTile && row.model_aligned) {",
        "if (high - low == kTile) {",
    ),
    Mutant(
        "one vector twice",
        "csrc/tiles.h",
        "const int at = ((step * kUnroll + u) * kThreads + thread) * kLanes;\n      f(",
        "const int at = ((step * kUnroll) * kThreads + thread) * kLanes;\n      f(",
    ),
    Mutant(
        "one decay for all on the device",
        "csrc/launch.h",
        "static_cast<const double*>(call.device_decay)[average]",
        "static_cast<const double*>(call.device_decay)[0]",
    ),
    Mutant(
        "blocks of averages mixed up",
        "csrc/tiles.h",
        "launch.call.first + int(block % averages)",
        "int(block % averages)",
    ),
    Mutant("no average at decay 1 left alone", "csrc/tiles.h", "if (is_update(kOp) && step.decay == 1.0) return;", ""),
    # ---- csrc: the CPU runner
    Mutant("decay 1 computed on the CPU", "csrc/ema_cpu.cpp", "if (is_update(op) && step.decay == 1.0) continue;", ""),
    Mutant("subnormals flushed", "csrc/cpu.h", "_mm_setcsr(before_ & ~0x8040u);", "_mm_setcsr(before_);"),
    Mutant(
        "first average for all", "csrc/ema_cpu.cpp", "step_of(call, row, average)", "step_of(call, row, call.first)"
    ),
    Mutant(
        "first elements of each piece",
        "csrc/ema_cpu.cpp",
        "const int64_t low = std::max<int64_t>(begin - row->first, 0)",
        "const int64_t low = 0",
    ),
    Mutant("restored from the average", "csrc/ema_cpu.cpp", "if (op == Op::restore) {", "if (op == Op::copy) {"),
    Mutant(
        "copied in the other direction",
        "csrc/ema_cpu.cpp",
        "std::memcpy(to, from, size_t(n * size_of(to_type)));",
        "std::memcpy(const_cast<void*>(from), to, size_t(n * size_of(to_type)));",
    ),
    # ---- csrc: plans that are stale
    Mutant("no version bump", "csrc/plan.cpp", "      bump(pair.ema);\n", ""),
    Mutant("no version bump of the model", "csrc/plan.cpp", "if (writes_model(op)) bump(pair.model);", ""),
    Mutant("stale address", "csrc/plan.cpp", "data_of(tensor, written) != record.data ||", ""),
    Mutant("stale dtype", "csrc/plan.cpp", "tensor->dtype() != record.dtype || ", ""),
    Mutant(
        "stale storage size",
        "csrc/plan.cpp",
        " ||\n      tensor->unsafe_storage().unsafeGetStorageImpl()->nbytes() != record.storage_bytes",
        "",
    ),
    Mutant("stale strides", "csrc/plan.cpp", " || strides[d] != shape[record.dims + d]", ""),
    Mutant("stale sizes", "csrc/plan.cpp", "sizes[d] != shape[d] || ", ""),
    Mutant("another kind of tensor", "csrc/plan.cpp", "if (tensor->key_set() != record.keys) return false;", ""),
    Mutant(
        "copy-on-write on threads",
        "csrc/plan.cpp",
        "if (written && c10::impl::cow::is_cow_data_ptr(tensor->unsafe_storage().data_ptr())) return false;",
        "",
    ),
    Mutant(
        "inference tensors written", "csrc/plan.cpp", "return c10::InferenceMode::is_enabled() ||", "return true ||"
    ),
    Mutant("one number for all tensors", "csrc/plan.cpp", "number += entry.ema.numel();", ""),
    Mutant(
        "averages of complex numbers overlap",
        "csrc/plan.cpp",
        "entry.stride * (complex ? 2 : 1)",
        "entry.stride",
    ),
    Mutant("the interpreter kept from others", "csrc/bindings.cpp", "prepared_.large()", "false"),
    Mutant(
        "no lock",
        "csrc/bindings.cpp",
        "std::unique_lock<std::mutex> lock(one_at_a_time(), std::try_to_lock);",
        "std::mutex mine;\n    std::unique_lock<std::mutex> lock(mine, std::try_to_lock);",
    ),
    Mutant(
        "children not watched",
        "csrc/watch.cpp",
        "!same_items(registry, slot, module.end[i], allowed)) return false;",
        "(i < 2 && !same_items(registry, slot, module.end[i], allowed))) return false;\n      slot = module.end[i];",
    ),
    Mutant("names not watched", "csrc/watch.cpp", " key != slots_[slot].key ||", ""),
    Mutant(
        "swap_tensors not seen",
        "csrc/watch.cpp",
        "(!slot.tensor || THPVariable_Unpack(found).unsafeGetTensorImpl() == slot.tensor)",
        "true",
    ),
    Mutant("shards not watched", "csrc/watch.cpp", "(!slot.shard || shard_of(found) == slot.shard)", "true"),
    Mutant("garbage collected in between", "csrc/watch.cpp", "PyGC_Disable() != 0", "false"),
    Mutant("versions of shards that ended", "csrc/bindings.cpp", "alive = prepared_.tensors();", ""),
    Mutant("versions of tensors that ended", "csrc/bindings.cpp", "alive.push_back(reference(tensor));", ";"),
    Mutant(
        "modules that name others",
        "fused_ema/runners/watch.py",
        "{id(source), *children} - {id(None)} == ",
        "source and ",
    ),
    Mutant("always complete", "csrc/bindings.cpp", "return complete_ && ", "return "),
    Mutant("exchanged for good", "csrc/bindings.cpp", "exchanged_ = op == Op::swap;", "exchanged_ = true;"),
    Mutant("version at decay 1", "csrc/bindings.cpp", "return decay == 1.0; };", "return decay == 2.0; };"),
    Mutant("scratch memory not checked", "csrc/bindings.cpp", "memory.numel() >= bytes &&", "true &&"),
    Mutant("versions of sharded averages", "csrc/bindings.cpp", "    bump_versions(ema_dtensors_);\n", ""),
    # ---- Pairing and checks
    Mutant("double tie", "fused_ema/pairs/checks.py", "        actions[i] = Action.NONE\n", "        pass\n"),
    Mutant(
        "one average of two parameters",
        "fused_ema/pairs/checks.py",
        "if place(pairs.model[before]) != place(model):",
        "if False:",
    ),
    Mutant(
        "averages that overlap",
        "fused_ema/pairs/memory.py",
        "if farthest and each.begin < farthest.end:",
        "if farthest and each.begin < farthest.begin:",
    ),
    Mutant(
        "average in the model's memory",
        "fused_ema/pairs/checks.py",
        "if before in model and after in model:",
        "if before in model or after in model:",
    ),
    Mutant(
        "spans without strides",
        "fused_ema/pairs/memory.py",
        "begin + extent(tensor) * tensor.element_size()",
        "begin + tensor.numel() * tensor.element_size()",
    ),
    Mutant(
        "expanded averages",
        "fused_ema/pairs/memory.py",
        "        if stride <= reach:",
        "        if stride < reach:",
    ),
    Mutant("storage too small", "fused_ema/pairs/checks.py", "    if found >= needed:", "    if found > 0:"),
    Mutant("narrow averages", "fused_ema/pairs/checks.py", "if WIDTH[ema.dtype] >= WIDTH[model.dtype]:", "if True:"),
    Mutant(
        "checked while writing",
        "fused_ema/pairs/checks.py",
        "    if ema.shape != model.shape:",
        "    if ema.numel() != model.numel():",
    ),
    Mutant(
        "paired by position",
        "fused_ema/pairs/pairing.py",
        "matched = [(name, name) for name in ours]",
        "matched = list(zip(ours, theirs))",
    ),
    Mutant(
        "names of one side dropped",
        "fused_ema/pairs/pairing.py",
        "    if differ:\n        raise ValueError(",
        "    if False:\n        raise ValueError(",
    ),
    Mutant(
        "tied names once",
        "fused_ema/pairs/pairing.py",
        "for prefix, child in module.named_modules(remove_duplicate=False):",
        "for prefix, child in module.named_modules():",
    ),
    Mutant("buffers averaged", "fused_ema/pairs/pairing.py", 'and uses[asked] == "average")', ")"),
    Mutant(
        "vectors of spectral norm averaged",
        "fused_ema/pairs/pairing.py",
        'kinds["_u"] = kinds["_v"] = "power iteration"',
        "pass",
    ),
    Mutant(
        "averages taken in unwritten",
        "fused_ema/manager/ema.py",
        "                if fresh:\n",
        "                if 0:\n",
    ),
    Mutant(
        "plans of other buffers",
        "fused_ema/functional.py",
        "key = (id(ema), id(model), asked, names)",
        "key = (id(ema), id(model), names)",
    ),
    Mutant("plans of the dead", "fused_ema/functional.py", "lambda _: _module_plans.pop(key, None)", "lambda _: None"),
    Mutant(
        "decay above 1",
        "fused_ema/pairs/arguments.py",
        "    if not 0.0 <= value <= 1.0:  #",
        "    if not 0.0 <= value <= 2.0:  #",
    ),
    # ---- The manager
    Mutant(
        "refused updates counted",
        "fused_ema/manager/ema.py",
        "        step = self._step + 1\n",
        "        step = self._step = self._step + 1\n",
    ),
    Mutant(
        "steps counted before they are made",
        "fused_ema/manager/ema.py",
        """                self._run(Call(self._timetable.op, decays, on_device, keys))
""",
        """                self._step = step
                try:
                    self._run(Call(self._timetable.op, decays, on_device, keys))
                except Exception:
                    self._step = step - 1
                    raise
""",
    ),
    Mutant(
        "made of another's averages",
        "fused_ema/manager/ema.py",
        '        self._refuse_swapped("EMA()")\n',
        "",
    ),
    Mutant(
        "old states skip",
        "fused_ema/manager/state.py",
        'saved = {"nonfinite": "propagate", **saved}',
        'saved = {"nonfinite": "skip", **saved}',
    ),
    Mutant("saved without a word", "fused_ema/manager/report.py", "    if not bad:\n", "    if len(bad) < 2:\n"),
    Mutant(
        "moved, and written to where it was",
        "fused_ema/manager/ema.py",
        "            self._averages.to(torch.device(device))\n            self._plan = None\n",
        "            self._averages.to(torch.device(device))\n",
    ),
    Mutant(
        "copied into what overlaps",
        "fused_ema/manager/copying.py",
        '    if refusal := write_refusal(f"model[{name!r}]", target):\n        raise refusal\n',
        "",
    ),
    Mutant(
        "copied into what is shared",
        "fused_ema/manager/copying.py",
        "    _check_memory(values, into, averages)\n",
        "",
    ),
    Mutant(
        "decays on the device in float32",
        "fused_ema/manager/ema.py",
        "d, dtype=torch.float64)) for d",
        "d, dtype=torch.float32)) for d",
    ),
    Mutant(
        "swaps without a lock",
        "fused_ema/manager/ema.py",
        '            with one_at_a_time():\n                self._refuse_swapped("EMA.swapped()")\n',
        '            if True:\n                self._refuse_swapped("EMA.swapped()")\n',
    ),
    Mutant("update_every forgotten", "fused_ema/manager/timetable.py", "decay**self.update_every if", "decay if"),
    Mutant(
        "one key for all averages", "fused_ema/manager/timetable.py", "step * MAX_AVERAGES + k)", "step * MAX_AVERAGES)"
    ),
    Mutant(
        "replaced tensors keep the average",
        "fused_ema/manager/swap.py",
        "        if self.replaced:\n",
        "        if False:\n",
    ),
    Mutant(
        "undone by position",
        "fused_ema/manager/ema.py",
        "[self._averages.as_sharded(name, given[name]) for name in names]",
        "[self._averages.as_sharded(*each) for each in zip(names, given.values(), strict=True)]",
    ),
    Mutant(
        "unwatched models not followed",
        "fused_ema/manager/swap.py",
        "            self.replaced |= not plan.lasts",
        "            _ = plan.lasts",
    ),
    Mutant(
        "inference tensors not told apart",
        "fused_ema/runners/in_python.py",
        "tensor.is_neg(), tensor.is_inference())",
        "tensor.is_neg())",
    ),
    Mutant(
        "compared by their own __eq__",
        "fused_ema/runners/watch.py",
        "list(map(id, values))), values",
        "values), values",
    ),
    Mutant(
        "not counted as exchanged",
        "fused_ema/runners/exchange.py",
        "            self.done = done\n",
        "",
    ),
    Mutant(
        "written to where another is",
        "fused_ema/manager/swap.py",
        "if owner.setdefault(id(tensor), self._place(name)) != self._place(name):",
        "if False:",
    ),
    Mutant(
        "written to the averages",
        "fused_ema/manager/swap.py",
        "*self._averages.storages(), ",
        "",
    ),
    Mutant("freed memory stays so", "fused_ema/manager/swap.py", "        self._bring_back_memory()\n", ""),
    Mutant(
        "exchanges kept",
        "fused_ema/manager/swap.py",
        "        if self in _under_way:\n            _under_way.remove(self)\n",
        "",
    ),
    Mutant(
        "autocast's copies stay",
        "fused_ema/plan.py",
        "    torch.clear_autocast_cache()\n",
        "",
    ),
    Mutant(
        "averages of several share lines",
        "fused_ema/manager/averages.py",
        "math.ceil(numel / unit) * unit if count > 1",
        "numel if count > 1",
    ),
    Mutant("tied names apart", "fused_ema/manager/averages.py", "if id(tensor) not in tied:", "if True:"),
    Mutant(
        "seed not resumed",
        "fused_ema/manager/state.py",
        '        numbers["seed"],\n',
        "        own.timetable.seed,\n",
    ),
    Mutant("decays not resumed", "fused_ema/manager/state.py", 'tuple(saved["decays"])', "ema._decays"),
    Mutant(
        "averages half taken over",
        "fused_ema/manager/state.py",
        "if found.shape != average.shape:",
        "if False:",
    ),
    Mutant(
        "skipped steps counted",
        "fused_ema/manager/attach.py",
        "            if found_inf.item():\n                return\n            found_inf = None\n        devices",
        "            found_inf = None\n        devices",
    ),
    Mutant(
        "swapped models trained",
        "fused_ema/manager/attach.py",
        '        self._manager.refuse_swapped("optimizer.step(), which would train the averages,")\n',
        "",
    ),
    Mutant(
        "phases of a step not seen",
        "fused_ema/manager/attach.py",
        'for name in ("step", *PHASES):',
        'for name in ("step",):',
    ),
    Mutant(
        "any phase ends a step",
        "fused_ema/manager/attach.py",
        "name in phases[-1:]",
        "name in phases",
    ),
    Mutant("a model without steps is fine", "fused_ema/manager/attach.py", "self._warned = True", "return"),
    Mutant("the count of warm-up", "fused_ema/schedules.py", "(1 + n) / (10 + n)", "n / (10 + n)"),
    Mutant(
        "power function by steps",
        "fused_ema/schedules.py",
        "sigma_rel: float\n    per_step: ClassVar[bool] = False",
        "sigma_rel: float\n    per_step: ClassVar[bool] = True",
    ),
    Mutant(
        "numbers of random bits",
        "fused_ema/runners/foreach.py",
        "number += 2 * job.ema[i].numel()",
        "number += job.ema[i].numel()",
    ),
    Mutant(
        "PyTorch's branches exchanged",
        "fused_ema/runners/reference.py",
        "difference.mul_(1 - decay).add_(old) if 1 - decay < 0.5",
        "difference.mul_(1 - decay).add_(old) if 1 - decay > 0.5",
    ),
    Mutant(
        "nothing skipped by PyTorch",
        "fused_ema/runners/reference.py",
        "            if finite and average:\n",
        "            if finite and not average:\n",
    ),
    Mutant(
        "copies skip nothing by PyTorch",
        "fused_ema/runners/reference.py",
        "(decay == 0 and not finite) or not average",
        "decay == 0 or not average",
    ),
    # ---- Runners in Python
    Mutant(
        "small decays by _foreach_lerp_",
        "fused_ema/runners/groups.py",
        "    if decay >= 0.5:\n        torch",
        "    if decay > 0:\n        torch",
    ),
    Mutant(
        "any CPU taken for one with FMA",
        "fused_ema/runners/groups.py",
        'first.device.type != "cpu" or _lerp_is_fused()',
        "True",
    ),
    Mutant(
        "scratch memory after the first write",
        "fused_ema/runners/foreach.py",
        "        scratch = {device: borrow(device, size) for device, size in self._scratch_bytes.items()}\n",
        "        _copy(self._pick_copied, ema, model)\n"
        "        scratch = {device: borrow(device, size) for device, size in self._scratch_bytes.items()}\n",
    ),
    Mutant("both halves of scratch memory one", "fused_ema/runners/groups.py", "memory[-self._fullest :]", "memory"),
    Mutant("parts counted as changes", "fused_ema/runners/pieces.py", "reals(tensor.data)", "reals(tensor)"),
    Mutant("a last part forgotten", "fused_ema/runners/pieces.py", "range(0, size, step)", "range(0, size - 1, step)"),
    Mutant(
        "versions of swapped parts not raised",
        "fused_ema/runners/exchange.py",
        "increment_version([each for each in written if not each.is_inference()])",
        "increment_version([])",
    ),
    Mutant(
        "finished after any error",
        "fused_ema/runners/reference.py",
        "except KeyboardInterrupt:",
        "except BaseException:",
    ),
    Mutant("scratch memory shared with a handler", "fused_ema/runners/groups.py", "_kept.pop()", "_kept[-1]"),
    Mutant("no way back from an exchange", "fused_ema/runners/exchange.py", "            p.copy_(old_p)\n", ""),
    Mutant(
        "addresses not compared",
        "fused_ema/runners/in_python.py",
        "return list(map(_data_ptr, tensors)) == self._addresses",
        "return True",
    ),
    Mutant(
        "tensors that came twice not compared",
        "fused_ema/runners/in_python.py",
        "            if not all(tensors[i] is tensors[before] for i, before in self._repeated):\n"
        "                return False\n",
        "",
    ),
    Mutant(
        "written before the others were looked at",
        "fused_ema/runners/several.py",
        "part.run(self._writes_nothing, ema, model) for part in self._parts",
        "part.run(call, ema, model) for part in self._parts",
    ),
    Mutant(
        "restored though not swapped",
        "fused_ema/runners/several.py",
        'call.op == "restore" and not part.exchanged()',
        "False",
    ),
    Mutant(
        "versions of launches not raised",
        "fused_ema/runners/nvrtc.py",
        "increment_version(written)",
        "increment_version([])",
    ),
    Mutant("plans of a parent run", "fused_ema/runners/nvrtc.py", "self._process != os.getpid()", "False"),
    Mutant(
        "tables of a graph freed", "fused_ema/runners/nvrtc.py", "            _never_freed.extend(self.memory)\n", ""
    ),
    Mutant("complex strides in elements", "fused_ema/runners/tables.py", "stride * reals, numel", "stride, numel"),
    Mutant(
        "code of anybody trusted",
        "fused_ema/_build/kernels.py",
        "if cached and (reason := distrust(path)):",
        "if False:",
    ),
    # ---- Files
    Mutant(
        "pickles that run code",
        "fused_ema/checkpoints/load.py",
        "mmap=mmap, weights_only=True)",
        "mmap=mmap, weights_only=False)",
    ),
    Mutant(
        "written in place",
        "fused_ema/checkpoints/files.py",
        'temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")\n    try:\n        temporary.touch()',
        "temporary = path\n    try:\n        temporary.touch()",
    ),
    Mutant(
        "removed, then renamed",
        "fused_ema/checkpoints/files.py",
        "        os.replace(temporary, path)\n",
        "        path.unlink(missing_ok=True)\n        os.replace(temporary, path)\n",
    ),
    Mutant(
        "one copy too few",
        "fused_ema/checkpoints/layouts.py",
        "copied = 0 < ema.update_after_step <= ema.step",
        "copied = 0 < ema.update_after_step < ema.step",
    ),
    Mutant(
        "empty ones tied",
        "fused_ema/posthoc/snapshots.py",
        "(x.data_ptr(), x.shape, x.stride(), x.dtype, x.device)",
        "(x.data_ptr(), x.dtype, x.device)",
    ),
    Mutant(
        "later snapshots of another run",
        "fused_ema/posthoc/snapshots.py",
        "and count > updates)",
        "and count < 0)",
    ),
    Mutant(
        "not yet on the disk",
        "fused_ema/checkpoints/files.py",
        "        _sync(temporary)\n        os.replace",
        "        os.replace",
    ),
    Mutant(
        "leftovers of failures", "fused_ema/checkpoints/files.py", "        temporary.unlink(missing_ok=True)\n", ""
    ),
    Mutant(
        "weights that don't sum to 1", "fused_ema/posthoc/profiles.py", "    return x / x.sum()\n", "    return x\n"
    ),
    Mutant(
        "positions of what is not averaged",
        "fused_ema/checkpoints/restore.py",
        "(positional or id(place) in averaged)",
        "(id(place) in averaged)",
    ),
    Mutant(
        "all averages in an export",
        "fused_ema/manager/ema.py",
        "shared = (copy or self._averages.count > 1) and",
        "shared = copy and",
    ),
    Mutant(
        "states that go on",
        "fused_ema/manager/ema.py",
        "shared = (copy or self._averages.count > 1) and",
        "shared = self._averages.count > 1 and",
    ),
    Mutant(
        "what unfreezes is no news",
        "fused_ema/manager/selection.py",
        "        self._frozen.difference_update(trained)\n",
        "        self._frozen.difference_update(trained)\n        return\n",
    ),
    Mutant("news of each phase", "fused_ema/manager/selection.py", "            self._frozen.clear()\n", ""),
    Mutant(
        "another choice forgotten",
        "fused_ema/manager/selection.py",
        "self._select if select is None else select)",
        "self._select)",
    ),
    Mutant(
        "one of tied names not enough",
        "fused_ema/manager/selection.py",
        "self._known = {name: id(tensor) in taken for name, tensor in candidates.items()}",
        "self._known = {n: id(t) in taken and (not select or bool(select(n, t))) for n, t in candidates.items()}",
    ),
    Mutant(
        "patched while exchanged",
        "fused_ema/plan.py",
        "if self.prepared.exchanged():\n            return None",
        "if 0: ...",
    ),
    Mutant(
        "patched though the pairs may be others", "fused_ema/plan.py", " or (changed.others and not self._by_name)", ""
    ),
    Mutant("patched where tied", "fused_ema/plan.py", "if not self._alone.keys() >= set(numbers):", "if not numbers:"),
    Mutant(
        "patched with another action",
        "fused_ema/plan.py",
        " or checked.actions != [self._actions[i] for i in numbers]",
        "",
    ),
    Mutant(
        "patched into what overlaps",
        "fused_ema/plan.py",
        "return new if new and self.prepared.patch(changed) else None",
        "return (new or apart) if self.prepared.patch(changed) else None",
    ),
    Mutant(
        "any folder for code",
        "fused_ema/_build/cache.py",
        "each.mkdir(mode=0o700, exist_ok=True)",
        "each.mkdir(exist_ok=True)",
    ),
    Mutant(
        "builds without a lock",
        "fused_ema/_build/cache.py",
        "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "pass",
    ),
    Mutant(
        "half a library",
        "fused_ema/_build/cache.py",
        'return library.is_file() and read_record(folder) == {**wanted, "size": library.stat().st_size}',
        "return (read_record(folder) or {}).items() >= wanted.items()",
    ),
]
