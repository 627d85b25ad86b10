"""How good renderings, sets and segmentations are."""

from custom.evaluation.distances import radiomic_features, radiomic_names
from custom.evaluation.handlers import LabelTable, MetricsTable, Previews, SegmentationPictures
from custom.evaluation.labels import MillimetreMetric, TopologyMetric
from custom.evaluation.rendering import RenderingMetric
from custom.evaluation.sets import measure_set

__all__ = [
    "LabelTable",
    "MetricsTable",
    "MillimetreMetric",
    "Previews",
    "RenderingMetric",
    "SegmentationPictures",
    "TopologyMetric",
    "measure_set",
    "radiomic_features",
    "radiomic_names",
]
