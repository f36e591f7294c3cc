// The pictures of a chunk: one of them on a tile, all of them moving when enlarged.
import { dialog, make } from "./dom.js";
import { word } from "./words.js";

const MOST = 64 * 1024; // characters of a picture
const RATE = 4; // latent frames a second, as they play at 16 pixel frames a second

/** Whether a value is a JPEG in base64 of a sensible size. */
export function isPicture(value) {
  return typeof value === "string" && value.length <= MOST && /^\/9j\/[A-Za-z0-9+/]+={0,2}$/.test(value);
}

/** Show one of the pictures that lie side by side in a chunk's image, or nothing. */
export function show(element, { image, pictures }, index) {
  if (!image) {
    element.style.backgroundImage = "none";
    return;
  }
  element.style.backgroundImage = `url("data:image/jpeg;base64,${image}")`;
  element.style.backgroundSize = `${100 * pictures}% 100%`;
  element.style.backgroundPosition = pictures > 1 ? `${(100 * index) / (pictures - 1)}% 0` : "0 0";
}

/** The width over height of one picture, when the browser has read the image. */
export async function aspect({ image, pictures }) {
  const read = new Image();
  read.src = `data:image/jpeg;base64,${image}`;
  await read.decode();
  return read.naturalWidth / pictures / read.naturalHeight;
}

/**
 * A dialog that plays a chunk large; the arrow keys and buttons go to its neighbours.
 * @param {object[]} chunks
 * @param {object} chosen one of them
 * @param {(chunk: object) => [string, () => void][]} choices what can be done with a chunk: text and action
 */
export function enlarge(chunks, chosen, choices = () => []) {
  let place = chunks.indexOf(chosen);
  let frame = 0;
  if (place < 0) return;
  const picture = make("div", { class: "autorefiner-large" });
  const title = make("span");
  const actions = make("div", { class: "autorefiner-bar autorefiner-actions" });
  const turn = async (by) => {
    place = Math.max(0, Math.min(chunks.length - 1, place + by));
    const { chunk, start, end } = chunks[place];
    title.textContent = `${word("chunk")} ${chunk + 1} · ${word("frames")} ${start + 1}–${end}`;
    frame = 0;
    draw();
    const buttons = choices(chunks[place]).map(([text, action]) =>
      button(text, () => {
        opened.close();
        action();
      }),
    );
    actions.replaceChildren(...buttons);
    actions.hidden = !buttons.length;
    picture.style.aspectRatio = String(await aspect(chunks[place]).catch(() => 16 / 9));
  };
  const draw = () => show(picture, chunks[place], frame % chunks[place].pictures);
  const button = (text, action) => make("button", { type: "button", onclick: action }, text);
  const bar = make(
    "div",
    { class: "autorefiner-bar" },
    button("◀", () => turn(-1)),
    title,
    button("▶", () => turn(1)),
    button(word("close"), () => opened.close()),
  );
  const keys = { ArrowLeft: -1, ArrowRight: 1 };
  const timer = setInterval(() => {
    frame += 1;
    draw();
  }, 1000 / RATE);
  const listeners = {
    onkeydown: (event) => keys[event.key] && turn(keys[event.key]),
    onclose: () => clearInterval(timer),
  };
  const opened = dialog(listeners, picture, bar, actions);
  turn(0);
}
