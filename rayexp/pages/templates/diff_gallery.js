"use strict";
// The gallery: the flips lie in columns in #data; cards are made for a page of them at a time.
const data = JSON.parse(document.getElementById("data").textContent);
const pictures = JSON.parse(document.getElementById("pictures").textContent);
const form = document.querySelector(".filters"), grid = document.getElementById("grid");
const more = document.getElementById("more"), count = document.getElementById("count");
const PAGE = 120, SIGN = { lost: "▼ lost", gained: "▲ gained", other_wrong: "◆ wrong in another way", not_finite: "✕ not finite" };
const CSS = { other_wrong: "other", not_finite: "broken" };
const number = n => n.toLocaleString("en");
let rows = [], shown = 0;

const counts = new Map();
for (const label of data.label) counts.set(label, (counts.get(label) || 0) + 1);
for (const label of [...counts.keys()].sort((x, y) => data.words[x].localeCompare(data.words[y])))
  form.elements.class.add(new Option(`${data.words[label]} (${counts.get(label)})`, label));

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function said(side, label, confidence, right) {
  const line = make("div", "said");
  line.append(make("span", "soft", `${side} ${right ? "✓" : "✗"}`));
  line.append(make("span", "", label === null ? "not finite" : data.words[label]));
  line.append(make("span", "soft", confidence === null ? "" : `${confidence.toFixed(0)}\u00a0%`));
  const meter = make("div", "meter"), bar = make("i");
  bar.style.width = `${confidence || 0}%`;
  meter.append(bar);
  line.append(meter);
  return line;
}

function card(i) {
  const kind = data.kinds[data.kind[i]], label = data.label[i];
  const item = make("li", CSS[kind] || kind), left = make("div");
  if (pictures[i]) {
    const image = make("img");
    image.decoding = "async";
    image.alt = `${data.name[i]}, ${data.words[label]}`;
    image.src = `data:image/webp;base64,${pictures[i]}`;
    left.append(image);
  } else left.append(make("div", "none"));
  left.append(make("div", "sign", SIGN[kind]));
  const body = make("div", "body");
  body.append(make("div", "true", data.words[label]), make("div", "soft", `${data.name[i]}, label ${label}`));
  body.append(said("A", data.a[i], data.ca[i], data.a[i] === label));
  body.append(said("B", data.b[i], data.cb[i], data.b[i] === label));
  item.append(left, body);
  return item;
}

function page() {
  const next = rows.slice(shown, shown + PAGE);
  grid.append(...next.map(card));
  shown += next.length;
  more.hidden = shown >= rows.length;
  more.textContent = `Show ${Math.min(PAGE, rows.length - shown)} more`;
  count.textContent = rows.length ? `${number(rows.length)} images, the first ${number(shown)} shown.` : "No image fits this filter.";
  if (shown === rows.length && shown) count.textContent = `${number(shown)} image${shown > 1 ? "s" : ""}.`;
}

const ORDER = {
  worst: (x, y) => x - y,
  best: (x, y) => y - x,
  a: (x, y) => (data.ca[y] ?? -1) - (data.ca[x] ?? -1) || x - y,
  b: (x, y) => (data.cb[y] ?? -1) - (data.cb[x] ?? -1) || x - y,
  name: (x, y) => data.name[x].localeCompare(data.name[y], "en", { numeric: true }),
};

function filter() {
  const words = Object.fromEntries(new FormData(form));
  const kind = data.kinds.indexOf(words.filter), find = words.find.trim().toLowerCase();
  const all = data.name.map((_, i) => i).filter(i =>
    (words.class === "" || data.label[i] === +words.class) && (!find || data.name[i].toLowerCase().includes(find)));
  for (const place of form.querySelectorAll("[data-count]")) {
    const wanted = data.kinds.indexOf(place.dataset.count);
    place.textContent = number(wanted < 0 ? all.length : all.filter(i => data.kind[i] === wanted).length);
  }
  rows = all.filter(i => kind < 0 || data.kind[i] === kind).sort(ORDER[words.sort]);
  document.body.dataset.filter = words.filter;
  grid.replaceChildren();
  shown = 0;
  page();
  const hash = new URLSearchParams(Object.entries(words).filter(([k, v]) => v && v !== "all" && v !== "worst"));
  history.replaceState(null, "", hash.size ? `#${hash}` : location.pathname + location.search);
}

function fromHash() {
  if (!location.hash.includes("=")) return false;
  const words = new URLSearchParams(location.hash.slice(1));
  for (const name of ["filter", "class", "sort", "find"]) {
    const field = form.elements[name], old = field.value;
    field.value = words.get(name) ?? { filter: "all", class: "", sort: "worst", find: "" }[name];
    if (name !== "find" && !field.value && words.get(name)) field.value = old;
  }
  return true;
}

form.addEventListener("input", filter);
form.addEventListener("submit", event => event.preventDefault());
more.addEventListener("click", () => {
  const first = shown;
  page();
  const item = grid.children[first];
  if (item) { item.tabIndex = -1; item.focus({ preventScroll: true }); }
});
for (const button of document.querySelectorAll("button[data-class]"))
  button.addEventListener("click", () => {
    form.elements.class.value = button.dataset.class;
    filter();
    const heading = document.getElementById("gallery");
    heading.scrollIntoView();
    heading.focus();
  });
addEventListener("hashchange", () => { if (fromHash()) filter(); });
fromHash();
filter();
