// A client of kvservice in Node, made from the protos alone: node client.mjs ADDRESS PROTOS [GOOGLE_PROTOS]
//
// ADDRESS is host:port; PROTOS holds kvservice/v1/*.proto; GOOGLE_PROTOS holds google/rpc/*.proto, for error details.
// With KVSERVICE_API_KEY set, calls carry it.
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const [address, ...protoFolders] = process.argv.slice(2);
const options = { keepCase: true, includeDirs: protoFolders, longs: Number, enums: String, oneofs: true, defaults: true };
const files = ["kvservice/v1/sessions.proto", "kvservice/v1/inference.proto"];
const { v1 } = grpc.loadPackageDefinition(await loader.load(files, options)).kvservice;
const details = await loader.load(["google/rpc/status.proto", "google/rpc/error_details.proto"], options);

const credentials = grpc.credentials.createInsecure();
const sessions = new v1.SessionService(address, credentials);
const inference = new v1.InferenceService(address, credentials);
const metadata = new grpc.Metadata();
if (process.env.KVSERVICE_API_KEY) metadata.set("authorization", `Bearer ${process.env.KVSERVICE_API_KEY}`);

function unary(client, name, request) {
  return new Promise((resolve, reject) => {
    client[name](request, metadata, (error, response) => (error ? reject(error) : resolve(response)));
  });
}

/** The messages that a service puts into the trailer `grpc-status-details-bin`. */
function errorDetails(error) {
  const [packed] = error.metadata.get("grpc-status-details-bin");
  if (!packed) return {};
  const status = details["google.rpc.Status"].deserialize(packed);
  return Object.fromEntries(status.details.map((each) => {
    const name = (each.type_url ?? each["@type"]).split("/").pop();
    return [name.replace("google.rpc.", ""), each.value ? details[name].deserialize(each.value) : each];
  }));
}

async function failure(call) {
  try {
    await call();
  } catch (error) {
    return error;
  }
  throw new Error("the call should have failed");
}

const say = (title, value) => console.log(`${title}: ${typeof value === "string" ? value : JSON.stringify(value)}`);

async function append(sessionId, document) {
  const call = sessions.Append(metadata);
  call.write({ start: { session_id: sessionId } });
  for (let at = 0; at < document.length; at += 500) call.write({ data: Buffer.from(document.slice(at, at + 500)) });
  call.end();
  let finished;
  for await (const message of call) finished = message.finished ?? finished;
  return finished;
}

/** Asks, and hands each event to `listen`; `listen` may cancel the call. */
async function generate(request, listen, deadlineMs) {
  const deadline = deadlineMs === undefined ? {} : { deadline: Date.now() + deadlineMs };
  const call = sessions.Generate(request, metadata, deadline);
  for await (const { event } of call) listen(event, call);
}

const document = "The pass key is 28478. ".repeat(40);

// Session and streaming
const { models } = await unary(inference, "ListModels", {});
say("models", models.map((model) => model.name));
const { session } = await unary(sessions, "Create", { recipe: "recall", ttl: { seconds: 600 } });
say("session", `recipe ${session.recipe}, ${session.num_tokens} tokens`);
const read = await append(session.session_id, document);
say("append", `${read.num_tokens} tokens`);
const kinds = [];
let tokens = 0;
let finished;
await generate(
  { session_id: session.session_id, prompt: "Question?", sampling: { max_new_tokens: 6, ignore_eos: true } },
  (event) => {
    if (kinds.at(-1) !== event.event) kinds.push(event.event);
    tokens += event.tokens?.token_ids.length ?? 0;
    finished = event.finished ?? finished;
  },
);
say("events", kinds);
say("answer", `${tokens} tokens, ${finished.finish_reason}, cached ${finished.usage.cached_tokens}`);
const held = (await unary(sessions, "Get", { session_id: session.session_id })).session.num_tokens;
say("held", held);

// Cancel
const long = { session_id: session.session_id, prompt: "Go on", sampling: { max_new_tokens: 600, ignore_eos: true } };
const cancelled = await failure(() => generate(long, (event, call) => event.tokens && call.cancel()));
say("cancel", grpc.status[cancelled.code]);

/** A session is free as soon as the gateway has noticed that a caller went away. */
async function idle() {
  for (;;) {
    const { session: now } = await unary(sessions, "Get", { session_id: session.session_id });
    if (now.state === "SESSION_STATE_IDLE") return now.num_tokens;
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}
say("held after the cancel", await idle());

// Deadline
const late = await failure(() => generate(long, () => {}, 300));
say("deadline", grpc.status[late.code]);
say("held after the deadline", await idle());

// Error details
const unknown = await failure(() => unary(sessions, "Get", { session_id: "0".repeat(32) }));
const { ErrorInfo: info } = errorDetails(unknown);
say("unknown session", `${grpc.status[unknown.code]}, ${info.domain}/${info.reason}, retryable ${info.metadata.retryable}`);
const wrong = await failure(() => generate({ ...long, sampling: { max_new_tokens: 0 } }, () => {}));
const { BadRequest: bad } = errorDetails(wrong);
say("wrong request", `${grpc.status[wrong.code]}, ${bad.field_violations[0].field}: ${bad.field_violations[0].description}`);

// And its end
await unary(sessions, "Close", { session_id: session.session_id, purge: true });
const closed = await failure(() => unary(sessions, "Get", { session_id: session.session_id }));
say("closed", grpc.status[closed.code]);
