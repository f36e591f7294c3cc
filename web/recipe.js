// The recipe of a sampler: chunks that are rerolled, and where the clip ends, as text. Chunks are counted from 1.

const LONGEST = 2000; // characters
const MOST = 4096; // chunks, times
const COMMAND = /^(?:(reroll)\s+(\d{1,6})(?:\s+(\d{1,6}))?|(keep|extend)\s+(\d{1,6}))$/;

/** @typedef {{verb: "reroll" | "keep" | "extend", number: number, times: number}} Command */

/**
 * The commands of a recipe, or null where it cannot be read.
 * @param {string} text
 * @returns {Command[] | null}
 */
export function parseRecipe(text) {
  if (typeof text !== "string" || text.length > LONGEST) return null;
  const commands = [];
  for (const part of text.split(";").map((each) => each.trim()).filter(Boolean)) {
    const match = COMMAND.exec(part);
    if (!match) return null;
    const [number, times] = [Number(match[2] ?? match[5]), Number(match[3] ?? 1)];
    if (!(number >= 1 && number <= MOST && times >= 1 && times <= MOST)) return null;
    commands.push({ verb: match[1] ?? match[4], number, times });
  }
  return commands;
}

/** @param {Command[]} commands */
export function formatRecipe(commands) {
  return commands.map(({ verb, number, times }) => `${verb} ${number}${times > 1 ? ` ${times}` : ""}`).join("; ");
}

/** Rerolls of one chunk add up, wherever they stand. */
function withReroll(commands, command) {
  const place = commands.findIndex(({ verb, number }) => verb === "reroll" && number === command.number);
  if (place < 0) return [...commands, command];
  const times = Math.min(MOST, commands[place].times + command.times);
  return commands.with(place, { ...command, times });
}

/** What an earlier end makes meaningless goes: rerolls after it, and later ends. */
function withKeep(commands, command, chunks) {
  if (command.number >= chunks) return commands;
  const rest = commands.filter(({ verb, number }) => verb !== "reroll" || number <= command.number);
  let count = chunks; // after `rest`, or NaN where it is not known
  for (let place = rest.length - 1; place >= 0; place -= 1) {
    const { verb, number } = rest[place];
    if (verb === "reroll") continue;
    if (verb === "extend" && !(command.number < count - number)) break;
    count = verb === "extend" ? count - number : Number.NaN;
    rest.splice(place, 1);
  }
  return [...rest, command];
}

function withExtend(commands, command) {
  const last = commands.at(-1);
  if (last?.verb !== "extend") return [...commands, command];
  return commands.with(-1, { ...command, number: Math.min(MOST, last.number + command.number) });
}

/**
 * A recipe and one more command, in the fewest commands that say the same.
 * @param {Command[]} commands
 * @param {Partial<Command>} command
 * @param {number} chunks of the clip that `commands` make
 * @returns {Command[]}
 */
export function steered(commands, { verb, number, times = 1 }, chunks) {
  const command = { verb, number, times };
  if (verb === "reroll") return withReroll(commands, command);
  return verb === "keep" ? withKeep(commands, command, chunks) : withExtend(commands, command);
}
