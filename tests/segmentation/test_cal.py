"""Confidence-aware adaptive learning: its loss, weights, schedule, data and tables."""

from __future__ import annotations

import csv
import json
import logging
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from monai.losses import DiceCELoss, SoftclDiceLoss
from monai.metrics import HausdorffDistanceMetric, SurfaceDiceMetric

from custom.evaluation.handlers import LabelTable
from custom.evaluation.labels import MillimetreMetric, TopologyMetric
from custom.runs.resuming import Resume
from custom.runs.weights import KeepLast, LoadWeights, load_pretrained
from custom.segmentation.cases import pretraining_cases, sample_weights
from custom.segmentation.loss import CALLoss, class_normalised, class_weights
from custom.segmentation.schedule import ConfidenceSchedule
from custom.segmentation.transforms import LoadConfidenced, PrepareConfidence

CLASSES = 4


@pytest.fixture
def batch():
    """Logits, labels without class 3 in the second sample, and a confidence."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, CLASSES, 9, 8, 7, generator=generator)
    label = torch.randint(0, CLASSES, (2, 1, 9, 8, 7), generator=generator).float()
    label[1][label[1] == 3] = 0
    confidence = torch.rand(2, 1, 9, 8, 7, generator=generator) * 0.9 + 0.1
    return logits, label, confidence


def value_and_gradient(loss, logits, target):
    logits = logits.clone().requires_grad_()
    value = loss(logits, target)
    return value.detach(), torch.autograd.grad(value, logits)[0]


@pytest.mark.parametrize("level", [None, 1.0, 0.3, 1e-4])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_the_same_confidence_everywhere_is_dice_ce(batch, level, gamma):
    logits, label, _ = batch
    target = label if level is None else {"label": label, "confidence": torch.full_like(label, level)}
    for weight in (None, torch.tensor([1.0, 0.0, 2.0, 6.0])):
        expected = value_and_gradient(DiceCELoss(softmax=True, to_onehot_y=True, weight=weight), logits, label)
        found = value_and_gradient(CALLoss(gamma=gamma, weight=weight), logits, target)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_without_gamma_confidence_changes_nothing(batch):
    logits, label, confidence = batch
    torch.testing.assert_close(
        CALLoss(gamma=0.0)(logits, {"label": label, "confidence": confidence}), CALLoss()(logits, label)
    )


def test_scaling_the_confidence_changes_nothing(batch):
    logits, label, confidence = batch
    first, second = (
        value_and_gradient(CALLoss(), logits, {"label": label, "confidence": factor * confidence})
        for factor in (1.0, 0.01)
    )
    torch.testing.assert_close(first, second)


def test_the_loss_of_weights_by_hand():
    """Two voxels of class 0 with confidence 1 and 1/3, so weights 3/2 and 1/2; one of class 1."""
    p = torch.tensor([0.8, 0.6, 0.3])  # of class 0
    logits = torch.stack([p, 1 - p]).log().view(1, 2, 3, 1, 1)
    label = torch.tensor([0.0, 0.0, 1.0]).view(1, 1, 3, 1, 1)
    confidence = torch.tensor([1.0, 1 / 3, 0.2]).view_as(label)
    cross_entropy = -(1.5 * np.log(0.8) + 0.5 * np.log(0.6) + np.log(0.7)) / 3
    dice_0 = 2 * (1.5 * 0.8 + 0.5 * 0.6) / (1.5 * 0.8 + 0.5 * 0.6 + 0.3 + 2)
    dice_1 = 2 * 0.7 / (1.5 * 0.2 + 0.5 * 0.4 + 0.7 + 1)
    expected = cross_entropy + 1 - (dice_0 + dice_1) / 2
    assert float(CALLoss()(logits, {"label": label, "confidence": confidence})) == pytest.approx(expected, abs=1e-4)


def test_a_class_keeps_its_share_of_the_loss_however_little_it_is_trusted(batch):
    _, label, confidence = batch
    low = torch.where(label == 2, 0.01 * confidence, confidence)
    weights = class_normalised(low, label, CLASSES, largest=5.0)
    for sample, ids in zip(weights, label, strict=True):
        for k in ids.unique():
            assert float(sample[ids == k].mean()) == pytest.approx(1, abs=1e-6)
    assert float(weights[label == 2].std()) > 0.2, "within the class, confidence must still order the voxels"


@pytest.mark.parametrize("rest", [0.0, 1e-6, 0.05])
@pytest.mark.parametrize("trusted", [1, 190, 199, 201])
def test_few_voxels_cannot_outweigh_their_class(rest, trusted):
    label = torch.zeros(1, 1, 10, 10, 10)
    confidence = torch.full_like(label, rest)
    confidence.view(-1)[:trusted] = 1.0
    weights = class_normalised(confidence, label, 1, largest=5.0)
    assert float(weights.max()) <= 5.25
    assert float(weights.mean()) == pytest.approx(1, abs=1e-5)
    assert bool((weights.view(-1)[:trusted] >= weights.view(-1)[-1]).all())


def test_a_class_without_any_confidence_counts_like_one_with_the_same_everywhere(batch):
    _, label, confidence = batch
    weights = class_normalised(torch.where(label == 1, 0.0, confidence), label, CLASSES, largest=5.0)
    assert bool((weights[label == 1] == 1).all())
    assert bool(weights.isfinite().all())


def test_samples_count_by_their_weight(batch):
    logits, label, confidence = batch
    target = {"label": label, "confidence": confidence, "sample_weight": torch.tensor([2.0, 0.0])}
    alone = {"label": label[:1], "confidence": confidence[:1]}
    torch.testing.assert_close(CALLoss()(logits, target), CALLoss()(logits[:1], alone))


def test_samples_of_a_batch_do_not_see_each_other(batch):
    logits, label, confidence = batch
    together = CALLoss()(logits, {"label": label, "confidence": confidence})
    apart = [
        CALLoss()(logits[i : i + 1], {"label": label[i : i + 1], "confidence": confidence[i : i + 1]}) for i in (0, 1)
    ]
    torch.testing.assert_close(together, (apart[0] + apart[1]) / 2)


def test_half_precision_logits_give_a_float32_loss(batch):
    logits, label, confidence = batch
    found = CALLoss()(logits.bfloat16(), {"label": label, "confidence": confidence})
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, CALLoss()(logits, {"label": label, "confidence": confidence}), atol=0.01, rtol=0)


def test_a_volume_of_background_alone_has_a_finite_loss_and_gradient(batch):
    logits, label, _ = batch
    value, gradient = value_and_gradient(CALLoss(), logits, torch.zeros_like(label))
    assert bool(value.isfinite())
    assert bool(gradient.isfinite().all())


def test_the_cl_dice_term_is_monais_of_the_thin_labels(batch):
    logits, label, _ = batch
    p = logits.softmax(1)[:, [2]]
    term = SoftclDiceLoss()(p, (label == 2).float())
    found = CALLoss(cl_dice_weight=0.5, thin_labels=[2])(logits, label)
    torch.testing.assert_close(found, CALLoss()(logits, label) + 0.5 * term)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": -1.0}, "gamma, cl_dice_weight: must not be negative"),
        ({"largest_weight": 0.5}, "largest_weight: must be at least 1"),
        ({"cl_dice_weight": 0.1}, "thin_labels: a clDice term needs the ids"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CALLoss(**options)


def test_class_weights_of_another_number_are_refused(batch):
    with pytest.raises(ValueError, match="weight: needs one value for each of 4 classes, got 3"):
        CALLoss(weight=torch.ones(3))(*batch[:2])


@pytest.mark.parametrize("values", [[1, 1], [1, -1, 1], [0, 1, 1]])
def test_impossible_class_weights_are_refused_before_training(values):
    with pytest.raises(ValueError, match="class_weights: need one weight for each of 3 labels"):
        class_weights(values, 3)


def test_class_weights_are_those_of_the_list():
    assert torch.equal(class_weights([0.5, 1, 6], 3), torch.tensor([0.5, 1.0, 6.0]))


def test_confidence_of_another_shape_is_refused(batch):
    logits, label, confidence = batch
    with pytest.raises(ValueError, match=r"label and confidence must be \(B, 1, H, W, D\)"):
        CALLoss()(logits, {"label": label, "confidence": confidence[..., :-1]})


def test_gamma_is_0_in_the_warm_up_and_then_climbs_to_1():
    loss, seen = CALLoss(gamma=0.0), []
    engine = Engine(lambda *_: seen.append(loss.gamma))
    ConfidenceSchedule(loss, warmup_epochs=2, ramp_epochs=3).attach(engine)
    engine.run([0], max_epochs=8)
    assert seen == [0, 0, 0.25, 0.5, 0.75, 1, 1, 1]


def test_a_schedule_of_no_epochs_trusts_from_the_start():
    loss = CALLoss(gamma=0.0)
    engine = Engine(lambda *_: None)
    ConfidenceSchedule(loss, warmup_epochs=0, ramp_epochs=0).attach(engine)
    engine.run([0], max_epochs=1)
    assert loss.gamma == 1
    with pytest.raises(ValueError, match="warmup_epochs, ramp_epochs: must not be negative"):
        ConfidenceSchedule(loss, warmup_epochs=-1, ramp_epochs=0)


def test_sample_weights_have_mean_1_and_the_stated_ratios():
    weights = sample_weights([10.0, 0.0, 40.0, float("nan"), 10.0])
    assert np.mean(weights) == pytest.approx(1)
    assert weights[0] / weights[1] == pytest.approx(1 / 2)
    assert weights[2] / weights[1] == pytest.approx(1 / 5)
    assert weights[3] == 1, "no score counts as 1"


@pytest.mark.parametrize("scores", [[], [0.0, 0.0], [float("nan")] * 3, [7.0, 7.0]])
def test_scores_that_tell_nothing_weigh_alike(scores):
    assert sample_weights(scores) == [1.0] * len(scores)


def test_negative_scores_are_refused():
    with pytest.raises(ValueError, match="scores: must not be negative, got -1"):
        sample_weights([1.0, -1.0])


@pytest.fixture
def lists(tmp_path):
    """A synthetic list of three cases, one bare, and a real one of two."""
    for name in ("a", "b", "c", "r", "s"):
        for kind in ("image", "label", "confidence"):
            (tmp_path / f"{name}_{kind}.nii.gz").write_bytes(b"")

    def item(name, **more):
        return {"image": f"{name}_image.nii.gz", "label": f"{name}_label.nii.gz", **more}

    synthetic = [
        item("a", confidence="a_confidence.nii.gz", score_hu=10.0),
        item("b", confidence="b_confidence.nii.gz", score_hu=30.0),
        item("c"),
    ]
    (tmp_path / "synthetic.json").write_text(json.dumps({"training": synthetic}))
    (tmp_path / "real.json").write_text(json.dumps({"training": [item("r"), item("s", weight=3)]}))
    return str(tmp_path / "synthetic.json"), str(tmp_path / "real.json")


def test_synthetic_cases_bring_confidence_and_weight_and_what_lacks_is_said_once(lists, caplog):
    with caplog.at_level(logging.WARNING):
        cases = pretraining_cases(lists[0], "training")
    assert [("confidence" in case) for case in cases] == [True, True, False]
    assert np.mean([case["sample_weight"] for case in cases]) == pytest.approx(1)
    assert cases[0]["sample_weight"] > cases[1]["sample_weight"]
    assert all("score_hu" not in case for case in cases)
    assert [record.getMessage() for record in caplog.records] == [
        "1 of 3 synthetic cases have no confidence: they count as 1",
        "1 of 3 synthetic cases have no score_hu: they count as 1",
    ]


def test_real_cases_take_their_share_of_the_draws(lists):
    cases = pretraining_cases(*lists[:1], "training", real_datalists=lists[1], real_share=0.4)
    real = [case for case in cases if "score_hu" not in case and case["case"][0] in "rs"]
    assert sum(case["weight"] for case in real) / sum(case["weight"] for case in cases) == pytest.approx(0.4)
    assert real[1]["weight"] == pytest.approx(3 * real[0]["weight"])
    assert [case["sample_weight"] for case in real] == [1.0, 1.0]


def test_all_missing_confidence_maps_are_named_at_once(lists, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}_confidence.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"2 listed files do not exist: .*a_confidence.*b_confidence"):
        pretraining_cases(lists[0], "training")


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5])
def test_an_impossible_share_is_refused(lists, share):
    with pytest.raises(ValueError, match="real_share: must be between 0 and 1"):
        pretraining_cases(lists[0], "training", real_datalists=lists[1], real_share=share)


def confidence_file(folder, values, affine=None):
    path = folder / "confidence.nii.gz"
    nib.save(nib.Nifti1Image(np.asarray(values, np.float32), np.eye(4) if affine is None else affine), path)
    return str(path)


def label_item(shape=(5, 6, 7), **more):
    return {"label": MetaTensor(torch.zeros(1, *shape), affine=torch.eye(4)), **more}


def test_confidence_is_read_on_the_grid_of_the_label(tmp_path):
    values = np.random.default_rng(0).random((5, 6, 7))
    item = LoadConfidenced()(label_item(confidence=confidence_file(tmp_path, values)))
    np.testing.assert_allclose(item["confidence"][0], values, atol=1e-6)


def test_a_case_without_confidence_is_trusted_everywhere_on_the_grid_of_its_label():
    affine = torch.diag(torch.tensor([2.0, 3, 4, 1])).double()
    item = LoadConfidenced()({"label": MetaTensor(torch.zeros(1, 5, 6, 7), affine=affine)})
    assert bool((item["confidence"] == 1).all())
    torch.testing.assert_close(item["confidence"].affine, affine)


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_confidence_out_of_range_is_refused_with_its_file(tmp_path, value):
    values = np.full((5, 6, 7), 0.5)
    values[2, 3, 4] = value
    with pytest.raises(ValueError, match=r"confidence.nii.gz: confidence must lie between 0 and 1"):
        LoadConfidenced()(label_item(confidence=confidence_file(tmp_path, values)))


@pytest.mark.parametrize(
    ("shape", "affine"), [((5, 6, 8), np.eye(4)), ((5, 6, 7), np.diag([1, 1, 2, 1.0]))], ids=["size", "affine"]
)
def test_confidence_on_another_grid_is_refused(tmp_path, shape, affine):
    with pytest.raises(ValueError, match=r"confidence.nii.gz: they must share one grid"):
        LoadConfidenced()(label_item(confidence=confidence_file(tmp_path, np.ones(shape), affine)))


def test_confidence_of_several_channels_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"confidence.nii.gz: confidence must be one volume, got 2 channels"):
        LoadConfidenced()(label_item(confidence=confidence_file(tmp_path, np.ones((5, 6, 7, 2)))))


def test_a_batch_becomes_image_and_targets():
    volumes = {key: torch.rand(2, 1, 3, 3, 3) for key in ("image", "label", "confidence")}
    image, targets, *_ = PrepareConfidence()({**volumes, "sample_weight": torch.tensor([1.0, 2.0])}, "cpu")
    torch.testing.assert_close(image, volumes["image"])
    assert set(targets) == {"label", "confidence", "sample_weight"}
    assert targets["sample_weight"].tolist() == [1.0, 2.0]


def test_pretrained_weights_are_optional_but_must_fit(tmp_path):
    network, path = torch.nn.Linear(2, 2), tmp_path / "pretrained.pt"
    before = network.weight.clone()
    assert load_pretrained(network, str(path)) is False
    torch.testing.assert_close(network.weight, before)
    torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    assert load_pretrained(network, str(path)) is True
    assert not torch.equal(network.weight, before)
    torch.save(torch.nn.Linear(3, 2).state_dict(), path)
    with pytest.raises(ValueError, match="these are not weights of the configured network"):
        load_pretrained(network, str(path))
    with pytest.raises(FileNotFoundError, match="no weights; train first"):
        LoadWeights(network, str(tmp_path / "none.pt"))()


def test_a_run_that_forgets_leaves_no_state_but_an_interrupted_one_does(tmp_path):
    path = tmp_path / "resume.pt"

    finished = Engine(lambda *_: None)
    Resume({}, str(path), torch.device("cpu"), forget_when_done=True).attach(finished)
    finished.run([0], max_epochs=2)
    assert not path.exists()

    def killed_in_epoch_2(engine, _):
        if engine.state.epoch == 2:
            raise RuntimeError("killed")

    engine = Engine(killed_in_epoch_2)
    Resume({}, str(path), torch.device("cpu"), forget_when_done=True).attach(engine)
    with pytest.raises(RuntimeError, match="killed"):
        engine.run([0], max_epochs=3)
    assert path.exists()


def test_the_last_weights_are_kept_but_not_those_of_a_training_that_failed(tmp_path):
    path, network = tmp_path / "models/model.pt", torch.nn.Linear(1, 1, bias=False)

    def step(engine, fails):
        torch.nn.init.constant_(network.weight, 3.0)
        if fails:
            raise KeyboardInterrupt

    def run(*, fails):
        engine = Engine(step)
        KeepLast(network, str(path)).attach(engine)
        engine.run([fails])

    with pytest.raises(KeyboardInterrupt):
        run(fails=True)
    assert not path.exists()
    run(fails=False)
    assert float(torch.load(path, weights_only=True)["weight"]) == 3


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
    distance = MillimetreMetric(HausdorffDistanceMetric(percentile=100), 2)
    distance(prediction, truth)
    assert float(distance.aggregate()) == pytest.approx(6.0)
    for tolerance_mm, all_within in ((6.1, True), (5.9, False)):
        surface = MillimetreMetric(SurfaceDiceMetric([tolerance_mm]), 2)
        surface(prediction, truth)
        assert (float(surface.aggregate()) == 1.0) is all_within


def test_a_label_that_one_map_lacks_has_no_distance():
    inside = slice(3, 9)
    prediction, truth = boxes((inside, inside, inside), (inside, inside, inside))
    metric = MillimetreMetric(HausdorffDistanceMetric(percentile=95), 3)
    prediction[0, 0, 0, 0, 0] = 2
    metric(prediction, MetaTensor(truth, affine=torch.eye(4)))
    assert torch.as_tensor(metric.get_buffer()).tolist() == [[0.0, pytest.approx(float("nan"), nan_ok=True)]]
    assert float(metric.aggregate()) == 0
    surface = MillimetreMetric(SurfaceDiceMetric([1.0, 1.0]), 3)
    surface(prediction, MetaTensor(truth, affine=torch.eye(4)))
    assert torch.as_tensor(surface.get_buffer())[0, 1] == 0, "a surface that has no counterpart is not found"
    with pytest.raises(ValueError, match="must be a label map"):
        metric(prediction, truth)


def test_topology_of_several_labels_has_a_column_each():
    truth = torch.zeros(1, 1, 9, 9, 9)
    truth[..., 2:4, 2:4, 2:4], truth[..., 6:8, 6:8, 6:8] = 1, 2
    prediction = truth.clone()
    prediction[..., 0, 0, 8] = 2
    metric = TopologyMetric("betti_error_0", [1, 2])
    metric(prediction, truth)
    assert torch.as_tensor(metric.get_buffer()).tolist() == [[0.0, 1.0]]
    assert float(metric.aggregate()) == 0.5


def test_the_table_has_a_row_for_every_case_and_label_and_means_join_the_metrics(tmp_path):
    table = LabelTable(
        str(tmp_path / "labels.csv"),
        label_names=["background", "ventricle", "vessel"],
        columns={"dice": [1, 2], "cl_dice": [2]},
    )
    nan = float("nan")
    details = {"dice": torch.tensor([[0.5, nan], [1.0, nan]]), "cl_dice": torch.tensor([[0.25], [0.75]])}
    state = SimpleNamespace(metrics={}, metric_details=details, batch=[{"case": "a"}])
    table.collect(SimpleNamespace(state=state))
    state.batch = [{"case": "b"}]
    table.collect(SimpleNamespace(state=state))
    table.write(SimpleNamespace(state=state))
    with (tmp_path / "labels.csv").open(newline="") as file:
        rows = [tuple(row.values()) for row in csv.DictReader(file)]
    assert rows == [
        ("a", "ventricle", "0.5000", ""),
        ("a", "vessel", "", "0.2500"),
        ("b", "ventricle", "1.0000", ""),
        ("b", "vessel", "", "0.7500"),
    ]
    assert state.metrics == {"dice ventricle": 0.75, "cl_dice vessel": 0.5}
