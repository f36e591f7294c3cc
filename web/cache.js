// On Reflective Cache: the bytes that it takes, and a drawing of what a chunk sees of the past.
import { make, ownPointer } from "./dom.js";
import { shape } from "./svg.js";
import { word } from "./words.js";

const [WIDTH, CELL, GAP] = [300, 20, 2];
const MOST_CELLS = 24; // frames drawn; of more, the middle of each part is one cell with their number

/** Bytes as people say them. */
export function size(bytes) {
  const mega = bytes / 1e6;
  return mega < 1000 ? `${mega.toFixed(1)} MB` : `${(mega / 1000).toFixed(2)} GB`;
}

/**
 * The frames of a video up to a chunk's end in parts: each seen or not, in their order.
 * @returns {{kind: "sink" | "recent" | "gone" | "now", start: number, end: number}[]}
 */
export function partsOf({ start, end, sees, sink }) {
  const parts = [];
  const seen = new Set(sees);
  for (let frame = 0; frame < end; frame += 1) {
    const held = frame < sink ? "sink" : "recent";
    const kind = frame >= start ? "now" : seen.has(frame) ? held : "gone";
    const last = parts.at(-1);
    if (last?.kind === kind) last.end = frame + 1;
    else parts.push({ kind, start: frame, end: frame + 1 });
  }
  return parts;
}

/** The cells that parts are drawn as: a frame each, or a number of frames. */
export function cellsOf(parts) {
  const total = parts.reduce((sum, part) => sum + part.end - part.start, 0);
  const most = total <= MOST_CELLS ? total : Math.max(3, Math.floor(MOST_CELLS / parts.length));
  return parts.flatMap(({ kind, start, end }) => {
    const frames = Array.from({ length: end - start }, (_, place) => ({ kind, frame: start + place }));
    if (frames.length <= most || kind === "now") return frames;
    const edge = kind === "gone" ? 0 : Math.floor((most - 1) / 2);
    const middle = { kind, many: frames.length - 2 * edge };
    return [...frames.slice(0, edge), middle, ...frames.slice(frames.length - edge)];
  });
}

export class CacheView {
  constructor() {
    this.status = make("div", { class: "autorefiner-status" });
    this.drawing = shape("svg", { viewBox: `0 0 ${WIDTH} ${2 * CELL + 2}`, class: "autorefiner-drawing", role: "img" });
    this.legend = make("div", { class: "autorefiner-legend" });
    this.element = ownPointer(
      make("div", { class: "autorefiner-strip autorefiner-memory" }, this.status, this.drawing, this.legend),
    );
    this.show({ missing: "model" });
  }

  /** Draw the server's answer, or say what is missing or wrong. */
  show(told) {
    this.drawing.replaceChildren();
    this.legend.replaceChildren();
    if (!Array.isArray(told?.sees)) {
      const missing = word(`cache ${told?.missing ?? "model"}`);
      this.status.textContent = typeof told?.error === "string" ? told.error : missing;
      return;
    }
    const past = told.sees.length;
    const chunk = `${word("chunk")} ${told.chunks}/${told.chunks}`;
    const kept = told.store === "int8" ? told.store : told.dtype;
    const elsewhere = told.host_bytes ? ` + ${size(told.host_bytes)} ${word("in host memory")}` : "";
    const bytes = `${size(told.bytes)} ${word("of keys")} (${kept})${elsewhere}`;
    this.status.textContent = `${chunk} ${word(told.memory === "window" ? "sees" : "holds")} ${past}/${told.start} ${word("past frames")} · ${bytes}`;
    this.status.title = this.status.textContent;
    this.draw(told);
  }

  draw(told) {
    const cells = cellsOf(partsOf(told));
    const step = Math.min(CELL, (WIDTH - 2) / cells.length);
    const kinds = new Set();
    const put = (kind, place, y, height, text, title) => {
      kinds.add(kind);
      const [x, width] = [1 + place * step, Math.max(2, step - GAP)];
      const group = shape("g", { class: `autorefiner-${kind}` });
      group.append(shape("title", {}, title), shape("rect", { x, y, width, height, rx: 2 }));
      if (text) group.append(shape("text", { x: x + width / 2, y: y + height - 5, "text-anchor": "middle" }, text));
      this.drawing.append(group);
    };
    cells.forEach(({ kind, frame, many }, place) => {
      const which = many ? `${many} ${word("frames")}` : `${word("frame")} ${frame + 1}`;
      put(kind, place, 1, CELL - GAP, many ? `…${many}` : String(frame + 1), `${which}: ${word(kind)}`);
      if (kind === "now" && ["joint", "pending"].includes(told.previous)) {
        put("previous", place, 1 + CELL, CELL - GAP, "x0", `${word("previous")} (${told.previous})`);
      }
      if (told.history === "shared" && ["sink", "recent"].includes(kind)) {
        put("refiner", place, 1 + CELL, 4, "", word("refiner"));
      }
    });
    for (const kind of kinds) this.legend.append(make("span", { class: `autorefiner-key-${kind}` }, word(kind)));
    if (told.memory !== "window") {
      const read = `${told.memory} (${word("window")} ${told.window}/${told.sink}, ${told.positions})`;
      this.legend.append(make("div", { title: read }, read));
    }
  }
}
