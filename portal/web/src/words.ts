// What an answer means, in plain words.

import type { Answered, Result } from "./api";

export type Tone = "finding" | "none" | "uncertain" | "refused";

export interface Summary {
  tone: Tone;
  title: string;
  text: string;
}

const NO_FINDING = "No finding";

/** A probability; one that is nearly 0 or 1 is not said to be that. */
export function percent(value: number): string {
  if (value > 0 && value < 0.001) return "< 0.1 %";
  if (value < 1 && value > 0.999) return "> 99.9 %";
  return `${(100 * value).toFixed(1)} %`;
}

export const decisionWords: Record<string, string> = {
  positive: "above its threshold",
  negative: "below its threshold",
  uncertain: "not certain",
};

/** The one sentence that stands above everything else. */
export function summary(result: Result): Summary {
  if (result.outcome === "refused") {
    return { tone: "refused", title: "Not analysed", text: result.detail };
  }
  if (result.outcome === "failed") {
    return { tone: "refused", title: "No answer", text: result.detail };
  }
  const names = (decision: string) =>
    Object.keys(result.decisions).filter((label) => result.decisions[label] === decision);
  const positive = names("positive");
  const uncertain = names("uncertain");
  const most = `Most probable: ${result.label}, ${percent(result.probabilities[result.label] ?? 0)}.`;
  // Also where another class has passed its threshold: then the two contradict each other.
  if (!positive.includes(result.label)) {
    const about = uncertain.length ? ` about ${list(uncertain)}` : "";
    return {
      tone: "uncertain",
      title: "The model is not certain",
      text: `It cannot decide${about}. ${most} Do not read this as a result.`,
    };
  }
  const findings = positive.filter((label) => label !== NO_FINDING);
  const also = uncertain.length ? ` It is not certain about ${list(uncertain)}.` : "";
  if (findings.length === 0) {
    const text = `The model finds nothing that it was trained to find. ${most}${also}`;
    return { tone: "none", title: NO_FINDING, text };
  }
  return {
    tone: "finding",
    title: `Signs of ${list(findings)}`,
    text: `${most}${also}`,
  };
}

/** What is wrong with an image that was answered all the same; empty where nothing is. */
export function faults(result: Result): string[] {
  return result.outcome === "answered" ? (result.quality?.reasons ?? []).map((one) => one.text) : [];
}

function list(words: readonly string[]): string {
  return words.length < 2 ? (words[0] ?? "") : `${words.slice(0, -1).join(", ")} and ${words.at(-1)}`;
}

/** The rows of the session as a table; a spreadsheet must not take a name for a formula. */
export function csv(rows: readonly { name: string; time: string; result: Result }[]): string {
  const answered = rows.map((row) => row.result).filter((result): result is Answered => result.outcome === "answered");
  const labels = Object.keys(answered[0]?.probabilities ?? {});
  const head = [
    "file", "time", "outcome", "label", ...labels.map((label) => `p(${label})`),
    ...labels.map((label) => `decision(${label})`), "quality", "detail", "model_version",
  ];
  const lines = rows.map(({ name, time, result }) =>
    result.outcome === "answered"
      ? [
          name, time, result.outcome, result.label,
          ...labels.map((label) => String(result.probabilities[label] ?? "")),
          ...labels.map((label) => result.decisions[label] ?? ""),
          (result.quality?.reasons ?? []).map((one) => one.reason).join(" "), "", result.model_version,
        ]
      : [name, time, result.outcome, "", ...labels.flatMap(() => ["", ""]), "", result.detail, ""],
  );
  return [head, ...lines].map((cells) => cells.map(cell).join(",")).join("\r\n");
}

function cell(text: string): string {
  const safe = /^[=+\-@\t\r]/.test(text) ? `'${text}` : text;
  return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}
