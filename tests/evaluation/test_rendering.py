"""Rendering measures: the truth against itself, cases computed by hand, and what is undefined."""

import math

import numpy as np
import pytest
import torch
from custom.evaluation import mask_pairs as of_pairs
from custom.evaluation import rendering as of_rendering
from custom.evaluation.rendering import (
    MEASURES,
    Rendering,
    RenderingMetric,
    around_vessels,
    grain_ratio,
    label_mean_error,
    label_wasserstein,
    mean_absolute_error,
    texture_correlation,
    vessel_contrast_ratio,
    vessel_regions,
)
from scipy import ndimage

vessel_cl_dice = MEASURES["vessel_cl_dice"]

SHAPE = (24, 22, 26)
CHAMBER, VESSEL, MISSING = 2, 9, 7


def make_case(noise_hu=0.0, seed=0):
    """A chamber of 400 HU and a straight vessel of 300 HU, one voxel thick and 16 long, in tissue of -50 HU."""
    label = np.zeros(SHAPE, np.int64)
    label[2:12, 2:12, 4:20] = CHAMBER
    label[18, 16, 5:21] = VESSEL
    truth = np.select([label == CHAMBER, label == VESSEL], [400.0, 300.0], -50.0).astype(np.float32)
    return truth + np.random.default_rng(seed).normal(0, noise_hu, SHAPE).astype(np.float32), label


IDENTITY = {
    "label_mean_error": ([CHAMBER, VESSEL], 0.0),
    "label_mean_score": ([CHAMBER, VESSEL], 0.0),
    "label_wasserstein": ([CHAMBER, VESSEL], 0.0),
    "grain_ratio": ([CHAMBER], 1.0),
    "vessel_contrast_ratio": ([VESSEL], 1.0),
    "vessel_cl_dice": ([VESSEL], 1.0),
    "vessel_betti_error_0": ([VESSEL], 0.0),
    "vessel_betti_error_1": ([VESSEL], 0.0),
    "vessel_betti_error_2": ([VESSEL], 0.0),
    "vessel_centreline_recovered": ([VESSEL], 1.0),
    "vessel_attached": ([VESSEL], 0.0),  # the vessel does not reach the chamber
    "mean_absolute_error": ([0, CHAMBER], 0.0),
}


def test_every_measure_has_an_identity():
    assert IDENTITY.keys() == MEASURES.keys()


@pytest.mark.parametrize("name", IDENTITY)
def test_the_truth_against_itself(name):
    truth, label = make_case(noise_hu=5.0)
    labels, expected = IDENTITY[name]
    assert MEASURES[name](Rendering(truth.copy(), truth, label, labels, touches=[CHAMBER])) == expected


@pytest.mark.parametrize("name", IDENTITY)
def test_absent_labels_are_undefined(name):
    truth, label = make_case(noise_hu=5.0)
    assert math.isnan(MEASURES[name](Rendering(truth, truth, label, [MISSING])))


@pytest.mark.parametrize("name", IDENTITY)
def test_an_unknown_truth_is_undefined(name):
    """Pure inference has no image: the truth is NaN everywhere."""
    truth, label = make_case(noise_hu=5.0)
    assert math.isnan(MEASURES[name](Rendering(truth, np.full_like(truth, np.nan), label, IDENTITY[name][0])))


def test_label_mean_error_averages_absolute_errors_over_labels():
    truth, label = make_case()
    rendered = truth + 10.0 * (label == CHAMBER) - 30.0 * (label == VESSEL) + 500.0 * (label == 0)
    assert label_mean_error(Rendering(rendered, truth, label, [CHAMBER, VESSEL])) == pytest.approx(20.0, abs=1e-3)
    assert label_mean_error(Rendering(rendered, truth, label, [CHAMBER, VESSEL, MISSING])) == pytest.approx(
        20.0, abs=1e-3
    )
    assert label_mean_error(Rendering(rendered, truth, label, [CHAMBER])) == pytest.approx(10.0, abs=1e-3)


def test_label_mean_error_does_not_see_noise():
    truth, label = make_case()
    checker = 100.0 * (1 - 2 * (np.indices(SHAPE).sum(0) % 2))
    assert label_mean_error(Rendering(truth + checker, truth, label, [CHAMBER, VESSEL])) == pytest.approx(0.0, abs=1e-3)


