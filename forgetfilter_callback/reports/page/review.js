"use strict";
// Texts of samples are hostile: they get into the page through textContent only.

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const PAGE = 25, LINES = 40, POINTS = 2000, BINS = 60;

function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return Array.from(new Float32Array(bytes.buffer));
}
const byRecord = data.forgetting.map(unpack);
const last = byRecord[byRecord.length - 1];
const lengths = unpack(data.length), base = unpack(data.base);
const unsafe = data.unsafe === null ? null : unpack(data.unsafe).map((value) => value > 0);
const known = last.filter(Number.isFinite);
const lowest = known.reduce((a, b) => Math.min(a, b), Infinity);
const highest = known.reduce((a, b) => Math.max(a, b), -Infinity);
const firstPhi = data.threshold === null ? Math.max(data.looked_at, highest) : data.threshold;

let phi = firstPhi, plottedPhi = Math.fround(phi); // plotted values are rounded to 32 bits: they compare with φ rounded too
let touched = false; // whether φ has been moved: until then it is exported as it came, null included
const byHand = new Map();
let view = "forgotten", sort = { key: "value", descending: true }, words = "", page = 0;

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}
function format(value, digits = 3) {
  return value === null || !Number.isFinite(value) ? "–" : value.toFixed(digits);
}
function count(number) {
  return Math.round(number).toLocaleString("en");
}

// ---- plots ----

function layout(extra) {
  const ink = colour("--ink"), line = colour("--line");
  const axis = { gridcolor: line, zerolinecolor: line, automargin: true };
  return {
    margin: { l: 50, r: 10, t: 10, b: 45 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: ink }, showlegend: false, ...extra,
    xaxis: { ...axis, ...extra.xaxis }, yaxis: { ...axis, ...extra.yaxis },
  };
}
const config = { responsive: true, displaylogo: false, displayModeBar: false };
function phiLine(vertical) {
  const along = vertical ? { x0: phi, x1: phi, y0: 0, y1: 1, yref: "paper" } : { y0: phi, y1: phi, x0: 0, x1: 1, xref: "paper" };
  return { type: "line", line: { color: colour("--ink"), width: 3, dash: "dash" }, ...along };
}

function drawDistribution() {
  const values = byRecord[$("record").selectedIndex];
  const size = (highest - lowest) / BINS || 1;
  const bins = { start: lowest, end: highest + size, size };
  // Colours of the audit are its own: what is removed stands on the right of φ.
  const groups = unsafe === null
    ? [["samples", colour("--not-unsafe"), values]]
    : [["not unsafe", colour("--not-unsafe"), values.filter((_, i) => !unsafe[i])], ["unsafe", colour("--unsafe"), values.filter((_, i) => unsafe[i])]];
  const traces = groups.map(([name, color, x]) => ({ type: "histogram", x, name, marker: { color }, xbins: bins }));
  Plotly.react("distribution", traces, layout({
    barmode: "stack", showlegend: unsafe !== null, legend: { orientation: "h", y: 1.1 }, shapes: [phiLine(true)],
    xaxis: { title: { text: `${data.measure} forgetting [${data.unit}]` } }, yaxis: { title: { text: "samples" } },
  }), { ...config, edits: { shapePosition: true } });
}

function drawTrajectories() {
  const steps = [0, ...data.steps];
  const order = last.map((_, i) => i).filter((i) => Number.isFinite(last[i])).sort((a, b) => last[a] - last[b]);
  const some = order.filter((_, place) => place % Math.ceil(order.length / LINES) === 0);
  const line = (indices, color, width, opacity) => ({
    mode: "lines", x: steps, hoverinfo: "skip", line: { color, width }, opacity,
    y: [0, ...byRecord.map((values) => median(indices.map((i) => values[i])))],
  });
  const traces = some.map((i) => line([i], last[i] > plottedPhi ? colour("--removed") : colour("--kept"), 1, 0.35));
  for (const [name, color] of [["--removed", true], ["--kept", false]]) {
    const group = order.filter((i) => (last[i] > plottedPhi) === color);
    if (group.length) traces.push(line(group, colour(name), 4, 1));
  }
  Plotly.react("trajectories", traces, layout({ xaxis: { title: { text: "step of S1+ (thick: medians)" } } }), config);
}
function median(values) {
  const sorted = values.filter(Number.isFinite).sort((a, b) => a - b);
  return sorted[Math.floor(sorted.length / 2)];
}

