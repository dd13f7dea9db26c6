// Search without a server: the sections of all pages, indexed in the browser by elasticlunr when somebody first asks.
"use strict";
const box = document.getElementById("find"), list = document.getElementById("found"), root = document.body.dataset.root;
let ready = null;

const script = name => new Promise((done, failed) => {
  const tag = Object.assign(document.createElement("script"), { src: root + name, onload: done, onerror: failed });
  document.head.append(tag);
});

async function prepare() {
  await Promise.all([script("elasticlunr.min.js"), script("search-data.js")]);
  const index = elasticlunr(function () { this.setRef("id"); ["title", "page", "text"].forEach(f => this.addField(f)); this.saveDocument(false); });
  SECTIONS.forEach((section, id) => index.addDoc({ id, title: section.title, page: section.page, text: section.text }));
  return index;
}

const escaped = text => { const p = document.createElement("p"); p.textContent = text; return p.innerHTML; };

function around(text, words) {
  const places = words.map(word => text.toLowerCase().indexOf(word)).filter(place => place >= 0);
  const from = Math.max(0, Math.min(...(places.length ? places : [0])) - 60);
  return (from ? "… " : "") + text.slice(from, from + 160) + (text.length > from + 160 ? " …" : "");
}

async function search() {
  const asked = box.value.trim();
  if (asked.length < 2) { list.hidden = true; return; }
  const index = await (ready ??= prepare());
  if (asked !== box.value.trim()) return;  // more was typed meanwhile
  const fields = { title: { boost: 4 }, page: { boost: 1 }, text: { boost: 1 } };
  const words = asked.toLowerCase().split(/\s+/);
  const found = ["AND", "OR"].flatMap(bool => index.search(asked, { fields, bool, expand: true }).map(hit => hit.ref));
  list.innerHTML = [...new Set(found)].slice(0, 15).map(ref => {
    const { title, page, href, text } = SECTIONS[ref];
    return `<li><a href="${root}${escaped(href)}"><b>${escaped(title)}</b><small>${escaped(page)}</small><small>${escaped(around(text, words))}</small></a></li>`;
  }).join("") || "<li><p>Nothing found. Try one word less.</p></li>";
  list.hidden = false;
}

box.addEventListener("input", search);
document.addEventListener("keydown", event => {
  if (event.key === "/" && document.activeElement !== box) { event.preventDefault(); box.focus(); }
  if (event.key === "Escape") { list.hidden = true; box.blur(); }
});
document.addEventListener("click", event => {
  if (!event.target.closest("search") || event.target.closest("#found a")) list.hidden = true;
  if (event.target.closest("nav a")) document.getElementById("open").checked = false;
});
