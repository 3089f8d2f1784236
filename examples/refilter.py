"""A stored trace at other measures and other φ. No model is touched: `python examples/refilter.py TRACE [φ …]`"""

import sys

import numpy as np

from forgetfilter_callback import Trace, find_forgotten
from forgetfilter_callback.errors import TraceError


folder, *thresholds = sys.argv[1:] or ["forgetfilter-demo/_forgetfilter"]
trace = Trace.open(folder)
print(trace)
for measure in ("smoothed", "loss", "relative", "pooled"):
    try:
        values = trace.forgetting(measure)
    except TraceError as error:  # a trace without the base model's record has no relative forgetting
        print(f"{measure}: {error}")
        continue
    print(f"\n{measure}: quartiles {np.nanquantile(values, [0, 0.25, 0.5, 0.75, 1]).round(3).tolist()}")
    print("  auto   ", find_forgotten(trace, measure).summary())
    for threshold in thresholds:
        print(f"  {threshold:7}", find_forgotten(trace, measure, float(threshold)).summary())
    print("  top 20%", find_forgotten(trace, measure, share=0.2).summary())
