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

function showAnswer(parent, pieces) {
  parent.replaceChildren();
  if (pieces.every(([text, , isSpecial]) => isSpecial || !text.trim())) parent.append(element("span", "muted", "(empty) "));
  appendPieces(parent, pieces);
}

function textOf(pieces) {
  return pieces.map((piece) => piece[0]).join("");
}

// The chat template puts the same text before and after most prompts: up to a special token (and the rest of its line, such as
// "user\n"), and from a special token on. A few rows can have another system prompt.
function templateOf(whole, all) {
  return {
    start: longestOfMost(whole, (text, tokens) => tokens.flatMap(([, end]) => {
      const line = text.slice(end).match(/^[\w ]{0,20}\n+/);
      return [text.slice(0, end), ...(line === null ? [] : [text.slice(0, end + line[0].length)])];
    })),
    end: longestOfMost(all, (text, tokens) => tokens.map(([start]) => text.slice(start))),
  };
}
// The longest of the parts that more than half of the prompts have. A single prompt has nothing in common with others.
function longestOfMost(rows, partsOf) {
  const prompts = new Map(rows.map((row) => [textOf(row.prompt), row.prompt])), numbers = new Map();
  if (prompts.size < 2) return "";
  for (const [text, pieces] of prompts) {
    for (const part of new Set(partsOf(text, specialTokens(pieces)))) numbers.set(part, (numbers.get(part) ?? 0) + 1);
  }
  const common = [...numbers.keys()].filter((part) => numbers.get(part) > prompts.size / 2);
  return common.reduce((longest, part) => (part.length > longest.length ? part : longest), "");
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
