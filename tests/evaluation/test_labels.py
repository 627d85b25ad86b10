"""Measures of label maps: means over cases and labels, lengths in mm, what is empty, and what is computed once."""

import math

import numpy as np
import pytest
import torch
from custom.evaluation import labels
from custom.evaluation.labels import DiceMetric, LabelMetrics, PresenceMetric, SurfaceMetric, TopologyMetric
from custom.evaluation.mask_pairs import MASK_MEASURES
from custom.geometry import centrelines, topology
from monai.data import MetaTensor
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice
from monai.networks import one_hot
from shapes import KNOWN


def value(metric, predicted, truth):
    """The one column of the one label of one case."""
    return float(metric(predicted, truth)[0, 0, 0])


def test_topology_metrics_are_means_over_cases_of_one_label():
    balls, ring, wall = (torch.from_numpy(KNOWN[name][0])[None].long() for name in ("two balls", "torus", "shell"))
    truth = torch.stack([3 * balls, 3 * ring, 3 * wall])
    predicted = torch.stack([3 * ring + 5 * balls * (1 - ring), 3 * ring, 3 * balls])
    metric = TopologyMetric(["betti_error_0", "betti_error_1", "betti_error_2"], labels=[3])
    for prediction, reference in zip(predicted, truth, strict=True):
        metric(prediction[None], reference[None])
    assert metric.aggregate() == pytest.approx({"betti_error_0": 2 / 3, "betti_error_1": 1 / 3, "betti_error_2": 1 / 3})
    same = TopologyMetric(["cl_dice"], thin_labels=[3])
    same(truth, truth)
    assert same.aggregate() == {"cl_dice": 1.0}


def test_topology_of_several_labels_has_a_row_each():
    truth = torch.zeros(1, 1, 9, 9, 9)
    truth[..., 2:4, 2:4, 2:4], truth[..., 6:8, 6:8, 6:8] = 1, 2
    prediction = truth.clone()
    prediction[..., 0, 0, 8] = 2
    metric = TopologyMetric(["betti_error_0"], labels=[1, 2])
    metric(prediction, truth)
    assert metric.details()["betti_error_0"].tolist() == [[0.0, 1.0]]
    assert metric.aggregate() == {"betti_error_0": 0.5}


def label_maps(*vessels):
    """Maps (B, 1, 6, 6, 20): an aorta of label 6, and a vessel of label 9 over given voxels of the line from it."""
    maps = torch.zeros(len(vessels), 1, 6, 6, 20)
    maps[:, 0, 3, 3, 0:2] = 6
    for number, voxels in enumerate(vessels):
        maps[number, 0, 3, 3, list(voxels)] = 9
    return maps


def test_recovered_and_attached_lengths_are_shares_of_centre_lines():
    truth, predicted = label_maps(range(2, 18)), label_maps([*range(2, 10), *range(14, 18)])
    recovered = TopologyMetric(["centreline_recovered"], thin_labels=[9])
    attached = TopologyMetric(["attached"], thin_labels=[9], touches=[6])
    assert value(recovered, predicted, truth) == pytest.approx(11 / 15)
    assert value(attached, predicted, truth) == pytest.approx(7 / 10)
    assert value(attached, truth, truth) == 1.0


def test_lengths_are_those_of_the_spacing():
    """A bend: eight links along the last axis, then four along the first, three times as long."""
    truth = torch.zeros(1, 1, 20, 4, 20)
    truth[0, 0, 2, 1, 2:11], truth[0, 0, 3:7, 1, 10] = 9, 9
    predicted = truth.clone()
    predicted[0, 0, 3:] = 0
    metric = TopologyMetric(["centreline_recovered"], thin_labels=[9], spacing_mm=[3.0, 1.0, 1.0])
    # skeleton: the corner may be cut, so the share is that of its own links
    assert value(metric, predicted, truth) == pytest.approx(8 / 20, abs=0.12)
    in_voxels = TopologyMetric(["centreline_recovered"], thin_labels=[9])
    assert value(in_voxels, predicted, truth) == pytest.approx(8 / 12, abs=0.1)
    of_file = MetaTensor(truth, affine=torch.diag(torch.tensor([3.0, 1.0, 1.0, 1.0])))
    assert value(in_voxels, predicted, of_file) == value(metric, predicted, truth)


