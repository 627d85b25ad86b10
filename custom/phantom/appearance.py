"""Appearance of the cardiac CT phantom: contrast, texture, point spread, noise and artefacts."""

from __future__ import annotations

from typing import Any

import numpy as np
from custom.phantom.anatomy import Geometry
from custom.phantom.geometry import Array
from custom.phantom.labels import LABELS
from custom.volumes.artefacts import (
    PLAQUE_HU,
    PLAQUE_RADIUS_MM,
    SPOKES,
    STREAK_HU,
    add_plaque,
    add_streaks,
    blur_by_motion,
)
from scipy import ndimage

# HU range of the mean, and SD in HU of the fine (about 3 mm) and coarse (about 12 mm) texture inside the tissue. Means
# are CT numbers of radiology texts at 120 kV after contrast agent; textures are ours, by eye.
TISSUES: dict[str, tuple[float, float, float, float]] = {
    "fat": (-105, -85, 8, 10),
    "muscle": (45, 65, 10, 14),
    "lung": (-860, -780, 22, 25),
    "diaphragm": (45, 60, 4, 4),
    "liver": (55, 105, 6, 6),
    "viscera": (10, 70, 12, 45),
    "gas": (-960, -900, 5, 5),
    "mediastinum": (-105, -82, 10, 12),
    "spine_muscle": (40, 60, 8, 12),
    "cortex": (420, 700, 60, 60),
    "marrow": (140, 260, 45, 25),
    "disc": (70, 110, 8, 8),
    "airway_wall": (20, 50, 8, 5),
    "airway": (-990, -960, 3, 3),
    "oesophagus": (30, 55, 12, 15),
    "wall": (65, 100, 8, 10),
    "myocardium": (80, 130, 7, 11),
}

MIXING = {"right_atrium": 2.5, "svc": 2.0, "ivc": 2.0, "right_ventricle": 1.0}
"""Share of `mixing` in the coarse texture of blood; 0.4 elsewhere. Ours: contrast agent meets clear blood there."""


def _field(shape: tuple[int, ...], sigma_voxels: float, rng: np.random.Generator) -> Array:
    """Smooth Gaussian random field of mean 0 and SD 1."""
    f = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), sigma_voxels, mode="wrap")
    return (f - f.mean()) / f.std()


def _draw_contrast(rng: np.random.Generator) -> dict[str, float]:
    """Mean HU of every contrast-filled structure: one left level, a right heart that is filled or washed out."""
    left = rng.uniform(370, 530)
    washed_out = rng.random() < 0.45
    right = rng.uniform(130, 250) if washed_out else rng.uniform(320, 650)
    lung_arteries = right + (rng.uniform(0, 60) if washed_out else rng.uniform(-40, 40))
    return {
        "left_ventricle": left + rng.uniform(-20, 5),
        "left_atrium": left + rng.uniform(-5, 25),
        "appendage": left + rng.uniform(-40, 10),
        "pulmonary_veins": left + rng.uniform(0, 35),
        "aorta": left + rng.uniform(-20, 10),
        "coronaries": min(left * rng.uniform(0.82, 0.95), 450.0),
        "right_ventricle": right,
        "right_atrium": right + (rng.uniform(-20, 30) if washed_out else rng.uniform(-60, 80)),
        "pulmonary_artery": lung_arteries,
        "svc": right + (rng.uniform(0, 120) if washed_out else rng.uniform(150, 450)),
        "ivc": rng.uniform(90, 160),
        "vessels": 0.6 * lung_arteries + 0.3 * left,
    }


def draw_appearance(rng: np.random.Generator) -> dict[str, Any]:
    """Draws how a subject is scanned: mean HU of every tissue ("hu"), noise, grain, point spread, kernel, mixing."""
    tissue = {name: float(rng.uniform(low, high)) for name, (low, high, _, _) in TISSUES.items()}
    return {
        "hu": tissue | {name: float(v) for name, v in _draw_contrast(rng).items()},
        "noise_hu": rng.uniform(15, 40),
        "grain_mm": rng.uniform(0.45, 0.8),
        "psf_sigma_mm": rng.uniform(0.4, 0.7),
        "sharpening": rng.uniform(0.0, 0.35),
        "mixing": rng.uniform(0.02, 0.12),
    }


