"""What the transforms write, voxel by voxel."""

import numpy as np
import pytest
import torch
from custom.diffusion.coarse import low_pass
from custom.diffusion.context import MODES, Context
from custom.diffusion.grain import AddGraind, MeasureGraind, NominalAppearanced, SplitNoised
from custom.diffusion.noise import case_noise
from custom.diffusion.transforms import AlignTemplated, LabelStatisticsd, PaintPriord, RandPaintPriord, VaryContrastd
from custom.volumes.grids import as_batch
from custom.volumes.intensity import interior_noise_sd, label_statistics
from monai.data import MetaTensor
from scipy import ndimage

SIZE = (14, 12, 13)
NOMINAL_HU = [-60.0, 100.0, 400.0, 330.0]
AFFINE = torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0], dtype=torch.float64))


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def volume(values):
    return MetaTensor(values, affine=AFFINE, meta={"filename_or_obj": "/data/case.nii.gz"})


def box(label, index, start, stop):
    label[(slice(None), *(slice(a, b) for a, b in zip(start, stop, strict=True)))] = index


def target():
    label = torch.zeros(1, *SIZE)
    box(label, 1, (3, 3, 3), (11, 9, 10))
    box(label, 2, (5, 5, 5), (9, 7, 8))
    box(label, 3, (2, 4, 4), (3, 6, 6))  # a thin label on the outside
    return volume(label)


def template():
    label = torch.zeros(1, *SIZE)
    box(label, 1, (4, 3, 3), (12, 10, 9))
    box(label, 2, (6, 5, 5), (10, 8, 7))
    box(label, 3, (2, 8, 3), (4, 10, 7))
    return volume(label)


STATISTICS = torch.tensor([[-80.0, 30.0], [120.0, 11.0], [420.0, 22.0], [300.0, 33.0]])


def make_item():
    label = template()
    image = STATISTICS[:, 0][label.as_tensor().long()] + 5 * noise(1, *SIZE)
    return {
        "label": target(),
        "template_image": volume(image),
        "template_label": label,
        "statistics": STATISTICS,
        "grain_sd": volume(20 + noise(1, *SIZE, seed=2)),
        "surroundings": volume(30 * noise(1, *SIZE, seed=3)),
        "case": "a",
    }


def paint(mode, item=None, **options):
    return PaintPriord(nominal_hu=NOMINAL_HU, mode=mode, **options)(make_item() if item is None else item)


def channels(result):
    assert result["context"].shape == (len(Context._fields), *SIZE)
    return dict(zip(Context._fields, result["context"].as_tensor(), strict=True))


# Painting


def test_with_a_template_labels_wear_its_statistics_and_the_background_is_its_own():
    item = make_item()
    result = paint("template")
    context, label = channels(result), item["label"][0].as_tensor()
    assert torch.equal(context["target_label"], label)
    assert torch.equal(context["template_label"], item["template_label"][0].as_tensor())
    for index in (1, 2, 3):
        assert context["prior_hu"][label == index].unique().tolist() == [STATISTICS[index, 0]]
    background = context["prior_hu"][label == 0]
    assert (background + 80).abs().max() < 30  # its heart, of 120 to 420 HU, is filled from around
    outside = ndimage.binary_dilation(item["template_label"][0].numpy() > 0, np.ones((3, 3, 3))) == 0
    outside = torch.from_numpy(outside) & (label == 0)
    assert torch.equal(context["prior_hu"][outside], item["template_image"][0].as_tensor()[outside])


def test_by_the_mask_alone_labels_wear_the_statistics_in_drawn_surroundings():
    item = make_item()
    label = item["label"][0].as_tensor()
    context = channels(paint("mask_only", item))
    assert torch.equal(context["target_label"], label)
    means = torch.cat([torch.tensor(NOMINAL_HU[:1]), STATISTICS[1:, 0]])
    assert torch.equal(context["prior_hu"], means[label.long()] + item["surroundings"][0].as_tensor())
    assert context["template_label"].unique().tolist() == [-1]
    assert not context["template_image_hu"].any()


