"use strict";
// Watching a run. What the page shows comes from this service as JSON; texts of models enter the page as text nodes only.

const DARK = matchMedia("(prefers-color-scheme: dark)");
const MINUS = "\u2212";
const $ = (id) => document.getElementById(id);
const LIVE = true;
const TABS = [["curves", "Curves"], ["rollouts", "Rollouts"], ["cost", "Cost"], ["compare", "Compare"]];
// Of a search; they are the names of the fields and of the service's query, too.
const SEARCH = ["text", "regex", "prompt", "success", "finish", "least", "most", "first", "last", "variant", "at"];
const REMEMBERED = ["run", "tab", "group", "why", "step", "beside", ...SEARCH];

// What the service said last, by event: state, curves, time, rollouts.
const news = {};

// All that is chosen is in the address, so that any view can be linked to.
const chosen = (name) => new URLSearchParams(location.hash.slice(1)).get(name) ?? "";
const tab = () => (TABS.some(([name]) => name === chosen("tab")) ? chosen("tab") : TABS[0][0]);

function address(changes) {
  if (changes.view === "codes") return `runs/${encodeURIComponent(news.run)}/codes/#view=codes&code=${changes.code}`; // of the explorer
  const next = new URLSearchParams();
  for (const name of REMEMBERED) {
    const value = name in changes ? changes[name] : chosen(name);
    if (value !== null && value !== undefined && value !== "") next.set(name, value);
  }
  return "#" + next.toString();
}
const go = (changes) => {
  location.hash = address(changes);
};

function trouble(error) {
  $("problem").textContent = error ? printable(error.message) : "";
  $("problem").hidden = !error;
}

const ofRun = (path) => `api/runs/${encodeURIComponent(news.run)}/${path}`;