def test_empty_masks_are_defined_and_left_out_of_the_mean_where_nothing_can_be_said():
    empty, whole = label_maps([]), label_maps(range(2, 18))
    free = whole.where(whole != 6, torch.zeros(()))
    for measure, touches, cases in (
        ("centreline_recovered", [], [(empty, whole, 0.0), (whole, empty, math.nan), (empty, empty, math.nan)]),
        ("attached", [6], [(empty, whole, 0.0), (empty, empty, math.nan), (whole, empty, 1.0), (free, whole, 0.0)]),
        ("cl_dice", [], [(empty, whole, 0.0), (whole, empty, 0.0), (empty, empty, 1.0)]),
    ):
        metric = TopologyMetric([measure], thin_labels=[9], touches=touches)
        for predicted, truth, expected in cases:
            assert value(metric, predicted, truth) == pytest.approx(expected, nan_ok=True), measure
        assert metric.aggregate()[measure] == pytest.approx(np.nanmean([expected for *_, expected in cases]))


def test_a_missed_vessel_never_betters_the_mean_of_what_is_attached():
    truth = label_maps(range(2, 18), range(2, 18))
    means = []
    for second in (range(14, 18), []):  # a piece that hangs at nothing, and nothing
        metric = TopologyMetric(["attached"], thin_labels=[9], touches=[6])
        metric(label_maps(range(2, 18), second), truth)
        means.append(metric.aggregate()["attached"])
    assert means == [0.5, 0.5]


def test_columns_are_those_of_metrics_of_one_measure_each():
    """Centre lines are compared for the thin label only, the rest of their column is NaN and left out of the mean."""
    truth, predicted = label_maps(range(2, 18), range(2, 9)), label_maps([*range(2, 10), *range(14, 18)], [])
    together = TopologyMetric(list(MASK_MEASURES), labels=[6, 9], thin_labels=[9], touches=[6])
    together(predicted, truth)
    assert torch.as_tensor(together.get_buffer()).shape == (2, 2, 6)
    for measure in MASK_MEASURES:
        thin = not measure.startswith("betti")
        labels = {"thin_labels": [9]} if thin else {"labels": [6, 9]}
        alone = TopologyMetric([measure], **labels, touches=[6] if measure == "attached" else [])
        alone(predicted, truth)
        own, column = alone.details()[measure], together.details()[measure]
        torch.testing.assert_close(column[:, 1:] if thin else column, own, rtol=0, atol=0, equal_nan=True)
        assert not thin or bool(column[:, 0].isnan().all())
        assert together.aggregate()[measure] == alone.aggregate()[measure]


def test_a_label_map_without_thin_labels_has_nothing_to_measure():
    metric = TopologyMetric(["cl_dice"])
    metric(torch.zeros(2, 1, 4, 4, 4), torch.zeros(2, 1, 4, 4, 4))
    assert math.isnan(metric.aggregate()["cl_dice"])


@pytest.fixture
def count_calls(monkeypatch):
    """Function(module, name) -> list that grows by one with every call of it, from wherever."""

    def start(module, name):
        function, calls = getattr(module, name), []

        def counted(*args):
            calls.append(args)
            return function(*args)

        for place in ("custom.evaluation.mask_pairs", module.__name__):
            monkeypatch.setattr(f"{place}.{name}", counted, raising=False)
        return calls

    return start


def test_betti_numbers_and_skeletons_are_computed_once_for_all_columns(count_calls):
    numbers, lines = count_calls(topology, "betti_numbers"), count_calls(centrelines, "skeleton")
    truth, predicted = label_maps(range(2, 18), range(2, 9)), label_maps(range(2, 10), range(3, 9))
    TopologyMetric(list(MASK_MEASURES), labels=[6, 9], thin_labels=[9], touches=[6])(predicted, truth)
    assert len(numbers) == 2 * 2 * 2  # cases, labels, prediction and truth
    assert len(lines) == 2 * 2  # cases, prediction and truth of the thin label
    TopologyMetric(["betti_error_1"], labels=[9])(predicted, truth)
    assert len(lines) == 2 * 2  # what no column needs is left


def test_vessels_that_come_from_nothing_are_neither_attached_nor_loose():
    vessel = torch.zeros(1, 1, 9, 9, 9)
    vessel[..., 4, 4, :] = 9
    metric = TopologyMetric(["cl_dice", "attached"], thin_labels=[9])
    metric(vessel, vessel)
    means = metric.aggregate()
    assert means["cl_dice"] == 1
    assert math.isnan(means["attached"])


