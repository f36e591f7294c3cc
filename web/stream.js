// Two ways to feed a video element with a video that grows on the server.

const COUNT = "X-AutoRefiner-Fragments"; // in an answer: the fragments that the page has with it
const typeOf = (codec) => `video/mp4; codecs="${codec}"`;

/** Wait for an event of a target; rejects on an "error" of any of the targets. */
function once(target, name, ...others) {
  return new Promise((resolve, reject) => {
    target.addEventListener(name, resolve, { once: true });
    for (const one of [target, ...others]) one.addEventListener("error", reject, { once: true });
  });
}

/** Whether this browser plays a codec as a stream. */
export function plays(codec) {
  return Boolean(codec && globalThis.MediaSource?.isTypeSupported(typeOf(codec)));
}

/** A media source, which new fragments are fetched for and appended to. */
export class Stream {
  /**
   * @param {HTMLVideoElement} video
   * @param {(query: string) => Promise<Response>} ask request the video with a query
   * @param {string} codec
   */
  constructor(video, ask, codec) {
    this.ask = ask;
    this.count = 0; // fragments that the element has
    this.source = new MediaSource();
    const address = URL.createObjectURL(this.source);
    this.opened = once(this.source, "sourceopen", video)
      .then(() => (this.buffer = this.source.addSourceBuffer(typeOf(codec))))
      .finally(() => URL.revokeObjectURL(address));
    video.src = address;
  }

  /** Fetch and append what is new. Rejects where the page's policy or the browser forbids it. */
  async grow() {
    await this.opened;
    const answer = await this.ask(`?from=${this.count}`).catch(() => null);
    const data = answer?.ok ? await answer.arrayBuffer().catch(() => null) : null;
    const count = Number(answer?.headers.get(COUNT));
    if (!data || !(count > this.count)) return; // the next event asks again
    const updated = once(this.buffer, "updateend");
    this.buffer.appendBuffer(data);
    await updated;
    this.count = count;
    // A stream without a length in its head counts as endless, and the element's controls cannot seek in it.
    const { buffered } = this.buffer;
    if (buffered.length) this.source.duration = buffered.end(buffered.length - 1);
  }

  async end() {
    if (this.source.readyState === "open") this.source.endOfStream();
  }
}

/**
 * Loads the video again whenever it has played to its end and there is more: where the page's policy forbids media
 * sources, as ComfyUI's does with --disable-api-nodes.
 */
export class Reloads {
  /**
   * @param {HTMLVideoElement} video
   * @param {(fragments: number) => string} addressOf the address of the first fragments of the video
   */
  constructor(video, addressOf) {
    Object.assign(this, { video, addressOf, count: 0, loaded: 0, left: null });
    this.more = () => this.count > this.loaded && this.load();
    this.goOn = () => {
      if (this.left !== null) video.currentTime = this.left;
      this.left = null;
    };
    video.addEventListener("ended", this.more);
    video.addEventListener("loadedmetadata", this.goOn);
  }

  async grow(fragments) {
    this.count = fragments;
    if (!this.loaded || this.video.ended) this.load();
  }

  load() {
    const { paused, ended, currentTime } = this.video;
    this.left ??= currentTime; // a video that is still loading is at 0, wherever it was left
    this.loaded = this.count;
    this.video.src = this.addressOf(this.count);
    if (!paused || ended) this.video.play().catch(() => null); // one that its user paused stays paused
  }

  async end() {
    this.more();
  }

  close() {
    this.video.removeEventListener("ended", this.more);
    this.video.removeEventListener("loadedmetadata", this.goOn);
  }
}
