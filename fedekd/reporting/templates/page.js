// Column heads become buttons that sort the table: by number if every non-empty cell begins with one, else by text.
const text = (cell) => cell.dataset.value ?? (cell.querySelector("span") ?? cell).textContent.trim();
const number = (value) => parseFloat(value.replace("\u2212", "-").replaceAll(",", ""));
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    if (!head.textContent.trim()) return;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const direction = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", direction);
      const sign = direction === "ascending" ? 1 : -1;
      const rows = [...table.tBodies[0].rows];
      const value = (row) => text(row.cells[column]);
      const numeric = rows.every((row) => value(row) === "" || !isNaN(number(value(row))));
      const compare = (a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === "" || y === "") return (x === "") - (y === ""); // empty cells last
        return sign * (numeric ? number(x) - number(y) : x.localeCompare(y));
      };
      table.tBodies[0].append(...rows.sort(compare));
    });
  });
}
