// The plots.

function cssColor(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}
function layout(extra) {
  const text = cssColor("--text"), line = cssColor("--line");
  const axis = { gridcolor: line, zerolinecolor: line, automargin: true };
  return {
    margin: { l: 50, r: 10, t: 10, b: 45 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: text }, showlegend: false, ...extra,
    xaxis: { ...axis, ...extra.xaxis }, yaxis: { ...axis, ...extra.yaxis },
  };
}
const config = { responsive: true, displaylogo: false, displayModeBar: false };
function phiLine(vertical) {
  if (exportedThreshold === null) return [];
  const along = vertical ? { x0: phi, x1: phi, y0: 0, y1: 1, yref: "paper" } : { y0: phi, y1: phi, x0: 0, x1: 1, xref: "paper" };
  return [{ type: "line", line: { color: cssColor("--text"), width: 3, dash: "dash" }, ...along }];
}

function drawDistribution() {
  const values = byRecord[$("record").selectedIndex];
  const size = (highest - lowest) / BINS || 1;
  const bins = { start: lowest, end: highest + size, size };
  const those = (included) => values.filter((_, i) => included(i));
  const removed = plottedRemovals();
  // Audit labels have their own colors, because red and blue already mean removed and kept.
  const groups = unsafe === null
    ? [["kept", "--kept", those((i) => !removed[i])], ["removed", "--removed", those((i) => removed[i])]]
    : [["not labeled unsafe", "--audit-others", those((i) => !unsafe[i])], ["labeled unsafe", "--audit-unsafe", those((i) => unsafe[i])]];
  const traces = groups.map(([name, color, x]) => ({ type: "histogram", x, name, marker: { color: cssColor(color) }, xbins: bins }));
  Plotly.react("distribution", traces, layout({
    barmode: "stack", showlegend: unsafe !== null, legend: { orientation: "h", x: 0, y: 1.35 }, shapes: phiLine(true),
    margin: { l: 50, r: 10, t: unsafe === null ? 25 : 50, b: 45 },
    annotations: exportedThreshold === null ? [] : [["right", "kept ", "--kept"], ["left", " removed", "--removed"]].map(([xanchor, text, color]) => ({
      x: phi, y: 1, yref: "paper", xanchor, yanchor: "bottom", text, showarrow: false, font: { color: cssColor(color) },
    })),
    xaxis: { title: { text: `${data.measure} forgetting [${data.unit}], higher is more forgotten` } }, yaxis: { title: { text: "rows" } },
  }), { ...config, edits: { shapePosition: true } });
}

function drawTrajectories() {
  const steps = [0, ...data.steps], removed = plottedRemovals();
  const order = last.map((_, i) => i).filter((i) => Number.isFinite(last[i])).sort((a, b) => last[a] - last[b]);
  const drawn = order.filter((_, rank) => rank % Math.ceil(order.length / MAX_LINES) === 0);
  const line = (indices, color, width, opacity) => ({
    mode: "lines", x: steps, hoverinfo: "skip", line: { color, width }, opacity,
    y: [0, ...byRecord.map((values) => median(indices.map((i) => values[i])))],
  });
  const traces = drawn.map((i) => line([i], cssColor(removed[i] ? "--removed" : "--kept"), 1, 0.35));
  for (const [name, isRemoved] of [["--removed", true], ["--kept", false]]) {
    const group = order.filter((i) => removed[i] === isRemoved);
    if (group.length) traces.push(line(group, cssColor(name), 4, 1));
  }
  Plotly.react("trajectories", traces, layout({ xaxis: { title: { text: "step of the safety session (thick lines: medians)" } } }), config);
}
function median(values) {
  const sorted = values.filter(Number.isFinite).sort((a, b) => a - b);
  return sorted[Math.floor(sorted.length / 2)];
}

function drawScatter(id, x, title) {
  const step = Math.ceil(last.length / MAX_POINTS);
  const indices = last.map((_, i) => i).filter((i) => i % step === 0), removed = plottedRemovals();
  Plotly.react(id, [{
    mode: "markers", x: indices.map((i) => x[i]), y: indices.map((i) => last[i]), hoverinfo: "skip",
    marker: { size: 5, opacity: 0.6, color: indices.map((i) => cssColor(removed[i] ? "--removed" : "--kept")) },
  }], layout({ xaxis: { title: { text: title } }, shapes: phiLine(false) }), config);
}

function drawAll() {
  drawDistribution();
  drawTrajectories();
  drawScatter("by-length", lengths, "loss tokens");
  drawScatter("by-initial-loss", initialLosses, `mean loss of the ${data.initial_model} [nats per token]`);
}