def test_wasserstein_of_a_shift_is_the_shift_and_of_a_spread_is_not_zero():
    truth, label = make_case(noise_hu=10.0)
    rendered = truth + 25.0 * (label == CHAMBER) - 5.0 * (label == VESSEL)
    assert label_wasserstein(Rendering(rendered, truth, label, [CHAMBER])) == pytest.approx(25.0, rel=1e-4)
    assert label_wasserstein(Rendering(rendered, truth, label, [CHAMBER, VESSEL, MISSING])) == pytest.approx(
        15.0, rel=1e-4
    )
    structure = make_case()[0]
    # Normal values of SD 10 and 20: |z| * 10 on average, 8.0
    wider = label_wasserstein(Rendering(structure + 2 * (truth - structure), truth, label, [CHAMBER]))
    assert wider == pytest.approx(10 * math.sqrt(2 / math.pi), rel=0.05)


def test_wasserstein_does_not_see_where_values_stand():
    truth, label = make_case(noise_hu=10.0)
    rendered = truth.copy()
    rendered[label == CHAMBER] = np.random.default_rng(1).permutation(truth[label == CHAMBER])
    assert label_wasserstein(Rendering(rendered, truth, label, [CHAMBER])) == 0.0


def test_grain_ratio_is_the_factor_of_the_noise():
    truth, label = make_case(noise_hu=10.0)
    structure = make_case()[0]
    assert grain_ratio(Rendering(structure + 2 * (truth - structure), truth, label, [CHAMBER])) == pytest.approx(
        2.0, rel=1e-3
    )
    assert grain_ratio(Rendering(structure, truth, label, [CHAMBER])) == 0.0


def test_grain_ratio_without_true_grain_is_undefined():
    truth, label = make_case()
    rendered, _ = make_case(noise_hu=10.0)
    assert math.isnan(grain_ratio(Rendering(rendered, truth, label, [CHAMBER])))


def test_contrast_ratio_by_hand():
    """True contrast 350 HU; rendered 175 HU whatever the offset."""
    truth, label = make_case()
    assert vessel_contrast_ratio(Rendering(0.5 * truth + 77, truth, label, [VESSEL])) == pytest.approx(0.5)
    lost = np.where(label == VESSEL, np.float32(-50.0), truth)
    assert vessel_contrast_ratio(Rendering(lost, truth, label, [VESSEL])) == pytest.approx(0.0)


def test_contrast_ignores_partial_volume_lung_and_other_labels():
    truth, label = make_case()
    vessel = label == VESSEL
    rendered = truth.copy()
    rendered[ndimage.binary_dilation(vessel, np.ones((3, 3, 3))) & ~vessel] = 900.0
    rendered[label == CHAMBER] = -999.0
    truth[:, 18:], rendered[:, 18:] = -800.0, 700.0
    assert vessel_contrast_ratio(Rendering(rendered, truth, label, [VESSEL])) == pytest.approx(1.0)


def test_contrast_ratio_without_true_contrast_is_undefined():
    truth, label = make_case()
    assert math.isnan(vessel_contrast_ratio(Rendering(truth, np.zeros_like(truth), label, [VESSEL])))


def test_cl_dice_of_half_a_vessel():
    """Half of a straight line is lost: precision 1, sensitivity 1/2, clDice 2/3."""
    truth, label = make_case()
    rendered = truth.copy()
    rendered[18, 16, 13:21] = -50.0
    assert vessel_cl_dice(Rendering(rendered, truth, label, [VESSEL])) == pytest.approx(2 / 3)


def test_cl_dice_of_a_lost_vessel_is_zero_and_of_one_just_above_the_threshold_is_one():
    truth, label = make_case()
    for value, expected in ((124.0, 0.0), (126.0, 1.0)):  # half-way between -50 and 300 lies 125
        rendered = np.where(label == VESSEL, np.float32(value), truth)
        assert vessel_cl_dice(Rendering(rendered, truth, label, [VESSEL])) == expected


def test_cl_dice_does_not_search_far_from_the_vessel():
    truth, label = make_case()
    rendered = truth.copy()
    rendered[18, 4, 5:21] = 300.0  # a false vessel 12 voxels away
    assert vessel_cl_dice(Rendering(rendered, truth, label, [VESSEL])) == 1.0


def test_cl_dice_punishes_a_false_branch():
    truth, label = make_case()
    rendered = truth.copy()
    rendered[18, 18, 5:21] = 300.0
    assert 0.5 < vessel_cl_dice(Rendering(rendered, truth, label, [VESSEL])) < 0.8


