// Sort tables by clicking a heading.
"use strict";
const valueOf = (row, column) => {
  const cell = row.cells[column];
  const text = cell.textContent.trim();
  if (text === "" || text === "n/a") return null;
  return cell.dataset.sort === undefined ? text : Number(cell.dataset.sort);
};
const compare = (a, b) =>
  typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
const sortRows = (table, column, sign) => {
  const body = table.tBodies[0];
  const rows = [...body.rows].map(row => [valueOf(row, column), row]);
  rows.sort(([a], [b]) => {
    if (a === null || b === null) return (a === null) - (b === null); // n/a last in both directions
    return sign * compare(a, b);
  });
  body.append(...rows.map(([, row]) => row));
};
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const descending = heading.getAttribute("aria-sort") === "ascending";
      headings.forEach(other => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
      sortRows(table, column, descending ? -1 : 1);
      document.getElementById("sorted").textContent =
        `Sorted by ${button.textContent.trim()}, ${descending ? "descending" : "ascending"}.`;
    });
  });
}
