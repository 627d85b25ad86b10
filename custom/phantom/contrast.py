"""How a clinic phantom is scanned: phase and contrast of every pool, tissues, kernel, slices and noise."""

from __future__ import annotations

from typing import Any

import numpy as np
from custom.phantom.appearance import TISSUES
from custom.phantom.geometry import Array
from custom.phantom.layers import Layers, smooth_field
from custom.phantom.scene import Clinic
from scipy import ndimage

__all__ = ["CLINIC_TISSUES", "add_trends", "draw_look", "paint_layers", "reconstruct"]

# As `TISSUES`: HU range of the mean, SD of the fine and coarse texture. Ours, after radiology texts and by eye.
CLINIC_TISSUES: dict[str, tuple[float, float, float, float]] = TISSUES | {
    "skin": (-20, 60, 12, 8),
    "fat": (-115, -85, 9, 9),
    "visceral_fat": (-112, -85, 10, 16),
    "gland": (-20, 60, 16, 18),
    "muscle": (35, 75, 12, 15),
    "lung": (-900, -740, 26, 30),
    "mediastinum": (-112, -75, 12, 16),
    "cortex": (350, 900, 80, 70),
    "marrow": (90, 300, 75, 40),
    "marrow_fat": (-60, 60, 30, 20),
    "disc": (60, 120, 10, 10),
    "canal": (5, 45, 8, 8),
    "cord": (30, 60, 6, 5),
    "cartilage": (70, 150, 14, 14),
    "calcified_rim": (180, 450, 120, 90),
    "gut_wall": (35, 90, 8, 8),
    "stomach": (-10, 80, 22, 40),
    "bowel": (-60, 60, 45, 70),
    "kidney": (80, 200, 8, 20),
    "carbon": (-500, -150, 5, 5),
    "foam": (-990, -940, 3, 3),
    "mattress": (-960, -850, 3, 3),
    "pericardium": (20, 60, 8, 8),
    "effusion": (-5, 35, 5, 6),
    "node": (40, 90, 8, 8),
    "thrombus": (30, 80, 8, 10),
    "valve": (60, 160, 8, 8),
    "trabeculae": (70, 150, 8, 10),
}

PHASES = {"arterial": 0.42, "washed_out": 0.23, "early": 0.2, "late": 0.15}
"""Share of subjects by what the scan met: both sides filled; a right heart washed out by saline; agent that has hardly
reached the left side; agent that has gone round. Ours."""
_LEFT_HU = {"arterial": (300, 520), "washed_out": (300, 560), "early": (240, 430), "late": (210, 310)}
_RIGHT_HU = {"arterial": (260, 620), "washed_out": (80, 220), "early": (420, 800), "late": (150, 280)}
_LEFT_LIMITS, _RIGHT_LIMITS = (130.0, 740.0), (75.0, 840.0)  # within what the anatomy table calls plausible
_MIXING = {"right_atrium": 2.5, "svc": 2.0, "ivc": 2.0, "right_ventricle": 1.2, "pulmonary_artery": 0.6}


def _draw_pools(phase: str, rng: np.random.Generator) -> dict[str, float]:
    """Mean HU of all that holds blood, each moved by itself around the level of its side."""
    left, right = rng.uniform(*_LEFT_HU[phase]), rng.uniform(*_RIGHT_HU[phase])

    def near(level: float, low: float, high: float, limits: tuple[float, float]) -> float:
        return float(np.clip(level * rng.uniform(low, high), *limits))

    lung = right if phase != "washed_out" else right + rng.uniform(0, 0.7) * max(left - right, 0)
    hu = {
        "left_ventricle": near(left, 0.88, 1.05, _LEFT_LIMITS),
        "left_atrium": near(left, 0.94, 1.12, _LEFT_LIMITS),
        "appendage": near(left, 0.7, 1.08, _LEFT_LIMITS),
        "pulmonary_veins": near(left, 0.96, 1.18, _LEFT_LIMITS),
        "aorta": near(left, 0.72 if phase == "early" else 0.88, 1.06, _LEFT_LIMITS),
        "coronaries": near(left, 0.85, 1.02, _LEFT_LIMITS),
        "right_ventricle": near(right, 0.85, 1.1, _RIGHT_LIMITS),
        "right_atrium": near(right, 0.75, 1.25, _RIGHT_LIMITS),
        "pulmonary_artery": near(lung, 0.85, 1.1, _RIGHT_LIMITS),
    }
    dense = {"arterial": (1.0, 2.4), "washed_out": (0.8, 1.8), "early": (1.1, 2.2), "late": (0.9, 1.15)}[phase]
    back = (0.5, 1.0) if phase == "late" else (0.2, 0.45)  # what has come back through the body
    return hu | {
        "svc": near(right, *dense, (70.0, 1600.0)),
        "brachiocephalic_veins": near(right, *dense, (50.0, 1800.0)),
        "ivc": near(left, *back, (40.0, 260.0)),
        "azygos": near(left, *back, (40.0, 260.0)),
        "coronary_sinus": near(left, *back, (60.0, 260.0)),
        "hepatic_veins": near(left, *back, (45.0, 240.0)),
        "portal_veins": near(left, back[0], back[1], (45.0, 240.0)),
        "arteries": near(hu["aorta"], 0.85, 1.0, _LEFT_LIMITS),
        "vessels": 0.55 * hu["pulmonary_artery"] + 0.35 * hu["pulmonary_veins"],
    }


