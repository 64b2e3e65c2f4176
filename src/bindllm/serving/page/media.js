// Attached media: their modality, their preview, and the content part that carries them to the server.

import { drawMap, drawPoints, drawSignals, mapOfImage } from "./drawing.js";
import { FormatError, npyShape, readMap, readPoints, readSignals, writeNpy } from "./formats.js";

// File endings as bindllm reads them, and PCD, which this page sends as its points.
const ENDINGS = {
  image: ["png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "svg", "svgz", "avif"],
  video: ["mp4", "webm", "mkv", "avi", "mov", "m4v", "mpg", "mpeg"],
  audio: ["wav", "mp3", "flac", "ogg", "oga", "opus", "m4a", "aac"],
  point: ["ply", "obj", "off", "stl", "glb", "xyz", "pts", "pcd"],
};
// Modalities that a kind of file can have, the most likely first.
const MEANINGS = { image: ["image", "depth", "thermal"], video: ["video", "audio"], audio: ["audio"], point: ["point"] };
const NUMBERS = ["npy", "npz", "csv", "txt"];
// Larger files cannot be sent: a request is one text, which browsers limit.
const MOST_SENT = 200 << 20;
// Larger files of numbers get no preview.
const MOST_PREVIEWED = 64 << 20;

const PLURALS = {
  image: "images", video: "videos", audio: "audio", point: "point clouds", depth: "depth maps", thermal: "thermal images",
  imu: "IMU signals",
};

/** Return the names of modalities as a reader says them, in one order. */
export function listed(names) {
  const order = Object.keys(PLURALS);
  const known = order.filter((name) => names.includes(name)).map((name) => PLURALS[name]);
  const words = [...known, ...names.filter((name) => !order.includes(name))];
  return words.length < 2 ? words.join("") : `${words.slice(0, -1).join(", ")} and ${words.at(-1)}`;
}

export class MediaError extends Error {}

/**
 * Return media of a file.
 *
 * @param {File} file
 * @param {string[]} served modalities of the model
 * @returns {Promise<{file: File, choices: string[], modality: string}>} the modalities it can have, and the likely one
 */
export async function readFile(file, served) {
  if (!file.size) throw new MediaError(`${file.name}: the file is empty.`);
  if (file.size > MOST_SENT) throw new MediaError(`${file.name}: the file has ${shownSize(file.size)}; at most 200 MB can be sent.`);
  const kind = kindOf(file);
  const others = served.filter((name) => !["image", "video", "audio", "text"].includes(name));
  const possible = kind ? MEANINGS[kind] : [...others, "image", "audio"];
  const choices = possible.filter((name) => served.includes(name));
  if (!choices.length) {
    const meant = kind ? `${MEANINGS[kind][0]} files` : "such files";
    const known = listed(served.filter((name) => name !== "text"));
    throw new MediaError(`${file.name}: this model does not read ${meant}${known && `, only ${known}`}.`);
  }
  const likely = await likelyModality(file, kind);
  return { file, choices, modality: choices.includes(likely) ? likely : choices[0] };
}

/** Return the file chooser's filter for the modalities of a model; null: any file. */
export function acceptedFiles(served) {
  const known = served.filter((name) => ENDINGS[name]);
  // Files of numbers can have any of the others.
  if (known.length < served.filter((name) => name !== "text").length) return null;
  return known.map((name) => [name === "point" ? NUMBERS : [`${name}/*`], ENDINGS[name]].flat())
    .flat().map((name) => (name.includes("/") ? name : `.${name}`)).join(",");
}

/** Return the content part of media, as /v1/chat/completions takes it. */
export async function contentPart({ file, modality }) {
  const url = await dataUri(ending(file) === "pcd" ? await asNpy(file) : file);
  if (modality === "image") return { type: "image_url", image_url: { url } };
  if (modality === "video") return { type: "video_url", video_url: { url } };
  if (modality === "audio") return { type: "input_audio", input_audio: { data: url.slice(url.indexOf(",") + 1), format: ending(file) } };
  return { type: modality, [modality]: url };
}

/** Return the points of a PCD file, which the server does not read, as an NPY file. */
async function asNpy(file) {
  try {
    return writeNpy(readPoints(file.name, await file.arrayBuffer()).xyz);
  } catch (error) {
    throw new MediaError(`${file.name} cannot be read: ${error.message}. Remove it, or convert it to PLY.`);
  }
}

/** Return an element that shows media; `close` frees its memory. */
export function preview({ file, modality }) {
  const figure = document.createElement("figure");
  const caption = document.createElement("figcaption");
  const name = Object.assign(document.createElement("span"), { className: "name", textContent: file.name, title: file.name });
  const size = Object.assign(document.createElement("span"), { textContent: shownSize(file.size) });
  caption.append(name, size);
  const url = URL.createObjectURL(file);
  const show = (element) => figure.replaceChildren(element, caption);
  const plain = (why) => show(Object.assign(document.createElement("div"), { className: "plain", textContent: why }));
  const noPreview = () => plain(`No preview of this ${modality} file`);
  const kind = kindOf(file);
  plain("Loading\u2026");
  if (kind === "video" || kind === "audio") {
    const player = document.createElement(kind === "video" && modality === "audio" ? "audio" : kind);
    Object.assign(player, { controls: true, preload: "metadata", src: url, onerror: noPreview });
    player.setAttribute("aria-label", `${modality}: ${file.name}`);
    show(player);
  } else if (kind === "image") {
    const image = Object.assign(new Image(), { alt: `${modality}: ${file.name}`, src: url, onerror: noPreview });
    if (modality === "image") show(image);
    // Depth and thermal files are dark to the eye: show their range instead.
    else image.onload = () => drawn(() => drawMap(canvas(), mapOfImage(image), image.alt));
  } else if (file.size > MOST_PREVIEWED) {
    noPreview();
  } else {
    file.arrayBuffer().then((buffer) => drawn(() => drawNumbers(canvas(), modality, file.name, buffer)), noPreview);
  }
  return { element: figure, close: () => URL.revokeObjectURL(url) };

  function canvas() {
    const element = document.createElement("canvas");
    show(element);
    return element;
  }

  function drawn(draw) {
    try {
      draw();
    } catch (error) {
      plain(error instanceof FormatError ? `No preview: ${error.message}` : `No preview of this ${modality} file`);
    }
  }
}

function drawNumbers(canvas, modality, name, buffer) {
  if (modality === "point") drawPoints(canvas, readPoints(name, buffer));
  else if (modality === "imu") drawSignals(canvas, readSignals(buffer));
  else drawMap(canvas, readMap(buffer), `${modality}: ${name}`);
}

function ending(file) {
  return file.name.includes(".") ? file.name.split(".").pop().toLowerCase() : "";
}

/** Return image, video, audio or point; null: a file of numbers, or unknown. */
function kindOf(file) {
  const named = Object.keys(ENDINGS).find((kind) => ENDINGS[kind].includes(ending(file)));
  const typed = file.type.split("/")[0];
  return named ?? (["image", "video", "audio"].includes(typed) ? typed : null);
}

/** Guess the modality from the start of a file; people can change it. */
async function likelyModality(file, kind) {
  const head = await file.slice(0, 4096).arrayBuffer();
  const bytes = new Uint8Array(head);
  // A PNG of 16 bits and one channel is a map of numbers.
  if (ending(file) === "png" && bytes[24] === 16 && bytes[25] === 0) return "depth";
  if (kind) return MEANINGS[kind][0];
  const shape = npyShape(head);
  if (shape) {
    const [rows, columns] = shape;
    if (shape.length === 2 && (rows === 6 || columns === 6)) return "imu";
    return shape.length === 2 && columns >= 3 && columns < 16 ? "point" : "depth";
  }
  const text = new TextDecoder().decode(head);
  const columns = text.split("\n").at(text.includes("\n") ? -2 : -1).trim().split(/[\s,;]+/).length;
  return /acc|gyr|imu/i.test(text) || columns >= 6 ? "imu" : "point";
}

function dataUri(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new MediaError(`${blob.name ?? "A file"} cannot be read any more. Attach it again.`));
    reader.readAsDataURL(blob);
  });
}

function shownSize(bytes) {
  return bytes < 1e6 ? `${Math.max(1, Math.round(bytes / 1e3))} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}
