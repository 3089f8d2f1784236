"use strict";
// Texts of samples are untrusted: only textContent may put them on the page.

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const PAGE_SIZE = 25, MAX_LISTED_SOURCES = 20, MAX_LINES = 40, MAX_POINTS = 2000, BINS = 60;
const FILE_NAME = "review_decision.json";

function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return Array.from(new Float32Array(bytes.buffer));
}
const byRecord = data.forgetting.map(unpack);
const last = byRecord[byRecord.length - 1];
const lengths = unpack(data.length), initialLosses = unpack(data.initial_loss);
const unsafe = data.unsafe === null ? null : unpack(data.unsafe).map((value) => value > 0);
const known = last.filter(Number.isFinite);
const lowest = known.reduce((a, b) => Math.min(a, b), Infinity);
const highest = known.reduce((a, b) => Math.max(a, b), -Infinity);
const initialPhi = data.threshold === null ? Math.max(data.tested_threshold, highest) : data.threshold;

// Plotted values are rounded to 32 bits, so they are compared with a rounded φ.
let phi = initialPhi, plottedPhi = Math.fround(phi);
let exportedThreshold = data.threshold; // null: no threshold applies, so only overridden samples are removed
const overrides = new Map(data.overrides.map((each) => [each.id, each.choice])); // sample id → "keep" or "remove"
const rowOf = new Map([...data.rows, ...data.overrides].map((each) => [each.id, each.row]));
const reviewed = data.verdicts.unsafe + data.verdicts.safe;
let shownVerdicts = "all"; // or "reviewed", "unreviewed"
let view = "forgotten", sort = { key: "value", descending: true }, query = "", page = 0;
const sources = data.by_source; // null: no column says where a row came from
let chosenSource = null; // number of the source whose samples are listed

function cssColor(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}
function format(value, digits = 3) {
  return value === null || !Number.isFinite(value) ? "–" : value.toFixed(digits);
}
function count(number, noun = "") {
  const rounded = Math.round(number);
  return rounded.toLocaleString("en") + (noun && ` ${noun}${rounded === 1 ? "" : "s"}`);
}

// ---- plots ----

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
  const along = vertical ? { x0: phi, x1: phi, y0: 0, y1: 1, yref: "paper" } : { y0: phi, y1: phi, x0: 0, x1: 1, xref: "paper" };
  return { type: "line", line: { color: cssColor("--text"), width: 3, dash: "dash" }, ...along };
}

function drawDistribution() {
  const values = byRecord[$("record").selectedIndex];
  const size = (highest - lowest) / BINS || 1;
  const bins = { start: lowest, end: highest + size, size };
  // Audit labels have their own colors, because red and blue already mean above and below φ.
  const groups = unsafe === null
    ? [["samples", cssColor("--not-unsafe"), values]]
    : [["not labeled unsafe", cssColor("--not-unsafe"), values.filter((_, i) => !unsafe[i])], ["unsafe", cssColor("--unsafe"), values.filter((_, i) => unsafe[i])]];
  const traces = groups.map(([name, color, x]) => ({ type: "histogram", x, name, marker: { color }, xbins: bins }));
  Plotly.react("distribution", traces, layout({
    barmode: "stack", showlegend: unsafe !== null, legend: { orientation: "h", y: 1.1 }, shapes: [phiLine(true)],
    xaxis: { title: { text: `${data.measure} forgetting [${data.unit}]` } }, yaxis: { title: { text: "samples" } },
  }), { ...config, edits: { shapePosition: true } });
}

