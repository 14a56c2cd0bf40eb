"use strict";
/* Decisions about the pictures: keyboard and touch, kept in localStorage, saved as CSV. */
const store = "wasteddp-review " + JSON.parse(document.getElementById("store").textContent);
const slots = [...document.querySelectorAll(".slot")];
const panel = document.querySelector(".panel");
const find = (selector) => panel.querySelector(selector);
const classButtons = [...panel.querySelectorAll("[data-class]")];
const keyOf = (slot) => (slot.dataset.label ? "labelled " : "new ") + slot.dataset.path;
const slotsOf = new Map(); // one image may be in several cards
for (const slot of slots) slotsOf.set(keyOf(slot), [...(slotsOf.get(keyOf(slot)) ?? []), slot]);
const decisions = new Map(); // key -> {action, class}
const undone = [];
let current = 0;
let kept = true; // in localStorage

function say(text, bad) {
  find(".message").textContent = text;
  find(".message").classList.toggle("bad", Boolean(bad));
}

function load() {
  try {
    for (const [key, value] of Object.entries(JSON.parse(localStorage.getItem(store) ?? "{}"))) {
      if (["confirm", "correct", "drop"].includes(value?.action) && typeof value.class === "string") decisions.set(key, value);
    }
  } catch (error) {
    keepingFailed();
  }
}

function keep() {
  try {
    localStorage.setItem(store, JSON.stringify(Object.fromEntries(decisions)));
  } catch (error) {
    keepingFailed();
  }
}

function keepingFailed() {
  kept = false;
  say("This browser does not keep the decisions: save the CSV before you close the page.", true);
}

function paint(key) {
  const made = decisions.get(key);
  for (const slot of slotsOf.get(key) ?? []) {
    const badge = slot.querySelector(".decision");
    badge.hidden = !made;
    slot.classList.toggle("drop", made?.action === "drop");
    badge.textContent = !made ? "" : made.action === "drop" ? "dropped" : made.action === "confirm" ? "✓ " + made.class : "is " + made.class;
  }
}

function paintCount() {
  const done = [...slotsOf.keys()].filter((key) => decisions.has(key)).length;
  find(".count").textContent = `${done} of ${slotsOf.size} done`;
  find(".progress .band").style.width = 100 * done / Math.max(1, slotsOf.size) + "%";
}

function show(number, scroll = true) {
  if (!slots.length) return;
  slots[current].classList.remove("current");
  current = Math.min(slots.length - 1, Math.max(0, number));
  const slot = slots[current];
  const { path, label, suggested, split } = slot.dataset;
  slot.classList.add("current");
  if (scroll) slot.scrollIntoView({ block: "nearest" });
  const picture = slot.querySelector("img");
  find(".large").hidden = !picture;
  if (picture) find(".large").src = picture.src;
  find(".large").alt = path;
  find(".now").textContent = label ? `labelled ${label}` + (suggested && suggested !== label ? `, probably ${suggested}` : "") : `no label; probably ${suggested}`;
  find(".focus .source").textContent = split ? `${path} (${split})` : path;
  find(".probabilities").replaceChildren(...JSON.parse(slot.dataset.top).flatMap(([name, share]) => {
    const [term, bar, text] = ["dt", "dd", "dd"].map((tag) => document.createElement(tag));
    term.textContent = name;
    const track = bar.appendChild(document.createElement("span"));
    track.className = "track";
    const band = track.appendChild(document.createElement("span"));
    band.className = "band";
    band.style.width = 100 * share + "%";
    text.textContent = (100 * share).toFixed(0) + " %";
    return [term, bar, text];
  }));
  for (const button of classButtons) {
    button.classList.toggle("suggested", button.dataset.class === suggested);
    button.classList.toggle("is-label", button.dataset.class === label);
  }
  const accept = find("[data-do=accept]");
  accept.disabled = !suggested;
  find("[data-do=confirm]").disabled = !label && !suggested;
  find("[data-do=confirm]").firstChild.textContent = label ? "Label is right " : `It is ${suggested} `;
}

