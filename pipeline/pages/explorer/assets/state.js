"use strict";
// The explorer of a run. Everything shown comes from the JSON beside this script; texts of models enter the page as text nodes only.

const RUNS = JSON.parse(document.getElementById("data").textContent).runs;
const PER_PAGE = 25;
// Sent by latent-control watch, which answers what the file does not hold; its address ends with runs/NAME/codes/.
const LIVE = "live" in document.body.dataset;
const RUN = location.pathname.split("/").at(-3);
const ofRun = (path) => `../../../api/runs/${RUN}/${path}`;
const DARK = matchMedia("(prefers-color-scheme: dark)");
const MINUS = "\u2212";

// All state is in the address, so that any view can be linked to.

function state() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const number = (name, end) => {
    const text = asked.get(name);
    return text !== null && /^\d+$/.test(text) && Number(text) < end ? Number(text) : null;
  };
  const run = number("run", RUNS.length) ?? 0;
  const data = RUNS[run];
  const code = number("code", data.codes.length),
    rollout = number("rollout", data.rollouts.length);
  const fallback = rollout !== null ? "rollouts" : code !== null ? "codes" : "gain";
  const view = views().some(([name]) => name === asked.get("view")) ? asked.get("view") : fallback;
  const one = (name, known) => (known.includes(asked.get(name)) ? asked.get(name) : known[0]);
  return {
    run,
    data,
    view,
    code,
    rollout,
    step: number("step", 1e6),
    page: number("page", 1e6) ?? 0,
    split: number("split", data.splits.length) ?? 0,
    sort: one("sort", ["update", "reward", "worst", "advantage", "length"]),
    outcome: one("outcome", ["all", "good", "bad", "explained"]),
  };
}

const REMEMBERED = ["run", "view", "code", "rollout", "step", "page", "split", "sort", "outcome"];

function address(changes) {
  const now = new URLSearchParams(location.hash.slice(1));
  const next = new URLSearchParams();
  for (const name of REMEMBERED) {
    const value = name in changes ? changes[name] : now.get(name);
    if (value !== null && value !== undefined && value !== "") next.set(name, value);
  }
  return "#" + next.toString();
}

const go = (changes) => {
  location.hash = address(changes);
};
