// The strip of chunks on a sampler: it fills as they are made, and shows the latest run that the server knows of.
import { make, ownPointer } from "./dom.js";
import { aspect, enlarge, isPicture, show } from "./film.js";
import { word } from "./words.js";

const MOST_CHUNKS = 4096; // of an event or a state; more is not believed
const MOST_PASSES = 100_000; // of a chunk: every level, of every candidate
const [MOST_NOTICES, LONGEST_TEXT] = [20, 2000]; // of a run; characters
const STATUSES = ["running", "done", "stopped", "interrupted", "failed"];

/** A whole number within bounds, or null. */
function whole(value, least, most) {
  return Number.isInteger(value) && value >= least && value <= most ? value : null;
}

/** A text of a sensible length, or "". */
function text(value) {
  return typeof value === "string" ? value.slice(0, LONGEST_TEXT) : "";
}

/** Seconds as people say them: "8 s", "3:05". */
export function clock(seconds) {
  const full = Math.max(0, Math.round(seconds));
  return full < 60 ? `${full} s` : `${Math.floor(full / 60)}:${String(full % 60).padStart(2, "0")}`;
}

/** What an event or a state says of a chunk, or null when it says nothing sensible. */
function readChunk(event) {
  const chunks = whole(event?.chunks, 1, MOST_CHUNKS);
  const chunk = whole(event?.chunk, 0, (chunks ?? 0) - 1);
  const [level, levels] = [whole(event?.level, 0, MOST_PASSES), whole(event?.levels, 1, MOST_PASSES)];
  if (chunk === null || level === null || levels === null) return null;
  const [start, end] = [whole(event.start, 0, 1e6) ?? 0, whole(event.end, 0, 1e6) ?? 0];
  const pictured = isPicture(event.image) && whole(event.pictures, 1, 16);
  const picture = pictured ? { image: event.image, pictures: event.pictures } : {};
  const origin = { given: event.given === true, reused: event.reused === true };
  return { chunk, level: Math.min(level, levels), levels, start, end, ...origin, ...picture };
}

const isFinished = (chunk) => chunk?.level === chunk?.levels;

export class Strip {
  /**
   * @param {{stop: (node: string, prompt: string) => Promise<Response>}} actions ask the server to stop a run
   * @param {import("./steer.js").Steering} steering
   * @param {import("./text.js").Text} text shows the notices
   */
  constructor(actions, steering, text) {
    this.actions = actions;
    this.text = text;
    this.steering = steering;
    this.received = 0; // events
    this.status = make("span", { class: "autorefiner-status" });
    this.button = make("button", { type: "button", class: "autorefiner-stop", onclick: () => this.stop() });
    this.tiles = make("div", { class: "autorefiner-tiles" });
    const head = make("div", { class: "autorefiner-head" }, this.status, this.button);
    this.element = ownPointer(make("div", { class: "autorefiner-strip" }, head, this.tiles, steering.element));
    this.clear({});
    this.draw();
  }

  /** Begin another run. */
  clear({ prompt, run }) {
    Object.assign(this, { prompt, run, sequence: 0, node: null, chunks: [], now: null, changed: new Set() });
    Object.assign(this, { ended: null, running: false, asked: "", total: 0, first: 0, frames: 0, elapsed: 0 });
    Object.assign(this, { seed: null, recipe: "", length: 0, lines: [], firstPicture: null });
    this.tiles.replaceChildren();
    this.text.say(""); // the server repeats what was said of this run before it began
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
    this.received += 1;
    if (!this.shows(event)) this.clear(event);
    this.take(event);
    const chunk = readChunk({ ...event, chunks: this.total });
    if (chunk) this.put(chunk);
    this.draw();
  }

  shows({ prompt, run }) {
    return prompt === this.prompt && run === this.run;
  }

  /**
   * The latest run as the server holds it, or null for none.
   * @param {object | null} state
   * @param {number} received events when the server was asked: a run that began since is newer
   */
  restore(state, received) {
    const same = state && this.shows(state);
    if (this.received !== received && !same) return;
    if (!state) {
      if (this.running) Object.assign(this, { running: false, ended: "interrupted" });
    } else {
      if (!same) this.clear(state);
      this.merge(state, !same || !(state.sequence < this.sequence));
    }
    this.draw();
  }

  /** Take in a state; one that is older than the last event adds the chunks that are missing. */
  merge(state, newer) {
    const total = newer ? state.chunks : this.total;
    for (const tile of Array.isArray(state.tiles) ? state.tiles.slice(0, MOST_CHUNKS) : []) {
      const chunk = readChunk({ ...tile, chunks: total });
      if (chunk && (newer || !this.chunks[chunk.chunk])) this.put(chunk);
    }
    if (newer) this.take(state);
    const sampled = this.chunks.filter((chunk) => chunk && !chunk.given && !chunk.reused);
    this.now = sampled.find((chunk) => !isFinished(chunk)) ?? sampled.at(-1) ?? null;
  }

  /** What an event or a state says of the run. */
  take(event) {
    const number = (name, otherwise) => (Number.isFinite(event[name]) ? event[name] : otherwise);
    this.node = event.node;
    this.sequence = number("sequence", this.sequence + 1);
    this.elapsed = number("elapsed", this.elapsed);
    this.firstPicture = number("first_picture", this.firstPicture);
    this.total = whole(event.chunks, 1, MOST_CHUNKS) ?? this.total;
    this.first = whole(event.first, 0, 1e6) ?? this.first;
    this.frames = whole(event.frames, 0, 1e6) ?? this.frames;
    this.length = whole(event.length, 0, 1e6) ?? this.length; // frames before the recipe
    this.seed = whole(event.seed, 0, Number.MAX_SAFE_INTEGER) ?? this.seed;
    if (typeof event.recipe === "string") this.recipe = text(event.recipe);
    if (Array.isArray(event.notices)) this.lines = event.notices.slice(0, MOST_NOTICES).map(text);
    if (!STATUSES.includes(event.status)) return;
    this.running = event.status === "running";
    this.ended = this.running ? null : event.status;
  }

