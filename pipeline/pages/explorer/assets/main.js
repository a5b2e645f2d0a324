// The explorer of a run: what is chosen, and putting a view on the page, keeping the focus where it was.

const RUNS = onPage().runs, PER_PAGE = 25;
// Of the service that sent this page: its address ends with runs/NAME/codes/.
const RUN = location.pathname.split("/").at(-3), ofRun = (path) => `../../../api/runs/${RUN}/${path}`;
const REMEMBERED = ["run", "view", "code", "rollout", "step", "page", "split", "sort", "outcome"];
const VIEWS = [
  ["gain", "Gain", gainView],
  ["codes", "Codes", codesView],
  ["rollouts", "Rollouts", rolloutsView],
  ["training", "Training", trainingView],
  ["where", "Where", whereView],
  ["policy", "Before and after", policyView],
  ...(RUNS.length > 1 ? [["compare", "Side by side", compareView]] : []),
];

function state() {
  const number = (name, end) => (/^\d+$/.test(chosen(name)) && Number(chosen(name)) < end ? Number(chosen(name)) : null);
  const one = (name, known) => (known.includes(chosen(name)) ? chosen(name) : known[0]);
  const run = number("run", RUNS.length) ?? 0, data = RUNS[run];
  const code = number("code", data.codes.length), rollout = number("rollout", data.rollouts.length);
  const fallback = rollout !== null ? "rollouts" : code !== null ? "codes" : "gain";
  return {
    run, data, code, rollout,
    view: VIEWS.some(([name]) => name === chosen("view")) ? chosen("view") : fallback,
    step: number("step", 1e6), page: number("page", 1e6) ?? 0, split: number("split", data.splits.length) ?? 0,
    sort: one("sort", SORTS.map(([name]) => name)), outcome: one("outcome", OUTCOMES.map(([name]) => name)),
  };
}

let shownBefore = null;

function render() {
  const now = state(), main = $("main"), key = document.activeElement?.dataset?.key;
  const name = printable(now.data.summary.run), away = { code: null, rollout: null, step: null, page: null, split: null };
  put("title", `Explorer: ${name}`);
  document.title = `${name}: explorer`;
  $("runs").hidden = RUNS.length < 2;
  put("runs", RUNS.map((run, i) => link({ run: i, ...away }, { "aria-current": i === now.run && "true" }, `${"AB"[i]}: ${printable(run.summary.run)}`)));
  put("views", LIVE && el("a", { href: `../../../#run=${RUN}` }, "\u2190 Watch"),
    VIEWS.map(([view, text]) => link({ view, rollout: null, step: null, page: null }, { "aria-current": view === now.view && "page" }, text)));
  put("main", VIEWS.find(([view]) => view === now.view)[2](now));
  const subject = [now.run, now.view, now.code, now.rollout].join();
  const again = key && [...document.querySelectorAll("[data-key]")].find((node) => node.dataset.key === key);
  if (again && !(shownBefore !== subject && main.contains(again) && again.tagName === "A")) again.focus({ preventScroll: true });
  else if (shownBefore !== null && shownBefore !== subject) {
    main.querySelector("h2").focus({ preventScroll: true });
    window.scrollTo(0, 0);
  }
  shownBefore = subject;
}
window.addEventListener("hashchange", render);
DARK.addEventListener("change", render);
render();
