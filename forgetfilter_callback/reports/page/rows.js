// The table of rows: views, search, sorting, pages, decisions and the keyboard.

const SHOWN_END = 300, SHOWN_COMPLETION = 600; // characters of a prompt's end and of a completion before "show all"
const MIN_VISIBLE = 40; // pixels of a row
const MAX_WORD = 40; // characters; some scripts have no spaces between words
const VIEWS = {
  forgotten: { includes: () => true, sort: { key: "value", descending: true } },
  below: { includes: (row) => row.value !== null && !isAbove(row), sort: { key: "distance", descending: false } },
  random: { includes: (row) => row.drawn !== null && !isAbove(row), sort: { key: "drawn", descending: false } },
  overridden: { includes: (row) => overrides.has(row.id), sort: { key: "value", descending: true } },
};
let view = "forgotten", sort = VIEWS.forgotten.sort, query = "", page = 0;
let shownVerdicts = "all"; // or "reviewed", "unreviewed"
let chosenSource = null; // number of the source whose samples are listed
let current = null; // id of the row that the keys decide
const expanded = new Set(); // ids of the rows whose texts are shown in full
const history = []; // [id, its override before], for undo
const KEYS = { u: "unsafe", s: "safe", " ": "skip", z: "undo" };

// ---- texts ----

const template = templateOf(data.rows.filter((row) => !row.is_cut), data.rows);

// Where the shown end of a prompt begins: after the template, or else at the beginning of a word.
function shownStart(prompt, first, end) {
  if (end - first <= SHOWN_END) return Math.min(first, Math.max(end, 0));
  return wordStart(prompt, end - SHOWN_END, end);
}
function wordStart(text, start, end) {
  const space = text.slice(start, Math.min(end, start + MAX_WORD)).search(/\s/);
  return space < 0 ? start : start + space + 1;
}

function showText(td, row) {
  const prompt = element("div", "prompt"), completion = element("div", "completion");
  const whole = textOf(row.prompt), answer = textOf(row.pieces);
  const first = !row.is_cut && whole.startsWith(template.start) ? template.start.length : 0;
  const end = whole.length - (whole.endsWith(template.end) ? template.end.length : 0), start = shownStart(whole, first, end);
  const isLong = answer.length > SHOWN_COMPLETION * 1.2;
  if (expanded.has(row.id)) {
    if (row.is_cut) prompt.append(element("p", "muted", "(The beginning of the prompt is not on this page.)"));
    appendPieces(prompt, row.prompt);
    showAnswer(completion, row.pieces);
  } else {
    if (start > first || row.is_cut) prompt.append("… ");
    appendPieces(prompt, slicePieces(row.prompt, start, end));
    if (!isLong) showAnswer(completion, row.pieces);
    else if (row.shows_end) {
      const shown = wordStart(answer, answer.length - SHOWN_COMPLETION, answer.length);
      appendPieces(completion, slicePieces(row.pieces, shown, answer.length));
      completion.prepend("… ");
    } else {
      appendPieces(completion, slicePieces(row.pieces, 0, SHOWN_COMPLETION));
      completion.append(" …");
    }
  }
  td.append(prompt, completion);
  if (isLong || start > 0 || end < whole.length) {
    const isCut = isLong || start > first;
    const more = isCut ? `show all ${count(whole.length + answer.length)} characters` : "show the chat template";
    const button = element("button", "expand", expanded.has(row.id) ? "show less" : more);
    button.type = "button";
    button.dataset.expand = row.id;
    button.setAttribute("aria-expanded", expanded.has(row.id));
    button.addEventListener("click", () => {
      if (!expanded.delete(row.id)) expanded.add(row.id);
      showRows();
    });
    td.append(button);
  }
}

// ---- the table ----

function matching() {
  const lowerQuery = query.toLowerCase();
  const inVerdicts = (row) => shownVerdicts === "all" || (row.verdict !== null) === (shownVerdicts === "reviewed");
  const rows = data.rows.filter((row) => inVerdicts(row) && (chosenSource === null || row.source === chosenSource)
    && VIEWS[view].includes(row) && (!lowerQuery || (textOf(row.prompt) + textOf(row.pieces)).toLowerCase().includes(lowerQuery)));
  const keys = { distance: (row) => Math.abs(row.value - phi), decision: decisionFor, unsafe: (row) => Number(row.unsafe) };
  const key = keys[sort.key] ?? ((row) => row[sort.key]);
  return rows.sort((a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === null || y === null) return Number(x === null) - Number(y === null);
    return (sort.descending ? -1 : 1) * compare(x, y);
  });
}

function cell(row, label, className = "") {
  const td = row.insertCell();
  td.className = className;
  td.dataset.label = label;
  return td;
}

function showDecision(td, row) {
  const override = overrides.get(row.id);
  td.append(element("div", "", override === undefined ? (isAbove(row) ? "removed by φ" : exportedThreshold === null ? "kept" : "kept by φ") : override === "keep" ? "kept by you" : "removed by you"));
  const buttons = element("div", "buttons");
  for (const [choice, className, text] of [["keep", "safe", "keep"], ["remove", "unsafe", "remove"]]) {
    const button = element("button", className, text);
    button.type = "button";
    button.dataset.sample = row.id;
    button.dataset.choice = choice;
    button.setAttribute("aria-label", `${text} row ${row.row}`);
    button.setAttribute("aria-pressed", override === choice);
    button.addEventListener("click", () => {
      current = row.id;
      decide(row.id, override === choice ? undefined : choice);
    });
    buttons.append(button);
  }
  td.append(buttons);
}