def test_topology_metrics_refuse_what_they_cannot_compare():
    with pytest.raises(ValueError, match=r"measures: each must be one of \['attached', .* got 'betti'"):
        TopologyMetric(["cl_dice", "betti"], labels=[3])
    with pytest.raises(ValueError, match=r"y: must be label maps \(B, 1, H, W, D\)"):
        TopologyMetric(["cl_dice"], thin_labels=[3])(torch.zeros(1, 1, 4, 4, 4), torch.zeros(1, 2, 4, 4, 4))


def boxes(first, second):
    """Two label maps of one box of label 1 each, given as slices."""
    maps = torch.zeros(2, 1, 1, 24, 12, 12)
    maps[0][(..., *first)] = 1
    maps[1][(..., *second)] = 1
    return maps


def test_surface_distances_are_in_millimetres_of_the_case():
    """A box moved by 3 voxels of 2 mm along the first axis; the other axes have other voxels."""
    inside = slice(3, 9)
    prediction, truth = boxes((slice(3, 9), inside, inside), (slice(6, 12), inside, inside))
    truth = MetaTensor(truth, affine=torch.diag(torch.tensor([2.0, 0.5, 5.0, 1.0])))
    for tolerance_mm, all_within in ((6.1, True), (5.9, False)):
        metric = SurfaceMetric(2, tolerance_mm=tolerance_mm)
        metric(prediction, truth)
        assert metric.aggregate()["hd95_mm"] == pytest.approx(6.0)
        assert (metric.aggregate()["nsd"] == 1.0) is all_within


def test_a_label_that_one_map_lacks_has_no_distance():
    inside = slice(3, 9)
    prediction, truth = boxes((inside, inside, inside), (inside, inside, inside))
    metric = SurfaceMetric(3, tolerance_mm=1.0)
    prediction[0, 0, 0, 0, 0] = 2
    metric(prediction, MetaTensor(truth, affine=torch.eye(4)))
    assert metric.details()["hd95_mm"].tolist() == [[0.0, pytest.approx(float("nan"), nan_ok=True)]]
    assert metric.aggregate()["hd95_mm"] == 0
    assert metric.details()["nsd"][0, 1] == 0, "a surface that has no counterpart is not found"
    with pytest.raises(ValueError, match="must be a label map"):
        metric(prediction, truth)


def test_a_label_that_both_maps_lack_is_left_out():
    inside = slice(3, 9)
    prediction, truth = boxes((inside, inside, inside), (inside, inside, inside))
    metric = SurfaceMetric(3, tolerance_mm=1.0)
    metric(prediction, MetaTensor(truth, affine=torch.eye(4)))
    assert all(bool(values[0, 1].isnan()) for values in metric.details().values())
    assert metric.aggregate() == {"hd95_mm": 0.0, "nsd": 1.0}


def test_a_missed_label_is_as_far_off_as_the_volume_allows_and_never_betters_the_mean():
    """Volumes of 24 x 12 x 12 voxels of 2, 1 and 1 mm."""
    inside = slice(3, 9)
    prediction, truth = boxes((inside, inside, inside), (inside, inside, inside))
    truth[0, 0, 14:20, 3:9, 3:9] = 2
    truth = MetaTensor(truth, affine=torch.diag(torch.tensor([2.0, 1.0, 1.0, 1.0])))
    found = prediction.clone()
    found[0, 0, 15:20, 3:9, 3:9] = 2
    means = []
    for predicted in (found, prediction):
        metric = SurfaceMetric(3, tolerance_mm=1.0)
        metric(predicted, truth)
        means.append(metric.aggregate())
    assert metric.details()["hd95_mm"].tolist() == [[0.0, pytest.approx(math.hypot(48, 12, 12))]]
    assert metric.details()["nsd"].tolist() == [[1.0, 0.0]]
    assert means[0]["hd95_mm"] < means[1]["hd95_mm"]
    assert means[0]["nsd"] > means[1]["nsd"]


def test_labels_that_one_map_lacks_are_counted_over_cases_and_labels():
    truth = torch.zeros(2, 1, 4, 4, 4)
    prediction = truth.clone()
    truth[0, ..., 0], truth[:, ..., 1] = 1, 2  # labels 1 and 2; label 2
    prediction[0, ..., 0], prediction[1, ..., 0], prediction[1, ..., 1] = 1, 3, 2  # label 1; labels 3 and 2
    metric = PresenceMetric(4)
    metric(prediction, truth)
    assert metric.details()["missed"].tolist() == [[0, 1, 0], [0, 0, 0]]
    assert metric.details()["invented"].tolist() == [[0, 0, 0], [0, 0, 1]]
    assert metric.aggregate() == {"missed": 1.0, "invented": 1.0}
    with pytest.raises(ValueError, match="y: must be label maps"):
        metric(prediction, truth[..., :2])


