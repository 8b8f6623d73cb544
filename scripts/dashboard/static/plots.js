// The two plots. uPlot draws; this decides what, and takes colours from the style sheet.
/* global uPlot */
import { byId, fixed, say, scaled, span, whole } from "./dom.js";

const HEIGHT = 210;
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** One plot that follows its place's width and the colour scheme. */
class Plot {
  constructor(place, options) {
    this.place = place;
    this.options = options;
    this.data = null;
    this.plot = null;
    new ResizeObserver(() => this.fit()).observe(place);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.redraw());
  }

  show(data) {
    this.data = data[0].length ? data : null;
    if (this.data === null) {
      this.plot?.destroy();
      this.plot = null;
      return;
    }
    if (this.plot === null) this.redraw();
    else this.plot.setData(data);
  }

  redraw() {
    if (this.data === null) return;
    this.plot?.destroy();
    const width = Math.max(120, this.place.clientWidth);
    this.plot = new uPlot({ width, height: HEIGHT, ...this.options() }, this.data, this.place);
  }

  fit() {
    const width = this.place.clientWidth;
    if (this.plot !== null && width > 0 && width !== this.plot.width) this.plot.setSize({ width, height: HEIGHT });
  }
}

const FONT = "12px system-ui, sans-serif";

function axis(values, extra = {}) {
  return {
    stroke: colour("--muted"),
    font: FONT,
    grid: { stroke: colour("--grid"), width: 1 },
    ticks: { stroke: colour("--grid"), width: 1, size: 4 },
    values: (_plot, splits) => splits.map(values),
    ...extra,
  };
}

const common = () => ({
  legend: { live: true },
  cursor: { y: false, points: { size: 7 } },
  padding: [8, 10, 0, 0],
});

let axisKind = "tokens";
let begin = 0;
const xText = (value) => (value === null ? "–" : axisKind === "time" ? span(value) : scaled(value));

const loss = new Plot(byId("loss-plot"), () => ({
  ...common(),
  scales: { x: { time: false } },
  axes: [axis(xText, { space: 60, size: 32 }), axis((value) => fixed(value, 1), { size: 40 })],
  series: [
    { label: axisKind === "time" ? "elapsed" : axisKind, value: (_plot, value) => xText(value) },
    { label: "training", stroke: colour("--line-a"), width: 1.5, spanGaps: true, points: { show: false },
      value: (_plot, value) => fixed(value, 3) },
    { label: "validation", stroke: colour("--line-b"), width: 2, dash: [6, 4], spanGaps: true,
      points: { show: true, size: 8, fill: colour("--line-b") }, value: (_plot, value) => fixed(value, 4) },
  ],
}));

let rateUnit = "tokens/s";
const rate = new Plot(byId("rate-plot"), () => ({
  ...common(),
  scales: { x: { time: false }, y: { range: (_plot, _low, high) => [0, high > 0 ? high * 1.1 : 1] } },
  axes: [axis(span, { space: 60, size: 32 }), axis((value) => scaled(value), { size: 56 })],
  series: [
    { label: "elapsed", value: (_plot, value) => span(value) },
    { label: rateUnit, stroke: colour("--line-a"), width: 1.5, fill: colour("--fill-a"), points: { show: false },
      value: (_plot, value) => whole(value) },
  ],
}));

/** Bring both up to date. `kind` is "tokens" or "time". */
export function showPlots(curves, run, kind) {
  if (typeof uPlot === "undefined") return;
  const size = curves.tokens_per_microbatch;
  const timed = kind === "time" || !curves.loss.length; // a validator's own folder has no microbatches to count
  const wanted = timed ? "time" : size === null ? "microbatches" : "tokens";
  const changed = wanted !== axisKind;
  axisKind = wanted;
  begin = run.begin ?? 0;
  const at = (times, done) =>
    axisKind === "time" ? times.map((time) => time - begin) : done.map((count) => count * (size ?? 1));
  const training = ascending(at(curves.loss_time, curves.loss_done), curves.loss);
  const validation = ascending(at(curves.validation_time, curves.validation_done), curves.validation);
  loss.show(uPlot.join([training, validation]));
  if (changed) loss.redraw();
  sayLoss(curves, size);

  const unit = size === null ? "microbatches/s" : "tokens/s";
  const other = unit !== rateUnit;
  rateUnit = unit;
  rate.show([curves.rate_time.map((time) => time - begin), curves.rate]);
  if (other) rate.redraw();
  say(byId("rate-name"), size === null ? "Microbatches per second" : "Tokens per second");
  const latest = curves.rate.at(-1);
  say(byId("rate-said"), latest === undefined
    ? "Nothing has come back yet."
    : `Over stretches of ${curves.rate_seconds} s; the last whole one ${scaled(latest)} ${unit}, ` +
      `the best ${scaled(Math.max(...curves.rate))}.`);
}

/** Columns whose x rises strictly, as uPlot wants it: of equal ones the last stays. */
function ascending(xs, ys) {
  const kept = [[], []];
  xs.forEach((x, index) => {
    if (kept[0].length && x <= kept[0].at(-1)) {
      kept[1][kept[1].length - 1] = ys[index];
    } else {
      kept[0].push(x);
      kept[1].push(ys[index]);
    }
  });
  return kept;
}

function sayLoss(curves, size) {
  if (!curves.loss.length) return say(byId("loss-said"), "No microbatch has come back yet.");
  const done = curves.loss_done.at(-1);
  const over = size === null ? `${whole(done)} microbatches` : `${whole(done * size)} tokens`;
  const mean = curves.loss_width > 1 ? `, each point the mean of ${curves.loss_width} microbatches` : "";
  const checked = curves.validation.length
    ? ` Validation ${fixed(curves.validation[0], 3)} → ${fixed(curves.validation.at(-1), 3)}.` : "";
  return say(byId("loss-said"),
    `Training ${fixed(curves.loss[0], 3)} → ${fixed(curves.loss.at(-1), 3)} over ${over}${mean}.${checked}`);
}
