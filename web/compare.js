// Compare Videos: two clips one over the other, in step, with a slider between them.
import { make, ownPointer } from "./dom.js";
import { word } from "./words.js";

const APART = 1.5; // frames that the second clip may be off before it is set right

/** What the server says of a clip, or null when it is none. */
function readClip(told) {
  const named = typeof told?.filename === "string" && told.filename.endsWith(".mp4") && told.type === "temp";
  const counted = Number.isInteger(told?.frames) && told.frames > 0 && told.fps > 0 && told.fps <= 240;
  return named && counted ? { filename: told.filename, frames: told.frames, fps: told.fps } : null;
}

export class Compare {
  /** @param {(path: string) => string} address the server's address of a path */
  constructor(address) {
    this.address = address;
    [this.base, this.refined] = ["base", "refined"].map((name) => this.video(name));
    this.line = make("div", { class: "autorefiner-line" });
    const drag = (event) => this.drag(event);
    this.screen = make(
      "div",
      { class: "autorefiner-screen", onpointerdown: drag, onpointermove: drag },
      this.base,
      this.refined,
      make("span", { class: "autorefiner-left" }, word("base")),
      make("span", { class: "autorefiner-right" }, word("refined")),
      this.line,
    );
    this.play = make("button", { type: "button", onclick: () => this.toggle() });
    const seek = () => this.seek(Number(this.place.value));
    this.place = make("input", { type: "range", min: 0, max: 0, value: 0, oninput: seek });
    this.count = make("span", { class: "autorefiner-status" });
    const bar = make("div", { class: "autorefiner-bar" }, this.play, this.place, this.count);
    this.element = ownPointer(make("div", { class: "autorefiner-strip autorefiner-compare" }, this.screen, bar));
    this.split(0.5);
    this.told(null);
    new ResizeObserver(() => this.playing && this.run()).observe(this.screen); // it was put back into the page
  }

  video(name) {
    const video = make("video", { class: `autorefiner-video autorefiner-${name}`, playsinline: "", preload: "auto" });
    video.muted = true;
    return video;
  }

  /** Take what a run gave: two clips, or nothing. */
  told(output) {
    const clips = Array.isArray(output) ? output.map(readClip) : [];
    this.clips = clips.length === 2 && clips.every(Boolean) ? clips : null;
    this.frames = this.clips ? Math.min(...this.clips.map((clip) => clip.frames)) : 0;
    this.fps = this.clips?.[0].fps ?? 16;
    [this.base, this.refined].forEach((video, side) => {
      const asked = this.clips && new URLSearchParams({ filename: this.clips[side].filename, type: "temp" });
      if (asked) video.src = this.address(`/view?${asked}`);
      else {
        video.removeAttribute("src");
        video.load(); // until then it keeps the clip
      }
    });
    if (!this.clips) this.count.textContent = word("nothing compared");
    for (const control of [this.play, this.place]) control.disabled = !this.clips;
    this.place.max = Math.max(0, this.frames - 1);
    this.playing = Boolean(this.clips);
    this.run();
  }

  /** The frame that the base shows. */
  frame() {
    return Math.min(this.frames - 1, Math.max(0, Math.floor(this.base.currentTime * this.fps + 1e-3)));
  }

  /** Show a frame of both. */
  seek(frame) {
    this.playing = false;
    this.run();
    this.jump(frame);
  }

  jump(frame) {
    for (const video of [this.base, this.refined]) video.currentTime = (frame + 0.5) / this.fps;
    this.show(frame);
  }

  toggle() {
    this.playing = !this.playing;
    this.run();
  }

  run() {
    this.play.textContent = this.playing ? "❚❚" : "▶";
    this.play.title = word(this.playing ? "pause" : "play");
    cancelAnimationFrame(this.next);
    if (!this.playing) {
      for (const video of [this.base, this.refined]) video.pause();
      return;
    }
    this.start();
    this.next = requestAnimationFrame(() => this.follow());
  }

  start() {
    for (const video of [this.base, this.refined]) video.play().catch(() => {}); // it may be too early for that
  }

  /** While they play: begin again together, and set the second right where it is off. */
  follow() {
    if (!this.playing || !this.element.isConnected) return;
    this.next = requestAnimationFrame(() => this.follow());
    if (this.base.ended || this.refined.ended || this.base.currentTime * this.fps >= this.frames) {
      this.jump(0);
      this.start();
      return;
    }
    if (this.base.paused) this.start(); // it was too early when they were asked to
    const apart = Math.abs(this.base.currentTime - this.refined.currentTime) * this.fps;
    if (apart > APART && !this.refined.seeking) this.refined.currentTime = this.base.currentTime;
    this.show(this.frame());
  }

  show(frame) {
    if (!this.clips) return;
    this.place.value = frame;
    this.count.textContent = `${frame + 1}/${this.frames}`;
  }

  /** Put the slider at a share of the width: left of it is the base. */
  split(share) {
    const percent = 100 * Math.max(0, Math.min(1, share));
    this.refined.style.clipPath = `inset(0 0 0 ${percent}%)`;
    this.line.style.left = `${percent}%`;
  }

  drag(event) {
    if (!(event.buttons & 1)) return;
    const box = this.screen.getBoundingClientRect();
    this.split((event.clientX - box.left) / box.width);
  }
}
