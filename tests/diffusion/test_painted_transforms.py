"""A painted volume shows its mask in what was drawn for it, by its seed and name alone."""

import numpy as np
import pytest
import torch
from custom.diffusion.context import Context
from custom.diffusion.noise import HU_RANGE
from custom.diffusion.painted_transforms import PaintedInferer, PaintTissuesd
from custom.diffusion.prior import join_vessels
from monai.data import MetaTensor
from scipy import ndimage

SIZE = (40, 36, 32)
SPACING_MM = 1.5
AFFINE = torch.diag(torch.tensor([SPACING_MM] * 3 + [1.0], dtype=torch.float64))
NOMINAL_HU = [-60.0, 105.0, 400.0, 330.0]
PLAUSIBLE_HU = {1: (30, 220), 2: (100, 800), 3: (50, 800)}
OPTIONS = {"nominal_hu": NOMINAL_HU, "plausible_hu": PLAUSIBLE_HU, "pools": [None, None, "left", "left"]}
OPTIONS["thin_labels"] = [3]


def volume(values):
    return MetaTensor(torch.as_tensor(values, dtype=torch.float32)[None], affine=AFFINE)


def heart(shift=0):
    label = np.zeros(SIZE, np.uint8)
    label[8 + shift : 30 + shift, 8:28, 8:24] = 1
    label[12 + shift : 26 + shift, 12:24, 12:20] = 2
    label[14 + shift : 24 + shift, 5:7, 14:16] = 3
    return label


def make_item(**more):
    rng, label = np.random.default_rng(0), heart(1)
    image = np.full(SIZE, -100.0)
    image[:, :, 27:] = -850
    image[:4] = 50
    means = [0, 110.0, 420.0, 310.0]
    image = np.where(label > 0, np.array(means)[label], image) + rng.normal(0, 3, SIZE)
    return {
        "case": "mask_from_template",
        "label": volume(heart()),
        "template_image": volume(image),
        "template_label": volume(label),
        "statistics": torch.tensor([[-300.0, 300.0], *([m, 9.0] for m in means[1:])]),
        "grain_spectrum": torch.full((1, 17, 17, 9), 3.0),
        "noise_sd": 20.0,
        **more,
    }


def paint(item=None, **options):
    return PaintTissuesd(**{**OPTIONS, **options})(make_item() if item is None else item)


def structure(item=None, **options):
    return paint(item, **options)["prior"][0].numpy()


@pytest.mark.parametrize("seed", range(5))
def test_labels_wear_their_drawn_means_which_are_plausible(seed):
    result, label = paint(seed=seed), heart()
    image, drawn = result["prior"][0].numpy(), result["drawn_hu"].tolist()
    for k in (1, 2):
        inside = ndimage.binary_erosion(label == k, iterations=2)
        assert image[inside].mean() == pytest.approx(drawn[k], abs=18), "but for what varies slowly"
        assert PLAUSIBLE_HU[k][0] <= drawn[k] <= PLAUSIBLE_HU[k][1]
        assert 0.2 < image[inside].std() < 40, "no tissue is flat"
    lung, fat = image[10:, :, 30].mean(), image[34:, :, 10:20].mean()
    assert -930 < lung < -750
    assert -140 < fat < -60


def test_seed_and_name_alone_decide():
    first = structure(seed=3)
    np.testing.assert_array_equal(structure(seed=3), first)
    assert np.abs(structure(seed=4) - first)[heart() == 2].mean() > 1
    assert np.abs(structure(make_item(case="other"), seed=3) - first)[heart() == 2].mean() > 1


def test_the_context_holds_mask_and_image_and_the_inferer_gives_the_image_back():
    result = paint()
    context = Context.of(result["context"].as_tensor()[None])
    assert torch.equal(context.target_label[0, 0], torch.as_tensor(heart()).float())
    assert context.template_label.unique().tolist() == [-1]
    batch = result["context"][None].clone()
    batch[:, 3, 0, 0, 0] = 9000.0
    image = PaintedInferer()(batch, torch.nn.Identity(), cases=["a"])
    assert image[0, 0, 0, 0, 0] == HU_RANGE[1]
    assert torch.equal(image[0, 0, 1:], result["prior"][0, 1:].as_tensor())


