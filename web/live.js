// The video of a run while it is made: every finished chunk goes to a video element, by MediaSource.
import { after, make, ownPointer } from "./dom.js";
import { Reloads, Stream, plays } from "./stream.js";
import { word } from "./words.js";

const CODEC = /^avc1\.[0-9a-f]{6}$/;
const KEY = /^[0-9a-f]{32}$/;
const MOST_TEXT = 400; // characters of a note
const LEAST_HEIGHT = 220; // pixels of the page
const MOST_FRAGMENTS = 100_000;

/** What an event or an answer says of a video, or null when it says nothing sensible. */
function readRecord(given) {
  const { video, fragments, codec, seconds, note, ended } = given ?? {};
  const counts = Number.isInteger(fragments) && fragments >= 0 && fragments <= MOST_FRAGMENTS;
  if (typeof video !== "string" || !KEY.test(video) || !counts) return null;
  return {
    video,
    fragments,
    codec: typeof codec === "string" && CODEC.test(codec) ? codec : null,
    seconds: Number.isFinite(seconds) ? seconds : 0,
    note: typeof note === "string" ? note.slice(0, MOST_TEXT) : "",
    ended: ended === true,
  };
}

export class Live {
  /**
   * @param {{ask: (path: string) => Promise<Response>, address: (path: string) => string}} server
   * @param {() => void} show put the element on the page; called once, by `open`
   */
  constructor(server, show) {
    this.server = server;
    this.show = show;
    this.video = make("video", { class: "autorefiner-live-video", controls: "", playsinline: "" });
    this.video.muted = true; // a browser plays a video with sound only after a click
    this.line = make("div", { class: "autorefiner-status" }, word("no video"));
    this.element = ownPointer(make("div", { class: "autorefiner-live" }, this.video, this.line));
    // A video that is taken out of the page pauses too, and goes on with the next fragment.
    this.video.addEventListener("pause", () => (this.paused = this.video.isConnected && !this.atEnd()));
    this.video.addEventListener("play", () => (this.paused = false));
    this.clear(null);
  }

  /** Begin another video. */
  clear(record) {
    this.stream?.close?.();
    Object.assign(this, { record, stream: null, paused: false, failure: "" });
    this.video.loop = false;
    this.video.hidden = true;
    this.video.removeAttribute("src");
  }

  atEnd() {
    return this.video.ended || this.video.currentTime >= this.video.duration;
  }

  /** A record of the server: an event, or an answer after the page was loaded. */
  told(given) {
    const record = readRecord(given);
    if (!record) return;
    if (record.video !== this.record?.video) this.clear(record);
    if (record.fragments >= this.record.fragments) this.record = record;
    this.draw();
    this.follow();
  }

  /** Play what is new, until there is no more; the next event asks again where the server does not answer. */
  async follow() {
    if (this.following) return;
    this.following = true;
    while (this.stream?.count !== this.record.fragments && (await this.grow(this.record)));
    this.following = false;
    if (this.record.ended && this.stream?.count === this.record.fragments) await this.stream.end();
    this.video.loop = this.record.ended;
    this.draw();
  }

  /** Feed the element with what is new; false where nothing came. */
  async grow({ video, codec, fragments }) {
    if (!fragments || this.failure) return false;
    if (!plays(codec)) this.failure = word("no stream");
    if (this.failure) return false;
    const path = `/autorefiner/live/${video}`;
    this.stream ??= new Stream(this.video, (query) => this.server.ask(path + query), codec);
    const { stream } = this;
    const before = stream.count;
    const failed = await stream.grow(fragments).then(
      () => false,
      () => true,
    );
    if (stream !== this.stream) return true; // another video began meanwhile
    if (failed && before) this.failure = word("no stream");
    else if (failed) this.stream = new Reloads(this.video, (most) => this.server.address(`${path}?most=${most}`));
    this.draw();
    if (!this.paused) this.video.play().catch(() => null); // a browser may ask for a click first
    return failed ? !before : stream.count > before;
  }

  draw() {
    const { fragments, seconds, note } = this.record;
    const length = fragments ? `${seconds.toFixed(1)} s` : "";
    this.line.textContent = [length, this.failure, note].filter(Boolean).join(" · ");
    this.line.title = this.line.textContent;
    this.video.hidden = !this.stream;
    if (this.line.textContent) this.open();
  }

  /** Take room on the page. */
  open() {
    this.show?.();
    this.show = null;
  }
}

/**
 * Give a sampler a live view, which becomes a widget of it when a VAE is connected, and not only when a run begins: what
 * a run changes in a workflow would be a step of undo.
 */
export function addLive(node, server, addElement) {
  const live = new Live(server, () => {
    addElement(node, "live", live.element, LEAST_HEIGHT, { grows: true });
    const [width, height] = node.size;
    node.setSize([width, Math.max(height, node.computeSize()[1])]);
  });
  after(node, "onConnectionsChange", () => {
    if (node.inputs?.find((input) => input.name === "vae")?.link != null) live.open();
  });
  return live;
}
