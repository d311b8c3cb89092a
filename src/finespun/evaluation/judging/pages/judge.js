"use strict";
// An item's page works as a plain form. This adds keys, marks and the time it takes, and keeps an answer on the page
// until the server says that it is saved.

const form = document.getElementById("answer");
const undo = document.getElementById("undo");
const status = document.getElementById("status");
const method = form?.dataset.method;

// The second press of a double click must not answer the item that the first one brought.
const SETTLE_MS = 250;
let ready = false;
setTimeout(() => {
  ready = true;
  document.documentElement.dataset.ready = "yes";
}, SETTLE_MS);

// How long the page was in sight, by a clock that nobody can set.
let seen = 0;
let since = document.hidden ? null : performance.now();
document.addEventListener("visibilitychange", () => {
  if (document.hidden && since !== null) {
    seen += performance.now() - since;
    since = null;
  } else if (!document.hidden && since === null) since = performance.now();
});
const seconds = () => (seen + (since === null ? 0 : performance.now() - since)) / 1000;

function say(what) {
  status.textContent = what ? status.dataset[what] : "";
  status.className = what ?? "";
}

let busy = false;
async function send(which, submitter) {
  if (busy || !ready) return;
  busy = true;
  const body = new URLSearchParams(new FormData(which));
  if (submitter?.name) body.set(submitter.name, submitter.value);
  if (body.has("seconds")) body.set("seconds", seconds().toFixed(2));
  submitter?.classList.add("sent");
  say("sending");
  for (;;) {
    try {
      const response = await fetch(which.action, { method: "POST", body, headers: { Accept: "application/json" } });
      if (response.ok) {
        location.replace((await response.json()).next);
        return;
      }
      if (response.status < 500) break;
    } catch {
      // no server: it is tried again
    }
    say("waiting");
    await new Promise((done) => setTimeout(done, 1000));
  }
  say("refused");
  busy = false;
}

for (const each of [form, undo])
  each?.addEventListener("submit", (event) => {
    event.preventDefault();
    if (each === form && !complete()) {
      say("incomplete");
      return;
    }
    send(each, event.submitter);
  });

function complete() {
  if (method === "ranking") return ranking.length === texts.length;
  if (method === "rating") {
    const missing = criteria.find((one) => !one.querySelector(":checked"));
    missing?.querySelector("input").focus();
    return !missing;
  }
  return true;
}

// ---- marked errors: places are counted in Unicode characters, as the server counts them

const texts = [...document.querySelectorAll(".candidate .text")];
const contents = texts.map((box) => box.textContent);
const mark = document.getElementById("mark");
let spans = [];
let pending = null;

function draw(place) {
  const letters = [...contents[place]];
  const pieces = [];
  let at = 0;
  for (const span of spans.filter((one) => one.place === place).sort((a, b) => a.start - b.start)) {
    pieces.push(letters.slice(at, span.start).join(""));
    const piece = document.createElement("mark");
    piece.textContent = letters.slice(span.start, span.end).join("");
    piece.addEventListener("click", () => {
      if (!getSelection().isCollapsed) return;
      spans = spans.filter((one) => one !== span);
      draw(place);
    });
    pieces.push(piece);
    at = span.end;
  }
  pieces.push(letters.slice(at).join(""));
  texts[place].replaceChildren(...pieces.filter((piece) => piece !== ""));
  form.elements.spans.value = JSON.stringify(spans);
}

function add(span) {
  const touched = spans.filter((one) => one.place === span.place && one.start <= span.end && span.start <= one.end);
  spans = spans.filter((one) => !touched.includes(one));
  spans.push({
    place: span.place,
    start: Math.min(span.start, ...touched.map((one) => one.start)),
    end: Math.max(span.end, ...touched.map((one) => one.end)),
  });
  getSelection().removeAllRanges();
  pending = null;
  mark.hidden = true;
  draw(span.place);
}

function selected() {
  const selection = getSelection();
  if (!selection.rangeCount || selection.isCollapsed) return null;
  const range = selection.getRangeAt(0);
  const place = texts.findIndex((box) => box.contains(range.commonAncestorContainer));
  if (place < 0) return null;
  const before = document.createRange();
  before.selectNodeContents(texts[place]);
  before.setEnd(range.startContainer, range.startOffset);
  const words = range.toString();
  const start = [...before.toString()].length + [...words].length - [...words.trimStart()].length;
  const end = start + [...words.trim()].length;
  return end > start ? { place, start, end } : null;
}

if (form) {
  document.addEventListener("selectionchange", () => {
    const now = selected();
    if (now) {
      pending = now;
      mark.hidden = false;
    } else
      // a tap on the button takes the selection away before it is a click
      setTimeout(() => {
        if (selected()) return;
        pending = null;
        mark.hidden = true;
      }, 400);
  });
  mark.addEventListener("click", () => pending && add(pending));
}

// ---- marking by keyboard: whole words, in scripts with and without spaces

let walker = null;

function walk(place) {
  const segments = [...new Intl.Segmenter(document.documentElement.lang, { granularity: "word" }).segment(contents[place])];
  const words = segments
    .filter((one) => one.segment.trim())
    .map((one) => {
      const start = [...contents[place].slice(0, one.index)].length;
      return { start, end: start + [...one.segment].length };
    });
  if (!words.length) return;
  walker = { place, words, from: 0, to: 0 };
  show();
}

