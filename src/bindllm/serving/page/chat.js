// The chat: what is attached, the turns so far, and the answer that is being written. Text of the model is inserted as
// text, never as HTML.

import { acceptedFiles, contentPart, listed, MediaError, preview, readFile } from "./media.js";
import { record } from "./recorder.js";
import { readModel, ServerError, streamAnswer } from "./server.js";

const $ = (id) => document.getElementById(id);
const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};

let model = null;
// Media that wait for the next message, with their previews.
let attached = [];
// Each turn is a question with its media and, once there is one, its answer.
let turns = [];
let abort = null;

// --- The model -------------------------------------------------------------------------------------------------------

async function loadModel() {
  $("notice").hidden = true;
  try {
    model = await readModel($("key").value.trim());
  } catch (error) {
    $("notice-text").textContent = error.message;
    $("notice-settings").hidden = !error.needsKey;
    $("notice-retry").hidden = Boolean(error.needsKey);
    $("notice").hidden = false;
    $("serves").textContent = "The model is not known yet.";
    return;
  }
  const served = model.modalities.filter((name) => name !== "text");
  $("model").textContent = model.id;
  document.title = `${model.id} - bindllm chat`;
  $("serves").textContent = served.length
    ? `This model reads ${listed(served)}. Add files, drop or paste them, then type a question.`
    : "This model reads text only.";
  $("add").hidden = !served.length;
  const accepted = acceptedFiles(served);
  if (accepted === null) $("files").removeAttribute("accept");
  else $("files").accept = accepted;
  for (const button of document.querySelectorAll("button[data-modality]")) {
    button.hidden = !served.includes(button.dataset.modality);
    // Browsers offer the camera and the microphone only to pages of this machine or over https.
    button.disabled = !navigator.mediaDevices;
    button.title = button.disabled ? "Recording needs https or localhost" : "";
  }
}

// --- Attaching -------------------------------------------------------------------------------------------------------

async function attach(files) {
  const problems = [];
  for (const file of files) {
    try {
      const media = await readFile(file, model?.modalities ?? ["image", "video", "audio", "point", "depth", "thermal", "imu"]);
      attached.push({ ...media, preview: preview(media) });
      announce(`${file.name} is attached as ${media.modality}.`);
    } catch (error) {
      problems.push(error instanceof MediaError ? error.message : `${file.name} cannot be read: ${error.message}`);
    }
  }
  showProblem("composer-problem", problems.join("\n"));
  showAttached();
  $("text").focus();
}

function showAttached() {
  $("attached").replaceChildren(...attached.map((media, number) => {
    const { file, choices, modality } = media;
    const kind = choices.length < 2 ? make("span", { className: "kind", textContent: modality }) : make("select", {
      onchange: (event) => {
        media.preview.close();
        media.modality = event.target.value;
        media.preview = preview(media);
        showAttached();
        $("attached").querySelectorAll("li")[number].querySelector("select").focus();
      },
    }, ...choices.map((choice) => new Option(choice, choice, false, choice === modality)));
    kind.setAttribute("aria-label", `Modality of ${file.name}`);
    const remove = make("button", { type: "button", textContent: "Remove", onclick: () => {
      media.preview.close();
      attached = attached.filter((other) => other !== media);
      showAttached();
      announce(`${file.name} is removed.`);
      $("text").focus();
    } });
    remove.setAttribute("aria-label", `Remove ${file.name}`);
    return make("li", { className: "media" }, make("div", {}, media.preview.element, make("div", { className: "row" }, kind, remove)));
  }));
}

// --- Turns -----------------------------------------------------------------------------------------------------------

function send() {
  const text = $("text").value.trim();
  if (abort) return;
  if (!text) {
    showProblem("composer-problem", attached.length ? "Type a question about the attached media." : "");
    $("text").focus();
    return;
  }
  showProblem("composer-problem", "");
  turns.push({ text, media: attached, answer: "", note: "", problem: "", neighbors: [], element: null });
  attached = [];
  $("text").value = "";
  resize();
  showAttached();
  answer();
}