function drawScatter(id, x, title) {
  const step = Math.ceil(last.length / POINTS);
  const places = last.map((_, i) => i).filter((i) => i % step === 0);
  Plotly.react(id, [{
    mode: "markers", x: places.map((i) => x[i]), y: places.map((i) => last[i]), hoverinfo: "skip",
    marker: { size: 5, opacity: 0.6, color: places.map((i) => (last[i] > plottedPhi ? colour("--removed") : colour("--kept"))) },
  }], layout({ xaxis: { title: { text: title } }, shapes: [phiLine(false)] }), config);
}

function drawAll() {
  drawDistribution();
  drawTrajectories();
  drawScatter("by-length", lengths, "counted tokens");
  drawScatter("by-base", base, `mean loss at ${data.base_is} [nats per token]`);
}

// ---- φ and what follows from it ----

function verdict(row) {
  if (byHand.has(row.id)) return byHand.get(row.id);
  return row.value !== null && row.value > phi ? "remove" : "keep";
}

function showCounts() {
  const scale = data.samples / last.length, about = data.sampled ? "about " : "";
  const removed = last.map((value) => value > plottedPhi);
  // Of a part drawn at random, the few that are decided by hand are not scaled up: they are told, and not counted in.
  if (!data.sampled) for (const row of data.rows) if (byHand.has(row.id)) removed[row.row] = byHand.get(row.id) === "remove";
  const above = removed.filter(Boolean).length;
  let text = `φ = ${format(phi)}: ${about}${count(above * scale)} of ${count(data.samples)} removed, ${about}${count((last.length - above) * scale)} kept.`;
  if (unsafe !== null) {
    const hits = removed.filter((gone, i) => gone && unsafe[i]).length, all = unsafe.filter(Boolean).length;
    text += ` Against the audit column: precision ${above ? format(hits / above) : "–"}, recall ${all ? format(hits / all) : "–"}.`;
  }
  $("counts").textContent = text;
  const kept = [...byHand.values()].filter((choice) => choice === "keep").length;
  $("decision").textContent = `${text} By hand: ${kept} kept, ${byHand.size - kept} removed${data.sampled ? " (not counted in)" : ""}.`;
}

let drawing = 0;
function setPhi(value, moved = true) {
  if (!Number.isFinite(value)) return;
  phi = value;
  plottedPhi = Math.fround(value);
  touched = moved;
  $("phi").value = String(value);
  $("phi-number").value = String(Number(value.toPrecision(4)));
  showCounts();
  showRows();
  cancelAnimationFrame(drawing);
  drawing = requestAnimationFrame(drawAll);
}

// ---- the table ----

function matching() {
  const wanted = words.toLowerCase();
  const text = (row) => (row.prompt + row.pieces.map((piece) => piece[0]).join("")).toLowerCase();
  const rows = data.rows.filter((row) => (view !== "by-hand" || byHand.has(row.id)) && (!wanted || text(row).includes(wanted)));
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
  const rows = matching(), pages = Math.max(1, Math.ceil(rows.length / PAGE));
  page = Math.min(page, pages - 1);
  const body = $("rows");
  const focused = document.activeElement?.dataset?.sample;
  body.replaceChildren();
  for (const sample of rows.slice(page * PAGE, (page + 1) * PAGE)) {
    const tr = body.insertRow();
    tr.className = verdict(sample) === "remove" ? "removed" : "kept";
    const number = cell(tr, "Row", "number");
    number.textContent = sample.row;
    number.title = sample.id;
    cell(tr, "Forgetting", "number").textContent = format(sample.value);
    cell(tr, "Tokens", "number").textContent = sample.length;
    cell(tr, "Loss at first", "number").textContent = format(sample.base);
    if (unsafe !== null) cell(tr, "Audit").textContent = sample.unsafe ? "unsafe" : "–";
    const select = document.createElement("select");
    select.dataset.sample = sample.id;
    select.setAttribute("aria-label", `Verdict on row ${sample.row}`);
    const auto = sample.value !== null && sample.value > phi ? "removed by φ" : "kept by φ";
    for (const [value, text] of [["", auto], ["keep", "keep, by hand"], ["remove", "remove, by hand"]]) select.append(new Option(text, value));
    select.value = byHand.get(sample.id) ?? "";
    select.addEventListener("change", () => {
      if (select.value) byHand.set(sample.id, select.value);
      else byHand.delete(sample.id);
      showCounts();
      showRows();
    });
    cell(tr, "").append(select);
    const text = cell(tr, "", "text");
    const prompt = document.createElement("div"), completion = document.createElement("div");
    prompt.className = "prompt";
    prompt.tabIndex = completion.tabIndex = 0; // they scroll
    prompt.textContent = (sample.cut ? "[…] " : "") + sample.prompt;
    completion.className = "completion";
    for (const [piece, rise] of sample.pieces) {
      const span = document.createElement("span");
      span.textContent = piece;
      if (rise !== null) {
        const strength = Math.min(1, Math.abs(rise) / 4);
        span.style.backgroundColor = `rgba(${colour(rise > 0 ? "--forgotten" : "--recalled")}, ${strength.toFixed(2)})`;
        span.title = `${rise > 0 ? "+" : ""}${rise.toFixed(2)} nats`;
      }
      completion.append(span);
    }
    text.append(prompt, completion);
    prompt.scrollTop = prompt.scrollHeight; // what stands right before the completion
  }
  if (focused) [...body.querySelectorAll("select")].find((each) => each.dataset.sample === focused)?.focus();
  $("page").textContent = rows.length ? `Page ${page + 1} of ${pages}, ${count(rows.length)} samples` : "No sample here: none is decided by hand, or none has these words.";
  $("previous").disabled = page === 0;
  $("next").disabled = page >= pages - 1;
  for (const button of document.querySelectorAll("th button")) {
    const sorted = button.dataset.sort === sort.key;
    button.parentElement.setAttribute("aria-sort", sorted ? (sort.descending ? "descending" : "ascending") : "none");
  }
}