def test_half_a_vessel_is_recovered_in_pieces_and_what_is_cut_off_hangs_free():
    """16 voxels, of which 8 to 11 are lost; the vessel starts beside a label of id 6."""
    truth, label = make_case()
    label[18, 16, 3:5] = 6
    rendered = truth.copy()
    rendered[18, 16, 13:17] = -50.0
    measured = {name: MEASURES[f"vessel_{name}"] for name in ("centreline_recovered", "betti_error_0", "attached")}
    case = Rendering(rendered, truth, label, [VESSEL], touches=[6])
    # 15 links; each end voxel has half a link, so 8 voxels from the start have 7.5, 4 lost ones 4
    assert measured["centreline_recovered"](case) == pytest.approx(11 / 15)
    assert measured["betti_error_0"](case) == 1
    assert measured["attached"](case) == pytest.approx(7 / 10)
    metric = RenderingMetric(["vessel_attached"], thin_labels=[VESSEL], touches=[6])
    metric(torch.from_numpy(rendered[None, None]), batch_of((truth, label)))
    assert metric.aggregate() == {"vessel_attached": pytest.approx(7 / 10)}
    metric(torch.full(rendered.shape, -50.0)[None, None], batch_of((truth, label)))
    assert metric.aggregate() == {"vessel_attached": pytest.approx(7 / 20)}, "vessels that are not seen count as well"


def test_mean_absolute_error_by_hand():
    truth, label = make_case()
    rendered = truth + 10.0 * (label == CHAMBER) - 30.0 * (label == VESSEL)
    chamber, vessel = (label == CHAMBER).sum(), (label == VESSEL).sum()
    expected = (10.0 * chamber + 30.0 * vessel) / (chamber + vessel)
    assert mean_absolute_error(Rendering(rendered, truth, label, [CHAMBER, VESSEL])) == pytest.approx(
        expected, rel=1e-5
    )
    assert mean_absolute_error(Rendering(rendered, truth, label, [0])) == 0.0


def test_texture_correlation_tells_a_copy_from_new_noise():
    first, label = make_case(noise_hu=30.0)
    second, _ = make_case(noise_hu=30.0, seed=1)
    inside = label == CHAMBER
    assert texture_correlation(first, 3 * first + 100, inside) == pytest.approx(1.0, abs=1e-5)
    assert texture_correlation(first, -first, inside) == pytest.approx(-1.0, abs=1e-5)
    deep = ndimage.binary_erosion(inside, iterations=2)
    assert abs(texture_correlation(first, second, deep)) < 0.2


def batch_of(*cases):
    truth = [torch.from_numpy(np.stack([truth, label]).astype(np.float32)) for truth, label in cases]
    return torch.stack(truth)


@pytest.mark.parametrize(("measure", "sign"), [("label_mean_error", 1.0), ("label_mean_score", -1.0)])
def test_metric_averages_cases_over_batches_with_its_sign(measure, sign):
    truth, label = make_case()
    metric = RenderingMetric([measure], labels=[CHAMBER])
    rendered = torch.from_numpy(np.stack([truth + 10, truth - 30])[:, None])
    assert metric(rendered, batch_of((truth, label), (truth, label))).tolist() == [[[sign * 10.0]], [[sign * 30.0]]]
    metric(torch.from_numpy(truth[None, None] + 80), batch_of((truth, label)))
    assert metric.aggregate()[measure] == pytest.approx(sign * 40.0)
    metric.reset()
    metric(rendered[:1], batch_of((truth, label)))
    assert metric.aggregate()[measure] == pytest.approx(sign * 10.0)


def test_metric_leaves_undefined_cases_out():
    truth, label = make_case()
    metric = RenderingMetric(["mean_absolute_error"], labels=[VESSEL])
    without = np.where(label == VESSEL, 0, label)
    rendered = torch.from_numpy(np.stack([truth + 10, truth + 90])[:, None])
    metric(rendered, batch_of((truth, label), (truth, without)))
    assert metric.aggregate()["mean_absolute_error"] == pytest.approx(10.0)


def test_metric_takes_lists_of_decollated_cases():
    """What MONAI's handlers pass after `decollate_batch`."""
    truth, label = make_case()
    metric = RenderingMetric(["mean_absolute_error"], labels=[CHAMBER])
    metric([torch.from_numpy(truth[None] + 5)], [batch_of((truth, label))[0]])
    assert metric.aggregate()["mean_absolute_error"] == pytest.approx(5.0)


def test_columns_are_the_measures_of_their_labels():
    """Each measure looks at the labels it is named after: all, thin or homogeneous ones."""
    truth, label = make_case(noise_hu=5.0)
    label[18, 16, 3:5] = 6
    rendered = (truth + np.random.default_rng(1).normal(0, 9, SHAPE) - 40 * (label == VESSEL)).astype(np.float32)
    metric = RenderingMetric(
        list(MEASURES), labels=[CHAMBER, VESSEL], thin_labels=[VESSEL], homogeneous_labels=[CHAMBER], touches=[6]
    )
    metric(torch.from_numpy(rendered[None, None]), batch_of((truth, label)))
    for name, found in metric.details().items():
        labels = {"vessel": [VESSEL], "grain": [CHAMBER]}.get(name.split("_")[0], [CHAMBER, VESSEL])
        assert found.tolist() == [[np.float32(MEASURES[name](Rendering(rendered, truth, label, labels, [6])))]], name