/** Ask for the answer to the last turn. */
async function answer() {
  const turn = turns.at(-1);
  Object.assign(turn, { answer: "", note: "", problem: "", neighbors: [] });
  abort = new AbortController();
  showTurns();
  setBusy(true);
  scrollDown(true);
  let number = 0;
  try {
    const asked = await messages();
    number = asked.length - 1;
    const body = { ...settings(), model: model?.id, messages: asked };
    if (model?.has_cache) body.neighbors = true;
    if (turn.media.length) body.logprobs = true;
    const { finish, neighbors, warnings, least } = await streamAnswer(body, $("key").value.trim(), abort.signal, (text) => {
      turn.answer += text;
      turn.element.querySelector(".model p.text").textContent = turn.answer;
      scrollDown();
    });
    const note = NOTES[finish] ?? (hasText(turn.answer) ? "" : "The answer is empty.");
    // Those about media of earlier turns were shown there.
    const own = warnings.filter((words) => words.startsWith(`messages[${number}]`));
    const doubt = least < SURE ? `The model is not sure: one token of this answer has a probability of ${Math.round(100 * least)} %.` : "";
    turn.note = [doubt, note, ...own.map((words) => withFileNames(words, turn, number))].filter(Boolean).join(" ");
    // One list for each message with media; the last is the one that was asked now.
    turn.neighbors = turn.media.length ? neighbors.at(-1) ?? [] : [];
  } catch (error) {
    if (error.name === "AbortError") turn.note = "Stopped.";
    else turn.problem = error instanceof ServerError || error instanceof MediaError ? withFileNames(error.message, turn, number) : `This page failed: ${error.message}`;
    turn.needsKey = error.needsKey ?? false;
  }
  abort = null;
  setBusy(false);
  showTurns();
  scrollDown();
  announce(turn.problem ? "" : `${turn.answer} ${turn.note}`);
}

/** Name the file instead of its place in the request. */
function withFileNames(message, turn, number) {
  const place = /messages\[(\d+)\]\.content\[(\d+)\](?: \(\w+\))?/;
  return message.replace(place, (words, asked, part) => (Number(asked) === number && turn.media[part]?.file.name) || words);
}

/** Whether a text has any visible character; a turn whose answer has none is not sent again. */
function hasText(text) {
  return /[^\s\p{Cf}\p{Cc}]/u.test(text);
}

// In right answers of the scenes model, a token is hardly ever less likely than this.
const SURE = 0.5;

const NOTES = {
  length: "The answer was cut at the longest length (Max tokens in the settings).",
};

/** Return the conversation as the server takes it: turns with an answer, and the last question. */
async function messages() {
  const system = $("system").value.trim();
  const found = system ? [{ role: "system", content: system }] : [];
  for (const turn of turns) {
    const isLast = turn === turns.at(-1);
    if (!isLast && !hasText(turn.answer)) continue;
    // Read once: later turns send the same media again.
    turn.parts ??= await Promise.all(turn.media.map(contentPart));
    found.push({ role: "user", content: [...turn.parts, { type: "text", text: turn.text }] });
    if (!isLast) found.push({ role: "assistant", content: turn.answer });
  }
  return found;
}

function showTurns() {
  $("welcome").hidden = turns.length > 0;
  $("clear").disabled = !turns.length;
  $("turns").replaceChildren(...turns.map((turn) => (turn.element = turnElement(turn))));
}

function turnElement(turn) {
  const isLast = turn === turns.at(-1);
  const busy = isLast && abort !== null;
  const you = make("article", { className: "turn you" }, make("h3", { textContent: "You" }), make("div", { className: "bubble" }));
  if (turn.media.length) {
    const shown = turn.media.map((media) => make("li", {}, media.preview.element));
    you.querySelector(".bubble").append(make("ul", { className: "media" }, ...shown));
  }
  you.querySelector(".bubble").append(make("p", { className: "text", dir: "auto", textContent: turn.text }));
  if (isLast && !busy) you.append(tools(["Edit", () => edit(turn), "Edit this message"]));
  const reply = make("article", { className: `turn model${busy ? " answering" : ""}` }, make("h3", { textContent: "Model" }));
  reply.setAttribute("aria-busy", busy);
  if (busy || turn.answer) {
    reply.append(make("div", { className: "bubble" }, make("p", { className: "text", dir: "auto", textContent: turn.answer })));
  }
  if (turn.note) reply.append(make("p", { className: "note", textContent: turn.note }));
  if (turn.problem) {
    const problem = make("p", { className: "problem", textContent: turn.problem });
    // Announced once: older turns are drawn again with every change.
    if (isLast) problem.setAttribute("role", "alert");
    reply.append(problem);
  }
  if (turn.neighbors.length) reply.append(neighborList(turn.neighbors));
  if (!busy) {
    const buttons = [];
    if (turn.answer) buttons.push(["Copy", (event) => copy(turn.answer, event.target), "Copy the answer"]);
    if (isLast) buttons.push(["Retry", answer, "Ask for another answer"]);
    if (turn.problem && turn.needsKey) buttons.push(["Settings", openSettings, "Open the settings"]);
    reply.append(tools(...buttons));
    if (!isLast && !hasText(turn.answer)) reply.append(make("p", { className: "note", textContent: "This message has no answer. The model does not see it." }));
  }
  return make("div", {}, you, reply);
}

function tools(...buttons) {
  return make("div", { className: "tools" }, ...buttons.map(([text, onclick, label]) => {
    const button = make("button", { type: "button", textContent: text, onclick });
    button.setAttribute("aria-label", label);
    return button;
  }));
}