function show() {
  const { place, words, from, to } = walker;
  const [first, last] = [words[Math.min(from, to)].start, words[Math.max(from, to)].end];
  const range = document.createRange();
  const [a, b] = [nodeAt(texts[place], first), nodeAt(texts[place], last)];
  range.setStart(...a);
  range.setEnd(...b);
  getSelection().removeAllRanges();
  getSelection().addRange(range);
  const box = range.getBoundingClientRect();
  if (box.top < 0 || box.bottom > innerHeight - 160) scrollBy(0, box.top - innerHeight / 3);
}

function nodeAt(box, position) {
  const letters = [...box.textContent].slice(0, position).join("").length;
  const nodes = document.createTreeWalker(box, NodeFilter.SHOW_TEXT);
  let left = letters;
  while (nodes.nextNode()) {
    if (left <= nodes.currentNode.length) return [nodes.currentNode, left];
    left -= nodes.currentNode.length;
  }
  return [box, box.childNodes.length];
}

function walkKey(event) {
  const last = walker.words.length - 1;
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (step) {
    walker.to = Math.min(last, Math.max(0, walker.to + step));
    if (!event.shiftKey) walker.from = walker.to;
    show();
  } else if (event.key === "ArrowUp" || event.key === "ArrowDown") {
    walk((walker.place + (event.key === "ArrowDown" ? 1 : texts.length - 1)) % texts.length);
  } else if (event.key === "Enter") {
    const span = selected();
    if (span) add(span);
  } else if (event.key === "Backspace" || event.key === "Delete") {
    const span = selected();
    spans = spans.filter((one) => !span || one.place !== span.place || one.end <= span.start || span.end <= one.start);
    draw(walker.place);
  } else if (event.key === "Escape" || event.key.toLowerCase() === "e") {
    walker = null;
    getSelection().removeAllRanges();
  } else return false;
  return true;
}

// ---- ranking: texts are chosen from best to worst

let ranking = [];
const ranks = [...document.querySelectorAll(".rank")];

function rank(place) {
  // the last place follows from the others: it comes and goes with the one before it
  const taken = place === null ? ranking.length - 1 : ranking.indexOf(place);
  if (place !== null && taken === texts.length - 1) return;
  if (place === null || taken >= 0) ranking = ranking.slice(0, Math.max(0, Math.min(taken, texts.length - 2)));
  else ranking.push(place);
  if (ranking.length === texts.length - 1) ranking.push([...texts.keys()].find((one) => !ranking.includes(one)));
  for (const [at, button] of ranks.entries()) {
    const found = ranking.indexOf(at);
    button.querySelector("output").textContent = found < 0 ? "–" : found + 1;
    button.classList.toggle("placed", found >= 0);
  }
  form.elements.ranking.value = ranking.join(",");
}
for (const button of ranks) button.addEventListener("click", () => rank(Number(button.dataset.place)));
document.getElementById("clear")?.addEventListener("click", () => {
  ranking = [];
  rank(null);
});

// ---- rating

const criteria = [...document.querySelectorAll(".criterion")];

function give(digit) {
  const now = criteria.find((one) => one.contains(document.activeElement));
  const one = now ?? criteria.find((each) => !each.querySelector(":checked")) ?? criteria[0];
  const radio = one.querySelectorAll("input")[digit - 1];
  if (!radio) return;
  radio.checked = true;
  const next = criteria[criteria.indexOf(one) + 1];
  (next?.querySelector(":checked") ?? next?.querySelector("input") ?? document.getElementById("save")).focus();
}

// ---- keys

const choices = [...document.querySelectorAll(".choice")];

function key(event) {
  const digit = /^[1-9]$/.test(event.key) ? Number(event.key) : 0;
  const letter = event.key.toLowerCase();
  if (letter === "u") undo?.requestSubmit();
  else if (!form) return false;
  else if (letter === "c") form.elements.comment.focus();
  else if (letter === "e") walk(0);
  else if (digit && method === "pairs") choices[digit - 1] && form.requestSubmit(choices[digit - 1]);
  else if (digit && method === "ranking") {
    if (digit <= texts.length) rank(digit - 1);
    if (complete()) document.getElementById("save").focus();
  } else if (digit && method === "rating") give(digit);
  else if (event.key === "Backspace" && method === "ranking") rank(null);
  else if (event.key === "Enter" && method !== "pairs" && !document.activeElement.matches("button, summary, a"))
    form.requestSubmit(document.getElementById("save"));
  else if (method === "pairs" && (event.key === "ArrowLeft" || event.key === "ArrowRight")) {
    const at = choices.indexOf(document.activeElement);
    const step = event.key === "ArrowRight" ? 1 : -1;
    choices[at < 0 ? (step > 0 ? 0 : choices.length - 1) : (at + step + choices.length) % choices.length].focus();
  } else return false;
  return true;
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  if (event.target.tagName === "TEXTAREA") {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if (walker ? walkKey(event) : !event.repeat && ready && key(event)) event.preventDefault();
});

// ---- an answer that was taken back is shown to be changed

if (form?.dataset.previous) {
  const previous = JSON.parse(form.dataset.previous);
  form.elements.comment.value = previous.comment;
  spans = previous.spans;
  for (const place of texts.keys()) draw(place);
  for (const place of previous.ranking ?? []) if (!ranking.includes(place)) rank(place);
  for (const [name, value] of Object.entries(previous.marks ?? {}))
    for (const radio of form.elements[`mark-${name}`]) radio.checked = radio.value === String(value);
  choices.find((choice) => choice.value === previous.choice)?.classList.add("previous");
}
