"use strict";
// A column sorts a table's groups of rows; a second time the other way round. What has no value comes last.
function value(group, column) {
  const cell = group.rows[0].cells[column];
  const text = cell.dataset.value ?? cell.textContent.trim();
  const number = text === "" ? NaN : Number(text);
  return Number.isNaN(number) ? text : number;
}
function compare(one, other) {
  if (one === "" || other === "") return (one === "") - (other === "");
  return typeof one === "number" && typeof other === "number" ? one - other : String(one).localeCompare(String(other));
}
document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if ("more" in button.dataset) {
    const row = button.closest("tr").nextElementSibling;
    row.hidden = !row.hidden;
    button.setAttribute("aria-expanded", String(!row.hidden));
    return;
  }
  const heading = button.closest("th");
  const table = heading.closest("table");
  const numeric = heading.classList.contains("number");
  const before = heading.getAttribute("aria-sort");
  const descending = before ? before === "ascending" : numeric; // numbers: the largest first
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
  const groups = [...table.tBodies].map((group) => [value(group, heading.cellIndex), group]);
  groups.sort(([one], [other]) => (one === "" || other === "" ? compare(one, other) : descending ? compare(other, one) : compare(one, other)));
  for (const [, group] of groups) table.insertBefore(group, table.tFoot);
});