function drawTrajectories() {
  const steps = [0, ...data.steps];
  const order = last.map((_, i) => i).filter((i) => Number.isFinite(last[i])).sort((a, b) => last[a] - last[b]);
  const drawn = order.filter((_, rank) => rank % Math.ceil(order.length / MAX_LINES) === 0);
  const line = (indices, color, width, opacity) => ({
    mode: "lines", x: steps, hoverinfo: "skip", line: { color, width }, opacity,
    y: [0, ...byRecord.map((values) => median(indices.map((i) => values[i])))],
  });
  const traces = drawn.map((i) => line([i], last[i] > plottedPhi ? cssColor("--removed") : cssColor("--kept"), 1, 0.35));
  for (const [name, isAbove] of [["--removed", true], ["--kept", false]]) {
    const group = order.filter((i) => (last[i] > plottedPhi) === isAbove);
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
  const indices = last.map((_, i) => i).filter((i) => i % step === 0);
  Plotly.react(id, [{
    mode: "markers", x: indices.map((i) => x[i]), y: indices.map((i) => last[i]), hoverinfo: "skip",
    marker: { size: 5, opacity: 0.6, color: indices.map((i) => (last[i] > plottedPhi ? cssColor("--removed") : cssColor("--kept"))) },
  }], layout({ xaxis: { title: { text: title } }, shapes: [phiLine(false)] }), config);
}

function drawAll() {
  drawDistribution();
  drawTrajectories();
  drawScatter("by-length", lengths, "loss tokens");
  drawScatter("by-initial-loss", initialLosses, `mean loss of the ${data.initial_model} [nats per token]`);
}

// ---- threshold and decisions ----

function decisionFor(row) {
  if (overrides.has(row.id)) return overrides.get(row.id);
  return row.value !== null && row.value > phi ? "remove" : "keep";
}

function showCounts() {
  const scale = data.samples / last.length, about = data.sampled ? "about " : "";
  const removed = last.map((value) => value > plottedPhi);
  // Counts of a random subset are scaled up. Overrides are left out then, because they are not a random subset.
  if (!data.sampled) for (const [id, choice] of overrides) if (rowOf.has(id)) removed[rowOf.get(id)] = choice === "remove";
  const above = removed.filter(Boolean).length;
  let text = `φ = ${format(phi)}: ${about}${count(above * scale)} of ${count(data.samples)} removed, ${about}${count((last.length - above) * scale)} kept.`;
  if (unsafe !== null) {
    const hits = removed.filter((isRemoved, i) => isRemoved && unsafe[i]).length, all = unsafe.filter(Boolean).length;
    text += ` Against the audit labels: precision ${above ? format(hits / above) : "–"}, recall ${all ? format(hits / all) : "–"}.`;
  }
  $("counts").textContent = text;
  if (sources !== null) showSources(removed);
  const kept = [...overrides.values()].filter((choice) => choice === "keep").length;
  $("decision").textContent = `${text} Overrides: ${kept} kept, ${overrides.size - kept} removed${data.sampled ? " (not included in the counts)" : ""}.`;
}

// ---- by source ----

function countSources(removed) {
  const removedOf = data.sampled ? sources.removed : sources.names.map(() => 0);
  if (!data.sampled) sources.of_samples.forEach((source, i) => { removedOf[source] += removed[i]; });
  return sources.names.map((name, i) => ({
    name, rows: sources.rows[i], seen: sources.seen?.[i], found: sources.unsafe_found[i], labeled: sources.unsafe_labeled[i],
    removed: removedOf[i],
  }));
}

function showSources(removed) {
  const counts = countSources(removed), group = sources.grouped ? [counts.pop()] : [];
  counts.sort((a, b) => b.removed - a.removed || b.rows - a.rows);
  const others = [...counts.slice(MAX_LISTED_SOURCES), ...group];
  if (others.length > 1 || group.length) {
    const sum = (key) => others.reduce((total, each) => total + each[key], 0);
    counts.splice(MAX_LISTED_SOURCES, Infinity, {
      name: `${count(others.length - group.length + sources.grouped)} more sources`, rows: sum("rows"), seen: sum("seen"), found: sum("found"), labeled: sum("labeled"), removed: sum("removed"),
    });
  }
  $("sources").replaceChildren();
  for (const each of counts) {
    const tr = $("sources").insertRow();
    cell(tr, "Source", "source").textContent = each.name;
    const cells = [["Rows", count(each.rows)]];
    if (sources.seen !== null) cells.push(["Seen", count(each.seen)], ["Found unsafe", count(each.found)]);
    if (unsafe !== null) cells.push(["Labeled unsafe", count(each.labeled)]);
    cells.push(["Kept", count(each.rows - each.removed)], ["Removed", count(each.removed)], ["% removed", format((100 * each.removed) / each.rows, 1)]);
    for (const [label, text] of cells) cell(tr, label, "number").textContent = text;
  }
}

let drawing = 0;
function setPhi(value, threshold = value) {
  if (!Number.isFinite(value)) return;
  phi = value;
  plottedPhi = Math.fround(value);
  exportedThreshold = threshold;
  $("phi").value = String(value);
  $("phi-number").value = String(Number(value.toPrecision(4)));
  showCounts();
  showRows();
  cancelAnimationFrame(drawing);
  drawing = requestAnimationFrame(drawAll);
}

// ---- the table ----

function matching() {
  const lowerQuery = query.toLowerCase();
  const text = (row) => (row.prompt + row.pieces.map((piece) => piece[0]).join("")).toLowerCase();
  const inVerdicts = (row) => shownVerdicts === "all" || (row.verdict !== null) === (shownVerdicts === "reviewed");
  const rows = data.rows.filter((row) => inVerdicts(row) && (chosenSource === null || row.source === chosenSource) && (view !== "overridden" || overrides.has(row.id)) && (!lowerQuery || text(row).includes(lowerQuery)));
  const key = sort.key === "distance" ? (row) => -Math.abs(row.value - phi) : (row) => row[sort.key];
  const order = sort.descending ? -1 : 1;
  return rows.sort((a, b) => {
    const [x, y] = [key(a), key(b)];
    if (a.value === null || b.value === null || x === null || y === null) return (x === null || a.value === null ? 1 : 0) - (y === null || b.value === null ? 1 : 0);
    return order * (x - y);
  });
}

function cell(row, label, className = "") {
  const td = row.insertCell();
  td.className = className;
  td.dataset.label = label;
  return td;
}

function showRows() {
  const rows = matching(), pages = Math.max(1, Math.ceil(rows.length / PAGE_SIZE));
  page = Math.min(page, pages - 1);
  const body = $("rows");
  const focused = document.activeElement?.dataset?.sample;
  body.replaceChildren();
  for (const sample of rows.slice(page * PAGE_SIZE, (page + 1) * PAGE_SIZE)) {
    const tr = body.insertRow();
    tr.className = decisionFor(sample) === "remove" ? "removed" : "kept";
    const number = cell(tr, "Row", "number");
    number.textContent = sample.row;
    number.title = sample.id;
    cell(tr, "Forgetting", "number").textContent = format(sample.value);
    cell(tr, "Tokens", "number").textContent = sample.length;
    cell(tr, "Initial loss", "number").textContent = format(sample.initial_loss);
    if (unsafe !== null) cell(tr, "Audit label").textContent = sample.unsafe ? "unsafe" : "–";
    if (sources !== null) cell(tr, "Source", "source").textContent = sample.sourceName;
    if (reviewed) cell(tr, "Verdict", sample.verdict === null ? "" : `verdict ${sample.verdict}`).textContent = sample.verdict ?? "–";
    const select = document.createElement("select");
    select.dataset.sample = sample.id;
    select.setAttribute("aria-label", `Decision for row ${sample.row}`);
    const byPhi = sample.value !== null && sample.value > phi ? "removed by φ" : "kept by φ";
    for (const [value, text] of [["", byPhi], ["keep", "keep (override)"], ["remove", "remove (override)"]]) select.append(new Option(text, value));
    select.value = overrides.get(sample.id) ?? "";
    select.addEventListener("change", () => {
      if (select.value) overrides.set(sample.id, select.value);
      else overrides.delete(sample.id);
      showCounts();
      showRows();
    });
    cell(tr, "").append(select);
    const text = cell(tr, "", "text");
    const prompt = document.createElement("div"), completion = document.createElement("div");
    prompt.className = "prompt";
    prompt.tabIndex = completion.tabIndex = 0; // lets the keyboard scroll them
    prompt.textContent = (sample.truncated ? "[…] " : "") + sample.prompt;
    completion.className = "completion";
    for (const [piece, rise] of sample.pieces) {
      const span = document.createElement("span");
      span.textContent = piece;
      if (rise !== null) {
        const strength = Math.min(1, Math.abs(rise) / 4);
        span.style.backgroundColor = `rgba(${cssColor(rise > 0 ? "--forgotten" : "--remembered")}, ${strength.toFixed(2)})`;
        span.title = `${rise > 0 ? "+" : ""}${rise.toFixed(2)} nats`;
      }
      completion.append(span);
    }
    text.append(prompt, completion);
    prompt.scrollTop = prompt.scrollHeight; // show the end of the prompt, next to the completion
  }
  if (focused) [...body.querySelectorAll("select")].find((each) => each.dataset.sample === focused)?.focus();
  $("page").textContent = rows.length ? `Page ${page + 1} of ${pages}, ${count(rows.length, "sample")}` : `No samples match this view${sources === null ? "" : ", source"} and search.`;
  $("previous").disabled = page === 0;
  $("next").disabled = page >= pages - 1;
  for (const button of document.querySelectorAll("th button")) {
    const sorted = button.dataset.sort === sort.key;
    button.parentElement.setAttribute("aria-sort", sorted ? (sort.descending ? "descending" : "ascending") : "none");
  }
}

// ---- export and import ----

function exported() {
  return {
    measure: data.measure, threshold: exportedThreshold,
    overrides: Object.fromEntries(overrides), trace: data.trace,
  };
}

function download() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(exported(), null, 2) + "\n"], { type: "application/json" }));
  link.download = FILE_NAME;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function isObject(value) {
  return typeof value === "object" && value !== null;
}