/** Show the images that the visual cache blended into the media of a turn. */
function neighborList(neighbors) {
  const figures = neighbors.map(({ name, similarity, thumbnail }) => {
    // Only an image inside the answer is shown: nothing is loaded from elsewhere.
    const image = /^data:image\/(webp|png|jpeg);base64,/.test(thumbnail ?? "")
      ? make("img", { src: thumbnail, alt: name })
      : make("div", { className: "plain", textContent: "No image" });
    const caption = make("figcaption", {}, make("span", { className: "name", textContent: name, title: name }), make("span", { textContent: Number(similarity).toFixed(2) }));
    return make("li", {}, make("figure", {}, image, caption));
  });
  return make("section", { className: "neighbors" }, make("p", { className: "note", textContent: "Images of the visual cache, with their similarity:" }), make("ul", { className: "media" }, ...figures));
}

/** Take the last message back into the composer, with its media. */
function edit(turn) {
  turns = turns.filter((other) => other !== turn);
  attached = [...turn.media, ...attached];
  $("text").value = turn.text;
  showTurns();
  showAttached();
  resize();
  $("text").focus();
}

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without https the clipboard takes only a selection.
    const area = make("textarea", { value: text, className: "unseen" });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  button.textContent = "Copied";
  announce("The answer is copied.");
  setTimeout(() => (button.textContent = "Copy"), 1500);
}

function clear() {
  abort?.abort();
  for (const media of [...attached, ...turns.flatMap((turn) => turn.media)]) media.preview.close();
  [attached, turns] = [[], []];
  showProblem("composer-problem", "");
  showTurns();
  showAttached();
  announce("A new chat has begun.");
  $("text").focus();
}

// --- Settings --------------------------------------------------------------------------------------------------------

/** Return the fields of a request that are set; empty ones are left to the server. */
function settings() {
  const fields = { temperature: "temperature", "top-p": "top_p", "max-tokens": "max_tokens", seed: "seed" };
  return Object.fromEntries(
    Object.entries(fields).filter(([id]) => $(id).value !== "").map(([id, name]) => [name, Number($(id).value)]),
  );
}

function openSettings() {
  $("settings").showModal();
  if (!$("notice").hidden) $("key").focus();
}

function closeSettings(event) {
  const wrong = [...$("settings").querySelectorAll("input")].find((field) => !field.checkValidity());
  // A wrong number must not be sent, nor left out without a word.
  showProblem("settings-problem", wrong ? `${wrong.labels[0].textContent}: ${wrong.validationMessage}` : "");
  event.preventDefault();
  if (wrong) wrong.focus();
  else $("settings").close();
}

// --- Small things ----------------------------------------------------------------------------------------------------

function setBusy(busy) {
  // A button that disappears would lose the focus to the page.
  const hadFocus = [$("send"), $("stop")].includes(document.activeElement) || document.activeElement === document.body;
  $("stop").hidden = !busy;
  $("send").hidden = busy;
  if (hadFocus) $("text").focus();
}

function announce(text) {
  $("announcer").textContent = text;
}

function showProblem(id, text) {
  $(id).textContent = text;
  $(id).hidden = !text;
}

/** Keep the end of the conversation in view, unless the user has scrolled up. */
function scrollDown(always = false) {
  const main = document.querySelector("main");
  if (always || main.scrollHeight - main.scrollTop - main.clientHeight < 160) main.scrollTop = main.scrollHeight;
}

function resize() {
  $("text").style.height = "auto";
  $("text").style.height = `${$("text").scrollHeight + 2}px`;
}

function listen() {
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  $("text").addEventListener("input", resize);
  $("text").addEventListener("keydown", (event) => {
    // While a word is being composed (Japanese, Chinese, ...), Enter ends the word.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !document.querySelector("dialog[open]")) abort?.abort();
  });
  $("stop").onclick = () => abort?.abort();
  $("clear").onclick = clear;
  $("add").onclick = () => $("files").click();
  $("files").onchange = () => {
    attach([...$("files").files]);
    // The same file can be chosen again.
    $("files").value = "";
  };
  document.addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) attach([...event.clipboardData.files]);
  });
  for (const button of document.querySelectorAll("button[data-modality]")) {
    button.onclick = async () => {
      const file = await record(button.dataset.modality);
      if (file) attach([file]);
    };
  }
  $("open-settings").onclick = $("notice-settings").onclick = openSettings;
  $("notice-retry").onclick = loadModel;
  $("settings-form").onsubmit = closeSettings;
  $("settings").oncancel = closeSettings;
  $("key").onchange = loadModel;
  listenToDrops();
}

function listenToDrops() {
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
  document.addEventListener("dragover", (event) => {
    if (!hasFiles(event) || document.querySelector("dialog[open]")) return;
    event.preventDefault();
    $("drop").hidden = false;
  });
  document.addEventListener("dragleave", (event) => {
    // Elements inside the page fire it, too; outside there is no next one.
    if (!event.relatedTarget) $("drop").hidden = true;
  });
  document.addEventListener("drop", (event) => {
    $("drop").hidden = true;
    if (!hasFiles(event)) return;
    event.preventDefault();
    attach([...event.dataTransfer.files]);
  });
}

listen();
showTurns();
loadModel();
$("text").focus();
