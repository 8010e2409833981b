import { type DragEvent, type FormEvent, useCallback, useEffect, useId, useRef, useState } from "react";

import {
  cancel, finished, type Job, keyStore, type Model, models, PortalError, predict, results, submit, watch,
} from "./api";
import { Card } from "./Card";
import { ModelCard } from "./ModelCard";
import { BATCH_FROM, type Item, openJobs, useItems } from "./session";
import { csv, percent, summary } from "./words";

type View = "images" | "history" | "model";
const VIEWS: Record<View, string> = { images: "Images", history: "History", model: "Model card" };
// Requests at once; the browser holds no more than a handful of connections.
const AT_ONCE = 2;
// While the model is away, it is looked for this often.
const LOOK_MS = 3000;

const why = (error: unknown) => (error instanceof PortalError ? error.message : "The page has failed.");

export function App() {
  const { items, dispatch } = useItems();
  const [view, setView] = useState<View>("images");
  const [model, setModel] = useState<Model | null>(null);
  const [notice, setNotice] = useState("");
  const [asksKey, setAsksKey] = useState<string | null>(null);
  const [jobs, setJobs] = useState<Record<string, Job>>({});
  const [compared, setCompared] = useState<string[]>([]);
  const [asked, setAsked] = useState(0);
  const running = useRef(new Set<string>());
  const followed = useRef(new Map<string, AbortController>());
  const main = useRef<HTMLElement>(null);

  const onTrouble = useCallback((error: unknown) => {
    if (error instanceof PortalError && error.needsKey) {
      setAsksKey(keyStore.get() ? error.message : "This portal needs a key.");
    } else if (error instanceof PortalError) setNotice(error.message);
    else setNotice("Something went wrong on this page. Reload it.");
  }, []);

  const look = useCallback(async () => {
    try {
      const [found] = await models();
      setModel(found ?? null);
      setNotice(found && !found.ready ? "The model is not ready at the moment." : "");
      return found?.ready ?? false;
    } catch (error) {
      onTrouble(error);
      return error instanceof PortalError && error.needsKey;
    }
  }, [onTrouble]);

  // Look for the model, and go on looking while it is away.
  useEffect(() => {
    let timer: number | undefined;
    let over = false;
    const again = async () => {
      const found = await look();
      if (!over && !found) timer = window.setTimeout(() => void again(), LOOK_MS);
    };
    void again();
    return () => {
      over = true;
      window.clearTimeout(timer);
    };
  }, [look]);

  const follow = useCallback(
    async (id: string) => {
      // After a new key a job may still be followed with the old one.
      followed.current.get(id)?.abort();
      const ending = new AbortController();
      followed.current.set(id, ending);
      try {
        let seen = -1;
        await watch(
          id,
          async (job) => {
            setJobs((before) => ({ ...before, [id]: job }));
            const known = job.answered + job.refused + job.failed;
            if (known === seen) return;
            dispatch({ type: "results", job: id, results: await results(id, ending.signal) });
            seen = known;
          },
          ending.signal,
        );
        if (ending.signal.aborted) return;
        dispatch({ type: "settle", job: id, trouble: "The batch was cancelled before this image." });
        openJobs.remove(id);
      } catch (error) {
        if (error instanceof PortalError && error.status === 404) {
          openJobs.remove(id);
          dispatch({ type: "settle", job: id, trouble: "The batch is gone from the portal, or another key sent it." });
        } else {
          dispatch({ type: "settle", job: id, trouble: why(error) });
          onTrouble(error);
        }
      }
    },
    [dispatch, onTrouble],
  );

  // Batches that ran when the page was left are taken up again.
  useEffect(() => {
    const following = followed.current;
    for (const id of openJobs.get()) void follow(id);
    return () => following.forEach((ending) => ending.abort());
  }, [follow]);

  const ask = useCallback(
    async (item: Item) => {
      dispatch({ type: "change", ids: [item.id], change: { state: "asking", trouble: "" } });
      try {
        const result = await predict(item.file!);
        dispatch({ type: "change", ids: [item.id], change: { state: "answered", result } });
        setNotice("");
      } catch (error) {
        dispatch({ type: "change", ids: [item.id], change: { state: "broken", trouble: why(error) } });
        onTrouble(error);
      }
    },
    [dispatch, onTrouble],
  );

  // A few at a time and the first ones first, so that the first answers are there early.
  useEffect(() => {
    const waiting = items
      .filter((item) => item.state === "waiting" && !item.job && !running.current.has(item.id))
      .sort((a, b) => a.time.localeCompare(b.time) || a.index - b.index);
    for (const item of waiting.slice(0, AT_ONCE - running.current.size)) {
      running.current.add(item.id);
      void ask(item).finally(() => {
        running.current.delete(item.id);
        setAsked((count) => count + 1);
      });
    }
  }, [items, ask, asked]);

  async function pick(files: readonly File[]) {
    if (files.length === 0) return;
    const time = new Date().toISOString();
    const added = files.map((file, index): Item => ({
      id: crypto.randomUUID(), name: file.name, time, file, state: "waiting", result: null, trouble: "",
      job: files.length >= BATCH_FROM ? "sending" : null, index,
    }));
    dispatch({ type: "add", items: added });
    if (files.length < BATCH_FROM) return;
    const ids = added.map((item) => item.id);
    try {
      const job = await submit(files);
      openJobs.add(job.id);
      setJobs((before) => ({ ...before, [job.id]: job }));
      dispatch({ type: "change", ids, change: { job: job.id, state: "asking" } });
      await follow(job.id);
    } catch (error) {
      dispatch({ type: "change", ids, change: { job: null, state: "broken", trouble: why(error) } });
      onTrouble(error);
    }
  }

  function compare(id: string) {
    setCompared((before) =>
      before.includes(id) ? before.filter((one) => one !== id) : [...before, id].slice(-2),
    );
  }

  function show(next: View) {
    setView(next);
    main.current?.focus();
    window.scrollTo(0, 0);
  }

  const answers = items.filter((item) => item.result);
  const pair = compared.map((id) => items.find((item) => item.id === id)).filter((item) => item !== undefined);
  const card = (item: Item) => (
    <Card
      key={item.id}
      item={item}
      explains={model?.explains ?? false}
      compared={compared.includes(item.id)}
      onCompare={compare}
      onRemove={(id) => dispatch({ type: "remove", id })}
      onRetry={(one) => dispatch({ type: "change", ids: [one.id], change: { state: "waiting", job: null } })}
      onTrouble={onTrouble}
    />
  );

  return (
    <>
      <a className="skip" href="#main">
        Skip to the content
      </a>
      <header className="top">
        <p className="banner">
          <strong>Research use only.</strong> Not a medical device: do not diagnose or treat anyone by it.
        </p>
        <div className="title">
          <h1>Chest X-ray portal</h1>
          <Theme />
          <button type="button" className="quiet" onClick={() => setAsksKey("")}>
            Key
          </button>
        </div>
        <nav aria-label="Views">
          {(Object.keys(VIEWS) as View[]).map((name) => (
            <button
              key={name}
              type="button"
              aria-current={view === name ? "page" : undefined}
              onClick={() => show(name)}
            >
              {VIEWS[name]}
            </button>
          ))}
        </nav>
      </header>
      <main id="main" ref={main} tabIndex={-1}>
        <div role="alert">{notice && <p className="verdict refused">{notice}</p>}</div>
        {view === "images" && (
          <>
            <h2>Images</h2>
            <DropZone onFiles={(files) => void pick(files)} />
            {Object.values(jobs).map((job) => (
              <Batch key={job.id} job={job} onTrouble={onTrouble} />
            ))}
            {compared.length > 0 && (
              <section className="compare" aria-labelledby="compare">
                <h2 id="compare">Side by side</h2>
                {pair.length < 2 ? <p>Choose a second image to compare with.</p> : null}
                <div className="pair">{pair.map(card)}</div>
              </section>
            )}
            <div className="cards">{items.filter((item) => !compared.includes(item.id)).map(card)}</div>
          </>
        )}
        {view === "history" && (
          <History
            items={answers}
            onClear={() => {
              dispatch({ type: "clear" });
              setCompared([]);
            }}
          />
        )}
        {view === "model" && (model ? <ModelCard model={model} /> : <p>The model is not there at the moment.</p>)}
      </main>
      {asksKey !== null && (
        <KeyDialog
          reason={asksKey}
          onClose={() => setAsksKey(null)}
          onKey={(key) => {
            keyStore.set(key);
            setAsksKey(null);
            setNotice("");
            void look();
            for (const item of items) {
              if (item.state !== "broken") continue;
              if (openJobs.has(item.job)) {
                dispatch({ type: "change", ids: [item.id], change: { state: "asking", trouble: "" } });
              } else if (item.file) {
                dispatch({ type: "change", ids: [item.id], change: { state: "waiting", job: null } });
              }
            }
            for (const id of openJobs.get()) void follow(id);
          }}
        />
      )}
    </>
  );
}

