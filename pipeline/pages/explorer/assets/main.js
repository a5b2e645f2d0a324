// Putting a view on the page, keeping the focus where it was.

let shownBefore = null;

function render() {
  const now = state(),
    main = document.getElementById("main");
  const key = document.activeElement && document.activeElement.dataset ? document.activeElement.dataset.key : null;
  document.getElementById("title").textContent = `Explorer: ${printable(now.data.summary.run)}`;
  document.title = `${printable(now.data.summary.run)}: explorer`;
  const runs = document.getElementById("runs");
  runs.hidden = RUNS.length < 2;
  const away = { code: null, rollout: null, step: null, page: null, split: null };
  runs.replaceChildren(
    ...RUNS.map((run, i) =>
      link({ run: i, ...away }, { "aria-current": i === now.run && "true" }, `${"AB"[i]}: ${printable(run.summary.run)}`),
    ),
  );
  document
    .getElementById("views")
    .replaceChildren(
      ...(LIVE ? [el("a", { href: `../../../#run=${RUN}` }, "\u2190 Watch")] : []),
      ...views().map(([name, text]) =>
        link({ view: name, rollout: null, step: null, page: null }, { "aria-current": name === now.view && "page" }, text),
      ),
    );
  const [, , show] = views().find(([name]) => name === now.view);
  main.replaceChildren(...[show(now)].flat(Infinity).filter(Boolean));
  const subject = [now.run, now.view, now.code, now.rollout].join();
  const again = key && [...document.querySelectorAll("[data-key]")].find((node) => node.dataset.key === key);
  if (again && !(shownBefore !== subject && main.contains(again) && again.tagName === "A")) again.focus({ preventScroll: true });
  else if (shownBefore !== null && shownBefore !== subject) {
    main.querySelector("h2").focus({ preventScroll: true });
    window.scrollTo(0, 0);
  }
  shownBefore = subject;
}

document.getElementById("skip").addEventListener("click", (event) => {
  event.preventDefault();
  document.getElementById("main").focus();
});
window.addEventListener("hashchange", render);
DARK.addEventListener("change", render);
render();
