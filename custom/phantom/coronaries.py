"""Coronary trees of the cardiac CT phantom: centrelines, radii and voxels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from custom.geometry.topology import betti_numbers, fill_cavities, largest_components
from custom.phantom.geometry import FAR, Array, Frame, curve_length, draw_tube, spline
from custom.phantom.labels import TopologyError
from custom.phantom.survey import Survey
from numpy.typing import NDArray
from scipy import ndimage

# World lengths per scale that a main artery must have; what lies outside took a detour or broke off. Ours: those of 56
# accepted subjects are 72 to 103, 65 to 100 and 110 to 151 mm.
LENGTHS_MM = {"LAD": (66.0, 135.0), "LCX": (45.0, 125.0), "RCA": (85.0, 190.0)}
LEFT_LENGTHS_MM = LENGTHS_MM | {"LCX": (75.0, 200.0), "RCA": (35.0, 120.0)}
RIGHT_TREE = ("RCA", "PDA", "AM")

Branch = tuple[str, NDArray[np.float64], NDArray[np.float64]]


def coronary_curves(
    survey: Survey, size: float, rng: np.random.Generator, *, left_dominant: bool = False
) -> list[Branch]:
    """World centrelines and radii (mm) of both trees: (name, points, radii), a parent before its branches.

    The posterior descending artery (PDA) comes from the right artery, or, `left_dominant`, from the circumflex one,
    which then goes all the way round to it while the right artery ends early.
    """
    s, off, hug = survey.frame.scale, survey.offset, survey.outside.hug
    lad = _steady(survey.groove(survey.front, np.arange(-20.0, 43.0, 4.0), 0.1), 15 * s)
    left = hug(np.concatenate([survey.leave_aorta([20, 2, 36], lad[0]), lad]), off, fixed=2)
    arc = np.r_[0, np.cumsum(np.linalg.norm(np.diff(left, axis=0), axis=1))]
    split = min(int(np.searchsorted(arc, np.clip(rng.normal(10.5, 2.0), 7, 14) * s + 1.0)), len(left) - 1)
    last = rng.uniform(2.3, 2.9)
    if left_dominant:
        last = (
            float(np.interp(-20, survey.t, survey.below) - np.interp(-24, survey.t, survey.front)) % (2 * np.pi) - 0.3
        )
    phi = np.interp(-24, survey.t, survey.front) + np.linspace(0.6, last, 11 if left_dominant else 7)
    ring = np.array([survey.on_lv(t, p) for t, p in zip(np.linspace(-27, -30, len(phi)), phi, strict=True)])
    lcx = np.concatenate([left[split - 1 : split + 1], survey.outside.route(left[split], ring[0], off), ring])
    rca = np.array([survey.on_ring(p) for p in np.linspace(-0.9, 1.1 if left_dominant else 2.5, 12)])
    rca = np.concatenate([survey.leave_aorta([46, 32, 36], rca[0]), rca])
    curves = {"LAD": left, "LCX": hug(lcx, off, fixed=2), "RCA": hug(rca, off, fixed=2)}
    for name, curve in curves.items():
        low, high = (LEFT_LENGTHS_MM if left_dominant else LENGTHS_MM)[name]
        if not low <= (length := curve_length(curve) / s) <= high:
            raise TopologyError(f"{name} is {length:.0f} mm long, possible are {low:.0f}-{high:.0f}")
    r_lm, r_lad = size * rng.normal(2.25, 0.15), size * rng.normal(1.85, 0.12)
    r_lcx = max(1.2 * size, max(r_lm**3 - r_lad**3, 1.0) ** (1 / 3))  # Murray: r0^3 = r1^3 + r2^3
    radii: dict[str, NDArray] = {name: np.full(len(curve), r_lcx) for name, curve in curves.items()}
    radii["LAD"] = np.where(np.arange(len(left)) <= split, r_lm, r_lad)
    radii["RCA"][:] = size * rng.normal(1.95, 0.15)
    return _attach(
        curves, radii, _side_branches(survey, phi, rng, "LCX" if left_dominant else "RCA"), survey, size, rng
    )


def _side_branches(
    survey: Survey, ring_phi: NDArray, rng: np.random.Generator, dominant: str
) -> list[tuple[str, str, NDArray]]:
    """Waypoints of the side branches: (name, parent, points)."""
    below = np.arange(-20.0, rng.uniform(14, 30), 4.0)
    side = [("PDA", dominant, survey.groove(survey.below, below, -0.1))]
    for n, t in enumerate((-10.0, 4.0)):
        phi = float(np.interp(t, survey.t, survey.front))
        points = [survey.on_lv(t + 3 + 4 * i, phi + 0.25 + 0.17 * i) for i in range(1, 7)]
        side.append((f"D{n + 1}", "LAD", np.array(points)))
    for n, share in enumerate((0.35, 0.75)):
        phi = float(ring_phi[0] + share * (ring_phi[-1] - ring_phi[0]))
        side.append((f"OM{n + 1}", "LCX", np.array([survey.on_lv(-26 + 5 * i, phi + 0.06 * i) for i in range(1, 8)])))
    return [*side, ("AM", "RCA", survey.over_rv(survey.on_ring(0.7)))]


def _steady(points: NDArray, limit_mm: float) -> NDArray:
    """Points up to the first jump longer than the limit: where a ray met another structure."""
    jumps = np.linalg.norm(np.diff(points, axis=0), axis=1) > limit_mm
    return points[: int(np.argmax(jumps)) + 1] if jumps.any() else points


def _attach(
    curves: dict[str, NDArray],
    radii: dict[str, NDArray],
    side: list[tuple[str, str, NDArray]],
    survey: Survey,
    size: float,
    rng: np.random.Generator,
) -> list[Branch]:
    """Joins side branches to the nearest point of their parent, which narrows by Murray's law r0^3 = r1^3 + r2^3."""
    branches = []
    for name, parent, points in side:
        line, radius = curves[parent], radii[parent]
        n = len(line) - 1 if name == "PDA" else max(int(np.argmin(np.linalg.norm(line - points[0], axis=1))), 3)
        points = _steady(np.concatenate([line[n : n + 1], points]), 18.0)
        if len(points) < 3:
            continue
        r_branch = min(size * rng.uniform(0.85, 1.2), 0.85 * radius[n])
        radius[n + 1 :] *= max(1 - (r_branch / radius[n]) ** 3, 0.3) ** (1 / 3)
        curve = survey.outside.hug(points, survey.offset)
        branches.append((name, curve, np.linspace(r_branch, 0.75 * size, len(curve))))
    return [
        (name, curve, radii[name] * np.linspace(1.0, 0.72, len(curve))) for name, curve in curves.items()
    ] + branches


