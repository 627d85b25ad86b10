"""Every config of `structdiff_seg_cal` on four phantoms."""

import unittest

from bundle_test import BundleTest


class TestStructDiffSegCal(BundleTest):
    """From synthetic volumes with confidence to a segmentation."""

    name = "structdiff_seg_cal"

    def test_1_pretrain_config(self) -> None:
        """The segmenter is pre-trained, weighted by confidence."""
        self.run_entry("pretrain")

    def test_2_train_config(self) -> None:
        """It goes on with the training cases."""
        self.run_entry("train")

    def test_3_evaluate_config(self) -> None:
        """It is measured on the test case."""
        self.run_entry("evaluate")

    def test_4_inference_config(self) -> None:
        """The test image is segmented."""
        self.run_entry("inference")


if __name__ == "__main__":
    unittest.main()
