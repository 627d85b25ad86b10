"""What two sets of cases are compared by."""

import numpy as np
import pytest
from custom.evaluation.traits import case_traits

NAMES = ["background", "blood", "vessel", "absent"]


def measured(label, image, spacing_mm=(1.0, 1.0, 2.0)):
    return case_traits(image, label, spacing_mm, label_names=NAMES, thin_labels=[2])


def test_volumes_attenuation_and_vessels_are_those_drawn():
    label = np.zeros((30, 30, 30), np.uint8)
    label[2:12, 2:12, 2:12], label[22, 22, 5:25] = 1, 2
    found = measured(label, np.array([40.0, 400.0, 300.0], np.float32)[label])
    assert found["volume_ml"] == pytest.approx({"blood": 2.0, "vessel": 0.04})
    assert found["mean_hu"] == pytest.approx({"blood": 400.0, "vessel": 300.0})
    assert found["vessel_length_mm"] == pytest.approx(38.0)  # 19 steps of 2 mm
    assert found["vessel_contrast_hu"] == pytest.approx(260.0)
    assert found["noise_hu"] == pytest.approx(0.0, abs=1e-3)


def test_what_is_not_there_is_nan_or_left_out():
    found = measured(np.zeros((8, 8, 8), np.uint8), np.zeros((8, 8, 8), np.float32))
    assert found["volume_ml"] == found["mean_hu"] == {}
    assert np.isnan(found["vessel_length_mm"])
    assert np.isnan(found["vessel_contrast_hu"])