def test_metrics_together_are_those_of_each_alone(count_calls):
    prediction, truth = random_maps(torch.Generator().manual_seed(1))
    boxes = count_calls(labels.ndimage, "find_objects")

    def metrics():
        topology = TopologyMetric(list(MASK_MEASURES), labels=[1, 2], thin_labels=[2], touches=[1])
        return [DiceMetric(6), SurfaceMetric(6, tolerance_mm=1.0), PresenceMetric(6), topology]

    together = LabelMetrics(metrics())
    together(prediction, truth)
    assert [array.dtype for (array,) in boxes].count(np.uint8) == 2, "once a map; components of a label are int32"
    details, means = {}, {}
    for metric in metrics():
        metric(prediction, truth)
        rows = [together.labels.index(k) for k in metric.labels]
        for column, values in metric.details().items():
            details[column] = torch.full((1, 5), math.nan)
            details[column][:, rows] = values
        means |= metric.aggregate()
    assert list(together.details()) == list(details)
    torch.testing.assert_close(together.details(), details, rtol=0, atol=0, equal_nan=True)
    assert together.aggregate() == pytest.approx(means, rel=0, abs=0, nan_ok=True)


def test_metrics_together_need_columns_of_their_own_and_what_each_needs():
    with pytest.raises(ValueError, match=r"metrics: each must have columns of its own, got \['dice', 'dice'\]"):
        LabelMetrics([DiceMetric(3), DiceMetric(3)])
    volume = torch.ones(1, 1, 4, 4, 4)
    with pytest.raises(ValueError, match="y: must be a label map with an affine"):
        LabelMetrics([DiceMetric(3), SurfaceMetric(3, tolerance_mm=1.0)])(volume, volume)


def test_the_order_of_axes_in_memory_changes_nothing():
    prediction, truth = random_maps(torch.Generator().manual_seed(2))
    turned = MetaTensor(truth.transpose(2, 4).contiguous().transpose(2, 4), affine=truth.affine)
    metrics = [LabelMetrics([DiceMetric(6), SurfaceMetric(6, tolerance_mm=1.0)]) for _ in range(2)]
    metrics[0](prediction, truth)
    metrics[1](prediction, turned)
    torch.testing.assert_close(metrics[0].details(), metrics[1].details(), rtol=0, atol=0, equal_nan=True)


def random_maps(generator):
    """Two label maps (1, 1, 20, 18, 16) of blobs that share most voxels, label 4 in the truth alone, 5 in neither."""
    low = torch.rand(1, 4, 5, 5, 5, generator=generator)
    scores = torch.nn.functional.interpolate(low, (20, 18, 16), mode="trilinear")
    truth = scores.argmax(1, keepdim=True).float()
    prediction = truth.roll(1, 3)
    truth[..., :3, :3, :3] = 4
    return prediction, MetaTensor(truth, affine=torch.diag(torch.tensor([2.0, 1.0, 0.5, 1.0])))


@pytest.mark.filterwarnings("ignore:.*nan/inf distance")
def test_a_label_at_a_time_is_measured_as_monai_measures_all_at_once():
    prediction, truth = random_maps(torch.Generator().manual_seed(0))
    found, wanted = (one_hot(v.as_subclass(torch.Tensor), 6) for v in (prediction, truth))
    spacing = [2.0, 1.0, 0.5]
    dice, surfaces = DiceMetric(6), SurfaceMetric(6, tolerance_mm=1.0)
    dice(prediction, truth)
    surfaces(prediction, truth)
    options = {"rtol": 0, "atol": 1e-6, "equal_nan": True}
    expected = compute_dice(found, wanted, include_background=False)
    torch.testing.assert_close(dice.details()["dice"], expected, **options)
    assert expected[0, :3].min() > 0.3
    assert dice.aggregate()["dice"] == pytest.approx(float(expected.nanmean()))
    expected = compute_surface_dice(found, wanted, [1.0] * 5, spacing=spacing).float()
    torch.testing.assert_close(surfaces.details()["nsd"], expected, **options)
    expected = compute_hausdorff_distance(found, wanted, percentile=95, spacing=spacing).float()[:, :3]
    torch.testing.assert_close(surfaces.details()["hd95_mm"][:, :3], expected, **options)
