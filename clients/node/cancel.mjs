// Cancels an answer after some deltas; the server stops generating at once:  node cancel.mjs [deltas] [address]
import grpc from "@grpc/grpc-js";
import { ask, connect } from "./client.mjs";

const [limit = "10", address] = process.argv.slice(2);
const client = connect(address);
const stream = client.GenerateStream(ask("Count from 1 to 1000.", { stopping: { maxNewTokens: 1000 } }));

let deltas = 0;
try {
  for await (const { event, delta } of stream) {
    if (event !== "delta" || deltas === Number(limit)) continue;
    process.stdout.write(delta.text);
    if (++deltas === Number(limit)) stream.cancel();
  }
  console.log("\nThe answer ended before it was cancelled.");
} catch (error) {
  console.log(`\n${grpc.status[error.code]} after ${deltas} deltas`);
  if (error.code !== grpc.status.CANCELLED) {
    console.error(error.details);
    process.exitCode = 1;
  }
} finally {
  client.close();
}
