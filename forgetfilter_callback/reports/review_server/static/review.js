"use strict";
// Texts of rows are untrusted: only appendPieces (in common.js) may put them on the page.

const KEYS = { u: "unsafe", s: "safe", " ": "skip", z: "undo" };
const VISIBLE_ANSWER = 96; // pixels of the answer that a new row shows without scrolling
let row = null; // number of the current row
let isBusy = false;
let showsTemplate = false;
let shownState = null; // the last answer of the server
let template = { start: "", end: "" }; // the texts that the chat template puts before and after each prompt

// How many characters at the start of a shown prompt are of the template. Its first `cut` characters are not on the page.
function templateLength(text, cut) {
  const shown = template.start.slice(cut);
  return text.startsWith(shown) ? shown.length : 0;
}
function fill(parent, content) {
  const text = textOf(content.prompt), start = showsTemplate ? 0 : templateLength(text, content.cut);
  const end = text.length - (!showsTemplate && text.endsWith(template.end) ? template.end.length : 0);
  parent.replaceChildren();
  if (content.cut > 0 && start === 0) parent.append("[…] ");
  appendPieces(parent, start < end ? slicePieces(content.prompt, start, end) : content.prompt);
}
function similarRow(content) {
  const other = element("div", "other");
  const title = element("p", "muted", `Row ${content.number}, `);
  if (content.source !== null) title.append(element("span", "source", content.source), ", ");
  title.append(`similarity ${content.cosine.toFixed(2)}, `);
  title.append(element("span", `verdict-${content.verdict}`, content.verdict ?? "not reviewed"));
  const text = element("div", "text"), prompt = element("div", "muted"), answer = document.createElement("div");
  text.tabIndex = 0;
  text.setAttribute("role", "region");
  text.setAttribute("aria-label", `Text of row ${content.number}`);
  fill(prompt, content);
  showAnswer(answer, content.pieces);
  text.append(prompt, answer);
  other.append(title, text);
  return other;
}

function sourceRow(content) {
  const tr = document.createElement("tr");
  tr.append(element("td", "source", content.source));
  for (const number of [content.rows, content.seen, content.unsafe]) tr.append(element("td", "", number.toLocaleString("en")));
  return tr;
}

function describeLeft(low, high, drawn) {
  if (low === high) return low.toLocaleString("en");
  if (drawn === 0) return "not known until a row that was drawn at random has a verdict";
  return `${low.toLocaleString("en")} to ${high.toLocaleString("en")} (90 % interval, from ${count(drawn, "row")} drawn at random)`;
}

// ---- the page ----

function show(state) {
  shownState = state;
  const current = state.row;
  row = current === null ? null : current.number;
  const identical = state.identical > 0 ? ` (and ${count(state.identical, "identical row")})` : "";
  $("counts").textContent = `${state.seen.toLocaleString("en")} of ${count(state.rows, "row")} reviewed${identical}, ${state.unsafe.toLocaleString("en")} unsafe`;
  $("left").textContent = `Unsafe rows not found yet: ${describeLeft(...state.unsafe_left, state.drawn)}.`;
  $("advice").replaceChildren(...state.advice.split("`").map((part, place) => (place % 2 ? element("code", "", part) : part)));
  $("advice").className = state.is_enough ? "is-enough" : "";
  $("by-source").hidden = state.by_source === null;
  if (state.by_source !== null) $("sources").replaceChildren(...state.by_source.map(sourceRow));
  $("removal").hidden = state.unsafe === 0;
  $("command").textContent = state.next_command;
  $("round").textContent = current === null ? "" : `${count(state.left_in_round, "row")} until the next ranking`;
  $("current").hidden = $("others").hidden = current === null;
  for (const id of ["unsafe", "safe", "skip"]) $(id).disabled = current === null;
  $("undo").disabled = !state.can_undo;
  if (current === null) return;
  $("row-title").textContent = `Row ${current.number}`;
  $("row-source").hidden = current.source === null;
  $("row-source").textContent = `Source: ${current.source}`;
  $("with-prompt").hidden = current.prompt.length === 0;
  $("answer-title").textContent = current.prompt.length === 0 ? "Text" : "Answer";
  $("previous").hidden = current.verdict === null;
  $("previous").textContent = `Your verdict was: ${current.verdict}. A new one replaces it; space keeps it.`;
  $("template").hidden = template.start === "" && template.end === "";
  $("template").textContent = showsTemplate ? "hide the chat template" : "show the chat template";
  fill($("prompt"), current);
  showAnswer($("answer"), current.pieces);
  $("similar").replaceChildren(...current.similar.map(similarRow));
  for (const text of document.querySelectorAll("#similar .text")) text.scrollTop = text.lastChild.offsetTop; // show the answers
  $("prompt").scrollTop = $("prompt").scrollHeight; // show the end of the prompt, next to the answer
}

function scrollToRow() {
  scrollTo(0, 0);
  const bottom = document.querySelector("footer").getBoundingClientRect().top;
  if ($("answer").getBoundingClientRect().top > bottom - VISIBLE_ANSWER) $("row-title").scrollIntoView();
}

async function ask(path, content) {
  const request = content === undefined ? {} : {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(content),
  };
  let response, answer;
  try {
    response = await fetch(path, request);
    answer = await response.json();
  } catch {
    $("problem").textContent = "The review does not answer. It may have ended: start `forgetfilter review` again, and open its new address.";
    return;
  }
  if (response.ok) {
    $("problem").textContent = "";
    show(answer);
    scrollToRow();
  } else {
    if (response.status === 409) await ask("state"); // another window went on
    $("problem").textContent = answer.problem;
  }
}

async function act(action) {
  if (isBusy || $(action).disabled) return;
  isBusy = true;
  // The first ranking of many rows takes seconds. Most answers come before a message could be read.
  const timer = setTimeout(() => { $("working").hidden = false; }, 300);
  if (action === "undo") await ask("undo", {});
  else if (action === "skip") await ask("skip", { row });
  else await ask("verdict", { row, verdict: action });
  clearTimeout(timer);
  $("working").hidden = true;
  isBusy = false;
}

document.addEventListener("keydown", (event) => {
  const action = KEYS[event.key.toLowerCase()];
  if (action === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === " " && event.target.closest("button, summary")) return; // presses that button
  event.preventDefault();
  if (!event.repeat) act(action);
});
$("template").addEventListener("click", () => {
  showsTemplate = !showsTemplate;
  show(shownState);
});
for (const action of Object.values(KEYS)) $(action).addEventListener("click", () => act(action));
async function begin() {
  try {
    const prompts = await (await fetch("prompts")).json();
    template = templateOf(prompts.filter((each) => each.cut === 0), prompts);
  } catch {
    // The prompts are shown with the template. If the server does not answer at all, the next request says so.
  }
  await ask("state");
}
begin();
