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
    const value = (row) => Number((/^(?:[a-z]+ )?([-+]?[\d.]+(?:e[-+]?\d+)?)(?:%| .*)?$/.exec(key(row)) ?? [])[1]);
    const numbers = rows.every((row) => !Number.isNaN(value(row)));
    cell.firstChild.addEventListener("click", () => {
      const down = cell.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      cell.setAttribute("aria-sort", down ? "descending" : "ascending");
      const words = (a, b) => key(a).localeCompare(key(b), "en", { numeric: true });
      const order = numbers ? (a, b) => value(a) - value(b) : words;
      body.append(...rows.sort((a, b) => (down ? order(b, a) : order(a, b))));
    });
  });
  box.querySelector("label").hidden = false;
  find();
}