def test_unconditional_context_tells_nothing_but_the_coarse_image():
    coarse = 100 * noise(1, 1, *SIZE)
    item = make_item()
    means = torch.cat([torch.tensor(NOMINAL_HU[:1]), STATISTICS[1:, 0]])
    painted = low_pass(means[item["label"].as_tensor().long()][None], [2.0] * 3)
    item["surroundings"] = volume(coarse[0] - painted[0])
    context = channels(paint("unconditional", item))
    assert torch.allclose(context.pop("prior_hu"), coarse[0, 0], atol=1e-3)
    expected = {"target_label": [-1], "template_image_hu": [0], "template_label": [-1]}
    assert {name: part.unique().tolist() for name, part in context.items()} == expected


@pytest.mark.parametrize("mode", MODES)
def test_the_network_reads_the_mode_from_the_context(mode):
    assert MODES[Context.of(paint(mode)["context"][None].as_tensor()).modes()] == mode


@pytest.mark.parametrize("mode", ["mask_only", "unconditional"])
def test_without_a_template_no_template_is_asked_for(mode):
    item = make_item()
    alone = paint(mode, {key: item[key] for key in ("label", "statistics", "surroundings")})
    assert torch.equal(alone["context"], paint(mode)["context"])


@pytest.mark.parametrize("mode", MODES)
def test_prior_is_a_channel_of_the_context_and_both_lie_on_the_grid_of_the_mask(mode):
    result = paint(mode)
    assert result["prior"].shape == (1, *SIZE)
    assert torch.equal(result["prior"][0].as_tensor(), channels(result)["prior_hu"])
    for key in ("prior", "context"):
        assert torch.equal(result[key].affine, AFFINE), key
    assert result["case"] == "a"


@pytest.mark.parametrize("mode", MODES)
def test_without_prior_the_paint_is_flat_and_the_rest_of_the_context_stays(mode):
    context, usual = channels(paint(mode, use_prior=False)), channels(paint(mode))
    assert context["prior_hu"].unique().tolist() == [NOMINAL_HU[0]]
    for name in ("target_label", "template_label"):
        assert torch.equal(context[name], usual[name]), name
    shown = make_item()["template_image"][0].as_tensor() if mode == "template" else torch.zeros(SIZE)
    assert torch.equal(context["template_image_hu"], shown)


@pytest.mark.parametrize("thin_labels", [[], [3]], ids=["none thin", "one thin"])
def test_the_template_image_gives_way_to_the_prior_where_it_shows_another_anatomy(thin_labels):
    item = make_item()
    image, own, label = (item[key][0].as_tensor() for key in ("template_image", "template_label", "label"))
    foreign = own != label
    assert foreign.any()
    if thin_labels:
        near_own = ndimage.binary_dilation((own == 3).numpy(), np.ones((5, 5, 5)))
        foreign |= torch.from_numpy(near_own) | (label == 3)
    context = channels(paint("template", thin_labels=thin_labels))
    assert torch.equal(context["template_image_hu"], torch.where(foreign, context["prior_hu"], image))
    assert torch.equal(context["template_label"], own)


def test_a_label_the_template_lacks_is_painted_near_its_nominal_value():
    """The others lie 20 HU above theirs."""
    item = make_item()
    item["statistics"] = STATISTICS.clone()
    item["statistics"][3] = torch.nan
    context = channels(paint("template", item))
    thin = item["label"][0].as_tensor() == 3
    assert context["prior_hu"][thin].unique().tolist() == [NOMINAL_HU[3] + 20]


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match=r"mode: must be one of \('template', 'mask_only', .*\), got 'image'"):
        PaintPriord(nominal_hu=NOMINAL_HU, mode="image")


# Random modes


def drawn(count, seed=0, **options):
    transform = RandPaintPriord(nominal_hu=NOMINAL_HU, **options)
    transform.set_random_state(seed=seed)
    modes = []
    for _ in range(count):
        transform.randomize()
        modes.append(transform.mode)
    return modes


