// The gateway's API, with the types of its OpenAPI document.

import { EventSourceParserStream } from "eventsource-parser/stream";

import type { components } from "./api-types";

type Schemas = components["schemas"];
export type Answered = Schemas["AnsweredImage"];
export type Refused = Schemas["RefusedImage"];
export type Failed = Schemas["FailedImage"];
export type Result = Answered | Refused | Failed;
export type HeatMap = Schemas["HeatMap"];
export type Job = Schemas["Job"];
export type Model = Schemas["Model"];
export type Figure = Schemas["Figure"];
type Problem = Schemas["Problem"];

const KEY = "cxr.key";
// Between two attempts to watch a job whose stream has broken off.
const RECONNECT_MS = 1000;

export const keyStore = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (key: string) => sessionStorage.setItem(KEY, key),
};

/** Why there is no answer, in a sentence for people. */
export class PortalError extends Error {
  constructor(
    message: string,
    readonly status: number,
    readonly problem?: Problem,
  ) {
    super(message);
  }

  /** Whether a key is missing, or the one that there is no longer counts. */
  get needsKey(): boolean {
    return this.status === 401;
  }
}

async function request(path: string, init: RequestInit = {}): Promise<Response> {
  const headers = new Headers(init.headers);
  const key = keyStore.get();
  if (key) headers.set("Authorization", `Bearer ${key}`);
  let response: Response;
  try {
    response = await fetch(path, { ...init, headers });
  } catch (error) {
    if (init.signal?.aborted) throw error;
    throw new PortalError("The portal cannot be reached. Is it running?", 0);
  }
  if (response.ok) return response;
  let problem: Problem | undefined;
  try {
    problem = (await response.json()) as Problem;
  } catch {
    // Not the gateway's own answer: a proxy's.
  }
  const sentence = problem?.detail ?? `The portal answered ${response.status}.`;
  throw new PortalError(sentence, response.status, problem);
}

function form(files: readonly File[]): FormData {
  const data = new FormData();
  // Names of radiographs often are names of patients: they stay here.
  files.forEach((file, index) => data.append("images", file, String(index)));
  return data;
}

/** Ask about one file. A refusal is an answer, too. */
export async function predict(file: File, explain?: string): Promise<Answered | Refused> {
  const query = explain ? `?explain=${encodeURIComponent(explain)}` : "";
  try {
    const response = await request(`/v1/predictions${query}`, { method: "POST", body: form([file]) });
    const answer = (await response.json()) as Schemas["Predictions"];
    const [image] = answer.images;
    if (!image) throw new PortalError("The portal gave no answer.", response.status);
    return image;
  } catch (error) {
    const refused = error instanceof PortalError ? error.problem?.images?.[0] : undefined;
    if (refused) return refused as Refused;
    throw error;
  }
}

export async function models(): Promise<Model[]> {
  const response = await request("/v1/models");
  return ((await response.json()) as Schemas["Models"]).models;
}

export async function submit(files: readonly File[]): Promise<Job> {
  const headers = { "Idempotency-Key": crypto.randomUUID() };
  const response = await request("/v1/jobs", { method: "POST", body: form(files), headers });
  return (await response.json()) as Job;
}

export async function cancel(id: string): Promise<Job> {
  const response = await request(`/v1/jobs/${id}/cancel`, { method: "POST" });
  return (await response.json()) as Job;
}

export async function results(id: string, signal: AbortSignal): Promise<Result[]> {
  const response = await request(`/v1/jobs/${id}/result`, { signal });
  return ((await response.json()) as Schemas["JobResult"]).images;
}

export const finished = (job: Job): boolean => job.state === "done" || job.state === "cancelled";

/**
 * Tell how a job stands, as it happens, until it has finished. Where the stream breaks or `tell` fails, and that
 * may pass, it is begun again, with how the job stands.
 */
export async function watch(
  id: string,
  tell: (job: Job) => Promise<void>,
  signal: AbortSignal,
): Promise<void> {
  while (!signal.aborted) {
    try {
      const response = await request(`/v1/jobs/${id}/events`, { signal });
      const events = response
        .body!.pipeThrough(new TextDecoderStream())
        .pipeThrough(new EventSourceParserStream())
        .getReader();
      try {
        for (;;) {
          const { done, value } = await events.read();
          if (done) break;
          await tell(JSON.parse(value.data) as Job);
          if (value.event === "end") return;
        }
      } finally {
        // Still open where `tell` has failed, and the browser has few connections.
        void events.cancel().catch(() => undefined);
      }
    } catch (error) {
      if (signal.aborted) return;
      const passing = !(error instanceof PortalError) || error.status === 0 || error.status >= 500;
      if (!passing) throw error;
    }
    await new Promise((resolve) => setTimeout(resolve, RECONNECT_MS));
  }
}
