// From sections of the state to the panels of the page. docs/dashboard.md says what each figure is.
import { NONE, byId, bytes, dollars, el, fixed, mark, options, percent, say, scaled, span, table, whole } from "./dom.js";

const STATES = {
  starting: ["○", "quiet"], waiting: ["…", "quiet"], joining: ["↗", "busy"], active: ["●", "good"],
  training: ["▶", "good"], merging: ["⇄", "busy"], merged: ["✓", "good"], benched: ["⏸", "warn"],
  out: ["–", "quiet"], left: ["←", "quiet"], frozen: ["❙❙", "warn"], dead: ["✕", "bad"],
  unseen: ["?", "quiet"],
};
const STATE_WORDS = { unseen: "its log is not here" };
const LEVELS = { info: ["·", "quiet"], warning: ["!", "warn"], alarm: ["✕", "bad"] };

export function showRun(run, replaying) {
  document.title = `Orion · ${run.folder}`;
  say(byId("run-name"), run.name === run.folder ? run.folder : `${run.folder} · ${run.name}`);
  const [symbol, word, kind] = replaying
    ? ["↺", "replay", "replay"]
    : { waiting: ["○", "waiting", "waiting"], running: ["●", "live", "running"], finished: ["■", "finished", "finished"] }[
      run.status];
  const chip = byId("status");
  say(chip, `${symbol} ${word}`);
  chip.dataset.status = kind;
  say(byId("round"), run.round < 0 ? "no round yet" : run.rounds === null ? `round ${run.round}`
    : `round ${run.round}, the last is ${run.rounds - 1}`);
  say(byId("elapsed"), run.begin === null ? "" : `${span(run.at - run.begin)} elapsed`);
  const problem = byId("problem");
  problem.hidden = run.problem === "";
  say(problem, run.problem);
}

const SILENT = 60; // seconds without an event after which a run that has not ended is not called live

/** The age of the last event, while a run goes on. */
export function showFreshness(run, replaying, now) {
  const age = run.end === null || replaying || run.status !== "running" ? null : now - run.end;
  const place = byId("freshness");
  const chip = byId("status");
  if (age !== null && chip.dataset.status !== "lost") {
    const silent = age > SILENT;
    say(chip, silent ? "! silent" : "● live");
    chip.dataset.status = silent ? "silent" : "running";
  }
  say(place, age === null ? "" : age < 3 ? "events now" : `last event ${span(age)} ago`);
  place.classList.toggle("stale", age !== null && age > SILENT);
}

export function showTotals(totals) {
  const churn = [["killed", totals.killed], ["started again", totals.restarted], ["frozen", totals.frozen],
    ["joined", totals.joined], ["left", totals.left], ["benched", totals.benched], ["resumed", totals.resumed]]
    .filter(([, count]) => count).map(([word, count]) => `${count} ${word}`).join(", ");
  const audited = totals.audits_passed + totals.audits_failed;
  const rows = [
    ["loss", "Training loss", fixed(totals.loss, 3), "latest few"],
    ["validation", "Validation loss", fixed(totals.validation, 4),
      totals.validation_round === null ? "not measured yet" : `before round ${totals.validation_round}`],
    ["tokens", "Tokens", whole(totals.tokens), `${whole(totals.microbatches)} microbatches`],
    ["rate", "Tokens/s", whole(totals.tokens_per_second), "whole run"],
    ...against(totals),
    ["lost", "Lost", whole(totals.lost), `${whole(totals.in_flight)} in flight`, totals.lost > 0],
    ["audits", "Audited units", audited ? `${whole(totals.audits_passed)}/${whole(audited)}` : NONE,
      totals.audits_failed ? `${whole(totals.audits_failed)} failed` : audited ? "passed" : "none yet",
      totals.audits_failed > 0],
    ["convicted", "Convicted", whole(totals.convicted), totals.convicted ? "earn nothing" : "miners",
      totals.convicted > 0],
    ["weights-set", "Weights set", whole(totals.weights_set), "by all validators"],
    ["sent", "Sent", bytes(totals.forward_bytes + totals.backward_bytes + totals.merge_bytes),
      `${bytes(totals.merge_bytes)} in merges`],
    ["churn", "Gradients lost", whole(totals.gradients_lost), churn || "no churn", totals.gradients_lost > 0],
  ];
  byId("totals").replaceChildren(...rows.map(([id, name, value, more, alarm]) =>
    el("div", { class: alarm ? "alarm" : "" }, el("dt", {}, alarm ? mark("bad", "✕", name) : name), el("dd", { id: `total-${id}`, class: "figure" }, value),
      el("dd", { class: "more" }, more))));
}

