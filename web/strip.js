// The strip of chunks on a sampler: it fills as they are made, stays after the run and comes back with the workflow.
import { make, ownPointer } from "./dom.js";
import { aspect, enlarge, isPicture, show } from "./film.js";
import { word } from "./words.js";

const MOST_CHUNKS = 4096; // of an event or a workflow file; more is not believed
const MOST_PASSES = 100_000; // of a chunk: every level, of every candidate
const MOST_KEPT = 96 * 1024; // characters of pictures in a saved workflow

/** A whole number within bounds, or null. */
function whole(value, least, most) {
  return Number.isInteger(value) && value >= least && value <= most ? value : null;
}

/** Seconds as people say them: "8 s", "3:05". */
export function clock(seconds) {
  const full = Math.max(0, Math.round(seconds));
  return full < 60 ? `${full} s` : `${Math.floor(full / 60)}:${String(full % 60).padStart(2, "0")}`;
}

/**
 * What an event says of a chunk, or null when it says nothing sensible. Workflow files come from anywhere, and what
 * they keep passes through here too.
 */
function readChunk(told) {
  const chunks = whole(told?.chunks, 1, MOST_CHUNKS);
  const chunk = whole(told?.chunk, 0, (chunks ?? 0) - 1);
  const [level, levels] = [whole(told?.level, 0, MOST_PASSES), whole(told?.levels, 1, MOST_PASSES)];
  if (chunk === null || level === null || levels === null) return null;
  const [start, end] = [whole(told.start, 0, 1e6) ?? 0, whole(told.end, 0, 1e6) ?? 0];
  const pictured = isPicture(told.image) && whole(told.pictures, 1, 16);
  const picture = pictured ? { image: told.image, pictures: told.pictures } : {};
  return { chunk, chunks, level: Math.min(level, levels), levels, start, end, ...picture };
}

/** Chunks whose pictures fit the limit together: every second picture goes until they do. */
export function thinned(chunks, most = MOST_KEPT) {
  let kept = chunks;
  const size = () => kept.reduce((sum, chunk) => sum + (chunk.image?.length ?? 0), 0);
  for (let step = 2; size() > most && step <= 2 * chunks.length; step *= 2) {
    kept = chunks.map((chunk, place) => {
      const { image, pictures, ...plain } = chunk;
      return image && place % step === 0 ? { ...plain, image, pictures } : plain;
    });
  }
  return kept;
}

export class Strip {
  /**
   * @param {{stop: (node: string, prompt: string) => Promise<Response>, keep: (kept: object) => void}} actions
   *   ask the server to stop a run; keep the strip in the workflow
   */
  constructor(actions) {
    this.actions = actions;
    this.status = make("span", { class: "autorefiner-status" });
    this.button = make("button", { type: "button", class: "autorefiner-stop", onclick: () => this.stop() });
    this.tiles = make("div", { class: "autorefiner-tiles" });
    const head = make("div", { class: "autorefiner-head" }, this.status, this.button);
    this.element = ownPointer(make("div", { class: "autorefiner-strip" }, head, this.tiles));
    this.clear(null);
    this.draw();
  }

  /** Begin another run. */
  clear(prompt) {
    Object.assign(this, { prompt, node: null, chunks: [], total: 0, first: 0, frames: 0, elapsed: 0 });
    Object.assign(this, { ended: null, asked: "", now: null, changed: new Set() });
    this.tiles.replaceChildren();
    this.shaped = false;
  }

  /** Give the tiles the shape of a picture. */
  async shape(chunk) {
    this.shaped = true;
    const found = await aspect(chunk).catch(() => 16 / 9);
    this.tiles.style.setProperty("--autorefiner-aspect", String(Math.max(0.5, Math.min(2.5, found))));
  }

  /** An event of the server. */
  told(event) {
    const another = this.ended && !event.ended; // of the same prompt: one SAMPLER may be used twice
    if (event.prompt !== this.prompt || another) this.clear(event.prompt);
    this.node = event.node;
    this.elapsed = Number.isFinite(event.elapsed) ? event.elapsed : this.elapsed;
    if (typeof event.ended === "string") this.ended = event.ended;
    const chunk = readChunk(event);
    if (chunk) {
      this.first = whole(event.first, 0, 1e6) ?? 0;
      this.frames = whole(event.frames, 0, 1e6) ?? 0;
      this.put(chunk);
    }
    if (this.ended || (chunk && chunk.level === chunk.levels)) this.actions.keep(this.kept());
    this.draw();
  }

