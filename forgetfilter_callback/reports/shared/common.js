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

function count(number, noun = "") {
  const rounded = Math.round(number);
  return rounded.toLocaleString("en") + (noun && ` ${noun}${rounded === 1 ? "" : "s"}`);
}

// A button that was clicked with the mouse gives up the focus. Otherwise, the space bar would press it again instead of
// going to the next row.
document.addEventListener("click", (event) => {
  if (event.detail > 0 && document.activeElement instanceof HTMLButtonElement) document.activeElement.blur();
});
