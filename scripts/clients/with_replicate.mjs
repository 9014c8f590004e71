// Draws and edits with Replicate's client: `SERVER=http://127.0.0.1:8000 KEY=… node with_replicate.mjs` in a folder
// where `npm install replicate` was run.
import { createHmac } from "node:crypto";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import Replicate, { validateWebhook } from "replicate";
import { ClientReport, cancels, check, hole, key, prompt, refused, server } from "./cells.mjs";

const version = JSON.parse(readFileSync(createRequire(import.meta.url).resolve("replicate/package.json"))).version;
const client = new Replicate({ auth: key, baseUrl: `${server}/v1` });
const report = new ClientReport(`replicate (Node) ${version}`);
const small = { prompt, width: 256, height: 256 };

await report.cell("connect", () => client.run("local/sdxl", { input: small }));
await report.cell("list", async () => {
  const { results } = await client.predictions.list();
  check(results[0].status === "succeeded", "predictions are listed");
});
for (const name of ["local/sdxl", "local/flux", "stability-ai/sdxl", "local/sdxl:sdxl"])
  await report.cell("draw", async () => {
    const [url] = await client.run(name, { input: { ...small, seed: 7, output_format: "png" } });
    check((await fetch(url)).headers.get("content-type") === "image/png", `${name} answers the URL of a PNG`);
  });
await report.cell("draw", async () => {
  const [url] = await client.run("local/sdxl", { input: { ...small, seed: 9 }, wait: { mode: "poll", interval: 50 } });
  check((await fetch(url)).ok, "polling ends with the URL of an image");
});
const image = `data:image/png;base64,${hole}`;
for (const more of [{}, { prompt_strength: 0.4 }, { mask: image }])
  await report.cell("edit", () => client.run("local/sdxl", { input: { prompt, image, ...more } }));
await report.cell("edit", () => client.run("local/sdxl", { input: { prompt, image: new Blob([Buffer.from(hole, "base64")], { type: "image/png" }) } }));

const long = { prompt, width: 1024, height: 1024, num_inference_steps: 100 };
await report.cell("progress", async () => {
  let seen = 0;
  const input = { ...long, num_inference_steps: 12 };
  await client.run("local/sdxl", { input, wait: { mode: "poll", interval: 20 } }, (made) => {
    seen += / [1-9]\d*\/12$/.test(made.logs ?? "") ? 1 : 0;
  });
  check(seen > 1, "the logs have the steps");
});
await report.cell("cancel", () =>
  cancels(async (signal) => {
    await client.run("local/sdxl", { input: long, wait: { mode: "poll", interval: 50 }, signal });
    throw new Error("cancelled");
  }),
);
await report.cell("errors", () =>
  refused(() => client.run("local/sdxl", { input: { ...small, width: 9 } }), (error) => (/width/.test(error.message) ? "" : error.message)),
);
await report.cell("errors", () =>
  refused(() => client.run("local/nonesuch", { input: small }), (error) => (/nonesuch/.test(error.message) ? "" : error.message)),
);
// As the server signs (docs/jobs.md), by the client's own check.
await report.cell("errors", async () => {
  const [id, timestamp, body, secret] = ["a.start", "1795999855", '{"id":"a"}', Buffer.from("secret").toString("base64")];
  const signature = `v1,${createHmac("sha256", "secret").update(`${id}.${timestamp}.${body}`).digest("base64")}`;
  check(await validateWebhook({ id, timestamp, body, signature, secret: `whsec_${secret}` }), "a webhook is genuine");
  check(!(await validateWebhook({ id, timestamp, body: "{}", signature, secret: `whsec_${secret}` })), "another is not");
});