def _rasterise_tube(frame: Frame, points: NDArray, radii: NDArray) -> tuple[NDArray[np.bool_], Array]:
    """Voxels and signed distance of one artery; its centreline voxels are set, so it is connected on any grid."""
    distance = draw_tube(frame, points, radii, reach=3.0 + 2 * frame.h)
    fine, _ = spline(points, radii, 0.2 * frame.h)
    index = np.rint(frame.to_index(fine)).astype(int)
    index = index[((index >= 1) & (index < np.array(frame.shape) - 1)).all(axis=1)]
    mask = distance < 0
    mask[tuple(index.T)] = True
    return mask, distance


def draw_coronaries(
    frame: Frame,
    curves: list,
    aorta: NDArray[np.bool_],
    heart: NDArray[np.bool_],
    right_tree: Sequence[str] = RIGHT_TREE,
) -> tuple[NDArray[np.bool_], Array, list[str]]:
    """Draws branch by branch and keeps a side branch only while its tree stays a tree (one component, no loop)."""
    trees: dict[str, NDArray] = {"left": np.zeros(frame.shape, bool), "right": np.zeros(frame.shape, bool)}
    distance, kept = np.full(frame.shape, FAR, np.float32), []
    for name, points, radii in curves:
        own, other = ("right", "left") if name in right_tree else ("left", "right")
        forbidden = ndimage.binary_dilation(trees[other], np.ones((3, 3, 3)), iterations=2)
        for _ in range(6):
            mask, d = _rasterise_tube(frame, points, radii)
            mask &= ~heart
            if not trees[own].any():
                mask = largest_components(mask, 1)
            grown = fill_cavities(trees[own] | mask)
            if betti_numbers(grown) != (1, 0, 0):
                grown = fill_cavities(grown | (ndimage.binary_closing(grown, np.ones((3, 3, 3))) & ~heart))
            if betti_numbers(grown) == (1, 0, 0) and not (grown & forbidden).any():
                trees[own] = grown
                np.minimum(distance, d, out=distance)
                kept.append(name)
                break
            points, radii = points[:-4], radii[:-4]
            if len(points) < 6:
                break
    if not {"LAD", "LCX", "RCA"} <= set(kept):
        raise TopologyError(f"a main coronary artery is missing, drawn were {kept}")
    near = ndimage.binary_dilation(aorta, np.ones((3, 3, 3)))
    if not all((tree & near).any() for tree in trees.values()):
        raise TopologyError("a coronary tree does not reach the aorta")
    return trees["left"] | trees["right"], distance, kept
