"""Masks whose Betti numbers are known by construction."""

import numpy as np

GRID = np.moveaxis(np.indices((31, 33, 29)), 0, -1) - np.array([15, 16, 14])


def ball(radius, centre=(0, 0, 0)):
    return ((GRID - np.array(centre)) ** 2).sum(-1) <= radius**2


def shell():
    return ball(10) & ~ball(6)


def torus(ring=9, radius=3):
    h, w, d = np.moveaxis(GRID, -1, 0)
    return (np.hypot(h, w) - ring) ** 2 + d**2 <= radius**2


def tube(start, end, radius):
    start, end = np.array(start, float), np.array(end, float)
    along = np.clip((GRID - start) @ (end - start) / ((end - start) ** 2).sum(), 0, 1)
    return ((GRID - start - along[..., None] * (end - start)) ** 2).sum(-1) <= radius**2


def hollow_tube():
    return tube((0, 0, -10), (0, 0, 10), 6) & ~tube((0, 0, -30), (0, 0, 30), 3)


def voxels(*positions, shape=(5, 5, 5)):
    mask = np.zeros(shape, bool)
    for position in positions:
        mask[position] = True
    return mask


KNOWN = {
    "empty": (np.zeros((5, 6, 7), bool), (0, 0, 0)),
    "one voxel": (voxels((2, 2, 2)), (1, 0, 0)),
    "one voxel in a corner": (voxels((0, 0, 0)), (1, 0, 0)),
    "full array": (np.ones((4, 5, 6), bool), (1, 0, 0)),
    "ball": (ball(9), (1, 0, 0)),
    "shell": (shell(), (1, 0, 1)),
    "torus": (torus(), (1, 1, 0)),
    "tube": (tube((-9, -9, -9), (9, 9, 9), 2), (1, 0, 0)),
    "tube cut by the border": (tube((-40, 3, 2), (40, 3, 2), 3), (1, 0, 0)),
    "open hollow tube": (hollow_tube(), (1, 1, 0)),
    "hollow tube cut by both borders": (
        tube((0, 0, -30), (0, 0, 30), 6) & ~tube((0, 0, -30), (0, 0, 30), 3),
        (1, 1, 0),
    ),
    "two balls": (ball(4, (-8, 0, 0)) | ball(4, (8, 0, 0)), (2, 0, 0)),
    "neighbours over a corner": (voxels((1, 1, 1), (2, 2, 2)), (1, 0, 0)),
    "neighbours over an edge": (voxels((1, 1, 1), (2, 2, 1)), (1, 0, 0)),
    "one voxel apart": (voxels((1, 1, 1), (3, 1, 1)), (2, 0, 0)),
    "shell with a ball inside": (shell() | ball(2), (2, 0, 1)),
    "torus and shell": (np.concatenate([torus(), shell()]), (2, 1, 1)),
}
