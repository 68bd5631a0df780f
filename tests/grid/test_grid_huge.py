"""Tensors of up to 2^40 elements on the emulated grid: only the tiles that run have memory behind them."""

import errno
import mmap

import numpy as np
import pytest
import torch
from emulated_grid import Pair
from grid_checks import check_averages, noise

NORESERVE = 0x4000  # Linux; mmap.MAP_NORESERVE came with Python 3.13


def virtual(dtype, n, ahead=0):
    """n elements, `ahead` elements past a page boundary; pages appear as they are touched."""
    try:
        pages = mmap.mmap(-1, (n + 16) * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        pytest.skip(f"this machine gives no {n * dtype.itemsize >> 30} GiB of virtual memory")
    pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype)[ahead : ahead + n]


@pytest.mark.parametrize("grid", ["default", "small"], indirect=True)
@pytest.mark.parametrize(
    ("dtype", "numel", "ahead"),
    [(torch.float32, 100, 0), (torch.float32, 2**31 + 17, 3), (torch.uint8, 2**32 + 1, 15), (torch.bfloat16, 2**32, 0)],
)
def test_tiles_cover_large_tensors(grid, dtype, numel, ahead):
    """Tile tables around 2^31 and 2^32 elements."""
    if grid.tile(torch.uint8) < 16384 and dtype != torch.uint8:
        numel = min(numel, 2**26)  # tables, too, take memory
    pairs = [Pair(*(virtual(dtype, n, ahead) for _ in range(2))) for n in (7, numel)]
    tables = grid.tables(pairs)
    tiles = tables.tiles()
    large = tiles[tiles[:, 0] == 1, 1]
    assert (large == np.arange(-(-(numel + ahead) // grid.tile(dtype)))).all()
    assert tables.counts()[3] == numel + 7


@pytest.mark.parametrize("way", ["vectors", "elements", "strided"])
def test_two_to_the_forty_elements(grid, way):
    """float32 <- bfloat16 of 2^40 elements; only tiles at the ends and around 2^31 and 2^32 run."""
    numel, rng = 2**40, np.random.default_rng(1)
    ahead, model_ahead = {"vectors": (3, 3), "elements": (3, 0), "strided": (0, 0)}[way]
    ema, model = virtual(torch.float32, numel, ahead), virtual(torch.bfloat16, numel, model_ahead)
    shape = (2**10, 2**10, 2**20) if way == "strided" else (1, 1, numel)
    ema_view, model_view = ema.view(shape), model.view(shape)
    if way == "strided":  # the two outer dimensions exchanged
        model_view = model_view.transpose(0, 1)
    tables = grid.tables([Pair(ema_view, model_view)], with_tiles=False)
    assert tables.counts()[::3] == (1, numel)
    assert tables.dims(0) == (3 if way == "strided" else -1)

    tile = grid.tile(torch.float32)
    last = (numel + ahead - 1) // tile
    around = [(x + ahead) // tile + k for x in (2**31, 2**32) for k in (-1, 0)]
    chosen = sorted({0, 1, *around, last - 1, last})
    ranges = [(max(0, i * tile - ahead), min(numel, (i + 1) * tile - ahead)) for i in chosen]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == numel

    steps = []
    for low, high in ranges:
        e, p = noise(torch.float32, high - low, rng), noise(torch.bfloat16, high - low, rng)
        outer, rest = divmod(low, shape[1] * shape[2])
        middle, inner = divmod(rest, shape[2])  # a tile never leaves its inner row
        ema[low:high] = e
        model_view[outer, middle, inner : inner + high - low] = p
        steps.append((e, p, ema[low:high]))
    tables.run("update", 0.9, tiles=np.array([(0, index) for index in chosen], np.uint32))
    check_averages(steps, 0.9)

    addresses, sizes = grid.stores()
    words = (addresses[:, None] + np.arange(0, 16, 4))[np.arange(0, 16, 4) < sizes[:, None]]
    wanted = np.concatenate([np.arange(low, high) for low, high in ranges]) * 4 + ema.data_ptr()
    assert np.array_equal(np.sort(words), wanted)
    assert (sizes == 16).any() == (way == "vectors")
