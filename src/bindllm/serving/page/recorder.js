// Recording with the camera and the microphone, in a dialog. Nothing is recorded before its button is pressed.

const LONGEST = 60;
const RATE = 16000;
const TITLES = { image: "Take a photo", audio: "Record audio", video: "Record video" };
const $ = (id) => document.getElementById(id);

/**
 * Let the user record.
 *
 * @param {"image" | "audio" | "video"} modality
 * @returns {Promise<?File>} the recording; null: cancelled
 */
export async function record(modality) {
  const dialog = $("recorder");
  const action = $("recorder-action");
  $("recorder-title").textContent = TITLES[modality];
  $("recorder-problem").hidden = true;
  $("recorder-time").textContent = modality === "image" ? "" : time(0);
  $("viewfinder").hidden = modality === "audio";
  action.textContent = modality === "image" ? "Take photo" : "Start recording";
  action.disabled = true;
  dialog.showModal();
  const closed = new Promise((resolve) => dialog.addEventListener("close", () => resolve(null), { once: true }));
  $("recorder-cancel").onclick = () => dialog.close();
  const devices = { audio: modality !== "image", video: modality !== "audio" };
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia(devices);
    // Cancelled while the browser asked for permission.
    if (!dialog.open) return null;
    $("viewfinder").srcObject = modality === "audio" ? null : stream;
    if (modality !== "audio") await $("viewfinder").play();
    action.disabled = false;
    const pressed = new Promise((resolve) => (action.onclick = resolve));
    if (!(await Promise.race([pressed.then(() => true), closed]))) return null;
    const made = modality === "image" ? photo($("viewfinder")) : recording(stream, modality, action, closed);
    return await Promise.race([made, closed]);
  } catch (error) {
    show(error, modality);
    await closed;
    return null;
  } finally {
    stream?.getTracks().forEach((track) => track.stop());
    $("viewfinder").srcObject = null;
    dialog.close();
  }
}

function show(error, modality) {
  const device = modality === "audio" ? "microphone" : "camera";
  const reasons = {
    NotAllowedError: `The browser does not allow this page to use the ${device}. Allow it in the site settings.`,
    NotFoundError: `No ${device} was found.`,
    NotReadableError: `The ${device} is in use by another program.`,
  };
  $("recorder-problem").textContent = reasons[error.name] ?? `Recording failed: ${error.message}`;
  $("recorder-problem").hidden = false;
  $("recorder-action").disabled = true;
}

async function photo(video) {
  const canvas = Object.assign(document.createElement("canvas"), { width: video.videoWidth, height: video.videoHeight });
  canvas.getContext("2d").drawImage(video, 0, 0);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
  return new File([blob], "photo.jpg", { type: "image/jpeg" });
}

/** Record until the button is pressed, the dialog is closed or the longest time is over. */
async function recording(stream, modality, action, closed) {
  const recorder = new MediaRecorder(stream);
  const pieces = [];
  recorder.ondataavailable = (event) => pieces.push(event.data);
  const stopped = new Promise((resolve) => (recorder.onstop = resolve));
  recorder.start();
  action.textContent = "Stop and attach";
  const started = performance.now();
  const stop = () => recorder.state === "recording" && recorder.stop();
  const timer = setInterval(() => {
    const seconds = (performance.now() - started) / 1000;
    $("recorder-time").textContent = time(seconds);
    if (seconds >= LONGEST) stop();
  }, 200);
  action.onclick = stop;
  closed.then(stop);
  await stopped;
  clearInterval(timer);
  const blob = new Blob(pieces, { type: recorder.mimeType });
  if (modality === "audio") return new File([await wave(blob)], "recording.wav", { type: "audio/wav" });
  // Some browsers record WebM, others MP4.
  const ending = recorder.mimeType.includes("mp4") ? "mp4" : "webm";
  return new File([blob], `recording.${ending}`, { type: recorder.mimeType.split(";")[0] });
}

/** Convert a recording to a WAV file of one channel, which every server reads. */
async function wave(blob) {
  const context = new AudioContext();
  const decoded = await context.decodeAudioData(await blob.arrayBuffer());
  await context.close();
  const offline = new OfflineAudioContext(1, Math.max(1, Math.round(decoded.duration * RATE)), RATE);
  const source = offline.createBufferSource();
  source.buffer = decoded;
  source.connect(offline.destination);
  source.start();
  const samples = (await offline.startRendering()).getChannelData(0);
  const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const write = (offset, text) => [...text].forEach((letter, i) => view.setUint8(offset + i, letter.charCodeAt(0)));
  write(0, "RIFF");
  view.setUint32(4, 36 + 2 * samples.length, true);
  write(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  // Uncompressed, one channel, 16 bits.
  view.setUint16(20, 1, true);
  view.setUint16(22, 1, true);
  view.setUint32(24, RATE, true);
  view.setUint32(28, 2 * RATE, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  write(36, "data");
  view.setUint32(40, 2 * samples.length, true);
  samples.forEach((sample, i) => view.setInt16(44 + 2 * i, Math.max(-1, Math.min(1, sample)) * 32767, true));
  return view.buffer;
}

function time(seconds) {
  const shown = (value) => `${Math.floor(value / 60)}:${String(Math.floor(value % 60)).padStart(2, "0")}`;
  return `${shown(seconds)} / ${shown(LONGEST)}`;
}