def draw_look(rng: np.random.Generator) -> dict[str, Any]:
    """Draws how a subject is scanned: phase, mean HU of every tissue ("hu"), noise, grain, point spread, kernel."""
    phase = str(rng.choice(list(PHASES), p=list(PHASES.values())))
    hu = {name: float(rng.uniform(low, high)) for name, (low, high, _, _) in CLINIC_TISSUES.items()}
    hu |= _draw_pools(phase, rng)
    enhanced = {"arterial": 0.35, "washed_out": 0.4, "early": 0.1, "late": 0.9}[phase] + rng.uniform(-0.1, 0.1)
    hu["liver"] = float(rng.uniform(25, 70) + 60 * enhanced)
    hu["spleen"] = float(rng.uniform(45, 60) + 130 * enhanced)
    hu["myocardium"] = float(rng.uniform(50, 100) + 60 * enhanced)
    for name in ("hepatic_veins", "portal_veins"):  # never far from the liver around them
        hu[name] = float(np.clip(hu[name], hu["liver"] - 25, hu["liver"] + 90))
    sharp = rng.random()
    return {
        "phase": phase,
        "hu": hu,
        "noise_hu": float(np.exp(rng.uniform(np.log(15), np.log(60)))),
        "grain_mm": float(0.95 - 0.5 * sharp + rng.uniform(-0.05, 0.05)),
        "psf_sigma_mm": float(0.75 - 0.35 * sharp + rng.uniform(-0.05, 0.05)),
        "slice_sigma_mm": float(rng.uniform(0.25, 0.8)),
        "sharpening": float(0.9 * sharp**2),
        "kernel": "sharp" if sharp > 0.6 else "soft" if sharp < 0.3 else "medium",
        "mixing": float(rng.uniform(0.02, 0.11)),
        "swirl_hu": float(rng.uniform(0.03, 0.3) * hu["right_atrium"]),
        "dependent_hu": float(rng.uniform(0.3, 1.4)),  # lungs, HU a mm towards the back
        "vessel_hu": hu["vessels"],
    }


def paint_layers(layers: Layers, shape: tuple[int, ...], look: dict[str, Any], rng: np.random.Generator) -> Array:
    """HU of all layers over one another: a mean for every tissue, plus its own share of common texture fields."""
    spacing_mm = layers.spacing_mm
    fine, coarse = smooth_field(shape, 1.2 / spacing_mm, rng), smooth_field(shape, 5.0 / spacing_mm, rng)
    hu = np.full(shape, -1000.0, np.float32)
    for layer in layers.stack:
        if len(layer) == 1:
            hu[layer[0].box] *= 1 - layer[0].share
        else:
            free = np.ones(shape, np.float32)
            for part in layer:
                free[part.box] -= part.share
            hu *= np.maximum(free, 0)
        for part in layer:
            mean = np.float32(look["hu"][part.name])
            if part.name in CLINIC_TISSUES:
                a, b = CLINIC_TISSUES[part.name][2:]
            else:
                a, b = 4.0, float(mean) * look["mixing"] * _MIXING.get(part.name, 0.4)
            hu[part.box] += part.share * (mean + np.float32(a) * fine[part.box] + np.float32(b) * coarse[part.box])
    return hu


def add_trends(hu: Array, body: Clinic, look: dict[str, Any], rng: np.random.Generator) -> None:
    """Swirls of contrast agent in the right atrium, and lungs that are denser towards the back; in place."""
    shape, spacing_mm = hu.shape, body.layers.spacing_mm
    swirl = np.float32(look["swirl_hu"]) * smooth_field(
        shape, (1.6 / spacing_mm, 2.6 / spacing_mm, 5.0 / spacing_mm), rng
    )
    hu += swirl * body.layers.share_of("right_atrium", shape)
    height = (np.arange(shape[1], dtype=np.float32) - body.frame.origin[1]) * spacing_mm
    air = np.clip((-hu - 500) / 250, 0, 1) * (hu > -960)
    hu -= air * np.float32(look["dependent_hu"]) * np.clip(height, -90, 60)[:, None]


def reconstruct(hu: Array, look: dict[str, Any], spacing_mm: float) -> Array:
    """Point spread in plane and of the slices, and the overshoot of a sharp kernel."""
    sigma = look["psf_sigma_mm"] / spacing_mm
    blurred = ndimage.gaussian_filter(hu, (sigma, sigma, look["slice_sigma_mm"] / spacing_mm))
    return blurred + np.float32(look["sharpening"]) * (blurred - ndimage.gaussian_filter(blurred, (0.8, 0.8, 0.0)))
