// The initial state and the events.

$("summary").textContent = data.summary;
$("about").textContent = `Model ${data.model}, ${count(data.samples, "row")}.` +
  (data.sampled ? ` The plots and the counts below use a random subset of ${count(last.length)} rows.` : "");
$("identity").textContent = `Trace ${data.trace}.`;
$("shown").textContent = data.all_shown
  ? `The table contains ${data.samples === 1 ? "the only row" : `all ${count(data.samples, "row")}`}.`
  : `The table contains ${count(data.rows.length)} of ${count(data.samples, "row")}: the most forgotten, those closest to φ, some drawn at random${data.overrides.length || reviewed ? ", and overridden or reviewed ones" : ""}.`;
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
const identical = data.verdicts.unsafe + data.verdicts.safe - reviewed;
$("verdicts").textContent = `${count(reviewed)} of ${count(data.samples)} rows have a verdict${identical ? ` (and ${count(identical, "identical row")})` : ""}: ${count(data.verdicts.unsafe)} unsafe, ${count(data.verdicts.safe)} safe.`;
if (data.differing) {
  $("verdicts").append(` When this page was written, ${count(data.differing, "verdict")} ${data.differing === 1 ? "was" : "were"} not followed. To follow all verdicts, write the page with the option `, element("code", "", "--reviewed"), ".");
}
for (const id of ["verdicts", "reviewed-label", "verdict-head"]) $(id).hidden = !reviewed;
$("test").hidden = !data.summary.toLowerCase().includes("well separated"); // it explains these words
for (const step of data.steps) $("record").append(new Option(`safety session, step ${step}`));
$("record").selectedIndex = data.steps.length - 1;
$("record-label").hidden = data.steps.length === 1;
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
$("view").addEventListener("change", () => chooseView($("view").value));
for (const button of document.querySelectorAll("[data-view]")) {
  button.addEventListener("click", () => {
    chooseView(button.dataset.view);
    $("samples-title").scrollIntoView();
  });
}
$("source").addEventListener("change", () => {
  chosenSource = $("source").value === "" ? null : Number($("source").value);
  restart();
});
$("reviewed").addEventListener("change", () => {
  shownVerdicts = $("reviewed").value;
  restart();
});
$("search").addEventListener("input", () => {
  query = $("search").value;
  restart();
});
for (const button of document.querySelectorAll("[data-sort]")) {
  button.addEventListener("click", () => {
    sort = toggled(sort, button.dataset.sort);
    restart();
  });
}
for (const button of document.querySelectorAll("[data-source-sort]")) {
  button.addEventListener("click", () => {
    sourceSort = toggled(sourceSort, button.dataset.sourceSort);
    showCounts();
  });
}
document.addEventListener("keydown", (event) => {
  const action = KEYS[event.key.toLowerCase()];
  if (action === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.closest("input, select")) return; // types there
  if (event.key === " " && event.target.closest("button, summary")) return; // presses that button
  event.preventDefault();
  if (!event.repeat) act(action);
});
for (const action of Object.values(KEYS)) $(action).addEventListener("click", () => act(action));
$("previous").addEventListener("click", () => { page -= 1; showRows(); });
$("next").addEventListener("click", () => { page += 1; showRows(); });
for (const button of document.querySelectorAll(".export")) button.addEventListener("click", download);
$("import").addEventListener("change", async () => {
  if ($("import").files.length) await importDecision($("import").files[0]);
  $("import").value = ""; // lets the user choose the same file again
});
$("distribution").on("plotly_relayout", (change) => {
  if (!Object.keys(change).some((key) => key.startsWith("shapes[0]"))) return;
  // If one end of the line was dragged, only that end has moved. The line is drawn upright again.
  const ends = [change["shapes[0].x0"], change["shapes[0].x1"]];
  setPhi(ends.find((end) => end !== undefined && end !== phi) ?? phi);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