/** What is measured against the model, the card, the price and the goal. */
function against(totals) {
  const flops = scaled(totals.flops_per_second, "FLOP/s");
  const rows = [];
  if (totals.mfu !== null) {
    rows.push(["compute", "MFU", percent(totals.mfu), `${fixed(totals.miners, 1)} × ${totals.card}; ${totals.formula}, ${flops}`]);
  } else if (totals.flops_per_second !== null) {
    rows.push(["compute", "FLOP/s", scaled(totals.flops_per_second),
      `${totals.formula}; ${totals.card ? "not all logs here" : "no card named"}`]);
  }
  if (totals.dollars !== null) {
    rows.push(["cost", "Cost", dollars(totals.dollars), totals.dollars_per_million === null ? "estimated"
      : `estimated; ${dollars(totals.dollars_per_million)} per M tokens`]);
  }
  if (totals.progress !== null) {
    const of = totals.target === null ? "of the rounds" : `of ${scaled(totals.target)} tokens`;
    rows.push(["left", "Time left", span(totals.seconds_left), `${percent(totals.progress, 0)} ${of}`]);
  }
  return rows;
}

// -- swarm ------------------------------------------------------------------------------------------------------------

const WORK = { working: ["▶", "busy"], done: ["✓", "good"], failed: ["✕", "bad"] };
const cells = new Map();
const validators = el("section", { class: "stage" }, el("h3", {}, "validators"), el("ul"));

/** The grid. A cell is a button and stays the same element, so that focus stays where it is. */
export function showGrid(grid, chosen, choose) {
  const place = byId("grid");
  const present = new Set();
  const columns = grid.stages.map((stage) => {
    const buttons = stage.miners.map((miner) => cell(miner, chosen, choose, present));
    return [`stage ${stage.index}`, stage.role === "body" ? "" : stage.role, buttons];
  });
  if (place.children.length !== columns.length + 1) {
    place.replaceChildren(...columns.map(() => el("section", { class: "stage" }, el("h3"), el("ul"))), validators);
  }
  columns.forEach(([title, role, buttons], index) => {
    const [head, list] = place.children[index].children;
    if (head.dataset.key !== title + role) {
      head.dataset.key = title + role;
      head.replaceChildren(title, role ? el("small", {}, ` ${role}`) : "");
    }
    fill(list, buttons);
  });
  const away = grid.away.map((miner) => cell(miner, chosen, choose, present));
  if (away.length && !byId("away").children.length) {
    byId("away").replaceChildren(el("section", { class: "stage aside" }, el("h3", {}, "no stage"), el("ul")));
  }
  if (byId("away").children.length) fill(byId("away").querySelector("ul"), away);
  byId("away").hidden = away.length === 0;
  for (const [name, button] of cells) if (!present.has(name)) { button.remove(); cells.delete(name); }
  validators.hidden = grid.validators.length === 0;
  validators.lastChild.replaceChildren(...grid.validators.map((one) => el("li", { class: `card ${WORK[one.state][1]}` },
    el("span", { class: "row" }, el("strong", {}, one.name), mark(WORK[one.state][1], WORK[one.state][0], one.state)),
    el("span", { class: "row quiet" }, el("span", {}, `${whole(one.units)} units replayed`),
      el("span", {}, `${whole(one.convictions)} verdicts`)),
    one.failure ? el("span", { class: "quiet" }, one.failure) : "")));
}

function fill(list, buttons) {
  const now = [...list.children].map((item) => item.firstChild);
  if (now.length === buttons.length && now.every((button, index) => button === buttons[index])) return;
  const focused = document.activeElement;
  list.replaceChildren(...buttons.map((button) => el("li", {}, button)));
  if (buttons.includes(focused)) focused.focus();
}

