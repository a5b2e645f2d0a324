// A page of sections.

function show() {
  const report = onPage();
  put("title", plain(report.title));
  put("views", report.sections.map((s) => el("a", { href: `#${s.name}` }, plain(s.title))));
  if (report.tiles.length) $("views").before(tiles(report.tiles));
  put("main", report.sections.map((s) => el("section", { "aria-labelledby": s.name }, el("h2", { id: s.name, tabindex: "-1" }, plain(s.title)), sectionOf(s))));
}
DARK.addEventListener("change", () => (document.querySelector(".tiles")?.remove(), show()));
show();