def test_modes_come_as_often_as_asked_and_by_the_seed():
    modes = drawn(3000, mode_prob=(0.6, 0.1, 0.3))
    for mode, share in zip(MODES, (0.6, 0.1, 0.3), strict=True):
        assert modes.count(mode) / 3000 == pytest.approx(share, abs=0.03)  # three standard errors
    assert drawn(50) == drawn(50) != drawn(50, seed=1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("use_prior", [True, False])
def test_a_random_transform_paints_as_the_plain_one_in_the_mode_it_drew(mode, use_prior):
    options = {"thin_labels": [3], "use_prior": use_prior}
    sure = RandPaintPriord(nominal_hu=NOMINAL_HU, mode_prob=[float(m == mode) for m in MODES], **options)
    assert torch.equal(sure(make_item())["context"], paint(mode, **options)["context"])


@pytest.mark.parametrize("mode_prob", [(0.5, 0.5), (0.5, 0.4, 0.2), (1.2, -0.1, -0.1), (0.2, 0.2, 0.2)])
def test_bad_probabilities_of_modes_are_refused(mode_prob):
    with pytest.raises(ValueError, match="mode_prob: one probability for each of .*summing to 1, got") as error:
        RandPaintPriord(nominal_hu=NOMINAL_HU, mode_prob=mode_prob)
    assert str(list(mode_prob)) in str(error.value)


# Structure and grain


def scan(grain_hu, size=(28, 26, 24), blur=0.0, seed=0):
    """A chamber of 250 HU in tissue of -50 HU, with noise, correlated if blurred."""
    label = torch.zeros(1, *size)
    box(label, 1, (3, 3, 3), (25, 23, 21))
    grain = noise(1, *size, seed=seed)
    if blur:
        grain = torch.from_numpy(ndimage.gaussian_filter(grain.numpy(), [0, blur, blur, blur]))
        grain = grain / grain.std()
    return {"image": volume(300 * label - 50 + grain_hu * grain), "label": volume(label), "case": "a"}


def structure_of(size=(28, 26, 24)):
    """Another heart: two chambers of 400 and 100 HU, drawn without noise."""
    label = torch.zeros(1, *size)
    box(label, 1, (4, 4, 4), (24, 22, 13))
    box(label, 2, (4, 4, 13), (24, 22, 20))
    return {"pred": volume(torch.tensor([-60.0, 400.0, 100.0])[label.long()]), "label": volume(label), "case": "b"}


def measured(item):
    return MeasureGraind()(SplitNoised()(item))


def noise_of(item, key="pred"):
    return interior_noise_sd(item[key][0].numpy(), item["label"][0].numpy())


def put_on(item, structure=None, **options):
    """Grain of a measured scan on a structure."""
    of_template = {key: item[key] for key in ("grain_spectrum", "grain_sd", "noise_sd")}
    return AddGraind(**options)({**(structure_of() if structure is None else structure), **of_template})


def test_structure_takes_the_place_of_the_image_and_grain_is_the_rest():
    item = scan(30.0)
    result = SplitNoised()(item)
    inside = item["label"].as_tensor() > 0
    torch.testing.assert_close((result["image"] + result["grain"]).as_tensor(), item["image"].as_tensor())
    assert result["grain"].as_tensor()[inside].std() == pytest.approx(30, rel=0.25)
    assert result["image"].as_tensor()[inside].std() < 15
    for key in ("image", "grain"):
        assert result[key].shape == item["image"].shape
        assert torch.equal(result[key].affine, AFFINE)
    assert result.keys() == item.keys() | {"grain"}


def test_a_template_is_split_and_measured_by_its_own_keys():
    item = scan(30.0)
    keys = {"image_key": "template_image", "label_key": "template_label"}
    named = {"template_image": item["image"], "template_label": item["label"], "label": target()}
    result, usual = MeasureGraind(**keys)(SplitNoised(**keys)(named)), measured(item)
    assert torch.equal(result["template_image"], usual["image"])
    for key in ("grain", "grain_spectrum", "grain_sd"):
        assert torch.equal(result[key], usual[key]), key
    assert result["noise_sd"] == usual["noise_sd"]
    assert torch.equal(result["label"], named["label"])


def test_an_image_without_grain_is_all_structure_and_gives_none():
    item = scan(0.0)
    result = measured(item)
    assert torch.equal(result["image"], item["image"])
    assert not result["grain"].any()
    assert result["noise_sd"] == 0
    structure = structure_of()
    assert torch.equal(put_on(result)["pred"], structure["pred"])


def test_what_is_measured_of_grain_has_its_shapes_and_the_noise_is_that_of_the_scan():
    item = scan(30.0)
    result = measured(item)
    assert result["grain_spectrum"].shape == (1, 17, 17, 9)
    assert float(result["grain_spectrum"].mean()) == pytest.approx(30**2, rel=0.15)  # of white noise it is the variance
    assert result["grain_sd"].shape == item["image"].shape
    assert torch.equal(result["grain_sd"].affine, AFFINE)
    assert result["noise_sd"] == pytest.approx(noise_of(item, "image"), rel=1e-5)
    assert result["noise_sd"] == pytest.approx(30, rel=0.1)
    centre = result["grain_sd"][0, 14, 13, 12]
    assert float(centre) == pytest.approx(float(result["grain"].as_tensor().std()), rel=0.15)


@pytest.mark.parametrize(("factor", "blur"), [(1.0, 0.0), (1.0, 0.7), (0.5, 0.0), (2.0, 0.0)])
def test_grain_on_a_clean_structure_is_as_strong_as_that_of_the_template_times_the_factor(factor, blur):
    item = measured(scan(30.0, blur=blur))
    result = put_on(item, factor=factor)
    assert noise_of(result) == pytest.approx(factor * item["noise_sd"], rel=0.02)
    difference = (result["pred"] - structure_of()["pred"]).as_tensor()
    assert abs(float(difference.mean())) < 0.1 * float(difference.std())
    assert torch.equal(result["pred"].affine, AFFINE)


def lag_one(values):
    return [
        float(
            np.corrcoef(np.take(values, range(1, n), axis).ravel(), np.take(values, range(n - 1), axis).ravel())[0, 1]
        )
        for axis, n in enumerate(values.shape)
    ]


def striped(values, lag=6):
    """Largest correlation of a texture with itself some voxels on, along any axis."""
    shifted = [[np.take(values, range(k, n + k - lag), a) for k in (0, lag)] for a, n in enumerate(values.shape)]
    return max(abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) for first, second in shifted)


