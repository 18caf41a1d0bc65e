"use strict";
// A click on a heading sorts its table: first the way that shows the largest number (or the first word), then the other way.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, index) => head.querySelector("button").addEventListener("click", () => {
    const number = head.classList.contains("number");
    const now = head.getAttribute("aria-sort");
    const next = now === null ? (number ? "descending" : "ascending") : now === "ascending" ? "descending" : "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", next);
    const sign = next === "ascending" ? 1 : -1;
    const key = (row) => {
      const cell = row.cells[index];
      return number ? parseFloat(cell.dataset.value ?? "NaN") : cell.textContent;
    };
    const body = table.tBodies[0];
    const rows = [...body.rows].sort((a, b) => {
      const x = key(a), y = key(b);
      if (number) {
        if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y); // what has no value stays last
        return sign * (x - y);
      }
      return sign * x.localeCompare(y, undefined, { numeric: true });
    });
    body.append(...rows);
  }));
}
