"use strict";
// A table that is wider than its place is shown in blocks, see the style. Without this script its place scrolls.
{
  const tables = [...document.querySelectorAll("table")].filter(table => table.tHead);
  for (const table of tables) {
    const heads = [...table.tHead.rows[0].cells].map(cell => cell.textContent.trim());
    for (const row of [...table.tBodies].flatMap(body => [...body.rows]))
      [...row.cells].forEach((cell, i) => { if (heads[i] && cell.colSpan === 1) cell.dataset.head = heads[i]; });
  }
  const fit = () => {
    for (const table of tables) table.classList.remove("blocks");
    // Measured all at once, changed afterwards: the browser lays the page out twice, not once a table.
    const wide = tables.filter(table => {
      const place = table.parentElement, style = getComputedStyle(place);
      return table.offsetWidth > Math.ceil(place.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight));
    });
    for (const table of wide) table.classList.add("blocks");
  };
  let width = 0;
  addEventListener("resize", () => { if (width !== innerWidth) { width = innerWidth; fit(); } });
  document.addEventListener("toggle", fit, true);
  addEventListener("beforeprint", () => { for (const table of tables) table.classList.remove("blocks"); });
  addEventListener("afterprint", fit);
  fit();
}
