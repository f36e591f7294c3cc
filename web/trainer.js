// On Train Refiner LoRA: the curves of its figures and the latest sample sheet, live, and as the workflow kept them.
import { dialog, make, ownPointer } from "./dom.js";
import { clock } from "./strip.js";
import { shape } from "./svg.js";
import { word } from "./words.js";

const [WIDTH, HEIGHT, TOP] = [300, 36, 11]; // of a curve, and of the line of text over it
const [MOST_CURVES, MOST_POINTS] = [3, 400]; // of an event or a workflow file; more is not believed

/** Curves by name as [step, value], without what is none. Workflow files come from anywhere. */
function readCurves(told) {
  const sound = ([step, value, ...more]) => Number.isFinite(step) && Number.isFinite(value) && !more.length;
  return Object.entries(told && typeof told === "object" ? told : {})
    .filter(([, points]) => Array.isArray(points) && points.length && points.length <= MOST_POINTS)
    .filter(([, points]) => points.every((point) => Array.isArray(point) && sound(point)))
    .slice(0, MOST_CURVES)
    .map(([name, points]) => ({ name: name.slice(0, 40), points }));
}

/** A sheet of a training's folder, or null. */
function readSheet(told) {
  const file = typeof told?.filename === "string" && /^sheet_\d+\.png$/.test(told.filename);
  const folder = typeof told?.subfolder === "string" && /^autorefiner\/[^\\]+$/.test(told.subfolder);
  const inside = folder && !told.subfolder.split("/").includes("..");
  return file && inside ? { filename: told.filename, subfolder: told.subfolder } : null;
}

/** A number in a few characters. */
function short(value) {
  return Math.abs(value) >= 1e-3 && Math.abs(value) < 1e4 ? value.toPrecision(4) : value.toExponential(2);
}

/** A curve's points for an SVG, over the steps of the whole training. */
export function pathOf(points, steps) {
  const values = points.map(([, value]) => value);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  return points
    .map(([step, value]) => {
      const share = high > low ? (value - low) / (high - low) : 0.5;
      const x = (WIDTH * step) / Math.max(1, steps - 1);
      return `${x.toFixed(1)},${(HEIGHT - 2 - share * (HEIGHT - TOP - 4)).toFixed(1)}`;
    })
    .join(" ");
}

export class Trainer {
  /** @param {{address: (path: string) => string, keep: (kept: object) => void}} actions */
  constructor(actions) {
    this.actions = actions;
    this.status = make("div", { class: "autorefiner-status" });
    this.curves = make("div", { class: "autorefiner-curves" });
    this.image = make("img", {
      class: "autorefiner-sheet",
      alt: "",
      title: word("sheet"),
      onclick: () => dialog({}, make("img", { class: "autorefiner-sheet-large", src: this.image.src, alt: "" })),
      onerror: () => (this.image.hidden = true),
    });
    this.element = ownPointer(
      make("div", { class: "autorefiner-strip autorefiner-trainer" }, this.status, this.curves, this.image),
    );
    this.clear();
    this.draw();
  }

  clear() {
    Object.assign(this, { step: 0, first: 0, steps: 0, elapsed: 0, ended: null, figures: [], raw: {}, sheet: null });
  }

  /** An event of the server. */
  told(event) {
    if (event.prompt !== this.prompt) {
      this.clear();
      Object.assign(this, { prompt: event.prompt, first: event.step });
    }
    this.take(event);
    const { step, steps, elapsed, ended, raw, sheet } = this;
    this.actions.keep({ step, steps, elapsed, ended, curves: raw, sheet });
    this.draw();
  }

  /** The training as a workflow kept it; nothing of it is trusted. */
  restore(kept) {
    if (this.prompt || !kept || typeof kept !== "object") return;
    this.take(kept);
    this.ended ??= "interrupted";
    this.draw();
  }

  take(told) {
    const count = (value) => (Number.isInteger(value) && value >= 0 && value <= 1e9 ? value : 0);
    [this.step, this.steps] = [count(told.step), count(told.steps)];
    this.elapsed = Number.isFinite(told.elapsed) ? told.elapsed : 0;
    this.ended = ["done", "interrupted"].includes(told.ended) ? told.ended : null;
    this.figures = readCurves(told.curves);
    this.raw = Object.fromEntries(this.figures.map(({ name, points }) => [name, points]));
    this.sheet = readSheet(told.sheet);
  }

  sentence() {
    if (!this.steps) return word("no training");
    const parts = [`${word("step")} ${this.step}/${this.steps}`];
    const each = this.step > this.first ? this.elapsed / (this.step - this.first) : 0;
    if (this.ended) parts.push(`${word(this.ended)}, ${clock(this.elapsed)}`);
    else if (each) {
      parts.push(`${each.toFixed(1)} ${word("a step")}`, `${clock(each * (this.steps - this.step))} ${word("left")}`);
    }
    return parts.join(" · ");
  }

  draw() {
    this.status.textContent = this.sentence();
    this.curves.replaceChildren(...this.figures.map((figure) => this.curve(figure)));
    const asked = this.sheet && new URLSearchParams({ ...this.sheet, type: "output" });
    const source = asked ? this.actions.address(`/view?${asked}`) : "";
    if (this.image.getAttribute("src") !== source) {
      this.image.hidden = !source;
      this.image.setAttribute("src", source);
    }
  }

  curve({ name, points }) {
    const drawing = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "autorefiner-curve", role: "img" });
    const last = points.at(-1)[1];
    drawing.append(
      shape("text", { x: 2, y: 9 }, name),
      shape("text", { x: WIDTH - 2, y: 9, "text-anchor": "end" }, short(last)),
      shape("polyline", { points: pathOf(points, this.steps) }),
    );
    return drawing;
  }
}