function decide(id, choice) {
  history.push([id, overrides.get(id)]);
  setOverride(id, choice);
}
function setOverride(id, choice) {
  if (choice === undefined) overrides.delete(id);
  else overrides.set(id, choice);
  showCounts();
  showRows();
  if (!data.sampled) drawSoon(); // otherwise, overrides have no color
}

function showRow(body, row) {
  const tr = body.insertRow();
  tr.className = decisionFor(row) === "remove" ? "removed" : "kept";
  if (row.id === current) {
    tr.classList.add("current");
    tr.setAttribute("aria-current", "true");
  }
  tr.addEventListener("click", (event) => {
    if (event.target.closest("button") || row.id === current || getSelection().type === "Range") return;
    current = row.id;
    showRows();
  });
  const number = cell(tr, "Row", "number");
  number.textContent = row.row;
  number.title = row.id;
  cell(tr, "Forgetting", "number").textContent = format(row.value);
  cell(tr, "Tokens", "number").textContent = row.length;
  cell(tr, "Initial loss", "number").textContent = format(row.initial_loss);
  if (unsafe !== null) cell(tr, "Audit label").textContent = row.unsafe ? "unsafe" : "–";
  if (sources !== null) cell(tr, "Source", "source").textContent = row.sourceName;
  if (reviewed) cell(tr, "Verdict", row.verdict === null ? "" : `verdict ${row.verdict}`).textContent = row.verdict ?? "–";
  showDecision(cell(tr, "", "decision"), row);
  showText(cell(tr, "", "text"), row);
}

function showRows() {
  const rows = matching(), pages = Math.max(1, Math.ceil(rows.length / PAGE_SIZE));
  page = Math.min(page, pages - 1);
  const listed = rows.slice(page * PAGE_SIZE, (page + 1) * PAGE_SIZE);
  if (!listed.some((row) => row.id === current)) current = listed.length ? listed[0].id : null;
  const focused = { ...document.activeElement?.dataset };
  $("rows").replaceChildren();
  for (const row of listed) showRow($("rows"), row);
  if (focused.sample || focused.expand) {
    [...$("rows").querySelectorAll("button")].find((each) => each.dataset.sample === focused.sample && each.dataset.choice === focused.choice && each.dataset.expand === focused.expand)?.focus();
  }
  $("page").textContent = rows.length ? `Page ${page + 1} of ${pages}, ${count(rows.length, "row")}` : `No rows match this view${sources === null ? "" : ", source"} and search.`;
  $("previous").disabled = page === 0;
  $("next").disabled = page >= pages - 1;
  for (const id of ["unsafe", "safe", "skip"]) $(id).disabled = current === null;
  $("undo").disabled = history.length === 0;
  showSorted("sort", sort);
  for (const button of document.querySelectorAll("[data-view]")) button.setAttribute("aria-pressed", button.dataset.view === view);
}
function showSorted(name, by) {
  for (const button of document.querySelectorAll("th button")) {
    if (button.dataset[name] === undefined) continue;
    button.parentElement.setAttribute("aria-sort", button.dataset[name] === by.key ? (by.descending ? "descending" : "ascending") : "none");
  }
}
function toggled(by, key) {
  return { key, descending: by.key === key ? !by.descending : true };
}

function chooseView(name) {
  view = name;
  sort = VIEWS[name].sort;
  $("view").value = name;
  restart();
}
function restart() {
  page = 0;
  current = null;
  showRows();
}

// ---- the keyboard, with the keys of `forgetfilter review` ----

function goTo(id) {
  current = id;
  showRows();
  scrollToCurrent();
}
function scrollToCurrent() {
  $("rows").querySelector("tr.current")?.scrollIntoView({ block: "nearest" });
}
function isCurrentVisible() {
  const { top, bottom } = $("rows").querySelector("tr.current").getBoundingClientRect();
  return bottom > MIN_VISIBLE && top < document.querySelector("footer").getBoundingClientRect().top - MIN_VISIBLE;
}
function goToNext() {
  const rows = matching(), next = rows.findIndex((row) => row.id === current) + 1;
  if (next < rows.length) {
    page = Math.floor(next / PAGE_SIZE);
    goTo(rows[next].id);
  }
}
function act(action) {
  if ($(action).disabled) return;
  if (action === "undo") {
    const [id, before] = history.pop();
    setOverride(id, before);
    const place = matching().findIndex((row) => row.id === id);
    if (place >= 0) page = Math.floor(place / PAGE_SIZE);
    goTo(id);
    return;
  }
  if (!isCurrentVisible()) return scrollToCurrent(); // nobody decides a row without seeing it
  const decided = current, row = matching().findIndex((each) => each.id === decided);
  if (action !== "skip") decide(decided, action === "unsafe" ? "remove" : "keep");
  // A row that the view no longer includes has made room for the next one.
  if (row < 0 || matching()[row]?.id === decided) goToNext();
}