@pytest.mark.parametrize("texture_hu", [0.0, 1.5, 2.0, 3.0, 8.0])
def test_nominal_grain_is_no_stripes_whatever_texture_a_structure_has(texture_hu):
    """A spectrum of another unit than the structure's left few waves over, and images of stripes."""
    structure = structure_of()
    structure["pred"] = structure["pred"] + texture_hu * noise(1, 28, 26, 24, seed=9)
    result = put_on(NominalAppearanced(nominal_hu=NOMINAL_HU)(structure), structure)
    grain = (result["pred"] - structure["pred"])[0].numpy()
    assert striped(grain) < 0.1
    assert 15 < grain.std() < 45
    assert noise_of(result) == pytest.approx(30, rel=0.05)


def test_grain_of_a_scan_is_no_stripes_where_a_structure_lacks_next_to_nothing():
    item = measured(scan(30.0, blur=0.7))
    structure = structure_of()
    texture = ndimage.gaussian_filter(noise(1, 28, 26, 24, seed=9).numpy(), [0, 0.7, 0.7, 0.7])
    structure["pred"] = structure["pred"] + torch.from_numpy(29.0 / texture.std() * texture)
    grain = (put_on(item, structure)["pred"] - structure["pred"])[0].numpy()
    assert striped(grain) < 0.1
    assert grain.std() < 20


