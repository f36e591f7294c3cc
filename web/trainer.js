// On Train Refiner LoRA: the curves of its figures and the latest sample sheet, live, and as the server holds them.
import { dialog, make, ownPointer } from "./dom.js";
import { clock } from "./strip.js";
import { shape } from "./svg.js";
import { word } from "./words.js";

const [WIDTH, HEIGHT, TOP] = [300, 36, 11]; // of a curve, and of the line of text over it
const [MOST_CURVES, MOST_POINTS] = [3, 400]; // of an event or a state; more is not believed

/** Curves by name as [step, value], without what is none. */
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
  /** @param {{address: (path: string) => string}} actions */
  constructor(actions) {
    this.actions = actions;
    this.received = 0; // events
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
    Object.assign(this, { step: 0, first: 0, steps: 0, elapsed: 0, ended: null, figures: [], sheet: null });
  }

  /** An event of the server, which holds the whole state. */
  told(event) {
    this.received += 1;
    this.take(event);
    this.draw();
  }

  /**
   * The latest training as the server holds it, or null for none.
   * @param {object | null} state
   * @param {number} received events when the server was asked: what they said is newer
   */
  restore(state, received) {
    if (this.received !== received) return;
    if (state) this.take(state);
    else if (this.steps) this.ended ??= "interrupted";
    this.draw();
  }

  take(event) {
    const count = (value) => (Number.isInteger(value) && value >= 0 && value <= 1e9 ? value : 0);
    [this.step, this.steps, this.first] = [count(event.step), count(event.steps), count(event.first)];
    this.elapsed = Number.isFinite(event.elapsed) ? event.elapsed : 0;
    this.ended = ["done", "interrupted", "failed"].includes(event.status) ? event.status : null;
    this.figures = readCurves(event.curves);
    this.sheet = readSheet(event.sheet);
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
