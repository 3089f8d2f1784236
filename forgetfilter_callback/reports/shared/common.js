"use strict";
// Texts of rows are untrusted: only textContent may put them on a page.

const $ = (id) => document.getElementById(id);
// Characters that have no shape but change how a text looks, except tabs and line breaks.
const INVISIBLE = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]/;
const FULL_SHADE = 4; // nats
const MAX_OPACITY = 0.7; // the text stays readable

function element(tag, className, text = "") {
  const created = document.createElement(tag);
  created.className = className;
  created.textContent = text;
  return created;
}

function appendText(parent, text) {
  for (const part of text.split(new RegExp(`(${INVISIBLE.source})`))) {
    if (!INVISIBLE.test(part)) parent.append(part);
    else parent.append(element("span", "control", `U+${part.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`));
  }
}

// Pieces are [text, loss rise in nats or null, whether it is a special token].
function appendPieces(parent, pieces) {
  for (const [text, rise, isSpecial] of pieces) {
    const span = element("span", isSpecial ? "piece special" : "piece");
    appendText(span, text);
    if (rise !== null) {
      span.classList.add(rise > 0 ? "rose" : "fell");
      span.style.setProperty("--strength", (MAX_OPACITY * Math.min(1, Math.abs(rise) / FULL_SHADE)).toFixed(2));
      span.title = `${rise > 0 ? "+" : ""}${rise.toFixed(2)} nats`;
    }
    parent.append(span);
  }
}

function textOf(pieces) {
  return pieces.map((piece) => piece[0]).join("");
}

// The chat template puts the same text before and after all prompts: up to the last special token of the common start (and
// the rest of its line, such as "user\n"), and from the first special token of the common end.
function templateStartOf(rows) {
  const common = commonLength(rows, (prompt, i) => prompt[i]);
  if (common === 0) return 0;
  const end = specialTokens(rows[0].prompt).map(([, tokenEnd]) => tokenEnd).filter((tokenEnd) => tokenEnd <= common).pop();
  if (end === undefined) return 0;
  const line = textOf(rows[0].prompt).slice(end, common).match(/^[\w ]{0,20}\n+/);
  return end + (line === null ? 0 : line[0].length);
}
function templateEndOf(rows) {
  const common = commonLength(rows, (prompt, i) => prompt[prompt.length - 1 - i]);
  if (common === 0) return 0;
  const length = textOf(rows[0].prompt).length;
  const start = specialTokens(rows[0].prompt).map(([tokenStart]) => tokenStart).find((tokenStart) => length - tokenStart <= common);
  return start === undefined ? 0 : length - start;
}
function commonLength(rows, at) {
  const prompts = [...new Set(rows.map((row) => textOf(row.prompt)))];
  if (prompts.length < 2) return 0; // the only prompt has nothing in common with others
  let length = 0;
  while (at(prompts[0], length) !== undefined && prompts.every((prompt) => at(prompt, length) === at(prompts[0], length))) length += 1;
  return length;
}
function specialTokens(pieces) {
  let place = 0;
  return pieces.flatMap(([text, , isSpecial]) => {
    place += text.length;
    return isSpecial ? [[place - text.length, place]] : [];
  });
}

function slicePieces(pieces, start, end) {
  let place = 0;
  return pieces.flatMap(([text, ...rest]) => {
    const part = text.slice(Math.max(0, start - place), Math.max(0, end - place));
    place += text.length;
    return part ? [[part, ...rest]] : [];
  });
}

function count(number, noun = "") {
  const rounded = Math.round(number);
  return rounded.toLocaleString("en") + (noun && ` ${noun}${rounded === 1 ? "" : "s"}`);
}

// A button that was clicked with the mouse gives up the focus. Otherwise, the space bar would press it again instead of
// going to the next row.
document.addEventListener("click", (event) => {
  if (event.detail > 0 && document.activeElement instanceof HTMLButtonElement) document.activeElement.blur();
});
