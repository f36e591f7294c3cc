// What the page knows of the model and the size that a Reflective Cache is for, as the server is asked with it.
import { source, targets, valueOf } from "./graph.js";

const SAMPLERS = ["AutoRefinerSampler", "AutoRefinerCustomSampler"];
const FARTHEST = 32; // nodes that a search goes along

/** The named widgets' values of a node. */
function values(node, ...names) {
  return Object.fromEntries(names.map((name) => [name, valueOf(node, name)]));
}

/** The loader that a MODEL comes from, behind whatever patches it. */
function loader(node) {
  let found = node;
  for (let step = 0; found && step < FARTHEST; step += 1) {
    const next = source(found, "model");
    if (!next) return found;
    found = next;
  }
  return null;
}

function modelOf(node) {
  const found = loader(node);
  if (found?.comfyClass === "AutoRefinerLoadDemo") return { demo: true };
  if (found?.comfyClass === "AutoRefinerLoadARVDM") return values(found, "file", "preset", "dtype", "weights");
  if (found?.comfyClass === "UNETLoader") {
    return { file: valueOf(found, "unet_name"), preset: null, dtype: "auto", weights: "auto" };
  }
  return null;
}

function sizeOf(node) {
  const size = node && values(node, "width", "height", "length", "batch_size");
  return size && Object.values(size).every(Number.isInteger) ? size : null;
}

/** What to ask the server of a cache node, which may be connected to a sampler that knows the rest. */
export function askedOf(cache) {
  const sampler = targets(cache).find((node) => SAMPLERS.includes(node.comfyClass));
  const own = source(cache, "model");
  const latent = source(cache, "latent") ?? source(sampler, "latent");
  const refiner = source(sampler, "refiner");
  const schedule = source(sampler, "chunk_schedule");
  return {
    ...values(cache, "window", "sink", "positions", "history", "previous_x0"),
    ...values(cache, "memory", "memory_settings", "positions_settings", "store"),
    model: modelOf(own ?? source(sampler, "model") ?? source(refiner, "model")),
    size: sizeOf(latent ?? sampler),
    refiner: refiner?.comfyClass === "AutoRefinerLoadRefiner" ? values(refiner, "file") : null,
    schedule:
      schedule &&
      values(schedule, "preset", "levels", "frames_per_chunk", "first_levels", "refined_levels"),
  };
}
