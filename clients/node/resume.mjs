// Streams an answer, and goes on where it was when the connection breaks:  node resume.mjs "Count to 20." [address]
import { randomUUID } from "node:crypto";
import grpc from "@grpc/grpc-js";
import { ask, connect } from "./client.mjs";

// The events of a stream. A request with resumeAfterSequence 0 begins one that outlives its connection.
async function* resumable(client, request, maxResumptions = 3) {
  request.spec.requestId = randomUUID();
  let last = 0;
  let tries = 0;
  let ended = false;
  try {
    while (!ended) {
      try {
        for await (const response of client.GenerateStream({ ...request, resumeAfterSequence: last })) {
          last = response.sequence;
          tries = 0;
          yield response;
        }
        ended = true;
      } catch (error) {
        // What the server itself has answered has a request id: then it was no connection that broke.
        const broken = error.code === grpc.status.UNAVAILABLE && !error.metadata.get("x-request-id").length;
        if (!broken || !last || tries++ === maxResumptions) {
          ended = true;
          throw error;
        }
      }
    }
  } finally {
    // Whoever stops reading says so: the server would wait for a while.
    if (!ended) client.CancelStream({ requestId: request.spec.requestId }, () => {});
  }
}

const [prompt = "Count from 1 to 20.", address] = process.argv.slice(2);
const client = connect(address);
try {
  for await (const { event, delta } of resumable(client, ask(prompt, { stopping: { maxNewTokens: 256 } }))) {
    if (event === "delta") process.stdout.write(delta.text);
  }
  console.log();
} catch (error) {
  console.error(`${grpc.status[error.code]}: ${error.details}`);
  process.exitCode = 1;
} finally {
  client.close();
}