function DropZone({ onFiles }: { onFiles: (files: File[]) => void }) {
  const [over, setOver] = useState(false);
  const input = useRef<HTMLInputElement>(null);

  function drop(event: DragEvent) {
    event.preventDefault();
    setOver(false);
    onFiles([...event.dataTransfer.files]);
  }

  return (
    <div
      className={over ? "drop over" : "drop"}
      onDragOver={(event) => {
        event.preventDefault();
        setOver(true);
      }}
      onDragLeave={() => setOver(false)}
      onDrop={drop}
    >
      <p>Drop frontal chest radiographs here: JPEG, PNG, TIFF or DICOM, one or many.</p>
      <button type="button" className="primary" onClick={() => input.current?.click()}>
        Choose files
      </button>
      <input
        ref={input}
        type="file"
        multiple
        hidden
        aria-label="Files"
        onChange={(event) => {
          onFiles([...(event.target.files ?? [])]);
          event.target.value = "";
        }}
      />
      <p className="note">
        Images go to this portal only, and are not kept once they have an answer. File names stay in this
        browser tab.
      </p>
    </div>
  );
}

function Batch({ job, onTrouble }: { job: Job; onTrouble: (error: unknown) => void }) {
  const known = job.answered + job.refused + job.failed;
  const words = { queued: "waits", running: "is being answered", done: "is done", cancelled: "was cancelled" };
  const id = useId();
  return (
    <section className="batch" aria-labelledby={id}>
      <h3 id={id}>
        Batch of {job.total} images {words[job.state]}
      </h3>
      <progress aria-labelledby={id} max={job.total} value={known} />
      <p role="status">
        {known} of {job.total}: {job.answered} answered, {job.refused} refused
        {job.failed ? `, ${job.failed} failed` : ""}
        {job.cancelled ? `, ${job.cancelled} not asked about` : ""}.
      </p>
      {!finished(job) && (
        <button type="button" onClick={() => void cancel(job.id).catch(onTrouble)}>
          Cancel
        </button>
      )}
    </section>
  );
}