def test_drawn_grain_is_as_coarse_as_the_noise_of_the_scan_and_another():
    """What denoising takes of that noise is finer: 0.35 at one voxel, where the noise has 0.6."""
    noisy, clean = scan(30.0, blur=0.7), scan(0.0)
    item, own = measured(noisy), (noisy["image"] - clean["image"])[0].numpy()
    drawn = (put_on(item)["pred"] - structure_of()["pred"])[0].numpy()
    np.testing.assert_allclose(lag_one(drawn), lag_one(own), atol=0.1)
    assert max(lag_one(item["grain"][0].numpy())) < 0.4
    assert abs(np.corrcoef(drawn.ravel(), own.ravel())[0, 1]) < 0.05


def test_grain_is_strong_where_that_of_the_template_is():
    """Twice the dose in one half: there the grain is weaker."""
    item = scan(30.0, size=(40, 20, 20))
    item["image"][:, 20:] += 30 * noise(1, 20, 20, 20, seed=5)  # sqrt(2) times the noise
    structure = {key: volume(torch.ones(1, 40, 20, 20)) for key in ("pred", "label")} | {"case": "b"}
    drawn = put_on(measured(item), structure)["pred"][0].numpy() - 1
    assert drawn[28:].std() / drawn[:12].std() == pytest.approx(2**0.5, abs=0.2)


def test_grain_depends_on_case_and_seed_alone():
    item = measured(scan(30.0))
    torch.manual_seed(0)
    first = put_on(item, seed=3)["pred"]
    torch.manual_seed(1)
    assert torch.equal(put_on(item, seed=3)["pred"], first)
    clean = structure_of()["pred"]
    for other in (put_on(item, seed=4)["pred"], put_on(item, {**structure_of(), "case": "c"}, seed=3)["pred"]):
        pair = [(part - clean).as_tensor().flatten() for part in (first, other)]
        assert abs(float(torch.corrcoef(torch.stack(pair))[0, 1])) < 0.05


def test_grain_is_not_the_noise_that_the_sample_was_drawn_from():
    item = measured(scan(30.0))
    drawn = (put_on(item, seed=3)["pred"] - structure_of()["pred"]).as_tensor().flatten()
    sampled = case_noise((28, 26, 24), 3, "b").flatten()
    assert abs(float(torch.corrcoef(torch.stack([drawn, sampled]))[0, 1])) < 0.05


def test_without_grain_the_structure_is_the_image():
    assert torch.equal(put_on(measured(scan(30.0)), factor=0.0)["pred"], structure_of()["pred"])


def test_a_structure_as_noisy_as_the_scan_gets_no_more():
    noisy = structure_of()
    noisy["pred"] = noisy["pred"] + 40 * noise(1, 28, 26, 24, seed=4)
    assert torch.equal(put_on(measured(scan(30.0)), noisy)["pred"], noisy["pred"])


def test_the_structure_is_kept_under_the_name_that_is_asked_for():
    item = measured(scan(30.0))
    assert "structure" not in put_on(item)
    kept = put_on(item, structure_key="structure")
    assert torch.equal(kept["structure"], structure_of()["pred"])
    assert torch.equal(kept["pred"], put_on(item)["pred"])
    assert not torch.equal(kept["pred"], kept["structure"])


def test_an_image_with_grain_stays_within_its_limits():
    result = put_on(measured(scan(30.0)), hu_range=(-70.0, 390.0))["pred"]
    assert result.min() == -70
    assert result.max() == 390


def test_the_labels_of_a_truth_come_after_its_scan():
    """As in validation, where a scan taken for labels would be as many as it has values."""
    item, structure = measured(scan(30.0)), structure_of()
    truth = torch.cat([structure["pred"] + noise(1, *structure["pred"].shape[1:]), structure["label"]])
    result, usual = put_on(item, {**structure, "label": truth}), put_on(item, structure)
    assert torch.equal(result["pred"], usual["pred"])
    assert not torch.equal(usual["pred"], structure["pred"])


