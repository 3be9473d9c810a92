"use strict";

function valueOf(row, column) {
  const cell = row.cells[column];
  return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent.trim();
}

// Numbers in the order of size, then text; a missing value is always last.
function compare(one, two, sign) {
  const missing = (one === "–") - (two === "–");
  if (missing) return missing;
  if (typeof one === "number" && typeof two === "number") return sign * (one - two);
  if (typeof one !== typeof two) return typeof one === "number" ? -1 : 1;
  return sign * one.localeCompare(two, undefined, { numeric: true });
}

function sort(head) {
  const column = head.cellIndex, row = head.parentElement, body = head.closest("table").tBodies[0];
  const before = head.getAttribute("aria-sort");
  // Of numbers, the large ones come first at the first click; of names and row numbers, the small ones.
  const first = head.classList.contains("number") && column > 0 ? "descending" : "ascending";
  const order = !before ? first : before === "ascending" ? "descending" : "ascending";
  for (const other of row.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", order);
  const rows = [...body.rows];
  rows.sort((one, two) => compare(valueOf(one, column), valueOf(two, column), order === "ascending" ? 1 : -1));
  body.append(...rows);
}

for (const head of document.querySelectorAll("th")) {
  head.tabIndex = 0;
  head.addEventListener("click", () => sort(head));
  head.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    sort(head);
  });
}

for (const input of document.querySelectorAll("[data-filter]")) {
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of document.getElementById(input.dataset.filter).tBodies[0].rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
  });
}

// A link to a folded configuration opens it.
function openTarget() {
  const target = document.getElementById(location.hash.slice(1));
  if (target && target.tagName === "DETAILS") target.open = true;
}
addEventListener("hashchange", openTarget);
openTarget();
