// A backend for headrace in Node.js: a toy that babbles. It has no tokenizer; its tokens are words.
import { createHash } from "node:crypto";
import { once } from "node:events";
import { setTimeout as sleep } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";

const protos = fileURLToPath(new URL("../../../proto", import.meta.url));
const definition = loadSync("headrace/backend/v1/backend.proto", {
  includeDirs: [protos],
  keepCase: true, // names as in the proto
  longs: Number,
  enums: String,
  arrays: true, // an empty list is a list
  oneofs: true, // `spec.input` names the one that is set
});
const { BackendService } = grpc.loadPackageDefinition(definition).headrace.backend.v1;

const WORDS = "the wheel turns and water runs past mill, race and gate; a naïve café in 東京 hums 🙂".split(" ");
const MILLISECONDS_PER_WORD = 5;

const model = {
  name: "babble",
  context_length: 100_000,
  options: [
    "text",
    "chat.messages.role",
    "chat.messages.content.text",
    "chat.add_generation_prompt",
    "stopping.max_new_tokens",
    "stopping.stop_sequences",
  ],
  determinism_class: "DETERMINISM_CLASS_BIT_EXACT",
};
let loaded = false;

function promptOf(spec) {
  if (spec.input === "text") return spec.text;
  return spec.chat.messages.flatMap((turn) => turn.content.map((part) => part.text)).join("\n");
}

// The word after those so far depends on the prompt and its place: the same request gets the same answer.
function nextWord(prompt, place) {
  const digest = createHash("sha256").update(`${place} ${prompt}`).digest();
  return (place === 0 ? "" : " ") + WORDS[digest.readUInt32BE() % WORDS.length];
}

// Splits a text into what can be shown and what has to wait, because a stop sequence may begin in it.
function split(text, stops) {
  const found = stops.filter((stop) => text.includes(stop)).sort((a, b) => text.indexOf(a) - text.indexOf(b))[0];
  if (found !== undefined) return { shown: text.slice(0, text.indexOf(found)), held: "", found };
  let kept = 0;
  for (const stop of stops)
    for (let length = 1; length < stop.length; length++)
      if (text.endsWith(stop.slice(0, length))) kept = Math.max(kept, length);
  return { shown: text.slice(0, text.length - kept), held: text.slice(text.length - kept) };
}

async function answer(call, signal) {
  const { spec } = call.request;
  const prompt = promptOf(spec);
  const { max_new_tokens: most, stop_sequences: stops } = spec.stopping;
  const usage = { input_tokens: prompt.split(/\s+/).filter(Boolean).length || 1, output_tokens: 0 };
  const send = async (message) => {
    // A reader that is slow makes the writer wait.
    if (!call.write(message)) await once(call, "drain", { signal });
  };
  let pending = "";
  let found;
  while (usage.output_tokens < most && found === undefined) {
    await sleep(MILLISECONDS_PER_WORD, undefined, { signal });
    const parts = split(pending + nextWord(prompt, usage.output_tokens), stops);
    usage.output_tokens += 1;
    pending = parts.held;
    found = parts.found;
    const last = usage.output_tokens === most && found === undefined;
    await send({ usage, delta: { choice_index: 0, text: last ? parts.shown + pending : parts.shown } });
  }
  const reason = found === undefined ? "FINISH_REASON_MAX_TOKENS" : "FINISH_REASON_STOP_SEQUENCE";
  await send({ finish: { choice_index: 0, reason, stop_sequence: found } });
}

async function generate(call) {
  if (!loaded) {
    call.emit("error", { code: grpc.status.FAILED_PRECONDITION, details: "the model is not loaded" });
    return;
  }
  const cancelled = new AbortController();
  call.on("cancelled", () => cancelled.abort());
  try {
    await answer(call, cancelled.signal);
    call.end();
  } catch (error) {
    if (cancelled.signal.aborted) return; // nobody listens any more
    console.error(error);
    call.emit("error", { code: grpc.status.INTERNAL, details: "see the log" });
  }
}

const server = new grpc.Server();
server.addService(BackendService.service, {
  Describe: (call, done) => done(null, { contract_version: { major: 1, minor: 0 }, software: "babble", models: [model] }),
  LoadModel: (call, done) => done(null, ((loaded = true), {})),
  UnloadModel: (call, done) => done(null, ((loaded = false), {})),
  Generate: generate,
});
server.bindAsync(process.env.HEADRACE_BACKEND_ADDRESS, grpc.ServerCredentials.createInsecure(), (error) => {
  if (error) throw error;
});
