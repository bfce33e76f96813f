"""How gradients are measured: the probes, and what a probe or a metric of your own must offer."""

from adabatch.runtime.probes.comm_hook import CommHookProbe
from adabatch.runtime.probes.metrics import AdamMetric, KFACMetric, Metric
from adabatch.runtime.probes.micro_batch import MicroBatchProbe
from adabatch.runtime.probes.per_example import PerExampleProbe
from adabatch.runtime.probes.protocol import Probe
from adabatch.runtime.probes.reduce_scatter import ReduceScatterProbe

__all__ = [
    "AdamMetric",
    "CommHookProbe",
    "KFACMetric",
    "Metric",
    "MicroBatchProbe",
    "PerExampleProbe",
    "Probe",
    "ReduceScatterProbe",
]