function History({ items, onClear }: { items: Item[]; onClear: () => void }) {
  function save() {
    const rows = items.map((item) => ({ name: item.name, time: item.time, result: item.result! }));
    const url = URL.createObjectURL(new Blob([csv(rows)], { type: "text/csv" }));
    const link = document.createElement("a");
    link.href = url;
    link.download = "chest-x-ray-answers.csv";
    link.click();
    URL.revokeObjectURL(url);
  }

  return (
    <>
      <h2>This session</h2>
      <p>Answers since this tab was opened; they are forgotten when it is closed. Research use only.</p>
      {items.length === 0 ? (
        <p>There are none yet.</p>
      ) : (
        <>
          <p className="actions">
            <button type="button" className="primary" onClick={save}>
              Save as CSV
            </button>
            <button type="button" onClick={onClear}>
              Forget all
            </button>
          </p>
          <div className="scroll" tabIndex={0} role="region" aria-label="Answers of this session">
            <table>
              <thead>
                <tr>
                  <th scope="col">File</th>
                  <th scope="col">Answer</th>
                  <th scope="col">Most probable</th>
                  <th scope="col">Time</th>
                </tr>
              </thead>
              <tbody>
                {items.map(({ id, name, time, result }) => (
                  <tr key={id}>
                    <th scope="row">{name}</th>
                    <td>{summary(result!).title}</td>
                    <td>
                      {result!.outcome === "answered"
                        ? `${result!.label}, ${percent(result!.probabilities[result!.label] ?? 0)}`
                        : result!.detail}
                    </td>
                    <td>{new Date(time).toLocaleTimeString()}</td>
                  </tr>
                ))}
              </tbody>
            </table>
          </div>
        </>
      )}
    </>
  );
}

function KeyDialog(props: { reason: string; onClose: () => void; onKey: (key: string) => void }) {
  const dialog = useRef<HTMLDialogElement>(null);
  const [key, setKey] = useState("");
  const title = useId();
  const field = useId();
  useEffect(() => dialog.current?.showModal(), []);

  function send(event: FormEvent) {
    event.preventDefault();
    props.onKey(key.trim());
  }

  return (
    <dialog ref={dialog} aria-labelledby={title} onClose={props.onClose}>
      <form onSubmit={send}>
        <h2 id={title}>API key</h2>
        {props.reason && <p className="verdict refused">{props.reason}</p>}
        <p>Who runs this portal can make you a key. It stays in this browser tab.</p>
        <p>
          <label htmlFor={field}>Key</label>
          <input
            id={field}
            type="password"
            autoComplete="off"
            value={key}
            onChange={(event) => setKey(event.target.value)}
          />
        </p>
        <p className="actions">
          <button type="submit" className="primary">
            Use this key
          </button>
          <button type="button" onClick={props.onClose}>
            Close
          </button>
        </p>
      </form>
    </dialog>
  );
}

const THEMES = ["system", "light", "dark"] as const;

function Theme() {
  const [theme, setTheme] = useState<string>(() => localStorage.getItem("cxr.theme") ?? "system");
  const id = useId();
  useEffect(() => {
    document.documentElement.dataset["theme"] = theme;
    localStorage.setItem("cxr.theme", theme);
  }, [theme]);
  return (
    <span className="theme">
      <label htmlFor={id}>Colours</label>{" "}
      <select id={id} value={theme} onChange={(event) => setTheme(event.target.value)}>
        {THEMES.map((name) => (
          <option key={name}>{name}</option>
        ))}
      </select>
    </span>
  );
}
