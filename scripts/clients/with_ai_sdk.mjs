// Draws and edits with the AI SDK: `SERVER=http://127.0.0.1:8000 KEY=… node with_ai_sdk.mjs` in a folder where
// `npm install ai @ai-sdk/openai @ai-sdk/openai-compatible` was run.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateImage } from "ai";
import { ClientReport, cancels, check, hole, key, prompt, refused, server } from "./cells.mjs";

const version = (name) => JSON.parse(readFileSync(createRequire(import.meta.url).resolve(`${name}/package.json`))).version;
const maxRetries = 0;
const size = "256x256";
// The README's address: URLs in responses must have it too.
const local = server.replace("127.0.0.1", "localhost");

async function everyColumn(name, modelOf) {
  const report = new ClientReport(`${name} ${version(name)} with ai ${version("ai")}`);
  report.notApplicable("list", "progress");
  await report.cell("connect", () => generateImage({ model: modelOf("sdxl"), prompt, size, maxRetries }));
  let picture;
  for (const id of ["sdxl", "flux", "dall-e-3", "gpt-image-1", "gpt-image-2"])
    await report.cell("draw", async () => {
      const { image, warnings } = await generateImage({ model: modelOf(id), prompt, size, maxRetries });
      check(image.mediaType === "image/png", `${id} answers a PNG`);
      picture = image.uint8Array;
    });
  await report.cell("draw", async () => {
    const { images } = await generateImage({ model: modelOf("gpt-image-1"), prompt, size, n: 5, seed: 7, maxRetries });
    check(images.length === 5, "five images in one call");
  });
  for (const id of ["sdxl", "dall-e-2", "gpt-image-1", "gpt-image-2"])
    await report.cell("edit", async () => {
      const edit = { text: "a yellow circle", images: [picture] };
      const { image } = await generateImage({ model: modelOf(id), prompt: edit, maxRetries });
      check(image.mediaType === "image/png", `${id} edits a PNG`);
    });
  await report.cell("edit", async () => {
    const edit = { text: "a yellow circle", images: [picture, picture], mask: Buffer.from(hole, "base64") };
    await generateImage({ model: modelOf("sdxl"), prompt: edit, maxRetries });
  });
  await report.cell("cancel", () =>
    cancels((abortSignal) => generateImage({ model: modelOf("sdxl"), prompt, size: "1024x1024", n: 4, abortSignal, maxRetries,
      providerOptions: { [name.endsWith("openai") ? "openai" : "server"]: { num_inference_steps: 100 } } })),
  );
  await report.cell("errors", () =>
    refused(() => generateImage({ model: modelOf("sdxl"), prompt, size: "9x9", maxRetries }), (error) =>
      APICallError.isInstance(error) && error.statusCode === 400 && error.message.includes("size") ? "" : `${error.statusCode} ${error.message}`,
    ),
  );
  await report.cell("errors", () =>
    refused(() => generateImage({ model: modelOf("nonesuch"), prompt, size, maxRetries }), (error) =>
      /nonesuch/.test(error.message) ? "" : error.message,
    ),
  );
}

const openai = createOpenAI({ baseURL: `${local}/v1`, apiKey: key });
await everyColumn("@ai-sdk/openai", (id) => openai.image(id));
const compatible = createOpenAICompatible({ name: "server", baseURL: `${local}/v1`, apiKey: key });
await everyColumn("@ai-sdk/openai-compatible", (id) => compatible.imageModel(id));
