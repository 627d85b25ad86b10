"""Plots of the report: how the set is distributed beside real cases, and segmenters label by label."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["difference_picture", "distribution_picture"]

_COLOURS = ("#2f6fb3", "#d9822b", "#3a8f5c")  # synthetic, training, held out
_VIOLIN = 8  # ours: of fewer values a smoothed curve says more about the smoothing
_COLUMNS = 4

Groups = Mapping[str, Sequence[float]]


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _spread_out(count: int) -> np.ndarray:
    """Heights by which dots of one row are moved apart, always the same."""
    return 0.16 * np.sin(2.4 * np.arange(count))  # 2.4, the golden angle: neighbours never coincide


def _panel(axis: Axes, name: str, unit: str, groups: Groups) -> None:
    """One quantity: a row of dots for each group, its median, and its shape where there are enough."""
    for row, (values, colour) in enumerate(zip(groups.values(), _COLOURS, strict=False)):
        known = np.array([v for v in values if v is not None and np.isfinite(v)], dtype=float)
        if len(known) >= _VIOLIN and known.std() > 0:
            shape = axis.violinplot(known, [row], orientation="horizontal", widths=0.8, showextrema=False)
            bodies: list[Any] = shape["bodies"]  # type: ignore[assignment]
            bodies[0].set(facecolor=colour, alpha=0.25)
        axis.scatter(known, row + _spread_out(len(known)), s=14, color=colour, alpha=0.75, linewidths=0)
        if len(known):
            axis.plot([np.median(known)] * 2, [row - 0.34, row + 0.34], color=colour, linewidth=2)
    axis.set_title(name, fontsize=9, loc="left", parse_math=False)
    axis.set_xlabel(unit, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.set_yticks([])
    axis.set_ylim(len(groups) - 0.5, -0.5)
    axis.spines[["top", "right", "left"]].set_visible(False)


def distribution_picture(panels: Sequence[tuple[str, str, Groups]]) -> bytes:
    """PNG of small panels, one a quantity: every case a dot, by group, a line at the median, a violin of 8 and more.

    Args:
        panels: (name, unit, group -> a value for each case, NaN or None where it has none); at least one panel, all of
            the same groups, three at most.
    """
    names = list(panels[0][2])
    rows = -(-len(panels) // _COLUMNS)
    height = 1.6 * rows + 0.7
    figure = Figure(figsize=(11, height))
    margins = {"left": 0.02, "right": 0.98, "bottom": 0.5 / height, "top": 1 - 0.65 / height}
    margins |= {"wspace": 0.12, "hspace": 1.0}
    axes = figure.subplots(rows, _COLUMNS, squeeze=False, gridspec_kw=margins).ravel()
    for axis, panel in zip(axes, panels, strict=False):
        _panel(axis, *panel)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    dots = [
        axes[0].plot([], [], "o", color=colour, label=f"{name} ({len(panels[0][2][name])})")[0]
        for name, colour in zip(names, _COLOURS, strict=False)
    ]
    figure.legend(handles=dots, loc="upper left", ncols=len(dots), fontsize=9, frameon=False)
    return _png(figure)


def difference_picture(differences: pd.DataFrame, title: str) -> bytes:
    """PNG of paired differences of one measure: a dot a case with mean and SD by label, and a heat map.

    Args:
        differences: a row a case, a column a label; NaN where it is not defined. Above 0 is better.
        title: of the figure.
    """
    labels, cases = list(differences.columns), list(differences.index)
    size = float(np.nanmax(np.abs(differences.to_numpy()), initial=0.01))
    figure = Figure(figsize=(11, 0.34 * len(labels) + 1.7), layout="constrained")
    figure.suptitle(title, fontsize=10, x=0.01, ha="left", parse_math=False)
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1), sharey=True)
    left.axvline(0, color="#888888", linewidth=1)
    for row, label in enumerate(labels):
        values = differences[label].dropna().to_numpy()
        left.scatter(values, row + _spread_out(len(values)), s=16, color=_COLOURS[0], alpha=0.7, linewidths=0)
        if len(values):
            spread = values.std(ddof=1) if len(values) > 1 else 0.0
            left.errorbar(values.mean(), row, xerr=spread, fmt="D", color="black", markersize=5, capsize=3)
    left.set_yticks(range(len(labels)), labels, fontsize=9, parse_math=False)
    left.set_ylim(len(labels) - 0.5, -0.5)
    left.set_xlabel("each case (dots), mean and SD over cases; right of 0 is better", fontsize=8)
    left.spines[["top", "right"]].set_visible(False)
    shown = right.imshow(differences.to_numpy().T, cmap="RdBu", vmin=-size, vmax=size, aspect="auto")
    right.set_xticks(range(len(cases)), cases, rotation=30, ha="right", fontsize=8, parse_math=False)
    right.tick_params(left=False)
    if len(cases) <= 12:
        for row, label in enumerate(labels):
            for column, value in enumerate(differences[label]):
                if np.isfinite(value):
                    colour = "white" if abs(value) > 0.6 * size else "black"
                    right.text(column, row, f"{value:+.2f}", ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(shown, ax=right, label="difference, blue is better", shrink=0.9)
    return _png(figure)
