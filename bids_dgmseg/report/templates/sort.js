// Sort the rows of a table by a button in each heading; without this script the table is read as it stands.
"use strict";
const valueOf = (row, place) => {
  const cell = row.cells[place];
  const text = cell.textContent.trim();
  if (text === "" || text === "n/a") return null;
  return cell.dataset.sort === undefined ? text : Number(cell.dataset.sort);
};
const compare = (a, b) =>
  typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
const sortRows = (table, place, sign) => {
  const body = table.tBodies[0];
  const rows = [...body.rows].map(row => [valueOf(row, place), row]);
  rows.sort(([a], [b]) => {
    if (a === null || b === null) return (a === null) - (b === null); // n/a last in both directions
    return sign * compare(a, b);
  });
  body.append(...rows.map(([, row]) => row));
};
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, place) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const descending = heading.getAttribute("aria-sort") === "ascending";
      headings.forEach(other => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
      sortRows(table, place, descending ? -1 : 1);
      document.getElementById("sorted").textContent =
        `Sorted by ${button.textContent.trim()}, ${descending ? "descending" : "ascending"}.`;
    });
  });
}