def test_negative_grain_is_refused():
    with pytest.raises(ValueError, match=r"grain: must be 0 \(none\) or more, 1 for that of the template, got -0.5"):
        AddGraind(factor=-0.5)


def test_statistics_are_measured_on_the_named_pair():
    item = {f"template_{key}": value for key, value in scan(30.0).items()}
    result = LabelStatisticsd("template_image", "template_label", num_labels=3)(item)
    image, label = (item[key].as_tensor() for key in ("template_image", "template_label"))
    torch.testing.assert_close(result["statistics"], label_statistics(image, label, 3), equal_nan=True)
    assert result["statistics"][:, 0].tolist() == pytest.approx([-50, 250, np.nan], abs=3, nan_ok=True)


# Alignment


def test_a_template_on_its_own_mask_stays_where_it_is():
    item = make_item() | {"label": template()}
    result = AlignTemplated(labels=[1, 2])(item)
    assert (result["template_label"] != item["template_label"]).float().mean() < 0.01
    difference = (result["template_image"] - item["template_image"]).as_tensor()[item["template_label"] == 1]
    assert difference.abs().median() < 5


def test_a_shifted_template_is_carried_onto_the_target_grid():
    size = (18, 12, 13)
    label, moved = torch.zeros(1, *SIZE), torch.zeros(1, *size)
    box(label, 1, (3, 3, 3), (10, 9, 10))
    box(moved, 1, (8, 3, 3), (15, 9, 10))
    strength = torch.arange(18.0).view(1, 18, 1, 1).expand(1, *size)
    item = {"label": volume(label), "template_label": volume(moved), "template_image": volume(400 * moved)}
    result = AlignTemplated(labels=[1])({**item, "grain_sd": volume(strength)})
    for key in ("template_label", "template_image", "grain_sd"):
        assert result[key].shape == (1, *SIZE)
        assert torch.equal(result[key].affine, AFFINE)
    overlap = ((result["template_label"] == 1) & (label == 1)).sum() / (label == 1).sum()
    assert overlap > 0.9
    assert result["template_image"][label == 1].mean() > 350
    carried = result["grain_sd"][0, 4:9, 6, 6].as_tensor()  # five voxels on, as the heart
    torch.testing.assert_close(carried, torch.arange(9.0, 14.0), rtol=0, atol=0.7)


def test_labels_that_do_not_drive_the_alignment_do_not_count_as_shared():
    with pytest.raises(
        ValueError, match=r"case.nii.gz and template /data/case.nii.gz share none of the labels \[7, 9\]"
    ):
        AlignTemplated(labels=[7, 9])(make_item())


# Contrast


def scanned(case="a"):
    """A template with a bright label 2 and a dark label 1, its statistics, and no grain."""
    label = torch.zeros(1, *SIZE)
    box(label, 1, (8, 2, 2), (13, 10, 11))
    box(label, 2, (1, 2, 2), (7, 10, 11))
    label, image = volume(label), volume(torch.tensor([-60.0, 100.0, 400.0])[label.long()])
    statistics = label_statistics(as_batch(image), as_batch(label), 3)
    return {"template_image": image, "template_label": label, "statistics": statistics, "case": case}


def test_contrast_varies_by_label_and_what_is_filled_varies_together():
    vary = VaryContrastd(contrast_shift_hu=80.0, label_shift_hu=0.0, seed=1)
    item, given = vary(scanned()), scanned()
    change = item["statistics"][:, 0] - given["statistics"][:, 0]
    torch.testing.assert_close(item["mean_change_hu"], change, equal_nan=True)
    assert abs(float(change[2])) > 5
    assert float(change[1]) == pytest.approx(0, abs=0.1)
    inside = ndimage.binary_erosion(as_batch(item["template_label"])[0, 0].numpy() != 2, iterations=3)
    moved = (as_batch(item["template_image"]) - as_batch(given["template_image"]))[0, 0].numpy()
    assert np.abs(moved[inside]).max() < 1e-3, "what is not filled must stay"
    measured = label_statistics(as_batch(item["template_image"]), as_batch(item["template_label"]), 3)
    torch.testing.assert_close(item["statistics"], measured)