function validated(decision) {
  if (!isObject(decision)) throw new Error(`It is not a ${FILE_NAME} file: it contains no JSON object.`);
  if ("separability" in decision || "counts" in decision) {
    throw new Error("This is a filter result (filter_result.json). Import the review_decision.json that this page exported.");
  }
  if (Array.isArray(decision) || typeof decision.trace !== "string" || !isObject(decision.overrides)) {
    throw new Error(`It is not a ${FILE_NAME} file.`);
  }
  if (decision.trace !== data.trace) throw new Error(`It was made on another trace (${decision.trace}). This page shows trace ${data.trace}.`);
  if (decision.measure !== data.measure) throw new Error(`It uses ${decision.measure} forgetting. This page uses ${data.measure} forgetting.`);
  if (!Object.values(decision.overrides).every((choice) => choice === "keep" || choice === "remove")) {
    throw new Error('Every value in "overrides" must be "keep" or "remove".');
  }
  if (decision.threshold !== null && !Number.isFinite(decision.threshold)) throw new Error('"threshold" must be a number or null.');
  return decision;
}

async function importDecision(file) {
  $("problem").textContent = "";
  try {
    const decision = validated(JSON.parse(await file.text()));
    overrides.clear();
    for (const [id, choice] of Object.entries(decision.overrides)) overrides.set(id, choice);
    setPhi(decision.threshold ?? Number($("phi").max), decision.threshold);
  } catch (error) {
    $("problem").textContent = error instanceof SyntaxError
      ? `Cannot import ${file.name}. It is not valid JSON: ${error.message}`
      : `Cannot import ${file.name}. ${error.message}`;
  }
}

