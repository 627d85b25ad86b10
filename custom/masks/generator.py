"""The mask generation module (MGM), new label maps that keep the topology of a reference. Ours.

A reference is deformed by a diffeomorphism: its walls as signed distances, its vessels as centre lines that are drawn
again. What comes out is compared with the reference by `custom.masks.gate`; what breaks a limit is drawn anew, milder.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from custom.geometry.centrelines import grow
from custom.geometry.deformation import (
    exponentiate,
    identity_coordinates,
    jacobian_determinant,
    random_velocity,
    sample,
)
from custom.geometry.registration import velocity_of_weights
from custom.geometry.topology import BoolArray, betti_numbers, fill_cavities, largest_components
from custom.geometry.vessels import VesselTree, carry, draw, prune, tree_length_mm, tree_volume_mm3
from custom.masks.gate import MaskGate, mean_dice, measure_mask, rejections
from custom.masks.motion import Edits, Motion, carry_points, confine, mixture_coefficients
from custom.masks.preparation import LabelMap, without_handles
from custom.masks.reference import Neighbour, Reference, fill_nearest
from numpy.typing import NDArray
from scipy import ndimage

logger = logging.getLogger(__name__)

__all__ = ["Generated", "MaskGenerator", "NotAcceptedError"]

_REPAIR_PASSES = 3  # ours: what one repair spoils next to it is mended by the second; a third changes nothing


class NotAcceptedError(RuntimeError):
    """No draw of a mask was accepted; the message says which limit each draw broke and what to relax."""


@dataclass
class Generated:
    """An accepted label map.

    Attributes:
        label_map: (H, W, D) uint8.
        displacement: (1, 3, H, W, D) voxels; `warp(image, displacement)` deforms the source's image alike.
        record: what was drawn and measured, ready for JSON.
    """

    label_map: LabelMap
    displacement: torch.Tensor
    record: dict[str, Any]


@dataclass
class _Candidate:
    label_map: LabelMap
    repaired: dict[int, float] = field(default_factory=dict)
    vessels: dict[int, dict[str, float]] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)


class MaskGenerator:
    """Draws new label maps from one reference, and its neighbours where there are any.

    Args:
        reference: the source.
        neighbours: other references; none, one or more (see `custom.masks.motion.mixture_coefficients`).
        motion, edits, gate: how far to move, how to change vessels, what to accept; None takes the defaults.

    Raises:
        ValueError: when a random field of the motion is finer than the voxels.
    """

    def __init__(
        self,
        reference: Reference,
        neighbours: Sequence[Neighbour] = (),
        *,
        motion: Motion | None = None,
        edits: Edits | None = None,
        gate: MaskGate | None = None,
    ) -> None:
        self.reference, self.neighbours = reference, list(neighbours)
        self.motion, self.edits, self.gate = motion or Motion(), edits or Edits(), gate or MaskGate()
        self.motion.check_grid(reference.spacing_mm)

    def __call__(self, seed: Sequence[int]) -> Generated:
        """Draws until a label map is accepted.

        Args:
            seed: whole numbers that alone determine the result, for example (seed of the run, index of the mask).

        Raises:
            NotAcceptedError: when no draw was accepted.
        """
        attempts: list[dict[str, Any]] = []
        for attempt in range(self.motion.retries + 1):
            velocity, drawn = self.draw_velocity(seed, attempt)
            displacement = exponentiate(velocity)
            candidate = self._deform(velocity, displacement, np.random.default_rng((*seed, attempt, 1)))
            broken, measured = self._judge(candidate, displacement)
            attempts.append({"scale": drawn["scale"], "rejected": broken})
            if not broken:
                record = {"seed": list(seed), **drawn, **measured, "retries": attempt, "attempts": attempts}
                return Generated(candidate.label_map, displacement, record)
            logger.info("mask %s, scale %.2f rejected: %s", tuple(seed), drawn["scale"], "; ".join(broken))
        reasons = "; ".join(f"scale {a['scale']:.2f}: {', '.join(a['rejected'])}" for a in attempts)
        raise NotAcceptedError(
            f"no mask accepted for seed {tuple(seed)} after {len(attempts)} draws ({reasons}); lower the amplitudes of "
            "`motion`, allow more retries, or relax the limit that is named most often in `gate`"
            + "".join(self._torn(candidate.repaired))
        )

    def _torn(self, repaired: Mapping[int, float]) -> Iterator[str]:
        """What to do about labels that come apart as solid ones, since they may be vessels."""
        for k, share in repaired.items():
            structure, limit = self.reference.structures[k], self.gate.max_repaired
            if limit is not None and share > limit and not structure.thin:
                yield (
                    f"; if label {k} ({structure.name}) is a tree of vessels, say so: --anatomy#{k}#thin True, and "
                    f"--anatomy#{k}#components N of its pieces"
                )

    def draw_velocity(self, seed: Sequence[int], attempt: int = 0) -> tuple[torch.Tensor, dict[str, Any]]:
        """Draws the velocity of one attempt.

        Returns:
            (1, 3, H, W, D) in voxels, and what it was drawn from: "scale" of all motion, "coefficients" of the
            registrations and "z" (see `mixture_coefficients`).
        """
        motion, reference = self.motion, self.reference
        shape, spacing = reference.label_map.shape, reference.spacing_mm
        state = np.random.SeedSequence((*seed, attempt)).generate_state(1)
        generator = torch.Generator().manual_seed(int(state[0]))
        scale = motion.shrink**attempt
        velocity = torch.zeros(1, 3, *shape)
        for amplitude, sigma in ((motion.coarse_mm, motion.coarse_sigma_mm), (motion.fine_mm, motion.fine_sigma_mm)):
            velocity += random_velocity(
                shape, spacing_mm=spacing, sigma_mm=sigma, amplitude_mm=amplitude, generator=generator
            )
        drawn: dict[str, Any] = {"scale": scale, "coefficients": [], "z": []}
        if self.neighbours and motion.mixture_scale > 0:
            weights = torch.stack([neighbour.weights for neighbour in self.neighbours])
            coefficients, z = mixture_coefficients(weights, generator)
            mixture = motion.mixture_scale * torch.einsum("n,n...->...", coefficients, weights)[None]
            velocity += velocity_of_weights(mixture, shape, spacing)
            drawn |= {"coefficients": coefficients.tolist(), "z": z.tolist()}
        return confine(scale * velocity, spacing_mm=spacing, margin_mm=motion.margin_mm), drawn

    def warp_walls(self, displacement: torch.Tensor) -> LabelMap:
        """Walls alone, by their signed distances: the nearest one wins."""
        where = identity_coordinates(displacement.shape[2:]) + displacement
        winner = sample(self.reference.distances, where)[0].argmin(0).numpy()
        return np.array([0, *self.reference.walls], np.uint8)[winner]

    def _deform(self, velocity: torch.Tensor, displacement: torch.Tensor, rng: np.random.Generator) -> _Candidate:
        candidate = _Candidate(self.warp_walls(displacement))
        for k in self.reference.vessels:
            vessel = self._redraw(k, velocity, rng, candidate)
            candidate.label_map[vessel] = k
        self._repair(candidate)
        return candidate

    def _redraw(self, k: int, velocity: torch.Tensor, rng: np.random.Generator, candidate: _Candidate) -> BoolArray:
        """One vessel label drawn along its carried centre lines, grown from the roots so that it stays a forest."""
        reference, edits = self.reference, self.edits
        spacing = np.array(reference.spacing_mm)
        tree = carry(
            reference.trees[k],
            lambda mm: carry_points(torch.from_numpy(mm / spacing).float(), velocity).double().numpy() * spacing,
        )
        tree, pruned = prune(
            tree, probability=edits.prune_probability, max_length_mm=edits.prune_max_length_mm, rng=rng
        )
        factor = rng.uniform(*edits.radius_range)
        tree = VesselTree(tree.points_mm, tree.radii_mm * factor, tree.edges, tree.roots)
        expected = tree_volume_mm3(tree) * reference.cone_shares[k]
        drawn = draw(tree, reference.label_map.shape, reference.spacing_mm, volume_mm3=expected)
        seeds = np.zeros_like(drawn)
        last = np.array(drawn.shape) - 1
        seeds[tuple(np.clip(np.rint(tree.points_mm[tree.roots] / spacing).astype(int), 0, last).T)] = True
        vessel = grow(seeds, drawn)
        candidate.repaired[k] = 1 - float(vessel.sum()) / max(float(drawn.sum()), 1.0)
        candidate.vessels[k] = {
            "length_mm": tree_length_mm(tree),
            "expected_mm3": expected,
            "radius_factor": float(factor),
            "pruned_branches": pruned,
        }
        candidate.broken += _severed(k, vessel, tree, spacing)
        return vessel

    def _repair(self, candidate: _Candidate) -> None:
        """Brings walls back to their source's Betti numbers where voxels spoil them: specks, pinholes, thin bridges."""
        label_map, wanted = candidate.label_map, self.reference.anatomy.betti
        before = {k: label_map == k for k in self.reference.walls}
        for _ in range(_REPAIR_PASSES):
            wrong = [k for k in self.reference.walls if betti_numbers(label_map == k) != wanted[k]]
            for k in wrong:
                mask = label_map == k
                kept = largest_components(mask, wanted[k][0])
                label_map[:] = fill_nearest(label_map, mask & ~kept)
                if wanted[k][2] == 0:
                    kept = fill_cavities(kept) & ((label_map == k) | (label_map == 0))
                label_map[label_map == k] = 0
                label_map[without_handles(kept, label_map == 0, self.reference.spacing_mm, wanted[k][1])] = k
            if not wrong:
                break
        for k, mask in before.items():
            changed = float((mask ^ (label_map == k)).sum() / max(mask.sum(), 1))
            if changed:
                candidate.repaired[k] = changed

    def _judge(self, candidate: _Candidate, displacement: torch.Tensor) -> tuple[list[str], dict[str, Any]]:
        """Broken limits and the measures for the record."""
        reference, new = self.reference, candidate.label_map
        anatomy = measure_mask(new, reference.structures, reference.spacing_mm)
        others = [reference.label_map, *(neighbour.label_map for neighbour in self.neighbours)]
        for k, vessel in candidate.vessels.items():
            vessel["volume_ratio"] = anatomy.volume_mm3.get(k, 0.0) / vessel["expected_mm3"]
        dices = [mean_dice(new, other, reference.walls) for other in others]
        det = float(jacobian_determinant(displacement).min())
        measured = {
            "det_jacobian": det,
            "dice": max(dices),
            "repaired": candidate.repaired,
            "vessel_volume_ratio": {k: v["volume_ratio"] for k, v in candidate.vessels.items()},
        }
        broken = rejections(anatomy, reference.anatomy, reference.structures, self.gate, measured)
        record = {
            "min_det_jacobian": det,
            "dice_to_references": dices,
            "betti": {str(k): list(v) for k, v in anatomy.betti.items()},
            "volume_ml": {str(k): v / 1000 for k, v in anatomy.volume_mm3.items()},
            "wall_thickness_mm": {str(k): v for k, v in anatomy.thickness_mm.items()},
            "vessels": {str(k): v for k, v in candidate.vessels.items()},
            "repaired": {str(k): v for k, v in candidate.repaired.items()},
        }
        return candidate.broken + broken, record


def _severed(k: int, vessel: BoolArray, tree: VesselTree, spacing: NDArray[np.float64]) -> list[str]:
    """Trees whose points do not all lie in the piece of their root, at most one point in fifty apart."""
    pieces = ndimage.label(vessel, np.ones((3, 3, 3)))[0]
    last = np.array(vessel.shape) - 1
    piece = pieces[tuple(np.clip(np.rint(tree.points_mm / spacing).astype(int), 0, last).T)]
    number = tree.trees()
    roots = tree.roots[np.argsort(number[tree.roots])]
    lost = [float((piece[number == t] != piece[root]).mean()) for t, root in enumerate(roots)]
    return [
        f"severed: {share:.2f} of tree {t} of label {k} are cut off where it meets itself or another tree"
        for t, share in enumerate(lost)
        if share > 0.02
    ]
