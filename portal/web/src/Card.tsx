// One image and what is known of it.

import { useId, useState } from "react";

import { type Answered, type HeatMap, PortalError, predict } from "./api";
import { Preview } from "./Preview";
import type { Item } from "./session";
import { decisionWords, faults, percent, summary } from "./words";

export interface CardProps {
  item: Item;
  explains: boolean;
  compared: boolean;
  onCompare: (id: string) => void;
  onRemove: (id: string) => void;
  onRetry: (item: Item) => void;
  onTrouble: (error: unknown) => void;
}

export function Card({ item, explains, compared, onCompare, onRemove, onRetry, onTrouble }: CardProps) {
  const [heatmap, setHeatmap] = useState<HeatMap | null>(null);
  const heading = useId();
  const said = item.result && summary(item.result);
  return (
    <article className="card" aria-labelledby={heading}>
      <header>
        <h3 id={heading}>{item.name}</h3>
        <button type="button" className="quiet" onClick={() => onRemove(item.id)} aria-label={`Remove ${item.name}`}>
          ✕
        </button>
      </header>
      <Preview file={item.file} name={item.name} heatmap={heatmap} />
      <div role="status">
        {item.state === "waiting" && <p className="note">Waits for its turn.</p>}
        {item.state === "asking" && (
          <p className="note busy">
            <span className="spinner" aria-hidden="true" /> Asking the model…
          </p>
        )}
        {item.state === "broken" && (
          <div className="verdict refused">
            <h4>No answer</h4>
            <p>{item.trouble}</p>
            {item.file && (
              <button type="button" onClick={() => onRetry(item)}>
                Try again
              </button>
            )}
          </div>
        )}
        {said && (
          <div className={`verdict ${said.tone}`}>
            <h4>{said.title}</h4>
            <p>{said.text}</p>
          </div>
        )}
        {item.result && faults(item.result).length > 0 && (
          <div className="verdict refused">
            <h4>Doubtful image</h4>
            <p>The answer may mean nothing: {faults(item.result).join("; ")}.</p>
          </div>
        )}
      </div>
      {item.result?.outcome === "answered" && (
        <>
          <Bars result={item.result} />
          <p className="actions">
            <label className="check">
              <input type="checkbox" checked={compared} onChange={() => onCompare(item.id)} />
              Compare
            </label>
            {explains && item.file && (
              <Explain item={item} result={item.result} shown={heatmap} onMap={setHeatmap} onTrouble={onTrouble} />
            )}
          </p>
          <p className="note">Model version {item.result.model_version}. Research use only.</p>
        </>
      )}
    </article>
  );
}

/** A row for each class: its name, a bar, its probability, and what that means. */
function Bars({ result }: { result: Answered }) {
  return (
    <table className="bars">
      <caption className="hidden">Probability of each class</caption>
      <thead className="hidden">
        <tr>
          <th scope="col">Class</th>
          <th scope="col">Probability</th>
          <th scope="col">Meaning</th>
        </tr>
      </thead>
      <tbody>
        {Object.entries(result.probabilities).map(([label, probability]) => {
          const decision = result.decisions[label] ?? "negative";
          return (
            <tr key={label} className={decision}>
              <th scope="row">{label}</th>
              <td className="measure">
                <span className="bar" aria-hidden="true">
                  <span style={{ width: `${100 * probability}%` }} />
                </span>
                {percent(probability)}
              </td>
              <td>{decisionWords[decision]}</td>
            </tr>
          );
        })}
      </tbody>
    </table>
  );
}

function Explain(props: {
  item: Item;
  result: Answered;
  shown: HeatMap | null;
  onMap: (map: HeatMap | null) => void;
  onTrouble: (error: unknown) => void;
}) {
  const [label, setLabel] = useState(props.result.label);
  const [busy, setBusy] = useState(false);
  const [words, setWords] = useState("");
  const id = useId();

  async function show(wanted: string) {
    setBusy(true);
    setWords("");
    try {
      const answer = await predict(props.item.file!, wanted);
      if (answer.outcome === "answered") props.onMap(answer.heatmap ?? null);
      else setWords(answer.detail);
    } catch (error) {
      if (error instanceof PortalError) setWords(error.message);
      props.onTrouble(error);
    } finally {
      setBusy(false);
    }
  }

  return (
    <>
      <button
        type="button"
        disabled={busy}
        onClick={() => (props.shown ? props.onMap(null) : void show(label))}
      >
        {busy ? "Drawing…" : props.shown ? "Hide heat map" : "Show heat map"}
      </button>
      {props.shown && (
        <span className="class">
          <label htmlFor={id}>of</label>{" "}
          <select
            id={id}
            value={label}
            onChange={(event) => {
              setLabel(event.target.value);
              void show(event.target.value);
            }}
          >
            {Object.keys(props.result.probabilities).map((one) => (
              <option key={one}>{one}</option>
            ))}
          </select>
        </span>
      )}
      {props.shown && (
        <span className="note legend">
          Orange speaks for {props.shown.label}, blue against it. It shows where the model looks, not
          where a disease is.
        </span>
      )}
      {words && <span role="alert">{words}</span>}
    </>
  );
}