def test_the_gate_is_told_what_was_drawn_and_nothing_of_the_template():
    item, result = make_item(), paint()
    assert result["statistics"].isnan().all()
    torch.testing.assert_close(result["mean_change_hu"], result["drawn_hu"] - item["statistics"][:, 0])


def test_grain_is_that_of_the_template_at_a_drawn_strength():
    item = make_item()
    factors = []
    for seed in range(20):
        result = paint(item, seed=seed, grain=(0.5, 2.0))
        factor = result["noise_sd"] / item["noise_sd"]
        assert torch.allclose(result["grain_spectrum"], item["grain_spectrum"] * factor**2)
        factors.append(factor)
    assert 0.5 <= min(factors) < 0.9
    assert 1.5 < max(factors) <= 2.0
    assert paint(item, grain=(0, 0))["noise_sd"] == 0


def test_a_wider_point_spread_has_softer_edges():
    sharp, soft = (np.abs(np.diff(structure(blur_mm=(b, b)), axis=0)).max() for b in (0.0, 2.0))
    assert soft < 0.7 * sharp


def test_point_spread_is_a_length_and_a_voxel_averages_over_itself():
    """Of a plane, in HU: SD of the edge's slope is that of point spread and voxel together."""
    image = structure(blur_mm=(1.2, 1.2))[:, 18, 16]  # along it: myocardium, blood, myocardium
    slope = np.abs(np.diff(image[9:16]))
    at = np.arange(len(slope))
    centre = (slope * at).sum() / slope.sum()
    sd_mm = SPACING_MM * np.sqrt((slope * (at - centre) ** 2).sum() / slope.sum())
    wanted = np.sqrt(1.2**2 + SPACING_MM**2 / 12 + SPACING_MM**2 / 12)  # the difference of two voxels is one, too
    assert sd_mm == pytest.approx(wanted, rel=0.2)


def test_no_artefact_unless_it_is_asked_for_and_each_is_drawn_alone():
    plain = structure()
    changes = {name: structure(artefacts=[name]) - plain for name in ("plaques", "streaks", "motion")}
    near = ndimage.binary_dilation(heart() == 3, iterations=12)
    assert changes["plaques"].max() > 100
    for name in ("plaques", "motion"):
        assert np.abs(changes[name]).max() > 5
        assert np.abs(changes[name])[~near].max() < 1, name
    assert np.abs(changes["streaks"])[~near].max() > 1
    both = structure(artefacts=["plaques", "streaks"]) - plain
    np.testing.assert_allclose(both, changes["plaques"] + changes["streaks"], atol=40)


def test_a_mask_without_vessels_or_without_labels_is_painted_all_the_same():
    everything = ["plaques", "streaks", "motion"]
    for label in (np.where(heart() == 3, 0, heart()), np.zeros(SIZE, np.uint8)):
        image = structure(make_item(label=volume(label)), artefacts=everything)
        assert np.isfinite(image).all()


def test_a_mask_that_leaves_nothing_unlabelled_is_painted_all_the_same():
    label = np.maximum(heart(), 1)
    result = paint(make_item(label=volume(label)))
    assert result["prior"][0].numpy()[label == 2].mean() == pytest.approx(float(result["drawn_hu"][2]), abs=40)


def test_a_label_that_the_template_lacks_is_painted():
    item = make_item()
    item["statistics"][2] = torch.nan
    result = paint(item)
    inside = ndimage.binary_erosion(heart() == 2, iterations=2)
    assert result["prior"][0].numpy()[inside].mean() == pytest.approx(float(result["drawn_hu"][2]), abs=20)


def test_a_vessel_goes_on_from_its_label_and_fat_stays_fat():
    """A vena cava above an atrium: the voxel around the label was filled with fat."""
    shape = (1, 1, 20, 20, 30)
    template, label = torch.full(shape, -100.0), torch.zeros(shape)
    template[..., 6:14, 6:14, :] = 400.0
    label[..., 6:14, 6:14, :15] = 1
    template[..., 2, 2, :] = 900.0  # a rib, which no label is beside
    filled = torch.where(template > 200, torch.full_like(template, -100.0), template)
    filled[..., 6:14, 6:14, 16:] = 400.0
    joined = join_vessels(filled, template, label, label, [1.5] * 3)
    assert (joined[..., 6:14, 6:14, 15] == 400).all()
    assert (joined[..., 5, 6:14, :10] == -100).all()
    assert torch.equal(joined[..., 2, 2, :], filled[..., 2, 2, :])
