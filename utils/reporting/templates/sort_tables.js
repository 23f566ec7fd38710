// A click on a column's head sorts by it, once more the other way round.
for (const table of document.querySelectorAll("table.sortable"))
  table.tHead.rows[0].querySelectorAll("th").forEach((head, column) => {
    let rising = false;
    head.addEventListener("click", () => {
      rising = !rising;
      const value = row => row.cells[column].dataset.sort ?? row.cells[column].textContent;
      const order = (a, b) => { const x = value(a), y = value(b);
        return (isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y) * (rising ? 1 : -1); };
      table.tBodies[0].append(...[...table.tBodies[0].rows].sort(order));
    });
  });