function cell(miner, chosen, choose, present) {
  present.add(miner.name);
  let button = cells.get(miner.name);
  if (button === undefined) {
    button = el("button", { type: "button", class: "miner" });
    button.addEventListener("click", () => choose(miner.name));
    button.dataset.miner = miner.name;
    cells.set(miner.name, button);
  }
  button.setAttribute("aria-pressed", String(miner.name === chosen));
  const key = JSON.stringify(miner);
  if (button.dataset.key === key) return button;
  button.dataset.key = key;
  const convicted = miner.sentence?.in_force ?? false;
  const [symbol, kind] = miner.failure ? ["✕", "bad"] : STATES[miner.state] ?? ["?", "quiet"];
  button.className = `miner ${convicted ? "bad" : kind}`;
  const audits = miner.passed + miner.failed;
  button.replaceChildren(
    el("span", { class: "row" }, el("strong", {}, miner.name),
      el("span", { class: "quiet" }, miner.uid === null ? "no uid yet" : `uid ${miner.uid}`)),
    el("span", { class: "row" }, mark(kind, symbol, miner.failure ? "failed" : STATE_WORDS[miner.state] ?? miner.state),
      miner.state === "unseen" ? "" : miner.fetching ? fetched(miner.fetching) : merged(miner.merge)),
    miner.state === "unseen" ? "" : el("span", { class: "row quiet" }, el("span", {}, `${whole(miner.units)} units`),
      el("span", {}, `${whole(miner.steps)} steps`)),
    el("span", { class: "row quiet" },
      el("span", {}, audits ? `audits ${whole(miner.passed)}/${whole(audits)}` : "not audited"),
      el("span", {}, miner.weight === null ? "" : `weight ${percent(miner.weight)}`)),
    verdictOf(miner, convicted),
  );
  return button;
}

function fetched(load) {
  return el("span", { class: "quiet" }, `${percent(load.bytes / load.total, 0)} of ${bytes(load.total)}`);
}

function merged(merge) {
  if (merge === null) return el("span", { class: "quiet" }, "no merge yet");
  if (merge.void) return mark("warn", "∅", `void r${merge.round}`);
  return merge.included ? mark("good", "✓", `in merge r${merge.round}`) : mark("warn", "✕", `not in merge r${merge.round}`);
}

function verdictOf(miner, convicted) {
  if (convicted) return el("span", { class: "row" }, mark("bad", "✕", `convicted until r${miner.sentence.until}`),
    miner.plays ? el("span", { class: "quiet" }, miner.plays) : "");
  if (miner.sentence) return el("span", { class: "row" }, mark("warn", "!", `was convicted until r${miner.sentence.until}`));
  if (miner.plays) return el("span", { class: "row" }, mark("warn", "!", `plays ${miner.plays}`));
  return "";
}

// -- rounds -----------------------------------------------------------------------------------------------------------

export function showRounds(rounds, begin) {
  const rows = rounds.rounds.map((round) => {
    const sum = (pick) => round.merges.reduce((total, merge) => total + pick(merge), 0);
    const last = round.merges.length ? Math.max(...round.merges.map((merge) => merge.seconds)) : null;
    return [String(round.number), round.time === null ? NONE : span(round.time - begin), whole(round.block),
      whole(round.done),
      round.in_flight ? mark(round.closed ? "bad" : "busy", round.closed ? "✕" : "▶",
        `${round.in_flight} ${round.closed ? "lost" : "in flight"}`) : "0",
      fixed(round.loss, 3), fixed(round.validation, 4),
      round.merges.length ? `${sum((merge) => merge.included)}/${sum((merge) => merge.reported)}` : NONE,
      round.merges.length ? bytes(sum((merge) => merge.bytes)) : NONE, last === null ? NONE : `${fixed(last, 1)} s`,
      verdictOfMerges(round.merges)];
  });
  byId("rounds").replaceChildren(rows.length ? table("Rounds, newest first",
    [["round", "number"], ["begins", "number"], ["block", "number"], ["micro-batches", "number"], ["lost", "number"],
      ["loss", "number"], ["validation before", "number"], ["merged", "number"], ["fetched", "number"],
      ["slowest", "number"], ["replicas", "text"]], rows) : el("p", { class: "empty" }, "No round has begun yet."));
  if (rounds.left_out) byId("rounds").append(el("p", { class: "said" }, `${rounds.left_out} earlier rounds left out.`));
  options(byId("merge-round"), [["", "newest"],
    ...rounds.rounds.filter((round) => round.merges.length).map((round) => [String(round.number), String(round.number)])]);
  showMerges(rounds);
}

function verdictOfMerges(merges) {
  if (!merges.length) return NONE;
  if (merges.some((merge) => !merge.identical)) return mark("bad", "✕", "differ");
  if (merges.some((merge) => merge.void)) return mark("warn", "∅", "void");
  return mark("good", "✓", "identical");
}

export function showMerges(rounds) {
  const wanted = byId("merge-round").value;
  const round = rounds.rounds.find((one) => one.merges.length && (wanted === "" || String(one.number) === wanted));
  say(byId("merges-title"), round ? `Merge of round ${round.number} by stage` : "Merge by stage");
  byId("merges").replaceChildren(round ? table(`Merge of round ${round.number} by stage`,
    [["stage", "number"], ["in it", "number"], ["sources", "number"], ["fetched", "number"], ["slowest", "number"],
      ["values kept", "number"], ["replicas", "text"]],
    round.merges.map((merge) => [String(merge.stage), `${merge.included}/${merge.reported}`, String(merge.sources),
      bytes(merge.bytes), `${fixed(merge.seconds, 1)} s`, whole(merge.carried), verdictOfMerges([merge])]))
    : el("p", { class: "empty" }, "No merge has ended yet."));
}

