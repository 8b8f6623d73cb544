// What the page is told, what is shown of it, and the controls.
import { byId, say, span } from "./dom.js";
import {
  showAudited, showFreshness, showGrid, showLog, showMerges, showMinerOptions, showPeers, showRounds, showRun,
  showScore, showTotals, showVerdicts, showWeights,
} from "./panels.js";
import { showPlots } from "./plots.js";

const RETRY = 3000;
const SETTLE = 120; // milliseconds without a move of the scrub bar before a moment is asked for

const state = {};
let mode = "live"; // live, paused or playing
let chosen = null;
let stream = null;
let asked = null;
let bounds = { begin: null, end: null };
let alarms = null;
let isLost = false;

// -- showing ----------------------------------------------------------------------------------------------------------

function choose(name) {
  chosen = name;
  show(["grid", "scores"]);
}

const axis = () => document.querySelector("input[name=axis]:checked").value;
const replaying = () => mode !== "live";

function show(changed) {
  if (!state.run) return;
  const has = (...names) => names.some((name) => changed.includes(name));
  const begin = state.run.begin ?? bounds.begin ?? 0;
  if (has("run")) { showStanding(); showTime(); }
  if (has("totals")) showTotals(state.totals);
  if (has("grid")) {
    const miners = [...state.grid.stages.flatMap((stage) => stage.miners), ...state.grid.away];
    if (!miners.some((miner) => miner.name === chosen)) chosen = miners[0]?.name ?? null;
    showGrid(state.grid, chosen, choose);
    showMinerOptions(state.grid, chosen);
    showAudited(state.grid);
  }
  if (has("curves")) showPlots(state.curves, state.run, axis());
  if (has("rounds")) showRounds(state.rounds, begin);
  if (has("audits")) showVerdicts(state.audits);
  if (has("scores", "grid")) showScore(state.scores, chosen);
  if (has("weights")) showWeights(state.weights);
  if (has("log")) showLog(state.log, byId("topic").value, begin);
  if (has("peers")) {
    document.body.dataset.of = "peers";
    showPeers(state.peers);
  }
  if (has("grid", "totals")) announceAlarms();
  document.body.dataset.shown = String(state.run.at);
}

function showStanding() {
  if (!state.run || isLost) return;
  showRun(state.run, replaying());
  showFreshness(state.run, replaying(), Date.now() / 1000);
}

function take(text) {
  const news = JSON.parse(text);
  Object.assign(state, news);
  bounds = { begin: (mode === "live" ? state.run.begin : bounds.begin ?? state.run.begin), end: state.run.end };
  show(Object.keys(news));
}

const announce = (text) => say(byId("announce"), text);

/** Say what somebody who does not look must not miss: convictions and failures, as they come. */
function announceAlarms() {
  const miners = [...state.grid.stages.flatMap((stage) => stage.miners), ...state.grid.away];
  const now = new Set([
    ...miners.filter((miner) => miner.sentence?.in_force).map((miner) => `${miner.name} is convicted`),
    ...[...miners, ...state.grid.validators].filter((node) => node.failure).map((node) => `${node.name} has failed`),
    ...miners.filter((miner) => miner.state === "dead").map((miner) => `${miner.name} is dead`),
  ]);
  const fresh = alarms === null ? [] : [...now].filter((alarm) => !alarms.has(alarm));
  alarms = now;
  if (fresh.length) announce(`${fresh.join(", ")}.`);
}

// -- where it comes from ----------------------------------------------------------------------------------------------

function listen(address) {
  stream?.close();
  asked?.abort();
  stream = new EventSource(address);
  const own = stream;
  own.addEventListener("state", (event) => { lost(false); take(event.data); });
  own.addEventListener("end", () => { own.close(); pause(); });
  own.addEventListener("error", () => {
    if (own !== stream) return;
    lost(true);
    if (own.readyState === EventSource.CLOSED) setTimeout(() => own === stream && listen(address), RETRY);
  });
}

function lost(now) {
  if (now === isLost) return;
  isLost = now;
  announce(now ? "The connection to the dashboard is lost. Trying again." : "The connection is back.");
  if (now) {
    say(byId("status"), "✕ no connection");
    byId("status").dataset.status = "lost";
  } else showStanding();
}

function live() {
  mode = "live";
  listen("/events");
  showMode();
}

function pause() {
  mode = "paused";
  stream?.close();
  showMode();
}

function play() {
  const from = Number(byId("scrub").value);
  const whole = bounds.end - bounds.begin;
  const start = mode === "live" || from >= whole ? 0 : from;
  mode = "playing";
  listen(`/events?at=${bounds.begin + start}&speed=${byId("speed").value}`);
  showMode();
}

async function goTo(seconds) {
  pause();
  asked?.abort();
  asked = new AbortController();
  try {
    const answer = await fetch(`/state?at=${bounds.begin + seconds}`, { signal: asked.signal });
    if (answer.ok && mode === "paused") take(await answer.text());
    else if (!answer.ok) announce(await answer.text());
  } catch (error) {
    if (error.name !== "AbortError") lost(true);
  }
}

function showMode() {
  say(byId("play"), mode === "playing" ? "❙❙ Pause" : "▶ Play");
  byId("latest").setAttribute("aria-pressed", String(mode === "live"));
  showStanding();
  showTime();
}

function showTime() {
  const scrub = byId("scrub");
  const known = bounds.begin !== null && bounds.end !== null;
  for (const id of ["play", "scrub"]) byId(id).disabled = !known;
  if (!known) return;
  const whole = Math.max(0.1, bounds.end - bounds.begin);
  const at = Math.min(whole, Math.max(0, state.run.at - bounds.begin));
  scrub.max = whole.toFixed(1);
  if (!scrubbing) scrub.value = at.toFixed(1);
  const text = `${span(Number(scrub.value))} of ${span(whole)}`;
  say(byId("moment"), text);
  scrub.setAttribute("aria-valuetext", text);
}

// -- controls ---------------------------------------------------------------------------------------------------------

let scrubbing = false;
let settling = 0;
byId("scrub").addEventListener("input", () => {
  scrubbing = true;
  if (mode !== "paused") pause();
  showTime();
  clearTimeout(settling);
  settling = setTimeout(() => { scrubbing = false; goTo(Number(byId("scrub").value)); }, SETTLE);
});
byId("play").addEventListener("click", () => (mode === "playing" ? pause() : play()));
byId("latest").addEventListener("click", live);
byId("speed").addEventListener("change", () => { if (mode === "playing") play(); });
byId("time").addEventListener("submit", (event) => event.preventDefault());
byId("miner").addEventListener("change", (event) => choose(event.target.value));
byId("score-round").addEventListener("change", () => show(["scores"]));
byId("merge-round").addEventListener("change", () => showMerges(state.rounds));
byId("topic").addEventListener("change", () => show(["log"]));
for (const radio of document.querySelectorAll("input[name=axis]")) radio.addEventListener("change", () => show(["curves"]));
setInterval(() => { if (state.run) showFreshness(state.run, replaying(), Date.now() / 1000); }, 1000);

live();
