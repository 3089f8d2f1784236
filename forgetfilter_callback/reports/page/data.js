// The data of the page, and the state that the parts of the page share.

const data = JSON.parse($("data").textContent);
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
let exportedThreshold = data.threshold; // null: no threshold applies, so only overridden samples are removed and no φ is shown
const overrides = new Map(data.overrides.map((each) => [each.id, each.choice])); // sample id → "keep" or "remove"
const rowOf = new Map([...data.rows, ...data.overrides].map((each) => [each.id, each.row]));
const reviewed = data.reviewed; // number of rows
const sources = data.by_source; // null: no column says where a row came from

function format(value, digits = 3) {
  return value === null || !Number.isFinite(value) ? "–" : value.toFixed(digits);
}
function isAbove(row) {
  return exportedThreshold !== null && row.value !== null && row.value > phi;
}
function decisionFor(row) {
  return overrides.get(row.id) ?? (isAbove(row) ? "remove" : "keep");
}
function compare(x, y) {
  return typeof x === "string" ? x.localeCompare(y) : x - y;
}