// -- trust ------------------------------------------------------------------------------------------------------------

export function showAudited(grid) {
  const miners = [...grid.stages.flatMap((stage) => stage.miners), ...grid.away];
  byId("audited").replaceChildren(miners.length ? table("Audits by miner",
    [["miner", "name"], ["stage", "number"], ["passed", "number"], ["failed", "number"], ["other checks failed", "number"],
      ["verdict", "text"]],
    miners.map((miner) => [miner.name, miner.stage === null ? NONE : String(miner.stage), whole(miner.passed),
      miner.failed ? mark("bad", "✕", whole(miner.failed)) : "0",
      miner.other_failed ? mark("bad", "✕", whole(miner.other_failed)) : "0",
      miner.sentence?.in_force ? mark("bad", "✕", `convicted until round ${miner.sentence.until}`)
        : miner.sentence ? mark("warn", "!", `was convicted until round ${miner.sentence.until}`)
          : miner.passed + miner.failed ? mark("good", "✓", "none") : mark("quiet", "…", "not audited")]))
    : el("p", { class: "empty" }, "No miner has begun yet."));
  byId("auditors").replaceChildren(grid.validators.length ? table("Validators' audits",
    [["validator", "name"], ["units replayed", "number"], ["FLOPs", "number"], ["fetched", "number"], ["verdicts", "number"]],
    grid.validators.map((one) => [one.name, whole(one.units), scaled(one.flops), bytes(one.bytes), whole(one.convictions)]))
    : el("p", { class: "empty" }, "No validator has begun yet."));
}

export function showVerdicts(audits) {
  const verdicts = audits.verdicts.map((one) => [String(one.round), one.miner, one.stage === null ? NONE : String(one.stage),
    el("span", {}, one.in_force ? mark("bad", "✕", `convicted until round ${one.until}`)
      : mark("warn", "!", `served, until round ${one.until}`)),
    one.validators.join(", "), one.reasons.join(" · ")]);
  const faults = audits.faults.map((one) => [String(one.round), one.miner, String(one.stage),
    mark("warn", "!", `${one.fault} in the merge`), "merge", one.reason]);
  const rows = [...verdicts, ...faults];
  byId("verdicts").replaceChildren(rows.length ? table("Verdicts, newest first",
    [["round", "number"], ["miner", "name"], ["stage", "number"], ["verdict", "text"], ["by", "text"], ["reason", "prose"]], rows)
    : el("p", { class: "empty" }, "Nobody has been convicted, and no merge has found a fault."));
  byId("checks-more").hidden = audits.failed.length === 0;
  say(byId("checks-title"), `Checks that failed: the latest ${audits.failed.length}`);
  byId("checks").replaceChildren(table("Checks that failed, newest first",
    [["round", "number"], ["miner", "name"], ["stage", "number"], ["check", "text"], ["sample", "number"], ["error", "number"],
      ["limit", "number"], ["validator", "text"], ["reason", "prose"]],
    audits.failed.map((one) => [String(one.round), one.miner, String(one.stage), `${one.check} (${one.grade})`,
      one.sample === null ? NONE : String(one.sample), one.error === null ? NONE : one.error.toPrecision(3),
      String(one.tolerance), one.reported ? `${one.validator}, after a report` : one.validator, one.reason])));
}

export function showMinerOptions(grid, chosen) {
  const miners = [...grid.stages.flatMap((stage) => stage.miners), ...grid.away];
  options(byId("miner"), miners.map((miner) => [miner.name, miner.uid === null ? miner.name : `${miner.name} (uid ${miner.uid})`]));
  if (chosen !== null) byId("miner").value = chosen;
}

