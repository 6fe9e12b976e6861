// A field above each table of more than thirty rows: only rows that hold all its words are shown.
document$.subscribe(() => {
  for (const table of document.querySelectorAll("article table:not([class])")) {
    const rows = [...table.tBodies[0].rows];
    if (rows.length <= 30) continue;
    const field = document.createElement("input");
    field.type = "search";
    field.className = "filter";
    field.placeholder = `Filter ${rows.length} rows`;
    field.setAttribute("aria-label", field.placeholder);
    field.addEventListener("input", () => {
      const words = field.value.toLowerCase().split(/\s+/);
      for (const row of rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
      }
    });
    (table.closest(".md-typeset__scrollwrap") ?? table).before(field);
  }
});
