// Drawings of media that a browser cannot show: point clouds, maps of numbers, and signals over time.

const MOST_POINTS = 20000;
// From low to high: blue, green, yellow.
const SCALE = [[48, 71, 158], [33, 145, 140], [94, 201, 98], [250, 220, 60]];

/** Draw a point cloud that turns by dragging and by the arrow keys. */
export function drawPoints(canvas, { xyz, rgb }) {
  const count = xyz.length / 3;
  const step = Math.ceil(count / MOST_POINTS);
  const low = [Infinity, Infinity, Infinity];
  const high = [-Infinity, -Infinity, -Infinity];
  xyz.forEach((value, i) => {
    low[i % 3] = Math.min(low[i % 3], value);
    high[i % 3] = Math.max(high[i % 3], value);
  });
  const center = low.map((value, axis) => (value + high[axis]) / 2);
  let reach = 0;
  for (let i = 0; i < xyz.length; i += 3) {
    reach = Math.max(reach, Math.hypot(xyz[i] - center[0], xyz[i + 1] - center[1], xyz[i + 2] - center[2]));
  }
  reach ||= 1;
  const color = rgb
    ? (i) => `rgb(${rgb[3 * i]} ${rgb[3 * i + 1]} ${rgb[3 * i + 2]})`
    : (i) => shade((xyz[3 * i + 1] - low[1]) / (high[1] - low[1] || 1));
  let [turn, tilt] = [0.6, -0.35];

  const draw = () => {
    const { context, width, height } = prepared(canvas);
    const scale = (Math.min(width, height) / 2.1) / reach;
    const size = Math.max(1, Math.min(width, height) / 140);
    const [c, s, ct, st] = [Math.cos(turn), Math.sin(turn), Math.cos(tilt), Math.sin(tilt)];
    for (let i = 0; i < count; i += step) {
      const [x, y, z] = [0, 1, 2].map((axis) => xyz[3 * i + axis] - center[axis]);
      // Around the upright axis, then toward the viewer.
      const depth = z * c - x * s;
      context.fillStyle = color(i);
      context.fillRect(width / 2 + (x * c + z * s) * scale, height / 2 - (y * ct + depth * st) * scale, size, size);
    }
  };
  const rotate = (x, y) => {
    turn += x;
    tilt = Math.max(-1.57, Math.min(1.57, tilt + y));
    requestAnimationFrame(draw);
  };
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `Point cloud of ${count.toLocaleString("en")} points; the arrow keys turn it`);
  canvas.addEventListener("pointerdown", (event) => canvas.setPointerCapture(event.pointerId));
  canvas.addEventListener("pointermove", (event) => {
    if (canvas.hasPointerCapture(event.pointerId)) rotate(event.movementX / 90, -event.movementY / 90);
  });
  canvas.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: [-0.15, 0], ArrowRight: [0.15, 0], ArrowUp: [0, 0.15], ArrowDown: [0, -0.15] };
    if (!moves[event.key]) return;
    event.preventDefault();
    rotate(...moves[event.key]);
  });
  whenShown(canvas, draw);
}

/** Draw a map of numbers from low (blue) to high (yellow); numbers that are not finite stay clear. */
export function drawMap(canvas, { width, height, values }, label) {
  const finite = Array.from(values).filter(Number.isFinite).sort((a, b) => a - b);
  // A few outliers must not hide the rest.
  const [low, high] = [0.01, 0.99].map((share) => finite[Math.floor(share * (finite.length - 1))]);
  const image = new ImageData(width, height);
  values.forEach((value, i) => {
    if (!Number.isFinite(value)) return;
    image.data.set([...mix((value - low) / (high - low || 1)), 255], 4 * i);
  });
  canvas.width = width;
  canvas.height = height;
  canvas.getContext("2d").putImageData(image, 0, 0);
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", label);
}

/** Draw signals over time, each in a color and a range of its own. */
export function drawSignals(canvas, signals) {
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${signals.length} signals of ${signals[0].length.toLocaleString("en")} readings`);
  whenShown(canvas, () => {
    const { context, width, height } = prepared(canvas);
    signals.forEach((signal, number) => {
      const [low, high] = signal.reduce(([a, b], value) => [Math.min(a, value), Math.max(b, value)], [Infinity, -Infinity]);
      const band = height / signals.length;
      // At most two readings for each pixel.
      const step = Math.max(1, Math.floor(signal.length / (2 * width)));
      context.strokeStyle = shade(number / Math.max(1, signals.length - 1));
      context.lineWidth = Math.max(1, width / 300);
      context.beginPath();
      for (let t = 0; t < signal.length; t += step) {
        const level = (signal[t] - low) / (high - low || 1);
        context.lineTo((t / Math.max(1, signal.length - 1)) * width, (number + 0.9 - 0.8 * level) * band);
      }
      context.stroke();
    });
  });
}

/** Return the numbers of a decoded image: its brightness, for depth and thermal files. */
export function mapOfImage(image) {
  const scale = Math.min(1, 512 / Math.max(image.naturalWidth, image.naturalHeight));
  const width = Math.max(1, Math.round(image.naturalWidth * scale));
  const height = Math.max(1, Math.round(image.naturalHeight * scale));
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0, width, height);
  const { data } = context.getImageData(0, 0, width, height);
  const values = Float64Array.from({ length: width * height }, (_, i) => data[4 * i] + data[4 * i + 1] + data[4 * i + 2]);
  return { width, height, values };
}

function mix(level) {
  const place = Math.max(0, Math.min(1, level)) * (SCALE.length - 1);
  const first = Math.min(SCALE.length - 2, Math.floor(place));
  return SCALE[first].map((value, i) => Math.round(value + (SCALE[first + 1][i] - value) * (place - first)));
}

function shade(level) {
  return `rgb(${mix(level).join(" ")})`;
}

/** Fit a canvas to its place on the screen, and clear it. */
function prepared(canvas) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = canvas.clientWidth * ratio;
  canvas.height = canvas.clientHeight * ratio;
  return { context: canvas.getContext("2d"), width: canvas.width, height: canvas.height };
}

/** Draw now or when the canvas enters the page, and again when its size changes. */
function whenShown(canvas, draw) {
  new ResizeObserver(() => canvas.clientWidth && draw()).observe(canvas);
}