def paint(anatomy: Geometry, look: dict[str, Any], spacing_mm: float, rng: np.random.Generator) -> Array:
    """Tissues over one another by coverage, each a mean HU plus its own share of common texture fields."""
    shape = anatomy.label.shape
    fine = _field(shape, 1.3 / spacing_mm, rng)
    coarse = _field(shape, 5.0 / spacing_mm, rng)
    hu = np.full(shape, -1000.0, np.float32)
    for layer in anatomy.layers:
        background = 1 - np.minimum(sum(layer.values()), 1)
        hu *= background
        for name, coverage in layer.items():
            mean = np.float32(look["hu"][name])
            a, b = TISSUES[name][2:] if name in TISSUES else (4.0, float(mean) * look["mixing"] * MIXING.get(name, 0.4))
            hu += coverage * (mean + np.float32(a) * fine + np.float32(b) * coarse)
    return hu


def scan(hu: Array, look: dict[str, Any], spacing_mm: float) -> Array:
    """Point spread (in plane, half of it along z) and the reconstruction kernel's slight overshoot."""
    sigma = look["psf_sigma_mm"] / spacing_mm
    blurred = ndimage.gaussian_filter(hu, (sigma, sigma, 0.7 * sigma))
    return blurred + np.float32(look["sharpening"]) * (blurred - ndimage.gaussian_filter(blurred, (0.8, 0.8, 0.0)))


def draw_noise(shape: tuple[int, ...], look: dict[str, Any], spacing_mm: float, rng: np.random.Generator) -> Array:
    """CT-like noise: band-pass in plane (ramp times kernel), nearly white along z, strongest in the middle."""
    white = rng.standard_normal(shape, dtype=np.float32)
    s = look["grain_mm"] / spacing_mm
    grain = ndimage.gaussian_filter(white, (s, s, 0.85 * s)) - 0.55 * ndimage.gaussian_filter(white, (3 * s, 3 * s, s))
    x, y = (np.linspace(-1, 1, n, dtype=np.float32) for n in shape[:2])
    envelope = 0.88 + 0.24 * np.exp(-1.5 * (x[:, None] ** 2 + y[None] ** 2))
    return grain * (np.float32(look["noise_hu"]) / grain.std()) * envelope[..., None]


def add_artefacts(hu: Array, anatomy: Geometry, spacing_mm: float, rng: np.random.Generator) -> dict[str, Any]:
    """Paints calcified plaques, streaks at the superior vena cava and mixing in the right atrium, in place."""
    spacing, half = [spacing_mm] * 3, (np.array(hu.shape) - 1) / 2
    voxel = np.stack(np.nonzero(anatomy.label == LABELS["coronaries"]), axis=1)
    plaques = voxel[rng.integers(0, len(voxel), rng.integers(1, 7))]
    for centre in (plaques - half) * spacing_mm:
        radius = rng.uniform(*PLAQUE_RADIUS_MM)
        add_plaque(hu, centre, radius_mm=radius, plaque_hu=rng.uniform(*PLAQUE_HU), spacing_mm=spacing)
    source = anatomy.points_mm["svc"][len(anatomy.points_mm["svc"]) // 3]
    phases = [rng.uniform(0, 6.28) for _ in SPOKES]
    strength = rng.uniform(*STREAK_HU)
    add_streaks(hu, source, phases=phases, strength_hu=strength, spacing_mm=spacing)
    mixing = rng.uniform(50, 200)
    swirl = np.float32(mixing) * _field(hu.shape, 2.2 / spacing_mm, rng)
    hu += swirl * next(layer["right_atrium"] for layer in anatomy.layers if "right_atrium" in layer)
    return {"plaques": len(plaques), "streak_hu": strength, "mixing_hu": mixing}


def move_right_artery(hu: Array, anatomy: Geometry, spacing_mm: float, rng: np.random.Generator) -> float:
    """Averages the neighbourhood of the right coronary artery over a short in-plane motion, in place; returns mm."""
    motion_mm = float(rng.uniform(1.0, 4.0))
    heading = rng.uniform(0, 2 * np.pi)
    artery = np.zeros(hu.shape, np.float32)
    index = np.rint(anatomy.points_mm["RCA"] / spacing_mm + (np.array(hu.shape) - 1) / 2).astype(int)
    artery[tuple(np.clip(index, 0, np.array(hu.shape) - 1).T)] = 1.0
    blur_by_motion(hu, artery, motion_mm=motion_mm, heading=heading, spacing_mm=[spacing_mm] * 3)
    return motion_mm
