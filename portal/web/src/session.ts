// What this browser tab remembers until it is closed: answers and names, never images.

import { useEffect, useReducer, useRef } from "react";

import type { Result } from "./api";

const STORE = "cxr.session";
// Asked about one by one up to here; more become a job.
export const BATCH_FROM = 9;

export interface Item {
  id: string;
  name: string;
  time: string;
  // Not there after a reload: a page cannot keep files.
  file: File | null;
  state: "waiting" | "asking" | "answered" | "broken";
  result: Result | null;
  // Why there is no answer yet.
  trouble: string;
  job: string | null;
  index: number;
}

export type Action =
  | { type: "add"; items: Item[] }
  | { type: "change"; ids: readonly string[]; change: Partial<Item> }
  | { type: "results"; job: string; results: readonly Result[] }
  | { type: "settle"; job: string; trouble: string }
  | { type: "remove"; id: string }
  | { type: "clear" };

export function reduce(items: Item[], action: Action): Item[] {
  switch (action.type) {
    case "add":
      return [...action.items, ...items];
    case "change":
      return items.map((item) => (action.ids.includes(item.id) ? { ...item, ...action.change } : item));
    case "results": {
      const found = new Map(action.results.map((result) => [result.index, result]));
      return items.map((item) => {
        const result = item.job === action.job && !item.result ? found.get(item.index) : undefined;
        return result ? { ...item, result, state: "answered" } : item;
      });
    }
    case "settle":
      return items.map((item) =>
        item.job === action.job && !item.result
          ? { ...item, state: "broken", trouble: action.trouble }
          : item,
      );
    case "remove":
      return items.filter((item) => item.id !== action.id);
    case "clear":
      return [];
  }
}

// Of images that were still being sent, for the most part: their files have gone with the page.
const LOST = "The page was reloaded before it could keep an answer. Choose the file again.";

function restored(): Item[] {
  try {
    const kept = JSON.parse(sessionStorage.getItem(STORE) ?? "[]") as Item[];
    return kept
      .filter((item) => item.result || item.job)
      .map((item): Item => {
        if (item.result) return { ...item, file: null, state: "answered" };
        if (openJobs.has(item.job)) return { ...item, file: null, state: "asking", trouble: "" };
        return { ...item, file: null, state: "broken", trouble: item.trouble || LOST };
      });
  } catch {
    return [];
  }
}

/** The images of this session, the newest first. */
export function useItems() {
  const [items, dispatch] = useReducer(reduce, undefined, restored);
  const first = useRef(true);
  useEffect(() => {
    if (first.current) {
      first.current = false;
      return;
    }
    const kept = items.map((item) => ({ ...item, file: null, result: slim(item.result) }));
    try {
      sessionStorage.setItem(STORE, JSON.stringify(kept));
    } catch {
      // The browser's room for it is used up: the page goes on, and a reload forgets more.
    }
  }, [items]);
  return { items, dispatch };
}

/** Without the heat map, which is large and easily asked for again. */
function slim(result: Result | null): Result | null {
  return result?.outcome === "answered" ? { ...result, heatmap: null } : result;
}

const JOBS = "cxr.jobs";

/** Jobs that this tab has submitted and that may still run. */
export const openJobs = {
  get: (): string[] => JSON.parse(sessionStorage.getItem(JOBS) ?? "[]") as string[],
  has: (id: string | null): boolean => id !== null && openJobs.get().includes(id),
  add: (id: string) => sessionStorage.setItem(JOBS, JSON.stringify([...openJobs.get(), id])),
  remove: (id: string) =>
    sessionStorage.setItem(JOBS, JSON.stringify(openJobs.get().filter((one) => one !== id))),
};