  /** Take a chunk in, with the picture that it had where it brings none. */
  put({ chunks, ...chunk }) {
    this.total = chunks;
    this.now = chunk;
    const { image, pictures } = this.chunks[chunk.chunk] ?? {};
    this.chunks[chunk.chunk] = image && !chunk.image ? { ...chunk, image, pictures } : chunk;
    this.changed.add(chunk.chunk);
  }

  /** What goes into the workflow. */
  kept() {
    const { total, first, frames, elapsed, ended } = this;
    return { total, first, frames, elapsed, ended, chunks: thinned(this.chunks.filter(Boolean)) };
  }

  /** The strip as a workflow kept it; nothing of it is trusted. */
  restore(kept) {
    if (this.prompt || !kept || !Array.isArray(kept.chunks)) return;
    this.clear(null);
    for (const told of kept.chunks.slice(0, MOST_CHUNKS)) {
      const chunk = readChunk({ ...told, chunks: kept.total });
      if (chunk) this.put(chunk);
    }
    this.first = whole(kept.first, 0, 1e6) ?? 0;
    this.frames = whole(kept.frames, 0, 1e6) ?? 0;
    this.elapsed = Number.isFinite(kept.elapsed) ? kept.elapsed : 0;
    this.ended = ["done", "stopped", "interrupted"].includes(kept.ended) ? kept.ended : "interrupted";
    this.draw();
  }

  async stop() {
    this.asked = word("stopping");
    this.draw();
    const answer = await this.actions.stop(this.node, this.prompt).catch(() => null);
    if (!answer?.ok && !this.ended) this.asked = word(answer ? "no run" : "no answer");
    this.draw();
  }

  /** Frames that are made, as far as the levels tell. */
  made() {
    const { start, end, level, levels } = this.now;
    return start + ((end - start) * level) / levels - this.first;
  }

  sentence() {
    if (!this.now) return word("idle");
    const made = this.made();
    const rate = this.elapsed > 0 ? made / this.elapsed : 0;
    const parts = [`${word("chunk")} ${this.now.chunk + 1}/${this.total}`];
    if (!this.ended) parts.push(`${word("pass")} ${this.now.level}/${this.now.levels}`);
    if (rate > 0) parts.push(`${rate.toFixed(1)} ${word("rate")}`);
    if (this.ended) parts.push(`${word(this.ended)}, ${clock(this.elapsed)}`);
    else if (rate > 0) parts.push(`${clock((this.frames - this.first - made) / rate)} ${word("left")}`);
    return parts.join(" · ");
  }

  draw() {
    const running = Boolean(this.now) && !this.ended;
    this.status.textContent = this.sentence();
    this.status.title = this.status.textContent;
    this.button.textContent = this.asked && running ? this.asked : word("stop");
    this.button.disabled = !running || this.asked === word("stopping");
    this.button.hidden = !running;
    while (this.tiles.childElementCount < this.total) this.tiles.append(this.tile(this.tiles.childElementCount));
    for (const place of this.changed) this.fill(this.tiles.children[place], this.chunks[place]);
    this.changed.clear();
    if (running) this.follow(this.tiles.children[this.now.chunk]);
  }

  /** Scroll to the chunk in the making, within the strip alone. */
  follow(tile) {
    const below = tile.offsetTop + tile.offsetHeight - this.tiles.offsetTop - this.tiles.clientHeight;
    if (below > this.tiles.scrollTop) this.tiles.scrollTop = below;
  }

  tile(place) {
    const open = () => enlarge(this.chunks.filter((chunk) => chunk?.image), this.chunks[place]);
    return make(
      "button",
      { type: "button", class: "autorefiner-tile", disabled: "", title: `${word("chunk")} ${place + 1}`, onclick: open },
      make("span", { class: "autorefiner-picture" }),
      make("span", { class: "autorefiner-level" }),
    );
  }

  fill(tile, chunk) {
    const finished = chunk.level === chunk.levels;
    tile.classList.toggle("autorefiner-finished", finished);
    tile.lastElementChild.style.width = `${(100 * chunk.level) / chunk.levels}%`;
    const numbers = `${word("frames")} ${chunk.start + 1}–${chunk.end}`;
    tile.title = `${word("chunk")} ${chunk.chunk + 1}, ${numbers}${chunk.image ? `: ${word("enlarge")}` : ""}`;
    tile.disabled = !chunk.image;
    if (!chunk.image) return;
    if (!this.shaped) this.shape(chunk);
    show(tile.firstElementChild, chunk, chunk.pictures - 1);
  }
}
