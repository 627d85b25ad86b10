"""Ways to spoil a volume or any file: name -> function of its path and a source of random numbers."""

from __future__ import annotations

import gzip
import math
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np


def rewritten(change: Callable[[np.ndarray, np.ndarray, random.Random], tuple[Any, Any]]) -> Callable:
    """Spoil voxels and affine of a volume."""

    def spoil(path: Path, rng: random.Random) -> None:
        source = nib.load(path)
        values, affine = change(np.asarray(source.dataobj), source.affine.copy(), rng)
        path.unlink()
        nib.save(nib.Nifti1Image(values, affine), path)

    return spoil


def with_voxel(values: np.ndarray, value: float, rng: random.Random) -> np.ndarray:
    result = values.astype(np.float32)
    result[tuple(rng.randrange(n) for n in values.shape)] = value
    return result


def any_nan(v, a, rng):
    return with_voxel(v, rng.choice([np.nan, np.inf, -np.inf]), rng), a


def byte_scale(v, a, rng):
    low, high = rng.uniform(-400, 0), rng.uniform(500, 1500)
    return (np.clip((v - low) / (high - low), 0, 1) * 255).astype(np.uint8), a


def unit_scale(v, a, rng):
    return ((v - v.min()) / (v.max() - v.min()) * rng.choice([1, 2]) - rng.choice([0, 1])).astype(np.float32), a


def unsigned(v, a, rng):
    return (v.astype(np.int32) + rng.choice([1024, 1000, 2048])).clip(0).astype(np.uint16), a


def constant(v, a, rng):
    return np.full(v.shape, rng.choice([0, -1000, 40, 255]), np.int16), a


def two_volumes(v, a, rng):
    return np.stack([v] * rng.randint(2, 4), -1), a