def test_vessels_are_looked_for_and_thinned_once_for_all_columns(monkeypatch):
    calls = []
    for module, name in ((of_rendering, "vessel_regions"), (of_pairs, "skeleton"), (of_pairs, "betti_errors")):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, f=function, n=name: (calls.append(n), f(*args))[1])
    truth, label = make_case()
    label[18, 16, 3:5] = 6
    measures = [name for name in MEASURES if name.startswith("vessel_")]
    metric = RenderingMetric(measures, thin_labels=[VESSEL], touches=[6])
    metric(torch.from_numpy(truth[None, None]), batch_of((truth, label)))
    assert sorted(calls) == ["betti_errors", "skeleton", "skeleton", "vessel_regions"]


def test_lung_is_no_tissue_around_vessels():
    """The limit is -400 HU, the same as that of the diffusion's regions."""
    truth, label = make_case()
    for hu, tissue in ((-399.0, True), (-401.0, False)):
        assert vessel_regions(np.full_like(truth, hu), label, [VESSEL])[1].any() == tissue


def cubes(mask, voxels):
    return ndimage.binary_dilation(mask, np.ones((3, 3, 3)), iterations=voxels)


def test_regions_of_voxels_of_the_model_are_counted_in_voxels():
    """More than one and up to three from the vessels, more than one from other labels; searched are two."""
    truth, label = make_case()
    label[16, 13:16, 6:9] = CHAMBER
    vessel, around, searched = vessel_regions(truth, label, [VESSEL])
    free = (label == 0) & ~cubes(label == CHAMBER, 1)
    np.testing.assert_array_equal(vessel, label == VESSEL)
    np.testing.assert_array_equal(around, cubes(vessel, 3) & ~cubes(vessel, 1) & free)
    np.testing.assert_array_equal(searched, vessel | (cubes(vessel, 2) & free))


@pytest.mark.parametrize("spacing_mm", [(0.35, 0.35, 0.5), (0.5, 1.0, 3.0), (4.0, 4.0, 4.0)])
def test_regions_reach_as_far_on_every_grid(spacing_mm):
    label = np.zeros((61, 63, 59), np.int64)
    label[30, 31, 29] = VESSEL
    around = vessel_regions(np.zeros(label.shape), label, [VESSEL], spacing_mm)[1]
    for axis, (centre, spacing) in enumerate(zip((30, 31, 29), spacing_mm, strict=True)):
        line = around[tuple(slice(None) if a == axis else n for a, n in enumerate((30, 31, 29)))]
        away_mm = np.abs(np.flatnonzero(line) - centre) * spacing
        assert 2 - spacing / 2 < away_mm.min() <= max(2 + 1.5 * spacing, 2 * spacing)
        assert away_mm.max() == pytest.approx(4.5, abs=max(1.01 * spacing, 0.01))


def test_the_box_of_vessels_holds_all_that_counts_for_them():
    truth, label = make_case()
    for spacing_mm in ((1.5, 1.5, 1.5), (0.7, 1.0, 2.0)):
        box = around_vessels(label, [VESSEL], spacing_mm)
        whole, part = (
            vessel_regions(v, ids, [VESSEL], spacing_mm) for v, ids in ((truth, label), (truth[box], label[box]))
        )
        for mask, cut in zip(whole, part, strict=True):
            np.testing.assert_array_equal(mask[box], cut)
            assert mask.sum() == cut.sum()
    assert around_vessels(label, [MISSING], (1.5, 1.5, 1.5)) is None


def test_unknown_measure_is_refused():
    with pytest.raises(
        ValueError, match=r"measures: each must be one of \['grain_ratio', .*'vessel_contrast_ratio'.*\], got 'psnr'"
    ):
        RenderingMetric(["grain_ratio", "psnr"], labels=[1])


@pytest.mark.parametrize("channels", [1, 3])
def test_metric_needs_image_and_label(channels):
    metric = RenderingMetric(["mean_absolute_error"], labels=[1])
    with pytest.raises(ValueError, match=r"y: must be \(B, 2, H, W, D\), true image and label"):
        metric(torch.zeros(1, 1, 4, 4, 4), torch.zeros(1, channels, 4, 4, 4))
