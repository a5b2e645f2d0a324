// Listening and showing.

const timeView = () => [
  el("h2", {}, "Time"),
  ...news.time.flatMap((spent) => {
    const whole = Object.values(spent.totals).reduce((sum, value) => sum + value, 0);
    const rows = Object.entries(spent.totals);
    return [
      timeFigure(spent),
      table(`All updates: ${spent.stage}`, [
        { name: "part", cell: ([name]) => name },
        { name: "seconds", number: true, cell: ([, value]) => value.toFixed(1), value: ([, value]) => value },
        { name: "share", number: true, cell: ([, value]) => percent(value / (whole || 1)), value: ([, value]) => value },
      ], rows),
      spent.workers_idle !== null && el("p", {}, `Rollout workers had nothing to sample ${percent(spent.workers_idle, 0)} of the time.`),
    ].filter(Boolean);
  }),
  ...(news.time.length ? [] : [el("p", {}, "No update of reinforcement learning has ended yet.")]),
];

const curvesView = () => [
  el("h2", {}, "Curves"),
  news.curves.length ? el("div", { class: "columns" }, news.curves.map(curvesFigure)) : el("p", {}, "Nothing has been logged yet."),
];

const VIEWS = { curves: ["curves", curvesView], time: ["time", timeView], rollouts: ["rollouts", rolloutsView] };

// Fills the view; a place that is focused stays so, and what a reader has opened stays open.
function show() {
  const [needs, view] = VIEWS[tab()];
  for (const node of $("tabs").children)
    node.dataset.tab === tab() ? node.setAttribute("aria-current", "page") : node.removeAttribute("aria-current");
  if (!(needs in news)) return $("view").replaceChildren(el("p", {}, "Waiting for the run."));
  const places = (selector) => [...$("view").querySelectorAll(selector)];
  const focused = places(".reader").indexOf(document.activeElement);
  const open = places("details").map((node) => node.open);
  $("view").replaceChildren(...view());
  places("details").forEach((node, i) => (node.open = open[i] ?? false));
  if (focused >= 0) places(".reader")[focused]?.focus();
  if (tab() === "rollouts") refreshRollouts();
}

function showState() {
  const { name, status, stage, step, updates, reward, pages, steer } = news.state;
  document.title = `${printable(name)}: watch`;
  $("title").textContent = printable(name);
  const at = status !== "finished" && stage && `, ${stage} ${step}${updates ? ` of ${updates}` : ""}`;
  $("about").textContent = `${status}${at || ""}${reward === null ? "" : `, reward of the last update ${fixed(reward)}`}`;
  const rest = [
    ...pages.map((file) => el("a", { href: `runs/${encodeURIComponent(name)}/${file}`, rel: "noreferrer" }, file)),
    steer && el("span", {}, "steer it: ", el("code", {}, printable(steer))),
  ].filter(Boolean);
  const key = JSON.stringify([pages, steer]);
  if ($("links").dataset.key === key) return;
  $("links").dataset.key = key;
  $("links").replaceChildren(el("p", {}, rest.map((node, i) => [i ? " \u00b7 " : "", node])));
}

let source = null;

function listen(name) {
  source?.close();
  for (const part of Object.keys(news)) delete news[part];
  news.run = name;
  show();
  source = new EventSource(ofRun("events"));
  const on = (part, then) =>
    source.addEventListener(part, (event) => {
      news[part] = JSON.parse(event.data);
      $("connection").textContent = "";
      then();
    });
  on("state", showState);
  for (const part of ["curves", "time"]) on(part, () => tab() === part && show());
  on("rollouts", () => tab() === "rollouts" && ($("rollouts") ? !chosen("at") && !chosen("group") && refreshRollouts() : show()));
  source.onerror = () => ($("connection").textContent = "The connection is lost: is latent-control watch still running?");
}

async function start() {
  const names = await ask("api/runs");
  const wanted = () => (names.includes(chosen("run")) ? chosen("run") : names[0]);
  $("tabs").append(...TABS.map(([name, text]) => el("a", { href: "#", "data-tab": name, onclick: (event) => (event.preventDefault(), go({ tab: name, group: null })) }, text)));
  $("pick").append(...names.map((name) => el("option", { value: name }, printable(name))));
  $("pick-field").hidden = names.length < 2;
  $("pick").value = wanted();
  $("pick").addEventListener("change", () => go({ run: $("pick").value, at: null, group: null }));
  if (!names.length) throw new Error("there is no run in this folder yet: start one, then load this page again");
  let last = {};
  addEventListener("hashchange", () => {
    const before = last;
    last = { tab: tab(), run: wanted() };
    if (last.run !== news.run) return listen(last.run);
    if (last.tab !== before.tab || !$("rollouts")) show();
    else refreshRollouts();
  });
  last = { tab: tab(), run: wanted() };
  listen(wanted());
}

$("skip").addEventListener("click", (event) => {
  event.preventDefault();
  $("main").focus();
});
DARK.addEventListener("change", show);
start().catch(trouble);
