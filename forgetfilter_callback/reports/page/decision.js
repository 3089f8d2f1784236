// φ, the counts, and the decision that is exported and imported.

// Whether each plotted row is removed.
function plottedRemovals() {
  const removed = last.map((value) => exportedThreshold !== null && value > plottedPhi);
  // Counts of a random subset are scaled up. Overrides are left out then, because they are not a random subset.
  if (!data.sampled) for (const [id, choice] of overrides) if (rowOf.has(id)) removed[rowOf.get(id)] = choice === "remove";
  return removed;
}

function showCounts() {
  const scale = data.samples / last.length, about = data.sampled ? "about " : "";
  const removed = plottedRemovals();
  const above = removed.filter(Boolean).length;
  let text = `${exportedThreshold === null ? "No φ" : `φ = ${format(phi)}`}: ${about}${count(above * scale)} of ${count(data.samples)} removed, ${about}${count((last.length - above) * scale)} kept.`;
  if (unsafe !== null) {
    const hits = removed.filter((isRemoved, i) => isRemoved && unsafe[i]).length, all = unsafe.filter(Boolean).length;
    text += ` Against the audit labels: precision ${above ? format(hits / above) : "–"}, recall ${all ? format(hits / all) : "–"}.`;
  }
  $("counts").textContent = text;
  $("progress").textContent = `${about}${count(above * scale)} of ${count(data.samples)} removed, ${count(overrides.size, "override")}`;
  if (sources !== null) showSources(removed);
  const kept = [...overrides.values()].filter((choice) => choice === "keep").length;
  $("decision").textContent = `${text} Overrides: ${kept} kept, ${overrides.size - kept} removed${data.sampled ? " (not included in the counts)" : ""}.`;
}

let drawing = 0;
function drawSoon() {
  cancelAnimationFrame(drawing);
  drawing = requestAnimationFrame(drawAll);
}
function setPhi(value, threshold = value) {
  if (!Number.isFinite(value)) return;
  phi = value;
  plottedPhi = Math.fround(value);
  exportedThreshold = threshold;
  $("phi").value = String(value);
  $("phi-number").value = threshold === null ? "" : String(Number(value.toPrecision(4)));
  for (const step of document.querySelectorAll(".with-phi")) step.hidden = threshold === null;
  showCounts();
  showRows();
  drawSoon();
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