def colours(v, a, rng):
    return np.zeros(v.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")]), a


def flat(v, a, rng):
    return v[:, :, rng.randrange(v.shape[2])], a


def one_slice(v, a, rng):
    return v[:, :, :1], a


def other_grid(v, a, rng):
    axis = rng.randrange(3)
    if rng.random() < 0.5:
        return np.take(v, range(v.shape[axis] - rng.randint(1, 5)), axis), a
    a[axis, 3] += rng.choice([-1, 1]) * rng.uniform(1, 200)
    return v, a


def metres(v, a, rng):
    return v, np.diag([1e-3, 1e-3, 1e-3, 1]) @ a


def inches(v, a, rng):
    return v, a @ np.diag([1, 1, rng.uniform(4, 20), 1])


def header(change: Callable[[bytearray, random.Random], None]) -> Callable:
    """Spoil bytes of a header."""

    def spoil(path: Path, rng: random.Random) -> None:
        content = bytearray(gzip.decompress(path.read_bytes()))
        change(content, rng)
        path.unlink()
        path.write_bytes(gzip.compress(bytes(content), 1))

    return spoil


DIM, PIXDIM, FORMS, QFORM, SROW = 40, 76, 252, 256, 280
"""Offsets in a NIfTI header."""


def bad_pixdim(content, rng):
    struct.pack_into("<f", content, PIXDIM + 4 * rng.randint(1, 3), rng.choice([0, math.nan, -1.5, math.inf, 1e-9]))


def bad_dim(content, rng):
    struct.pack_into("<h", content, DIM + 2 * rng.randint(1, 3), rng.choice([0, -3, 32767]))


def bad_rank(content, rng):
    struct.pack_into("<h", content, DIM, rng.choice([0, -1, 9, 300]))


def bad_sform(content, rng):
    row = rng.randrange(3)
    if rng.random() < 0.5:
        struct.pack_into("<4f", content, SROW + 16 * row, 0, 0, 0, 0)
    else:
        struct.pack_into("<f", content, SROW + 16 * row + 4 * rng.randrange(4), rng.choice([math.nan, math.inf]))


def moved_qform(content, rng):
    struct.pack_into("<2h", content, FORMS, 1, 1)
    place = QFORM + 12 + 4 * rng.randrange(3)
    struct.pack_into("<f", content, place, struct.unpack_from("<f", content, place)[0] + rng.uniform(2, 300))


def turned_qform(content, rng):
    struct.pack_into("<2h", content, FORMS, 1, 1)
    struct.pack_into("<3f", content, QFORM, *rng.choice([(0.9, 0.9, 0), (math.nan, 0, 0), (0, 0.3, 0.3)]))


def no_form(content, rng):
    struct.pack_into("<2h", content, FORMS, 0, 0)


def bad_type(content, rng):
    struct.pack_into("<h", content, 70, rng.choice([1, 32, 128, 1792, 9999]))


def bad_scale(content, rng):
    """Readers leave out a factor that is no number."""
    struct.pack_into("<2f", content, 112, rng.choice([math.nan, math.inf, 1e30]), 0)


def flipped(content, rng):
    """Any bits that say what the file holds and where it lies."""
    for _ in range(rng.randint(1, 3)):
        content[rng.choice([*range(4), *range(40, 124), *range(252, 348)])] ^= 1 << rng.randrange(8)


def raw(change: Callable[[bytes, random.Random], bytes]) -> Callable:
    """Replace all of a file."""

    def spoil(path: Path, rng: random.Random) -> None:
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(change(content, rng))

    return spoil


def cut(content, rng):
    return content[: rng.randrange(1, len(content) - 12)]


def cut_inside(content, rng):
    whole = gzip.decompress(content)
    return gzip.compress(whole[: rng.randrange(1, len(whole) - 4)])


def empty(content, rng):
    return b""


def garbage(content, rng):
    return rng.randbytes(rng.choice([7, 348, 4096]))


def text(content, rng):
    return rng.choice([b"patient 7\n" * 50, b"{}", b"<html>not found</html>", "Größe".encode("latin-1") * 99])


def damaged(content, rng):
    changed = bytearray(content)
    for _ in range(8):
        changed[rng.randrange(20, len(content))] ^= 0xFF
    return bytes(changed)


def folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def dangling(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to(path.with_name("gone"))


def missing(path: Path, rng: random.Random) -> None:
    path.unlink()


FILE = {spoil.__name__: raw(spoil) for spoil in (cut, cut_inside, empty, garbage, text)}
FILE |= {spoil.__name__: spoil for spoil in (folder, dangling, missing)}
HEADER = {
    spoil.__name__: header(spoil)
    for spoil in (bad_pixdim, bad_dim, bad_rank, bad_sform, moved_qform, turned_qform, no_form, bad_type)
}
VOXELS = {spoil.__name__: rewritten(spoil) for spoil in (any_nan, two_volumes, colours, flat, metres, inches)}
IMAGE = {**FILE, **HEADER, **VOXELS}
IMAGE |= {spoil.__name__: rewritten(spoil) for spoil in (byte_scale, unit_scale, unsigned, constant, one_slice)}


def unknown_id(v, a, rng):
    return np.where(v == rng.choice(np.unique(v)[1:].tolist()), rng.choice([15, 42, 200, 255]), v).astype(np.uint8), a


def negative_id(v, a, rng):
    return np.where(v == rng.choice(np.unique(v)[1:].tolist()), -rng.randint(1, 9), v).astype(np.int16), a


def fraction(v, a, rng):
    return with_voxel(v, rng.choice([0.5, 2.25, 9.9]), rng), a


def background(v, a, rng):
    return np.zeros_like(v), a


LABEL = {**FILE, **HEADER, **VOXELS}
LABEL |= {spoil.__name__: rewritten(spoil) for spoil in (unknown_id, negative_id, fraction, background)}


def one_label_less(v, a, rng):
    return np.where(v == rng.randint(1, 10), 0, v).astype(np.uint8), a


def torn(v, a, rng):
    """A speck of a label far from it."""
    v = v.copy()
    v[1:3, 1:3, 1:3] = rng.randint(1, 10)
    return v, a


LEGAL = {"flipped": header(flipped), "bad_scale": header(bad_scale), "damaged": raw(damaged)}
"""What may leave a good file: the run is refused clearly or does its work."""
LEGAL_LABEL = {spoil.__name__: rewritten(spoil) for spoil in (one_label_less, torn)}