function decide(action, name) {
  const slot = slots[current];
  if (!slot) return;
  const key = keyOf(slot);
  undone.push([key, decisions.get(key), current]);
  decisions.set(key, { action, class: name });
  keep();
  paint(key);
  paintCount();
  if (kept) say("");
  show(current + 1);
}

const choose = (name) => name && decide(name === slots[current]?.dataset.label ? "confirm" : "correct", name);

function undo() {
  if (!undone.length) return say("There is nothing to undo.");
  const [key, before, number] = undone.pop();
  if (before) decisions.set(key, before); else decisions.delete(key);
  keep();
  paint(key);
  paintCount();
  show(number);
}

/* The nearest picture of the row above or below. */
function row(direction) {
  const here = slots[current].getBoundingClientRect();
  let best = current, least = Infinity;
  slots.forEach((slot, number) => {
    const there = slot.getBoundingClientRect();
    const down = direction * (there.top - here.top);
    const cost = down * 10 + Math.abs(there.left - here.left);
    if (down > here.height / 2 && cost < least) [best, least] = [number, cost];
  });
  show(best);
}

/* As files.CsvWriter: no cell is a formula to a spreadsheet. */
function csv(rows) {
  const cell = (text, column) => {
    const safe = /^[=+\-@\t\r]/.test(text) ? (column ? "'" : "./") + text : text;
    return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  };
  return rows.map((one) => one.map(cell).join(",") + "\n").join("");
}

function save(name, head, isNew) {
  const rows = [];
  for (const [key, [slot]] of slotsOf) {
    const made = decisions.get(key);
    const { path, label } = slot.dataset;
    if (!made || Boolean(label) === isNew || (isNew && made.action === "drop")) continue;
    rows.push(isNew ? [path, made.class] : [path, label, made.action === "drop" ? "" : made.class, made.action]);
  }
  if (!rows.length) return say("Nothing is decided yet" + (isNew ? " about the images without a label." : "."));
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([csv([head, ...rows])], { type: "text/csv" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  say(`${name}: ${rows.length} row${rows.length === 1 ? "" : "s"}`);
}

const actions = {
  confirm: () => choose(slots[current]?.dataset.label || slots[current]?.dataset.suggested),
  accept: () => choose(slots[current]?.dataset.suggested),
  drop: () => decide("drop", ""),
  undo,
  previous: () => show(current - 1),
  next: () => show(current + 1),
  save: () => save("corrections.csv", ["path", "label", "class", "action"], false),
  "save-new": () => save("new-labels.csv", ["path", "label"], true),
};
const keys = {
  Enter: actions.confirm, " ": actions.confirm, a: actions.accept, d: actions.drop, u: undo, s: actions.save,
  S: actions["save-new"], j: actions.next, k: actions.previous, ArrowRight: actions.next, ArrowLeft: actions.previous,
  ArrowDown: () => row(1), ArrowUp: () => row(-1),
};
for (const button of classButtons) {
  if (button.dataset.key) keys[button.dataset.key] = () => choose(button.dataset.class);
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || !slots.length) return;
  if (event.target.closest("button") && (event.key === "Enter" || event.key === " ")) return; // presses the button
  const act = keys[event.key] ?? keys[event.key.toLowerCase()];
  if (!act) return;
  event.preventDefault();
  act();
});
panel.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (event.detail) button.blur(); // by a pointer: Enter stays the key of the current picture
  if (button.dataset.class !== undefined) choose(button.dataset.class); else actions[button.dataset.do]();
});
slots.forEach((slot, number) => slot.addEventListener("click", () => show(number, false)));
addEventListener("beforeunload", (event) => { if (!kept && decisions.size) event.preventDefault(); });

panel.hidden = !slots.length;
find("[data-do=save-new]").hidden = !slots.some((slot) => !slot.dataset.label);
load();
for (const key of slotsOf.keys()) paint(key);
paintCount();
show(Math.max(0, slots.findIndex((slot) => !decisions.has(keyOf(slot)))), false);