def test_contrast_depends_on_seed_and_case_alone():
    def change(case, seed):
        vary = VaryContrastd(contrast_shift_hu=80.0, label_shift_hu=20.0, seed=seed)
        vary(scanned("another"))
        return as_batch(vary(scanned(case))["template_image"])

    assert torch.equal(change("a", 0), change("a", 0))
    assert not torch.equal(change("a", 0), change("b", 0))
    assert not torch.equal(change("a", 0), change("a", 1))


def test_contrast_shifts_have_the_stated_deviation():
    vary = VaryContrastd(contrast_shift_hu=0.0, label_shift_hu=30.0, seed=0)
    centre = (0, 4, 6, 6)  # deep in label 2
    shifts = [float(vary(scanned(str(i)))["template_image"][centre]) - 400 for i in range(200)]
    assert np.std(shifts) == pytest.approx(30, rel=0.15)
    with pytest.raises(ValueError, match="contrast_shift_hu, label_shift_hu: must not be negative"):
        VaryContrastd(contrast_shift_hu=-1.0, label_shift_hu=0.0, seed=0)


def test_shifts_are_reflected_where_a_mean_would_be_implausible():
    """Label 2 has 400 HU, label 1 has 100 HU: a shift of label 2 to 400 + s is folded into 350 to 450."""
    limits = {"2": [350.0, 450.0], "1": [120.0, 200.0]}
    free, bound = (
        VaryContrastd(contrast_shift_hu=0.0, label_shift_hu=80.0, seed=0, plausible_hu=plausible)
        for plausible in (None, limits)
    )
    centres, folded = {1: (0, 10, 6, 6), 2: (0, 4, 6, 6)}, 0
    for case in map(str, range(40)):
        wild, kept = free(scanned(case))["template_image"], bound(scanned(case))["template_image"]
        assert float(kept[centres[1]]) == pytest.approx(float(wild[centres[1]])), "it starts outside its range"
        drawn, expected = float(wild[centres[2]]), float(wild[centres[2]])
        while not 350 <= expected <= 450:
            expected = 700 - expected if expected < 350 else 900 - expected
        assert float(kept[centres[2]]) == pytest.approx(expected, abs=1e-3)
        folded += drawn != expected
    assert folded > 5
    VaryContrastd(contrast_shift_hu=0.0, label_shift_hu=80.0, seed=0, plausible_hu={"7": [0, 1]})(scanned())
    with pytest.raises(ValueError, match="plausible_hu: label 2 needs a lowest below its highest mean"):
        VaryContrastd(contrast_shift_hu=0.0, label_shift_hu=80.0, seed=0, plausible_hu={"2": [450.0, 350.0]})


def test_each_label_may_have_a_deviation_of_its_own():
    vary = VaryContrastd(contrast_shift_hu=0.0, label_shift_hu=[50.0, 0.0, 30.0], seed=0)
    given, centre = scanned(), (0, 4, 6, 6)
    changes = [vary(scanned(str(i)))["template_image"] - given["template_image"] for i in range(200)]
    assert np.std([float(change[centre]) for change in changes]) == pytest.approx(30, rel=0.15)
    statistics = vary(scanned("0"))["statistics"] - given["statistics"]
    assert float(statistics[1, 0]) == pytest.approx(0, abs=0.1)
    with pytest.raises(ValueError, match="label_shift_hu: needs one value, or one for each of 3 labels"):
        VaryContrastd(contrast_shift_hu=0.0, label_shift_hu=[1.0, 2.0], seed=0)(given)
    with pytest.raises(ValueError, match="must not be negative"):
        VaryContrastd(contrast_shift_hu=0.0, label_shift_hu=[0.0, -2.0, 1.0], seed=0)
