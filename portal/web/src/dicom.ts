// A preview of a DICOM file, with window and level. The model sees the file itself, not this.

import { type DataSet, parseDicom, readEncapsulatedImageFrame } from "dicom-parser";

const IMPLICIT = "1.2.840.10008.1.2";
const EXPLICIT = "1.2.840.10008.1.2.1";
const JPEG_BASELINE = "1.2.840.10008.1.2.4.50";
const MAX_PIXELS = 100_000_000;

/** A window of grey values: those below it are black, those above it white. */
export interface Window {
  center: number;
  width: number;
}

/** Grey values of a DICOM file. */
export interface Grey {
  kind: "grey";
  width: number;
  height: number;
  values: Float32Array;
  inverted: boolean;
  low: number;
  high: number;
  window: Window;
}

export interface Colour {
  kind: "bitmap";
  bitmap: ImageBitmap;
}

/** Whether the file says that it is DICOM: 128 bytes of anything, and its name. */
export function isDicom(bytes: Uint8Array): boolean {
  return String.fromCharCode(...bytes.subarray(128, 132)) === "DICM";
}

/** Read a file; null where its compression is one that this page cannot unpack. */
export async function readDicom(bytes: Uint8Array): Promise<Grey | Colour | null> {
  const data = parseDicom(bytes);
  const element = data.elements["x7fe00010"];
  const width = data.uint16("x00280011") ?? 0;
  const height = data.uint16("x00280010") ?? 0;
  if (!element || !width || !height || width * height > MAX_PIXELS) return null;
  const syntax = data.string("x00020010") ?? IMPLICIT;
  if (syntax === JPEG_BASELINE) {
    const frame = readEncapsulatedImageFrame(data, element, 0);
    const bitmap = await createImageBitmap(new Blob([new Uint8Array(frame)]));
    return { kind: "bitmap", bitmap };
  }
  if ((syntax !== IMPLICIT && syntax !== EXPLICIT) || data.uint16("x00280002") !== 1) return null;
  const raw = stored(data, bytes, element.dataOffset, width * height);
  return raw && grey(data, raw, width, height);
}

/** The stored values, as the file's bits say. */
function stored(
  data: DataSet,
  bytes: Uint8Array,
  offset: number,
  count: number,
): Uint8Array | Int8Array | Uint16Array | Int16Array | null {
  const bits = data.uint16("x00280100");
  const signed = data.uint16("x00280103") === 1;
  const size = bits === 16 ? 2 : 1;
  if ((bits !== 8 && bits !== 16) || offset + count * size > bytes.length) return null;
  // A copy, because two-byte values must begin at an even place.
  const buffer = bytes.slice(offset, offset + count * size).buffer;
  if (bits === 8) return signed ? new Int8Array(buffer) : new Uint8Array(buffer);
  return signed ? new Int16Array(buffer) : new Uint16Array(buffer);
}

function grey(data: DataSet, raw: ArrayLike<number>, width: number, height: number): Grey {
  const slope = data.floatString("x00281053") ?? 1;
  const intercept = data.floatString("x00281052") ?? 0;
  const values = new Float32Array(raw.length);
  let low = Infinity;
  let high = -Infinity;
  for (let index = 0; index < raw.length; index++) {
    const value = raw[index]! * slope + intercept;
    values[index] = value;
    if (value < low) low = value;
    if (value > high) high = value;
  }
  const whole = { center: (low + high) / 2, width: Math.max(1, high - low) };
  const center = data.floatString("x00281050");
  const span = data.floatString("x00281051");
  return {
    kind: "grey",
    width,
    height,
    values,
    inverted: data.string("x00280004") === "MONOCHROME1",
    low,
    high,
    window: center !== undefined && span ? { center, width: span } : whole,
  };
}

/** The image through a window, 8 bits. */
export function through(image: Grey, window: Window): ImageData {
  const pixels = new ImageData(image.width, image.height);
  const packed = new Uint32Array(pixels.data.buffer);
  const bottom = window.center - window.width / 2;
  const scale = 255 / Math.max(1, window.width);
  for (let index = 0; index < packed.length; index++) {
    let value = (image.values[index]! - bottom) * scale;
    value = value < 0 ? 0 : value > 255 ? 255 : value;
    if (image.inverted) value = 255 - value;
    packed[index] = 0xff000000 | (value << 16) | (value << 8) | value;
  }
  return pixels;
}