export function showScore(scores, miner) {
  options(byId("score-round"), [["", "newest"], ...scores.rounds.map((round) => [String(round), String(round)])]);
  const wanted = byId("score-round").value;
  const own = scores.scores.filter((score) => score.miner === miner);
  const round = wanted === "" ? own[0]?.round : Number(wanted);
  const columns = own.filter((score) => score.round === round);
  if (!columns.length) {
    byId("score").replaceChildren(el("p", { class: "empty" }, miner === null ? "No miner is chosen."
      : `No validator has scored ${miner}${wanted === "" ? " yet" : ` in round ${wanted}`}.`));
    return;
  }
  const unpaid = (score) => Object.entries(score.unpaid).map(([why, count]) => `${count} ${why}`).join(", ") || "0";
  const terms = [
    ["units claimed", (score) => whole(score.claimed)],
    ["not paid", unpaid],
    ["forward units paid", (score) => whole(score.forward)],
    ["backward units paid", (score) => whole(score.backward)],
    ["FLOPs of a forward", (score) => scaled(score.forward_flops)],
    ["verified FLOPs", (score) => scaled(score.flops), "first"],
    ["× correctness", (score) => (score.correctness ? fixed(score.correctness, 2) : mark("bad", "✕", fixed(score.correctness, 2)))],
    ["× timeliness", (score) => (score.missed.length
      ? mark("warn", "!", `${fixed(score.timeliness, 2)} (missed ${score.missed.join(", ")})`) : fixed(score.timeliness, 2))],
    ["× scarcity", (score) => fixed(score.scarcity, 2)],
    ["= score of the round", (score) => scaled(score.score), "result"],
    ["mean of closed rounds", (score) => `${scaled(score.mean)} (${score.rounds})`],
    ["share of all means", (score) => percent(score.share, 2)],
    ["burned", (score) => percent(score.burn, 1)],
    ["= weight", (score) => percent(score.weight, 2), "result"],
  ];
  const shown = table(`Score of ${miner} in round ${round}`,
    [["term", "name"], ...columns.map((score) => [score.validator, "number"])],
    terms.map(([name, value]) => [name, ...columns.map((score) => value(score))]));
  [...shown.tBodies[0].rows].forEach((row, index) => { row.className = terms[index][2] ?? ""; });
  byId("score").replaceChildren(el("p", { class: "said" },
    `${miner}, uid ${columns[0].uid}, stage ${columns[0].stage}, round ${round}`), shown);
}

export function showWeights(weights) {
  if (!weights.rows.length) {
    byId("weights").replaceChildren(el("p", { class: "empty" }, "No validator has set weights yet."));
    return;
  }
  const top = Math.max(...weights.rows.map((row) => row.mean), 1e-9);
  byId("weights").replaceChildren(table("Weights by uid",
    [["uid", "number"], ["miner", "name"], ["stage", "number"],
      ...weights.validators.map((name, index) => [`${name} (r${weights.rounds[index]})`, "number"]), ["mean", "bar"]],
    weights.rows.map((row) => [String(row.uid), row.miner || NONE, row.stage === null ? NONE : String(row.stage),
      ...row.weights.map((weight) => percent(weight, 2)),
      el("span", { class: "weight" }, el("meter", { min: 0, max: top, value: row.mean,
        "aria-label": `mean weight of uid ${row.uid}` }, percent(row.mean, 2)),
        row.convicted ? mark("bad", "✕", "convicted") : "")])));
}

// -- nodes elsewhere --------------------------------------------------------------------------------------------------

export function showPeers({ peers }) {
  byId("peer-list").replaceChildren(table("Nodes",
    [["address", "name"], ["now", "text"], ["hotkey", "name"], ["serves", "number"], ["took", "number"],
      ["answered", "number"], ["last answer", "text"]],
    peers.map((peer) => [peer.address,
      peer.answers ? mark("good", "✓", "answers") : peer.asked ? mark("bad", "✕", peer.why) : mark("quiet", "…", "not asked yet"),
      peer.hotkey || NONE, peer.hotkey ? `${peer.routes} routes` : NONE,
      peer.seconds === null ? NONE : `${fixed(1000 * peer.seconds, 0)} ms`, `${whole(peer.answered)}/${whole(peer.asked)}`,
      peer.seen === null ? "never" : new Date(1000 * peer.seen).toLocaleTimeString("en-GB")])));
}

// -- log --------------------------------------------------------------------------------------------------------------

export function showLog(log, topic, begin) {
  const notes = log.notes.filter((note) => topic === "" || note.topic === topic).reverse();
  byId("log").replaceChildren(notes.length ? table("Log, newest first",
    [["time", "text"], [el("span", { class: "unseen" }, "weight"), "sign"], ["node", "name"], ["what happened", "prose"]],
    notes.map((note) => {
      const [symbol, kind] = LEVELS[note.weight];
      return [span(note.time - begin), note.weight === "info" ? el("span", { class: "quiet", "aria-hidden": "true" }, symbol)
        : mark(kind, symbol, note.weight), note.node, note.text];
    })) : el("p", { class: "empty" }, "Nothing of this kind has happened."));
}
