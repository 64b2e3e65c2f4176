// Files of numbers (NPY, PLY, PCD, OBJ, tables of text) become points, maps or signals for a preview. The server reads
// the files again by its own rules; a preview only shows people which file they chose.

export class FormatError extends Error {}

/** Return the points of a file: {xyz: Float32Array [N * 3], rgb: Uint8Array [N * 3] or null}. */
export function readPoints(name, buffer) {
  const text = decode(buffer, 2048);
  if (text.startsWith("ply")) return readPly(buffer);
  if (/^\s*(#.*\s+)*(VERSION|FIELDS)\s/.test(text)) return readPcd(buffer);
  if (isNpy(buffer)) {
    const { shape, values } = readNpy(buffer);
    if (shape.length !== 2 || shape[1] < 3) throw new FormatError(`an array [${shape}] is not a list of points`);
    return points(shape[0], (i, axis) => values[i * shape[1] + axis]);
  }
  const pattern = /\.obj$/i.test(name) ? /^v\s+(.*)$/gm : /^(.*)$/gm;
  const rows = numbers(Array.from(decode(buffer).matchAll(pattern), (match) => match[1]));
  const cloud = rows.filter((row) => row.length >= 3);
  if (!cloud.length) throw new FormatError("no points were found");
  return points(cloud.length, (i, axis) => cloud[i][axis]);
}

/** Return one map of numbers: {width, height, values}. */
export function readMap(buffer) {
  const { shape, values } = readNpy(buffer);
  const [height, width, ...rest] = shape;
  if (!width || rest.some((size) => size !== 1)) throw new FormatError(`an array [${shape}] is not a map`);
  return { width, height, values };
}

/** Return the signals of a file: a list of columns, each a list of numbers. */
export function readSignals(buffer) {
  if (!isNpy(buffer)) {
    const rows = numbers(decode(buffer).split("\n")).filter((row) => row.length > 1);
    if (rows.length < 2) throw new FormatError("no rows of numbers were found");
    return rows[0].map((_, column) => rows.map((row) => row[column]));
  }
  const { shape, values } = readNpy(buffer);
  if (shape.length !== 2) throw new FormatError(`an array [${shape}] is not a signal`);
  const [rows, columns] = shape;
  // The longer axis is time.
  const byRow = rows < columns;
  const length = byRow ? columns : rows;
  return Array.from({ length: byRow ? rows : columns }, (_, signal) =>
    Array.from({ length }, (_, t) => Number(byRow ? values[signal * columns + t] : values[t * columns + signal])),
  );
}

/** Return the shape of an NPY file, or null. */
export function npyShape(buffer) {
  try {
    return isNpy(buffer) ? npyHeader(buffer).shape : null;
  } catch {
    return null;
  }
}

/** Write points as an NPY file [N, 3] of 32-bit floats. */
export function writeNpy(xyz) {
  const head = `{'descr': '<f4', 'fortran_order': False, 'shape': (${xyz.length / 3}, 3), }`;
  // The header ends at a multiple of 64 bytes, with a new line.
  const padded = `${head.padEnd(64 * Math.ceil((head.length + 11) / 64) - 11)}\n`;
  const start = new Uint8Array(10 + padded.length);
  start.set([0x93, 0x4e, 0x55, 0x4d, 0x50, 0x59, 1, 0, padded.length & 255, padded.length >> 8]);
  start.set(new TextEncoder().encode(padded), 10);
  return new Blob([start, xyz], { type: "application/octet-stream" });
}

function decode(buffer, most = buffer.byteLength) {
  return new TextDecoder("latin1").decode(new Uint8Array(buffer, 0, Math.min(most, buffer.byteLength)));
}

/** Return the rows of numbers among lines of text; other lines, such as headers, have none. */
function numbers(lines) {
  const rows = lines.map((line) => line.trim().split(/[\s,;]+/).map(Number));
  return rows.filter((row) => row.every(Number.isFinite));
}

/** Gather points by a function of their number and axis; those that are not finite are skipped. */
function points(count, read, color = null) {
  const xyz = [];
  const rgb = color && [];
  for (let i = 0; i < count; i++) {
    const point = [0, 1, 2].map((axis) => Number(read(i, axis)));
    if (!point.every(Number.isFinite)) continue;
    xyz.push(...point);
    if (color) rgb.push(...color(i));
  }
  if (!xyz.length) throw new FormatError("no points were found");
  return { xyz: Float32Array.from(xyz), rgb: rgb && Uint8Array.from(rgb) };
}

// --- NPY -------------------------------------------------------------------------------------------------------------

function isNpy(buffer) {
  return new Uint8Array(buffer)[0] === 0x93 && decode(buffer, 6).endsWith("NUMPY");
}

function npyHeader(buffer) {
  const view = new DataView(buffer);
  const [size, start] = view.getUint8(6) === 1 ? [view.getUint16(8, true), 10] : [view.getUint32(8, true), 12];
  const head = decode(buffer.slice(start, start + size));
  const [, order, kind, bytes] = head.match(/'descr':\s*'([<>|=])([a-z])(\d)'/) ?? [];
  const shape = head.match(/'shape':\s*\(([^)]*)\)/)?.[1].split(",").filter((part) => part.trim()).map(Number);
  if (!shape || !kind) throw new FormatError("an NPY file of another kind of numbers");
  return { little: order !== ">", type: kind + bytes, shape, offset: start + size, fortran: head.includes("'fortran_order': True") };
}

function readNpy(buffer) {
  const { little, type, shape, offset, fortran } = npyHeader(buffer);
  const reader = NPY_READERS[type];
  if (!reader || fortran) throw new FormatError("an NPY file of another kind of numbers or order");
  const [name, size] = reader;
  const count = shape.reduce((product, length) => product * length, 1);
  if (offset + count * size > buffer.byteLength) throw new FormatError("the file is cut off");
  const view = new DataView(buffer, offset);
  const values = new Float64Array(count);
  for (let i = 0; i < count; i++) {
    values[i] = name === "half" ? half(view.getUint16(i * size, little)) : Number(view[name](i * size, little));
  }
  return { shape, values };
}

const NPY_READERS = {
  f2: ["half", 2], f4: ["getFloat32", 4], f8: ["getFloat64", 8], i1: ["getInt8", 1], u1: ["getUint8", 1],
  b1: ["getUint8", 1], i2: ["getInt16", 2], u2: ["getUint16", 2], i4: ["getInt32", 4], u4: ["getUint32", 4],
  i8: ["getBigInt64", 8], u8: ["getBigUint64", 8],
};

function half(bits) {
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  const size = exponent === 31 ? (fraction ? NaN : Infinity) : exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -24 * fraction;
  return bits >> 15 ? -size : size;
}

// --- PLY -------------------------------------------------------------------------------------------------------------

const PLY_READERS = {
  char: ["getInt8", 1], int8: ["getInt8", 1], uchar: ["getUint8", 1], uint8: ["getUint8", 1],
  short: ["getInt16", 2], int16: ["getInt16", 2], ushort: ["getUint16", 2], uint16: ["getUint16", 2],
  int: ["getInt32", 4], int32: ["getInt32", 4], uint: ["getUint32", 4], uint32: ["getUint32", 4],
  float: ["getFloat32", 4], float32: ["getFloat32", 4], double: ["getFloat64", 8], float64: ["getFloat64", 8],
};

function readPly(buffer) {
  const head = decode(buffer, 1 << 16).match(/^[^]*?\bend_header\r?\n/)?.[0];
  const format = head?.match(/^format\s+(\S+)/m)?.[1];
  const elements = Array.from(head?.matchAll(/^element\s+(\S+)\s+(\d+)[ \t]*((?:\r?\n(?!element|end_header).*)*)/gm) ?? []);
  // Vertices come first in nearly all files; those after lists of other elements have no fixed position.
  const [, name, count, body] = elements[0] ?? [];
  if (!format || name !== "vertex") throw new FormatError("its header has no vertices at the start");
  const fields = Array.from(body.matchAll(/^property\s+(\S+)\s+(\S+)/gm), ([, type, field]) => ({ type, field }));
  if (fields.some(({ type }) => !PLY_READERS[type])) throw new FormatError("its vertices have fields of another type");
  const read = format === "ascii"
    ? textReader(decode(buffer).slice(head.length))
    : binaryReader(new DataView(buffer, head.length), fields.map(({ type }) => PLY_READERS[type]), format.includes("little"));
  return cloud(Number(count), fields.map(({ field }) => field), read);
}

/** Return a reader of the field of a row, in lines of text. */
function textReader(text) {
  const rows = numbers(text.split("\n"));
  return (row, field) => rows[row]?.[field];
}

/** Return a reader of the field of a row, in records of one size. */
function binaryReader(view, readers, little) {
  const offsets = readers.map((_, field) => readers.slice(0, field).reduce((sum, [, size]) => sum + size, 0));
  const stride = offsets.at(-1) + readers.at(-1)[1];
  return (row, field) => view[readers[field][0]](row * stride + offsets[field], little);
}

function cloud(count, fields, read) {
  const axes = ["x", "y", "z"].map((axis) => fields.indexOf(axis));
  if (axes.includes(-1)) throw new FormatError("its points have no x, y and z");
  const colors = ["red", "green", "blue"].map((color) => fields.indexOf(color));
  try {
    const color = colors.includes(-1) ? null : (i) => colors.map((field) => read(i, field));
    return points(count, (i, axis) => read(i, axes[axis]), color);
  } catch (error) {
    throw error instanceof RangeError ? new FormatError("the file is cut off") : error;
  }
}

// --- PCD -------------------------------------------------------------------------------------------------------------

const PCD_READERS = {
  F4: ["getFloat32", 4], F8: ["getFloat64", 8], I1: ["getInt8", 1], U1: ["getUint8", 1], I2: ["getInt16", 2],
  U2: ["getUint16", 2], I4: ["getInt32", 4], U4: ["getUint32", 4], I8: ["getBigInt64", 8], U8: ["getBigUint64", 8],
};

function readPcd(buffer) {
  const head = decode(buffer, 1 << 16).match(/^[^]*?^DATA\s+\S+\s*?\n/m)?.[0];
  const words = (key) => head?.match(new RegExp(`^${key}\\s+(.*?)\\s*$`, "m"))?.[1].split(/\s+/) ?? [];
  const count = Number(words("POINTS")[0] ?? words("WIDTH")[0] * words("HEIGHT")[0]);
  const fields = words("FIELDS");
  const counts = words("COUNT").length ? words("COUNT").map(Number) : fields.map(() => 1);
  // A field may hold several numbers, each of which takes a column.
  const columns = fields.flatMap((field, i) =>
    Array.from({ length: counts[i] }, () => ({ field, reader: PCD_READERS[words("TYPE")[i] + words("SIZE")[i]] })),
  );
  const names = columns.map(({ field }) => field);
  const readers = columns.map(({ reader }) => reader);
  if (!head || !count || readers.includes(undefined)) throw new FormatError("its header is damaged");
  const kind = words("DATA")[0];
  const rest = buffer.slice(head.length);
  if (kind === "ascii") return cloud(count, names, textReader(decode(rest)));
  if (kind === "binary") return cloud(count, names, binaryReader(new DataView(rest), readers, true));
  // Compressed files hold all numbers of a field after each other.
  const view = new DataView(unpackLzf(rest).buffer);
  const starts = readers.map((_, i) => readers.slice(0, i).reduce((sum, [, size]) => sum + size * count, 0));
  return cloud(count, names, (row, i) => view[readers[i][0]](starts[i] + row * readers[i][1], true));
}

/** Decompress LZF: runs of literal bytes, and copies of bytes before. */
function unpackLzf(buffer) {
  const view = new DataView(buffer);
  const packed = new Uint8Array(buffer, 8, view.getUint32(0, true));
  const size = view.getUint32(4, true);
  // A damaged size must not take all memory: LZF shrinks by less than 1:100.
  if (size > packed.length * 100 + 1024) throw new FormatError("its compressed data are damaged");
  const out = new Uint8Array(size);
  let from = 0;
  let to = 0;
  while (from < packed.length) {
    const control = packed[from++];
    if (control < 32) {
      out.set(packed.subarray(from, from + control + 1), to);
      from += control + 1;
      to += control + 1;
    } else {
      const length = (control >> 5 === 7 ? packed[from++] + 7 : control >> 5) + 2;
      const start = to - ((control & 31) << 8) - packed[from++] - 1;
      for (let i = 0; i < length; i++) out[to++] = out[start + i];
    }
  }
  return out;
}
