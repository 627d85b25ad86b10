"""Every config of `structdiff_cardiac` on four phantoms."""

import unittest

from bundle_test import BundleTest


class TestStructDiffCardiac(BundleTest):
    """From training to a synthetic data set."""

    name = "structdiff_cardiac"

    def test_1_train_config(self) -> None:
        """Weights are trained from the two training cases."""
        self.run_entry("train")

    def test_2_evaluate_config(self) -> None:
        """They are measured on the test case."""
        self.run_entry("evaluate")

    def test_3_inference_config(self) -> None:
        """The test mask is rendered with a template."""
        self.run_entry("inference")

    def test_4_generate_masks_config(self) -> None:
        """Two new masks are made."""
        self.run_entry("generate_masks")

    def test_5_calibrate_config(self) -> None:
        """The confidence table is made."""
        self.run_entry("calibrate")

    def test_6_synthesize_config(self) -> None:
        """The new masks are rendered with a confidence."""
        self.run_entry("synthesize")

    def test_7_measure_set_config(self) -> None:
        """The synthetic data set is measured."""
        self.run_entry("measure_set")

    def test_8_train_coarse_config(self) -> None:
        """The coarse stage is trained from the two training cases."""
        self.run_entry("train_coarse")


if __name__ == "__main__":
    unittest.main()