  /** Take a chunk in, with the picture that it had where it brings none. */
  put(chunk) {
    if (!chunk.given && !chunk.reused) this.now = chunk;
    const { image, pictures } = this.chunks[chunk.chunk] ?? {};
    this.chunks[chunk.chunk] = image && !chunk.image ? { ...chunk, image, pictures } : chunk;
    this.changed.add(chunk.chunk);
  }

  async stop() {
    this.asked = word("stopping");
    this.draw();
    const { prompt, run } = this;
    const answer = await this.actions.stop(this.node, prompt).catch(() => null);
    if (!this.shows({ prompt, run })) return; // another one began meanwhile
    if (!answer?.ok && !this.ended) this.asked = word(answer ? "no run" : "no answer");
    this.draw();
  }

  /** Frames that are made, as far as the levels tell. */
  made() {
    const { start, end, level, levels } = this.now;
    return start + ((end - start) * level) / levels - this.first;
  }

  sentence() {
    if (!this.running && !this.ended) return word("idle");
    if (!this.now) return `${this.total} ${word("chunks")} · ${word(this.ended ?? "starting")}`;
    const made = this.made();
    const rate = this.elapsed > 0 ? made / this.elapsed : 0;
    const parts = [this.ended === "stopped" ? this.progress() : `${word("chunk")} ${this.now.chunk + 1}/${this.total}`];
    if (!this.ended) parts.push(`${word("pass")} ${this.now.level}/${this.now.levels}`);
    if (rate > 0) parts.push(`${rate.toFixed(1)} ${word("rate")}`);
    if (this.ended) parts.push(`${word(this.ended)}, ${clock(this.elapsed)}`);
    else if (rate > 0) parts.push(`${clock((this.frames - this.first - made) / rate)} ${word("left")}`);
    if (this.ended && this.firstPicture !== null) {
      parts.push(`${word("first picture")} ${this.firstPicture.toFixed(1)}\u00a0s`);
    }
    return parts.join(" · ");
  }

  /** What came of a run that ended early. */
  progress() {
    const finished = this.chunks.filter(isFinished);
    const frames = Math.max(0, ...finished.map(({ end }) => end));
    return `${finished.length}/${this.total} ${word("chunks")}, ${frames} ${word("frames")}`;
  }

  draw() {
    const running = this.running && !this.ended;
    this.status.textContent = this.sentence();
    this.status.title = this.status.textContent;
    this.element.dataset.status = this.ended ?? (running ? "running" : "idle");
    this.button.textContent = this.asked && running ? this.asked : word("stop");
    this.button.disabled = !running || this.asked === word("stopping");
    this.button.hidden = !running;
    this.text.notice(this.lines);
    const { total, length, recipe, seed } = this;
    this.steering.show({ total, length, recipe, seed, known: running || Boolean(this.ended) });
    while (this.tiles.childElementCount < this.total) this.tiles.append(this.tile(this.tiles.childElementCount));
    for (const place of this.changed) this.fill(this.tiles.children[place], this.chunks[place]);
    this.changed.clear();
    if (running && this.now) this.follow(this.tiles.children[this.now.chunk]);
  }

  /** Scroll to the chunk in the making, within the strip alone. */
  follow(tile) {
    const below = tile.offsetTop + tile.offsetHeight - this.tiles.offsetTop - this.tiles.clientHeight;
    if (below > this.tiles.scrollTop) this.tiles.scrollTop = below;
  }

  /** Show a chunk large, with what can be done with it. */
  open(place) {
    const chunks = this.chunks.filter((chunk) => chunk?.image || isFinished(chunk));
    const before = (chunk) => this.chunks[chunk.chunk - 1]?.start ?? -1;
    const choices = (chunk) =>
      isFinished(chunk) ? this.steering.choices({ ...chunk, before: before(chunk) }) : [];
    enlarge(chunks, this.chunks[place], choices);
  }

  tile(place) {
    const open = () => this.open(place);
    const title = `${word("chunk")} ${place + 1}`;
    return make(
      "button",
      { type: "button", class: "autorefiner-tile", disabled: "", title, onclick: open },
      make("span", { class: "autorefiner-picture" }),
      make("span", { class: "autorefiner-mark" }),
      make("span", { class: "autorefiner-level" }),
    );
  }

  fill(tile, chunk) {
    const origin = ["given", "reused"].find((name) => chunk[name]);
    tile.classList.toggle("autorefiner-finished", isFinished(chunk));
    tile.classList.toggle("autorefiner-given", chunk.given);
    tile.classList.toggle("autorefiner-reused", chunk.reused);
    tile.querySelector(".autorefiner-mark").textContent = origin ? word(origin) : "";
    tile.lastElementChild.style.width = `${(100 * chunk.level) / chunk.levels}%`;
    const numbers = `${word("frames")} ${chunk.start + 1}–${chunk.end}${origin ? `, ${word(origin)}` : ""}`;
    tile.disabled = !chunk.image && !isFinished(chunk);
    tile.title = `${word("chunk")} ${chunk.chunk + 1}, ${numbers}${tile.disabled ? "" : `: ${word("enlarge")}`}`;
    if (!chunk.image) return;
    if (!this.shaped) this.shape(chunk);
    show(tile.firstElementChild, chunk, chunk.pictures - 1);
  }
}