// ---- what was decided, out and in ----

function exported() {
  return {
    measure: data.measure, threshold: touched ? phi : data.threshold,
    by_hand: Object.fromEntries(byHand), trace: data.trace,
  };
}

function download() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(exported(), null, 2) + "\n"], { type: "application/json" }));
  link.download = "decision.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

async function goOn(file) {
  $("problem").textContent = "";
  try {
    const decision = JSON.parse(await file.text());
    if (decision.trace !== data.trace) throw new Error("it was made on another trace");
    if (decision.measure !== data.measure) throw new Error(`it is of ${decision.measure} forgetting, this page of ${data.measure}`);
    const choices = Object.entries(decision.by_hand);
    if (!choices.every(([, choice]) => choice === "keep" || choice === "remove")) throw new Error("by_hand holds neither keep nor remove");
    if (decision.threshold !== null && !Number.isFinite(decision.threshold)) throw new Error("threshold is no number");
    byHand.clear();
    for (const [id, choice] of choices) byHand.set(id, choice);
    setPhi(decision.threshold ?? Number($("phi").max)); // null: nothing but by hand
  } catch (error) {
    $("problem").textContent = `This decision cannot be gone on with: ${error.message}.`;
  }
}

// ---- at the beginning ----

$("summary").textContent = data.summary;
$("about").textContent = `Model ${data.model}. Trace ${data.trace}.` +
  (data.sampled ? ` The graphs and the counts below show ${count(last.length)} of the ${count(data.samples)} samples, drawn at random.` : "");
$("shown").textContent = data.all_shown
  ? `All ${count(data.rows.length)} samples.`
  : `${count(data.rows.length)} of ${count(data.samples)} samples have their texts here: the most forgotten, those around φ, and the most kept.`;
$("audit-head").hidden = unsafe === null;
for (const step of data.steps) $("record").append(new Option(`S1+ step ${step}`));
$("record").selectedIndex = data.steps.length - 1;
$("phi").min = String(Math.min(lowest, firstPhi));
$("phi").max = String(Math.max(highest, firstPhi) + 0.01 * (highest - lowest)); // all the way up removes nothing
setPhi(firstPhi, false);
drawAll();

$("record").addEventListener("change", drawDistribution);
$("phi").addEventListener("input", () => setPhi(Number($("phi").value)));
$("phi-number").addEventListener("change", () => {
  if ($("phi-number").value === "") setPhi(phi, touched);
  else setPhi(Number($("phi-number").value));
});
$("phi-reset").addEventListener("click", () => setPhi(firstPhi, false));
$("view").addEventListener("change", () => {
  view = $("view").value;
  sort = { forgotten: { key: "value", descending: true }, kept: { key: "value", descending: false }, borderline: { key: "distance", descending: true }, "by-hand": { key: "value", descending: true } }[view];
  page = 0;
  showRows();
});
$("search").addEventListener("input", () => {
  words = $("search").value;
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
  if ($("import").files.length) await goOn($("import").files[0]);
  $("import").value = ""; // so that the same file can be chosen again
});
$("distribution").on("plotly_relayout", (change) => {
  if ("shapes[0].x0" in change) setPhi(change["shapes[0].x0"]);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { drawAll(); showRows(); });
