"use strict";
// The page works without this: cells are links to articles, which show when they are the target. This adds the keyboard
// (arrow keys, Escape, Tab into the details and back), what is said to screen readers, and the copy buttons.
const says = document.getElementById("says");
let opener = null; // the link that opened the details: where Escape returns to

const opened = () => document.querySelector("article:target");
const boxes = (table) => [...table.querySelectorAll("td a")];

function only(link) {
  // A table is one stop of the Tab key: the cell that was last in use.
  for (const other of boxes(link.closest("table"))) other.tabIndex = other === link ? 0 : -1;
}

function step(link, key, whole) {
  const row = link.closest("tr");
  const rows = [...row.parentElement.rows];
  const at = [rows.indexOf(row), link.parentElement.cellIndex];
  const links = (cells) => cells.map((cell) => cell?.querySelector("a")).filter(Boolean);
  const across = [...row.cells];
  const down = rows.map((r) => r.cells[at[1]]);
  switch (key) {
    case "ArrowRight": return links(across.slice(at[1] + 1))[0];
    case "ArrowLeft": return links(across.slice(1, at[1])).pop();
    case "ArrowDown": return links(down.slice(at[0] + 1))[0];
    case "ArrowUp": return links(down.slice(0, at[0])).pop();
    case "Home": return whole ? boxes(row.closest("table"))[0] : links(across.slice(1))[0];
    case "End": return (whole ? boxes(row.closest("table")) : links(across.slice(1))).pop();
  }
}

function close() {
  if (!opened()) return;
  location.hash = "#-";
  opener?.focus();
}

function shown() {
  for (const link of document.querySelectorAll("[aria-current]")) link.removeAttribute("aria-current");
  const article = opened();
  if (!article) {
    says.textContent = "";
    return;
  }
  const box = [...document.querySelectorAll("td a")].find((a) => a.hash === location.hash);
  if (box) {
    box.setAttribute("aria-current", "true");
    only(box);
  }
  opener = opener?.hash === location.hash ? opener : box;
  article.scrollTop = 0;
  says.textContent = `${article.querySelector("h3").textContent}: ${article.querySelector("b").textContent}. Tab goes to the details.`;
  opener?.focus();
}

async function copy(button) {
  const code = button.parentElement.querySelector("code");
  try {
    await navigator.clipboard.writeText(code.textContent);
    says.textContent = button.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(code);
    says.textContent = button.textContent = document.execCommand("copy") ? "Copied" : "Selected";
  }
  setTimeout(() => { button.textContent = "Copy"; }, 2000);
}

document.addEventListener("click", (event) => {
  const link = event.target.closest("a[href^='#']");
  if (event.target.closest("button")) copy(event.target.closest("button"));
  else if (link?.classList.contains("close")) { event.preventDefault(); close(); }
  else if (link?.hash.startsWith("#c-")) opener = link;
});

document.addEventListener("keydown", (event) => {
  const here = document.activeElement;
  const article = opened();
  if (event.key === "Escape") { close(); return; }
  if (event.key === "Tab" && article) {
    const stops = [...article.querySelectorAll("a, button")];
    const to = event.shiftKey ? here === stops[0] && opener : here === opener && stops[0];
    if (to) { event.preventDefault(); to.focus(); }
    // Behind the details comes what is behind their cell: from there the browser goes on.
    else if (!event.shiftKey && here === stops.at(-1)) opener?.focus();
    return;
  }
  if (!here?.matches("td a") || event.altKey || event.metaKey) return;
  const next = step(here, event.key, event.ctrlKey);
  if (next) { event.preventDefault(); only(next); next.focus(); }
});

document.addEventListener("focusin", (event) => { if (event.target.matches("td a")) only(event.target); });
for (const button of document.querySelectorAll("button")) button.hidden = false;
for (const table of document.querySelectorAll(".matrix")) if (boxes(table).length) only(boxes(table)[0]);
addEventListener("hashchange", shown);
addEventListener("load", shown);
