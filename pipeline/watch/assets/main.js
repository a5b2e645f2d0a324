// Watching a run: listening to the service, and showing what it says.

const TABS = [["curves", "Curves"], ["rollouts", "Rollouts"], ["rewards", "Rewards"], ["result", "Result"], ["cost", "Cost"], ["compare", "Compare"]];
// Of a search; they are the names of the fields and of the service's query, too.
const SEARCH = ["text", "regex", "prompt", "success", "finish", "least", "most", "first", "last", "variant", "at"];
const REMEMBERED = ["run", "tab", "group", "why", "step", "beside", ...SEARCH];
const LEFT = { group: null, why: null, step: null }; // with a view
const news = {}; // what the service said last, by event: state, curves, time, rollouts
let source = null, names = [], turn = 0; // of the run's events; of the runs; of questions: only the last one's answer is shown

const tab = () => (TABS.some(([name]) => name === chosen("tab")) ? chosen("tab") : TABS[0][0]);
const ofRun = (path) => `api/runs/${encodeURIComponent(news.run)}/${path}`;
const pageOf = (path) => `runs/${encodeURIComponent(news.run)}/${path}`;
const leadsTo = ({ view, code }) => view === "codes" && pageOf(`codes/#view=codes&code=${code}`); // of the explorer

const costView = () => [sectionsOf(ofRun("cost")), news.time.length ? headed(news.time) : p("No update of reinforcement learning has ended yet.")];

const curvesView = () => [title("Curves"), news.curves.length ? side(news.curves.map(chart)) : p("Nothing has been logged yet.")];

const compareView = () => {
  const beside = (chosen("beside") || news.run).split("/").filter((name) => names.includes(name));
  const toggled = (name, on) => go({ beside: (on ? [...beside, name] : beside.filter((one) => one !== name)).join("/") });
  const pick = (name) => el("label", { class: "tick" }, el("input", { type: "checkbox", checked: beside.includes(name), onchange: (event) => toggled(name, event.target.checked) }), printable(name));
  return [
    title("Compare"),
    names.length < 2 && p("No other run lies beside this one."),
    el("div", { class: "controls", role: "group", "aria-label": "runs" }, names.slice(0, 40).map(pick)),
    beside.length < 2 ? soft("Choose two runs or more.") : sectionsOf(`api/compare?${beside.map((name) => `run=${encodeURIComponent(name)}`).join("&")}`),
  ];
};

const headed = (sections) => sections.map((s) => [title(plain(s.title)), sectionOf(s)]);

// A place for sections that the service makes when they are asked for.
function sectionsOf(path) {
  const node = el("div", { class: "sections", "aria-live": "polite" }, soft("Computing\u2026")), mine = ++turn;
  const shown = (found) => mine === turn && (trouble(null), node.replaceChildren(...nodes(headed(found))));
  ask(path).then(shown, (error) => (node.replaceChildren(), mine === turn && trouble(error)));
  return node;
}

const asked = (name) => ["state", () => sectionsOf(ofRun(name))];
const VIEWS = {
  curves: ["curves", curvesView], rollouts: ["state", rolloutsView], rewards: asked("rewards"), result: asked("result"),
  cost: ["time", costView], compare: ["state", compareView],
};
const STOPS = ".reader, .tick input";

// Fills the view; a place that is focused stays so, and what a reader has opened stays open.
function show() {
  const [needs, view] = VIEWS[tab()];
  markTab();
  if (!(needs in news)) return put("view", el("p", { class: "waiting" }, "Reading the run folder\u2026"));
  const places = (selector) => [...$("view").querySelectorAll(selector)];
  const focused = places(STOPS).indexOf(document.activeElement), open = places("details").map((node) => node.open);
  put("view", view());
  places("details").forEach((node, i) => (node.open = open[i] ?? false));
  if (focused >= 0) places(STOPS)[focused]?.focus();
  if (tab() === "rollouts") refreshRollouts();
}

const markTab = () => {
  for (const node of $("tabs").children) node.dataset.tab === tab() ? node.setAttribute("aria-current", "page") : node.removeAttribute("aria-current");
};

function showState() {
  const { name, status, stage, step, updates, reward, pages, model, said, links } = news.state;
  document.title = `${printable(name)}: watch`;
  put("title", printable(name));
  const at = status !== "finished" && stage && `, ${stage} ${step}${updates ? ` of ${updates}` : ""}`;
  put("about", `${status}${at || ""}${at && reward !== null ? `, reward of the last update ${fixed(reward)}` : ""}`, said.map((text) => ["; ", plain(text)]));
  const to = (href, text) => el("a", { href, rel: "noreferrer" }, plain(text));
  const key = JSON.stringify([name, pages, model, links]);
  if ($("links").dataset.key === key) return;
  $("links").dataset.key = key;
  const own = ([id, text]) => el("a", { href: "#", "data-tab": id, onclick: (event) => (event.preventDefault(), go({ tab: id, ...LEFT })) }, text);
  put("tabs", TABS.map(own), pages.includes("explorer.html") && to(pageOf("codes/"), "Codes"), model && to(pageOf("steer/"), "Steer"));
  markTab();
  put("links", p([...pages.map((file) => to(pageOf(file), file)), ...links.map((one) => to(one.target, one.text))].map((node, i) => [i ? " \u00b7 " : "", node])));
}

function listen(name) {
  source?.close();
  for (const part of Object.keys(news)) delete news[part];
  news.run = name;
  delete $("links").dataset.key;
  for (const part of ["about", "tabs", "links", "connection"]) put(part); // they told of another run
  put("title", printable(name));
  trouble(null);
  show();
  source = new EventSource(ofRun("events"));
  const on = (part, then) =>
    source.addEventListener(part, (event) => {
      news[part] = JSON.parse(event.data);
      put("connection");
      then();
    });
  on("state", () => {
    showState();
    if ($("view").querySelector(".waiting")) show();
  });
  for (const part of ["curves", "time"]) on(part, () => VIEWS[tab()][0] === part && show());
  on("rollouts", () => tab() === "rollouts" && ($("rollouts") ? !chosen("at") && !chosen("group") && refreshRollouts() : show()));
  source.addEventListener("unread", (event) => put("connection", printable(JSON.parse(event.data))));
  source.onerror = () => put("connection", "The connection is lost: is latent-control watch still running?");
}

async function start() {
  names = await ask("api/runs");
  const wanted = () => (names.includes(chosen("run")) ? chosen("run") : names[0]);
  put("pick", names.map((name) => el("option", { value: name }, printable(name))));
  $("pick-field").hidden = names.length < 2;
  $("pick").value = wanted();
  $("pick").addEventListener("change", () => go({ run: $("pick").value, at: null, variant: null, ...LEFT }));
  if (!names.length) throw new Error("there is no run in this folder yet: start one, then load this page again");
  let last = { tab: tab(), run: wanted() };
  addEventListener("hashchange", () => {
    const before = last;
    last = { tab: tab(), run: wanted() };
    if (last.run !== news.run) return listen(last.run);
    if (last.tab !== before.tab || tab() !== "rollouts") show();
    else {
      for (const name of SEARCH) if ($(`s-${name}`)) putField(name); // a link, or the way back, has changed them
      refreshRollouts();
    }
  });
  listen(wanted());
}

DARK.addEventListener("change", show);
start().catch(trouble);
