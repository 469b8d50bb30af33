// A client of headrace's GenerationService, made from the protos as they are.
import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";

const protos = fileURLToPath(new URL("../../proto", import.meta.url));
const definition = loadSync("headrace/v1/generation.proto", {
  includeDirs: [protos],
  longs: Number, // counts of tokens fit; seeds of 64 bits would need String
  enums: String,
  oneofs: true, // `response.event` names the one that is set
  defaults: true,
});
const { headrace } = grpc.loadPackageDefinition(definition);

// Nothing is sent before the first event, so a full or restarting server is tried again without anyone noticing.
const serviceConfig = {
  methodConfig: [
    {
      name: [{ service: "headrace.v1.GenerationService" }],
      retryPolicy: {
        maxAttempts: 4,
        initialBackoff: "0.2s",
        maxBackoff: "5s",
        backoffMultiplier: 2,
        retryableStatusCodes: ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
      },
    },
  ],
};

export const DEFAULT_ADDRESS = process.env.HEADRACE_ADDRESS ?? "127.0.0.1:50051";

// The key of a server that asks for one, with each call.
function authorize(options, nextCall) {
  return new grpc.InterceptingCall(nextCall(options), {
    start(metadata, listener, next) {
      const key = process.env.HEADRACE_API_KEY;
      if (key) metadata.set("authorization", `Bearer ${key}`);
      next(metadata, listener);
    },
  });
}

export function connect(address = DEFAULT_ADDRESS) {
  return new headrace.v1.GenerationService(address, grpc.credentials.createInsecure(), {
    "grpc.service_config": JSON.stringify(serviceConfig),
    interceptors: [authorize],
  });
}

// A conversation of one turn; `options` are the other fields of GenerationSpec.
export function ask(text, options = {}) {
  const messages = [{ role: "ROLE_USER", content: [{ text }] }];
  return { spec: { chat: { messages }, ...options } };
}
