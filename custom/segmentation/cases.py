"""Synthetic and real cases of pre-training, and how much each weighs. Ours."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from custom.volumes.cases import check_files, load_cases, read_number

logger = logging.getLogger(__name__)


def pretraining_cases(
    datalists: Sequence[str] | str,
    section: str,
    *,
    real_datalists: Sequence[str] | str = (),
    real_share: float = 0.25,
    check: bool = True,
) -> list[dict[str, Any]]:
    """Synthetic cases with their confidence and sample weight, and real ones among them.

    Args:
        datalists: of synthetic cases, as `synthesize.json` writes them. `confidence` (a file) and `score_hu` are
            optional: a case without confidence is trusted everywhere, one without score weighs 1; said once.
        section: of both kinds of datalists.
        real_datalists: of real cases, trusted everywhere; empty for none.
        real_share: share of the samples that are drawn from the real cases, when there are any.
        check: as in :func:`load_cases`.

    Returns:
        `image`, `label`, `case`, `weight` (of drawing), `sample_weight` (in the loss; mean 1), and `confidence` where
        there is one.

    Raises:
        FileNotFoundError: naming all missing files.
        ValueError: as :func:`load_cases`; when `real_share` is not between 0 and 1.
    """
    if not 0 < real_share < 1:
        raise ValueError(f"real_share: must be between 0 and 1, got {real_share}; give no real_datalists for none")
    cases = load_cases(datalists, section, extras=["score_hu"], extra_files=["confidence"], check=False)
    for key in ("confidence", "score_hu"):
        without = sum(key not in case for case in cases)
        if without:
            logger.warning("%d of %d synthetic cases have no %s: they count as 1", without, len(cases), key)
    scores = [read_number(case, "score_hu", str(datalists)) if "score_hu" in case else float("nan") for case in cases]
    for case, weight in zip(cases, sample_weights(scores), strict=True):
        case["sample_weight"] = weight
        case.pop("score_hu", None)
    if real_datalists:
        real = load_cases(real_datalists, section, check=False)
        synthetic_total, real_total = (sum(case["weight"] for case in part) for part in (cases, real))
        factor = real_share / (1 - real_share) * synthetic_total / real_total
        cases += [{**case, "weight": factor * case["weight"], "sample_weight": 1.0} for case in real]
    if check:
        check_files(cases, " and ".join(str(lists) for lists in (datalists, real_datalists) if lists))
    return cases


def sample_weights(scores: Sequence[float]) -> list[float]:
    """Weights of mean 1 from scores in HU, less for the higher: r proportional to 1 / (1 + score / median). Ours.

    The worst sample of a set keeps a share: half of what a perfect one gets at the median score, a fifth at four times
    the median.

    Args:
        scores: at least 0; NaN (no score) weighs 1.

    Returns:
        one weight each; all 1 when the scores are alike, all are 0 or none is known.

    Raises:
        ValueError: for a negative score.
    """
    known = torch.tensor([s for s in scores if s == s], dtype=torch.float64)
    if bool((known < 0).any()):
        raise ValueError(f"scores: must not be negative, got {float(known.min())}")
    median = float(known.median()) if len(known) else 0.0
    if median == 0:
        return [1.0] * len(scores)
    weights = 1 / (1 + known / median)
    rest = iter((weights / weights.mean()).tolist())
    return [next(rest) if s == s else 1.0 for s in scores]
