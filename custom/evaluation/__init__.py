"""How good renderings, sets and segmentations are."""

from custom.evaluation.distances import radiomic_features, radiomic_names
from custom.evaluation.handlers import (
    LabelTable,
    MetricColumns,
    MetricsFile,
    MetricsTable,
    Previews,
    SegmentationPictures,
)
from custom.evaluation.labels import DiceMetric, LabelMetrics, PresenceMetric, SurfaceMetric, TopologyMetric
from custom.evaluation.records import read_set
from custom.evaluation.rendering import RenderingMetric
from custom.evaluation.sets import measure_set
from custom.evaluation.traits import case_traits

__all__ = [
    "DiceMetric",
    "LabelMetrics",
    "LabelTable",
    "MetricColumns",
    "MetricsFile",
    "MetricsTable",
    "PresenceMetric",
    "Previews",
    "RenderingMetric",
    "SegmentationPictures",
    "SurfaceMetric",
    "TopologyMetric",
    "case_traits",
    "measure_set",
    "radiomic_features",
    "radiomic_names",
    "read_set",
]