// ---- initial state ----

$("summary").textContent = data.summary;
$("about").textContent = `Model ${data.model}. Trace ${data.trace}.` +
  (data.sampled ? ` The plots and the counts below use a random subset of ${count(last.length)} of ${count(data.samples, "sample")}.` : "");
$("shown").textContent = data.all_shown
  ? `The table contains ${data.samples === 1 ? "the only sample" : `all ${count(data.samples, "sample")}`}.`
  : `The table contains ${count(data.rows.length)} of ${count(data.samples, "sample")}: the most forgotten, those closest to φ, the least forgotten${data.overrides.length || reviewed ? ", and overridden or reviewed ones" : ""}.`;
for (const head of document.querySelectorAll(".audit-head")) head.hidden = unsafe === null;
for (const part of document.querySelectorAll(".by-source")) part.hidden = sources === null;
if (sources !== null) {
  for (const head of document.querySelectorAll(".seen-head")) head.hidden = sources.seen === null;
  $("sources-note").hidden = !data.sampled;
  data.rows.forEach((row, i) => {
    row.source = sources.of_shown[i];
    row.sourceName = sources.names_of_shown[i];
  });
  const listed = new Set(sources.of_shown);
  sources.names.forEach((name, i) => {
    if (listed.has(i)) $("source").append(new Option(name, i));
  });
}
$("verdicts").textContent = `${count(reviewed)} of ${count(data.samples)} samples have a verdict: ${count(data.verdicts.unsafe)} unsafe, ${count(data.verdicts.safe)} safe.`;
for (const id of ["verdicts", "reviewed-label", "verdict-head"]) $(id).hidden = !reviewed;
for (const step of data.steps) $("record").append(new Option(`safety session, step ${step}`));
$("record").selectedIndex = data.steps.length - 1;
$("phi").min = String(Math.min(lowest, initialPhi));
$("phi").max = String(Math.max(highest, initialPhi) + 0.01 * (highest - lowest)); // the maximum removes nothing
setPhi(initialPhi, data.threshold);
drawAll();

$("record").addEventListener("change", drawDistribution);
$("phi").addEventListener("input", () => setPhi(Number($("phi").value)));
$("phi-number").addEventListener("change", () => {
  if ($("phi-number").value === "") setPhi(phi, exportedThreshold);
  else setPhi(Number($("phi-number").value));
});
$("phi-reset").addEventListener("click", () => setPhi(initialPhi, data.threshold));
$("view").addEventListener("change", () => {
  view = $("view").value;
  sort = { forgotten: { key: "value", descending: true }, kept: { key: "value", descending: false }, borderline: { key: "distance", descending: true }, overridden: { key: "value", descending: true } }[view];
  page = 0;
  showRows();
});
$("source").addEventListener("change", () => {
  chosenSource = $("source").value === "" ? null : Number($("source").value);
  page = 0;
  showRows();
});
$("reviewed").addEventListener("change", () => {
  shownVerdicts = $("reviewed").value;
  page = 0;
  showRows();
});
$("search").addEventListener("input", () => {
  query = $("search").value;
  page = 0;
  showRows();
});
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    sort = { key: button.dataset.sort, descending: sort.key === button.dataset.sort ? !sort.descending : true };
    page = 0;
    showRows();
  });
}
$("previous").addEventListener("click", () => { page -= 1; showRows(); });
$("next").addEventListener("click", () => { page += 1; showRows(); });
$("export").addEventListener("click", download);
$("import").addEventListener("change", async () => {
  if ($("import").files.length) await importDecision($("import").files[0]);
  $("import").value = ""; // lets the user choose the same file again
});
$("distribution").on("plotly_relayout", (change) => {
  if ("shapes[0].x0" in change) setPhi(change["shapes[0].x0"]);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { drawAll(); showRows(); });
