// Streams an answer:  node stream.mjs "Why is the sky blue?" [address]
import grpc from "@grpc/grpc-js";
import { ask, connect } from "./client.mjs";

const [prompt = "In one sentence: what is a headrace?", address] = process.argv.slice(2);
const client = connect(address);
const stream = client.GenerateStream(ask(prompt, { stopping: { maxNewTokens: 256 } }));

try {
  for await (const response of stream) {
    switch (response.event) {
      case "delta":
        process.stdout.write(response.delta.text);
        break;
      case "finish":
        process.stdout.write(`\n\n${response.finish.reason}`);
        break;
      case "end": {
        const { usage, model, cacheStatus } = response.end;
        const used =
          cacheStatus === "CACHE_STATUS_HIT" ? "a stored answer" : `${usage.inputTokens} + ${usage.outputTokens} tokens`;
        process.stdout.write(` · ${used} · ${model}\n`);
        break;
      }
    }
  }
} catch (error) {
  console.error(`${grpc.status[error.code]}: ${error.details}`);
  process.exitCode = 1;
} finally {
  client.close();
}
