// The picked file as a picture, with the heat map over it.

import { useEffect, useId, useRef, useState } from "react";

import type { HeatMap } from "./api";
import { type Colour, type Grey, isDicom, readDicom, through, type Window } from "./dicom";

// Pixels of the longer side on the screen; a radiograph has ten times as many.
const SIDE = 640;

type Picture = Grey | Colour;
type State = Picture | "reading" | "none";

async function read(file: File): Promise<State> {
  try {
    const bytes = new Uint8Array(await file.arrayBuffer());
    if (isDicom(bytes)) return (await readDicom(bytes)) ?? "none";
    return { kind: "bitmap", bitmap: await createImageBitmap(file) };
  } catch {
    return "none";
  }
}

export function Preview({ file, name, heatmap }: { file: File | null; name: string; heatmap: HeatMap | null }) {
  const [picture, setPicture] = useState<State>(file ? "reading" : "none");
  const [window, setWindow] = useState<Window | null>(null);
  const [opacity, setOpacity] = useState(0.6);
  const canvas = useRef<HTMLCanvasElement>(null);

  useEffect(() => {
    if (!file) return;
    let current = true;
    void read(file).then((found) => {
      if (!current) return;
      setPicture(found);
      if (typeof found === "object" && found.kind === "grey") setWindow(found.window);
    });
    return () => {
      current = false;
    };
  }, [file]);

  useEffect(() => {
    if (typeof picture === "object" && canvas.current) draw(canvas.current, picture, window);
  }, [picture, window]);

  if (typeof picture === "string") {
    const words = {
      reading: "Reading the file…",
      none: file
        ? "No preview of this file here. The model reads it by itself."
        : "The image itself is not kept; pick it again to see it.",
    };
    return <p className="no-preview">{words[picture]}</p>;
  }
  return (
    <div className="preview">
      <div className="frame">
        <div className="layers">
          <canvas ref={canvas} role="img" aria-label={`Preview of ${name}`} />
          {heatmap && <Map heatmap={heatmap} opacity={opacity} />}
        </div>
      </div>
      {heatmap && (
        <Slider label="Heat map" low={0} high={1} step={0.05} value={opacity} show={(v) => `${Math.round(100 * v)} %`} change={setOpacity} />
      )}
      {picture.kind === "grey" && window && (
        <details>
          <summary>Window and level</summary>
          <Slider label="Level" low={picture.low} high={picture.high} step={1} value={window.center} show={whole} change={(center) => setWindow({ ...window, center })} />
          <Slider label="Window" low={1} high={Math.max(2, 2 * (picture.high - picture.low))} step={1} value={window.width} show={whole} change={(width) => setWindow({ ...window, width })} />
          <button type="button" className="quiet" onClick={() => setWindow(picture.window)}>
            As the file says
          </button>
          <p className="note">This changes what you see, not what the model sees.</p>
        </details>
      )}
    </div>
  );
}

const whole = (value: number): string => String(Math.round(value));

function draw(canvas: HTMLCanvasElement, picture: Picture, window: Window | null) {
  const source = picture.kind === "grey" ? rendered(picture, window ?? picture.window) : picture.bitmap;
  const scale = SIDE / Math.max(source.width, source.height);
  canvas.width = Math.max(1, Math.round(source.width * scale));
  canvas.height = Math.max(1, Math.round(source.height * scale));
  canvas.getContext("2d")!.drawImage(source, 0, 0, canvas.width, canvas.height);
}

function rendered(picture: Grey, window: Window): HTMLCanvasElement {
  const canvas = document.createElement("canvas");
  canvas.width = picture.width;
  canvas.height = picture.height;
  canvas.getContext("2d")!.putImageData(through(picture, window), 0, 0);
  return canvas;
}

/** Evidence for the class in orange, against it in blue; nothing where the model does not look. */
function Map({ heatmap, opacity }: { heatmap: HeatMap; opacity: number }) {
  const [picture, setPicture] = useState<string>();
  useEffect(() => {
    const bytes = Uint8Array.from(atob(heatmap.png), (letter) => letter.charCodeAt(0));
    const address = URL.createObjectURL(new Blob([bytes], { type: "image/png" }));
    setPicture(address);
    return () => URL.revokeObjectURL(address);
  }, [heatmap]);
  return (
    <img
      src={picture}
      className="map"
      style={{ opacity }}
      alt={`Heat map: orange speaks for ${heatmap.label}, blue against it`}
    />
  );
}

function Slider(props: {
  label: string;
  low: number;
  high: number;
  step: number;
  value: number;
  show: (value: number) => string;
  change: (value: number) => void;
}) {
  const id = useId();
  return (
    <p className="slider">
      <label htmlFor={id}>{props.label}</label>
      <input
        id={id}
        type="range"
        min={props.low}
        max={props.high}
        step={props.step}
        value={props.value}
        aria-valuetext={props.show(props.value)}
        onChange={(event) => props.change(Number(event.target.value))}
      />
      <output htmlFor={id}>{props.show(props.value)}</output>
    </p>
  );
}
