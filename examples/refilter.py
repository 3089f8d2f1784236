"""Filter a stored trace again with other measures and thresholds, without a model.

Usage: `python examples/refilter.py TRACE [THRESHOLD ...]`. The default is the trace of `forgetfilter demo`.
"""

import sys

import numpy as np

from forgetfilter_callback import FilterConfig, Trace, find_forgotten
from forgetfilter_callback.errors import TraceError


folder, *thresholds = sys.argv[1:] or ["forgetfilter-demo/_forgetfilter"]
trace = Trace.open(folder)
print(trace)
for measure in ("combined", "smoothed", "loss", "relative", "pooled"):
    try:
        values = trace.forgetting(measure)
    except TraceError as error:  # `relative` needs a record of the base model
        print(f"{measure}: {error}")
        continue
    print(f"\n{measure}: quartiles {np.nanquantile(values, [0, 0.25, 0.5, 0.75, 1]).round(3).tolist()}")
    print("  auto   ", find_forgotten(trace, FilterConfig(measure)).summary())
    for threshold in thresholds:
        print(f"  {threshold:7}", find_forgotten(trace, FilterConfig(measure, float(threshold))).summary())
    print("  top 20%", find_forgotten(trace, FilterConfig(measure, fraction=0.2)).summary())
