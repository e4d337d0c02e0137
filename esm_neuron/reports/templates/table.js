"use strict";
for (const box of document.querySelectorAll(".search")) {
  const table = box.querySelector("table"), body = table.tBodies[0], rows = [...body.rows];
  const shown = box.querySelector("output"), field = box.querySelector("input");
  const find = () => {
    const words = field.value.toLowerCase();
    let count = 0;
    for (const row of rows) {
      row.hidden = !row.textContent.toLowerCase().includes(words);
      count += !row.hidden;
    }
    shown.textContent = `${count} of ${rows.length}`;
  };
  field.addEventListener("input", find);
  [...table.tHead.rows[0].cells].forEach((cell, place) => {
    const key = (row) => row.cells[place].textContent.replaceAll(",", "");
    cell.firstChild.addEventListener("click", () => {
      const down = cell.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      cell.setAttribute("aria-sort", down ? "descending" : "ascending");
      const order = (a, b) => key(a).localeCompare(key(b), "en", { numeric: true });
      body.append(...rows.sort((a, b) => (down ? order(b, a) : order(a, b))));
    });
  });
  box.querySelector("label").hidden = false;
  find();
}
