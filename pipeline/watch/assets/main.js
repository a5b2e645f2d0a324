// Listening and showing.

const costView = () => [
  el("h2", {}, "Cost"),
  ...news.time.flatMap((spent) => {
    const whole = Object.values(spent.totals).reduce((sum, value) => sum + value, 0);
    const rows = Object.entries(spent.totals);
    return [
      chart({
        title: `Seconds of an update: ${spent.stage}`,
        across: "update",
        note: "Seconds of an update by the driver's clock, each bar the mean of neighbouring updates. idle: an asynchronous learner waits for rollouts; other: what is not measured by itself",
        labels: spent.updates,
        stacked: true,
        curves: rows.map(([name]) => ({ name, x: spent.updates.map((_, i) => i), y: spent.parts[name] })),
      }),
      table(`All updates: ${spent.stage}`, [
        { name: "part", cell: ([name]) => name },
        { name: "seconds", number: true, cell: ([, value]) => value.toFixed(1), value: ([, value]) => value },
        { name: "share", number: true, cell: ([, value]) => percent(value / (whole || 1)), value: ([, value]) => value },
      ], rows),
      spent.workers_idle !== null && el("p", {}, `Rollout workers had nothing to sample ${percent(spent.workers_idle, 0)} of the time.`),
    ].filter(Boolean);
  }),
  ...(news.time.length ? [] : [el("p", {}, "No update of reinforcement learning has ended yet.")]),
  el("div", { id: "costs" }),
];

// The report's tables of what stages and models cost.
async function refreshCosts() {
  const tables = await ask(ofRun("cost"));
  const shown = tables.map((one) => [
    table(one.title, one.head.map((name, i) => ({ name, number: i > 0, cell: (row) => printable(row[i]) })), one.rows),
    el("p", { class: "soft" }, one.note),
  ]);
  $("costs")?.replaceChildren(...shown.flat());
}

const curvesView = () => [
  el("h2", {}, "Curves"),
  news.curves.length ? el("div", { class: "columns" }, news.curves.map(chart)) : el("p", {}, "Nothing has been logged yet."),
];

const VIEWS = { curves: ["curves", curvesView], cost: ["time", costView], rollouts: ["state", rolloutsView], compare: ["state", compareView] };

const STOPS = ".reader, .tick input";

// Fills the view; a place that is focused stays so, and what a reader has opened stays open.
function show() {
  const [needs, view] = VIEWS[tab()];
  for (const node of $("tabs").children)
    node.dataset.tab === tab() ? node.setAttribute("aria-current", "page") : node.removeAttribute("aria-current");
  if (!(needs in news)) return $("view").replaceChildren(el("p", { class: "waiting" }, "Waiting for the run."));
  const places = (selector) => [...$("view").querySelectorAll(selector)];
  const focused = places(STOPS).indexOf(document.activeElement);
  const open = places("details").map((node) => node.open);
  $("view").replaceChildren(...view());
  places("details").forEach((node, i) => (node.open = open[i] ?? false));
  if (focused >= 0) places(STOPS)[focused]?.focus();
  if (tab() === "rollouts") refreshRollouts();
  if (tab() === "cost") refreshCosts().catch(trouble);
  if (tab() === "compare") refreshComparison().catch(trouble);
}

function showState() {
  const { name, status, stage, step, updates, reward, pages, model } = news.state;
  document.title = `${printable(name)}: watch`;
  $("title").textContent = printable(name);
  const at = status !== "finished" && stage && `, ${stage} ${step}${updates ? ` of ${updates}` : ""}`;
  $("about").textContent = `${status}${at || ""}${reward === null ? "" : `, reward of the last update ${fixed(reward)}`}`;
  const rest = [
    ...pages.map((file) => el("a", { href: `runs/${encodeURIComponent(name)}/${file}`, rel: "noreferrer" }, file)),
    pages.includes("explorer.html") && el("a", { href: `runs/${encodeURIComponent(name)}/codes/` }, "Codes"),
    model && el("a", { href: `runs/${encodeURIComponent(name)}/steer/` }, "Steer"),
  ].filter(Boolean);
  const key = JSON.stringify([pages, model]);
  if ($("links").dataset.key === key) return;
  $("links").dataset.key = key;
  $("links").replaceChildren(el("p", {}, rest.map((node, i) => [i ? " \u00b7 " : "", node])));
}

let source = null;
let names = []; // of the runs

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
  on("state", () => {
    showState();
    if ($("view").querySelector(".waiting")) show();
  });
  for (const part of ["curves", "time"]) on(part, () => VIEWS[tab()][0] === part && show());
  on("rollouts", () => tab() === "rollouts" && ($("rollouts") ? !chosen("at") && !chosen("group") && refreshRollouts() : show()));
  source.onerror = () => ($("connection").textContent = "The connection is lost: is latent-control watch still running?");
}

async function start() {
  names = await ask("api/runs");
  const wanted = () => (names.includes(chosen("run")) ? chosen("run") : names[0]);
  $("tabs").append(...TABS.map(([name, text]) => el("a", { href: "#", "data-tab": name, onclick: (event) => (event.preventDefault(), go({ tab: name, group: null, why: null, step: null })) }, text)));
  $("pick").append(...names.map((name) => el("option", { value: name }, printable(name))));
  $("pick-field").hidden = names.length < 2;
  $("pick").value = wanted();
  $("pick").addEventListener("change", () => go({ run: $("pick").value, at: null, group: null, why: null, variant: null }));
  if (!names.length) throw new Error("there is no run in this folder yet: start one, then load this page again");
  let last = {};
  addEventListener("hashchange", () => {
    const before = last;
    last = { tab: tab(), run: wanted() };
    if (last.run !== news.run) return listen(last.run);
    if (last.tab !== before.tab || tab() !== "rollouts") show();
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
