"use strict";
const $ = (id) => document.getElementById(id);
const make = (tag, cls, text) => {
  const node = document.createElement(tag);
  if (cls) node.className = cls;
  if (text !== undefined) node.textContent = text;
  return node;
};
const store = (area, key, value) => {
  try { return value === undefined ? area.getItem(key) : area.setItem(key, value); } catch { return null; }
};
const ADMIN = document.body.classList.contains("admin");

/* ---- theme */
const setTheme = (theme) => { if (theme) document.documentElement.dataset.theme = theme; };
setTheme(store(localStorage, "octavo-theme"));
$("theme").addEventListener("click", () => {
  const dark = document.documentElement.dataset.theme
    ? document.documentElement.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  setTheme(dark ? "light" : "dark");
  store(localStorage, "octavo-theme", dark ? "light" : "dark");
});

/* ---- key and settings */
const KEY = ADMIN ? "octavo-admin-token" : "octavo-key";
let key = store(sessionStorage, KEY) || "";
const setKey = (value) => {
  key = $("key").value = value.trim();
  store(sessionStorage, KEY, key);
  showUsage(null);
  refresh();
};
$("key").value = key;
$("key").addEventListener("change", () => setKey($("key").value));
if (ADMIN) $("gate-words").textContent = "This page asks for the admin token.";
else $("empty").before($("gate"));
const lock = (locked) => {
  $("gate").hidden = !locked;
  document.body.classList.toggle("locked", locked);
};
$("gate").addEventListener("submit", (event) => { event.preventDefault(); setKey($("gate-key").value); });
const headers = () => (key ? { authorization: "Bearer " + key } : {});

for (const name of ["temperature", "top-p"]) {
  $(name).addEventListener("input", () => { $(name + "-out").textContent = $(name).value; });
}
document.addEventListener("keydown", (event) => { if (event.key === "Escape") $("settings").open = false; });
document.addEventListener("click", (event) => { if (!$("settings").contains(event.target)) $("settings").open = false; });
